"""Music separation: metrics at their extremes, layouts, excerpts, generated music, the recipe of Demucs v2."""

from __future__ import annotations

import importlib.util
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import cli
from torch import Tensor, nn

from bitfront.cells import compose
from bitfront.cells.flow import build_method, build_task
from bitfront.cells.record import read_all
from bitfront.data import music
from bitfront.data.audio import Excerpts, Song, level, songs
from bitfront.data.generated import checksums
from bitfront.data.repitch import repitch
from bitfront.errors import BitfrontError
from bitfront.quant.model import QuantizedModel
from bitfront.tasks.sdr import FramewiseSDR, GlobalSDR, framewise_sdr, global_sdr
from bitfront.tasks.separation import Separation, separate

STEMS = ["drums", "bass", "other", "vocals"]
NAMES = ["separation", "separation_mir1k", "separation_musdb"]


def task(name: str, *words: str) -> Separation:
    built = build_task(compose.load([f"task={name}", *words]))
    assert isinstance(built, Separation)
    return built


class Oracle(nn.Module):
    """Knows the sources of the songs that it is asked to separate, one after the other, and gives a share of them."""

    def __init__(self, separation: Separation, split: str, share: float) -> None:
        super().__init__()
        self.whole, self.share, self.at = separation.dataset(split), share, 0

    def forward(self, x: Tensor) -> Tensor:
        song = self.whole[[self.at]]
        mean, std = level(song[0])
        self.at += 1
        return self.share * ((song[1:] - mean) / std)[None]


class Copies(nn.Module):
    """Gives the mixture as every source, times a factor."""

    def __init__(self, sources: int, factor: float) -> None:
        super().__init__()
        self.sources, self.factor = sources, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x[:, None].expand(-1, self.sources, -1, -1)


@pytest.mark.parametrize("name", NAMES)
def test_perfect_silent_and_idle_predictors(name: str) -> None:
    separation = task(name, "smoke=true")
    separation.shifts, separation.window = 1, 1e3
    perfect = separation.evaluate(Oracle(separation, "test", 1.0), "test")
    assert perfect.pop("loss") == pytest.approx(0, abs=1e-5)
    assert all(value > 80 for value in perfect.values())
    half = separation.evaluate(Oracle(separation, "test", 0.5), "test")  # 10 log10(1 / 0.5²)
    assert half["nsdr"] == pytest.approx(6.0206, abs=1e-2)
    assert all(half[f"nsdr_{source}"] == pytest.approx(6.0206, abs=1e-2) for source in separation.sources)
    sources = len(separation.sources)
    silent = separation.evaluate(Copies(sources, 0.0), "test")
    assert silent["nsdr"] == pytest.approx(0, abs=1e-2)
    assert half["loss"] == pytest.approx(silent["loss"] / 2, rel=1e-3)
    idle = separation.evaluate(Copies(sources, 1.0), "test")
    assert idle["nsdri"] == pytest.approx(0, abs=1e-4)
    assert silent["nsdri"] == pytest.approx(silent["nsdr"] - idle["nsdr"], abs=1e-4)


def test_the_metrics_do_not_depend_on_batches_windows_or_processes() -> None:
    whole = task("separation", "smoke=true", "task.window=1e3")
    net = Copies(4, 0.3)
    reference = whole.evaluate(net, "test")
    for words in (["train.batch_size=1"], ["train.batch_size=4", "task.overlap=0"], ["task.overlap=0.7"]):
        assert task("separation", "smoke=true", *words).evaluate(net, "test") == pytest.approx(reference, abs=1e-3)
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(2, 3, 1, 8000, generator=generator) for _ in range(5)]  # references and estimates of songs
    for kind in (GlobalSDR(["a", "b", "c"]), FramewiseSDR(["a", "b", "c"], 2000)):
        parts = [kind.clone() for _ in range(3)]
        for n, (truth, estimate) in enumerate(found):
            extra = [truth.sum(0)] if isinstance(kind, GlobalSDR) else []
            for metric in (parts[0], parts[1 + n % 2]):
                metric.update(truth, estimate, *extra)
        parts[1].merge_state(parts[2])
        assert {k: v.item() for k, v in parts[1].compute().items()} == pytest.approx(
            {k: v.item() for k, v in parts[0].compute().items()}, abs=1e-5
        )


def test_sdr_of_white_noise_and_of_silence() -> None:
    torch.manual_seed(0)
    truth = torch.randn(2, 2, 16000)
    noisy = truth + torch.tensor([0.1, 1.0])[:, None, None] * torch.randn(2, 2, 16000)
    assert global_sdr(truth, noisy).tolist() == pytest.approx([20, 0], abs=0.2)
    assert framewise_sdr(truth, noisy, 4000).tolist() == pytest.approx([20, 0], abs=2)  # 512 taps fit some of the noise
    silent = torch.cat([truth[:, :, :8000], torch.zeros(2, 2, 8000)], 2)
    frames = framewise_sdr(silent, silent + noisy - truth, 4000)
    assert torch.isfinite(frames).all()  # from the seconds that are not silent
    assert global_sdr(torch.zeros(1, 1, 9), torch.zeros(1, 1, 9)).item() == 0
    metric = FramewiseSDR(["a", "b"], 4000)
    for silence in (1.0, 0.0, 1.0):  # a song of silence does not count
        metric.update(silence * truth, silence * noisy)
    assert metric.compute()["sdr_a"].item() == pytest.approx(framewise_sdr(truth, noisy, 4000)[0].item(), abs=1e-4)


@pytest.mark.parametrize(("length", "window"), [(5, 8), (8, 8), (9, 8), (100, 8), (101, 7)])
def test_windows_fade_into_each_other(length: int, window: int) -> None:
    mixture = torch.randn(2, length)
    for overlap in (0, 0.25, 0.5, 0.9):
        for estimate in separate(Copies(3, 1.0), mixture, window, overlap, [0, 3]):
            torch.testing.assert_close(estimate, mixture)


def test_shifts_average_over_starts() -> None:
    class Position(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(float(x.shape[-1])).expand(1, 1, 1, -1)

    mixture = torch.randn(1, 6)
    mean, std = level(mixture)
    found = (separate(Position(), mixture, 100, 0, [0, 2, 4]) - mean) / std
    torch.testing.assert_close(found, torch.arange(6.0)[None, None] + 2)


def tree(root: Path, folders: dict[str, list[str]], sources: list[str], samplerate: int, channels: int, n: int) -> Path:
    """Songs of noise in the layout of MUSDB18-HQ, whose mixture is the sum."""
    rng = np.random.default_rng(0)
    for split, names in folders.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            stems = {source: rng.uniform(-0.2, 0.2, (n, channels)) for source in sources}
            for stem, wav in {**stems, "mixture": sum(stems.values())}.items():
                soundfile.write(root / split / name / f"{stem}.wav", wav, samplerate, subtype="PCM_16")
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Eight songs of two sources at 100 Hz; the validation song is one of the training folder."""
    return tree(tmp_path / "small", {"train": list("abcdef"), "test": ["g", "h"]}, ["x", "y"], 100, 1, 1050)


def test_official_layouts_are_read(small: Path) -> None:
    found = songs(small, ["x", "y"], ["c"], 100, 1)
    assert {k: [s.folder.name for s in v] for k, v in found.items()} == {
        "train": list("abdef"),
        "valid": ["c"],
        "test": ["g", "h"],
    }
    song = found["test"][0]
    mixture, x, y = song.read(["mixture", "x", "y"])
    assert mixture.shape == (1, 1050)
    torch.testing.assert_close(mixture, x + y, atol=1e-4, rtol=0)
    assert torch.equal(song.read(["y"], 30, 20)[0], y[:, 30:50])
    shutil.copytree(small / "train" / "a", small / "valid" / "v")
    assert [s.folder.name for s in songs(small, ["x", "y"], [], 100, 1)["valid"]] == ["v"]


def test_a_damaged_data_set_says_what_is_wrong(small: Path, tmp_path: Path) -> None:
    def refused(message: str, valid: str = "c", samplerate: int = 100) -> None:
        with pytest.raises(BitfrontError, match=message):
            songs(small, ["x", "y"], [valid] if valid else [], samplerate, 1)

    with pytest.raises(BitfrontError, match=r"zenodo.org/records/3338373.*data_root=<folder>"):
        task("separation_musdb", f"data_root={tmp_path}").loader("train")
    refused("no songs in .*valid", valid="")
    refused("lacks 1 of the 1 songs .*'nobody'", valid="nobody")
    refused("100 Hz and 1 channels, expected 44100", samplerate=44100)
    path = small / "test" / "h" / "y.wav"  # the test split is checked before the training
    whole = path.read_bytes()
    path.write_bytes(whole[:-400])
    refused("differ in length")
    path.write_bytes(b"no audio")
    refused("could not read .*y.wav")
    path.unlink()
    refused("y.wav' is missing")
    shutil.rmtree(small / "test")
    refused("no songs in .*test")
    with pytest.raises(BitfrontError, match="shorter than an excerpt"):
        Excerpts([Song(small / "train" / "a", 1050)], ["x"], 100, 2000, 10, 0.0, 1)
    with pytest.raises(BitfrontError, match="ends early"):
        Song(small / "train" / "a", 1060).read(["x"], 1040, 20)


def test_excerpts_are_cut_normalized_and_augmented(small: Path) -> None:
    found = songs(small, ["x", "y"], ["c"], 100, 1)["train"]
    plain = Excerpts(found, ["x", "y"], 100, 200, 60, 0.0, 2, disturbed=False)
    per_song = math.ceil((1050 - 200) / 60) + 1
    assert len(plain) == 2 * 5 * per_song and plain[[0, 1]].shape == (2, 2, 1, 140)
    mean, std = level(found[1].read(["mixture"])[0])
    x = (found[1].read(["x"], 120, 140)[0] - mean) / std
    torch.testing.assert_close(plain[[per_song + 2]][0, 0], x)
    assert torch.equal(plain[[3]], plain[[3 + 5 * per_song]])
    last = plain[[per_song - 1]][0, 0] * plain.levels[0][1] + plain.levels[0][0]
    torch.testing.assert_close(last, found[0].read(["x"], 850, 140)[0])
    disturbed = Excerpts(found, ["x", "y"], 100, 200, 60, 0.0, 1)

    def drawn(seed: int) -> Tensor:
        random.seed(seed)
        torch.manual_seed(seed)
        return disturbed[list(range(0, 50, 7))[:6]]

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert drawn(0).shape == (6, 2, 1, 140)
    # Each is a piece of its source in some song of its group, times a scale and a sign.
    pieces = torch.cat([song.read(["x", "y"]) for song in found], 1).unfold(2, 140, 1)  # [source, song, start, 140]
    for sources in drawn(2):
        for k, excerpt in enumerate(sources):
            a, b = excerpt[0], pieces[k]
            correlation = (b @ a) / (b.norm(dim=-1) * a.norm())
            assert correlation.abs().max() > 0.99


def test_repitch_changes_pitch_and_tempo(small: Path) -> None:
    t = torch.arange(88200) / 44100
    wav = torch.stack([torch.sin(2 * torch.pi * f * t) for f in (220.0, 1000.0)])[:, None].expand(-1, 2, -1)
    for semitones, tempo in ((0, 0.0), (2, 10.0), (-1, -12.0), (-2, 5.0)):
        found = repitch(wav, semitones, tempo, 44100)
        assert found.shape[:2] == (2, 2) and found.shape[2] == pytest.approx(88200 / (1 + tempo / 100), abs=3)
        middle = found[:, 0, 10000:60000]
        frequencies = torch.fft.rfft(middle * torch.hann_window(50000)).abs().argmax(1) * 44100 / 50000
        expected = [f * 2 ** (semitones / 12) for f in (220.0, 1000.0)]
        assert frequencies.tolist() == pytest.approx(expected, rel=5e-3)
        assert middle.square().mean().item() == pytest.approx(0.5, abs=0.02)
    excerpts = Excerpts(songs(small, ["x"], ["c"], 100, 1)["train"], ["x"], 100, 200, 60, 1.0, 1)
    assert excerpts[[0]].shape[-1] == int(0.88 * 200) - 60


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(music, "SONGS", {"train": 2, "test": 1})
    monkeypatch.setattr(music, "SECONDS", 3)


def test_generated_music_is_the_same_everywhere(brief: None, tmp_path: Path) -> None:
    first, second = music.music(tmp_path / "a"), music.music(tmp_path / "b")
    assert checksums(first) == checksums(second) and len(set(checksums(first).values())) == 15
    assert [p.name for p in first.parent.iterdir()] == ["music-1"]
    found = songs(first, STEMS, ["song-01"], music.SAMPLERATE, 1)
    mixture, *stems = found["test"][0].read(["mixture", *STEMS])
    assert torch.equal(mixture, torch.stack(stems).sum(0)) and 0.85 < mixture.abs().max() < 1
    loudness = torch.stack([s.square().mean() for s in stems])
    assert loudness.max() / loudness.min() < 4.1  # 6 dB
    assert [round(float(s.abs().mean()), 3) for s in stems] == [0.054, 0.045, 0.054, 0.04]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["task.segment=1"], "no longer than"),
        (["task.stride=0"], "positive"),
        (["task.overlap=1"], r"in \[0, 1\)"),
        (["task.window=0"], "positive"),
        (["task.shifts=0", "task=separation_musdb"], "positive"),
        (["task.repitch=2", "task=separation_musdb"], r"in \[0, 1\]"),
        (["train.schedule=step", "task=separation_musdb"], "out of range"),
        (["model=tasnet", "task=separation_musdb"], "there is no"),
    ],
)
def test_impossible_tasks_are_refused(words: list[str], answer: str) -> None:
    name = next((w.partition("=")[2] for w in words if w.startswith("task=")), "separation")
    with pytest.raises(BitfrontError, match=answer):
        task(name, *(w for w in words if not w.startswith("task=")))
    with pytest.raises(BitfrontError, match=r"task.window=10\.0"):
        task("separation_musdb", "model=htdemucs")


@pytest.mark.parametrize("network", ["demucs", "hdemucs", "htdemucs"])
def test_the_networks_of_demucs_train_and_separate(network: str) -> None:
    separation = task("separation_musdb", "smoke=true", f"model={network}", "train.batch_size=8")
    net = separation.model()
    batch = next(iter(separation.loader("train")))
    loss = separation.loss(net, batch)
    loss.backward()
    assert torch.isfinite(loss) and batch.shape[-1] == separation.length
    assert math.isfinite(separation.evaluate(net, "test")["nsdr"])


def v2() -> nn.Module:
    with torch.device("meta"):
        return task("separation_musdb").model()


def test_demucs_v2_has_the_published_size() -> None:
    net = v2()
    assert sum(p.numel() for p in net.parameters()) == 265_679_496
    assert sum(p.numel() for p in net.parameters()) * 4 / 2**20 == pytest.approx(1013.49, abs=5e-3)
    for bits, size in {3: 98.63, 4: 130.17, 5: 161.72, 8: 256.36}.items():
        method = build_method(compose.load(["quant=ste", f"bits={bits}", "quant.min_size=1"]))
        assert method.attach(net).megabytes().item() == pytest.approx(size, abs=5e-3)


def test_diffq_on_demucs_v2_starts_at_the_published_size() -> None:
    net = v2()
    quantizers = build_method(compose.load(["task=separation_musdb", "quant=diffq"])).quantizers(net)
    model = QuantizedModel(net, quantizers)
    widths = {"start": 8.0, "floor": 2.0}
    sizes = {}
    for name, width in widths.items():
        bits = 0.0
        for quantizer, w in zip(quantizers.values(), (net.get_parameter(n) for n in model.names), strict=True):
            groups = len(quantizer.logits)
            table = math.ceil(math.log2(1 + width - 2))
            bits += groups * quantizer.group_numel * width + 64 + 8 + groups * table
            assert groups * quantizer.group_numel == w.numel()
        small = sum(32 * p.numel() for n, p in net.named_parameters() if n not in quantizers)
        sizes[name] = (bits + small) / 2**23
    assert sizes == {"start": pytest.approx(268.192, abs=5e-4), "floor": pytest.approx(67.08, abs=5e-3)}


@pytest.mark.slow
def test_diffq_on_demucs_v2_measures_the_published_sizes() -> None:
    net = task("separation_musdb").model()
    model = build_method(compose.load(["task=separation_musdb", "quant=diffq"])).attach(net)
    assert model.eval().megabytes().item() == pytest.approx(268.192, abs=5e-4)
    for quantizer in model.quantizers:
        nn.init.constant_(quantizer.logits, -50)
    assert model.megabytes().item() == pytest.approx(67.08, abs=5e-3)


def test_the_recipe_of_demucs_v2() -> None:
    config = compose.load(["task=separation_musdb", "quant=diffq"])
    separation, method = task("separation_musdb", "quant=diffq"), build_method(config)
    recipe = separation.recipe
    assert (method.penalty, method.group_size, method.min_size, method.lr) == (3e-4, 8, 1.0, 1e-3)
    assert (recipe.epochs, recipe.batch_size, separation.repeat) == (180, 64, 2)
    assert (separation.segment, separation.stride, separation.repitch, separation.shifts) == (12.5, 1, 0.2, 10)
    assert (recipe.keep, recipe.max_size, recipe.ema, recipe.clip) == ("loss", 162, 0, 0)
    assert compose.load(["task=separation_musdb"]).values["train"]["max_size"] == 0
    assert separation.length == 10 * 44100
    assert {recipe.lr_factor(step, 100) for step in range(101)} == {1.0}
    weights = [nn.Parameter(torch.tensor([[0.5, -2.0]])), nn.Parameter(torch.tensor([1.0]))]
    optimizer = recipe.optimizer(weights, separation.decays)
    for p in weights:
        p.grad = torch.full_like(p, 3.0)
    before = [p.detach().clone() for p in weights]
    optimizer.step()
    for p, start in zip(weights, before, strict=True):  # Adam's first step: the learning rate, and no decay
        torch.testing.assert_close(start - p.detach(), torch.full_like(p, 3e-4), atol=1e-8, rtol=1e-3)


SMALL = ["task.demucs.channels=8", "task.demucs.depth=3", "quant.min_size=0.01"]


@pytest.mark.parametrize(
    "size",
    [SMALL, pytest.param([], marks=pytest.mark.slow)],
    ids=["small", "full"],
)
def test_the_paper_s_configuration_trains_and_evaluates_from_the_official_layout(
    tmp_path: Path, size: list[str]
) -> None:
    validation = compose.load(["task=separation_musdb"]).values["task"]["valid_songs"]
    package = importlib.util.find_spec("musdb")  # which cannot be imported without ffmpeg
    assert package is not None and package.origin is not None
    official = yaml.safe_load((Path(package.origin).parent / "configs" / "mus.yaml").read_text())["validation_tracks"]
    assert len(validation) == 14 and set(validation) == set(official)
    folders = {"train": ["A - B", "C - D", *validation], "test": ["E - F"]}
    tree(tmp_path / "musdb18hq", folders, STEMS, 44100, 2, 66150)
    words = ["task=separation_musdb", "quant=diffq", f"data_root={tmp_path}", f"root={tmp_path / 'runs'}", *size]
    words += ["task.segment=0.5", "task.stride=0.05", "task.shifts=2"]
    words += ["train.epochs=1", "train.batch_size=4", "train.workers=2"]
    result = cli("run", *words, "trainer.accelerator=cpu", "wandb=disabled")
    assert result.returncode == 0, result.stderr
    (record,) = read_all(tmp_path / "runs")
    assert math.isfinite(record.history[0]["train/loss"])
    same = [word for word in words if word.startswith(("task.", "train.", "data_root="))]
    assert len(task("separation_musdb", *same).loader("train")) >= 20  # steps
    assert set(record.metrics["valid"]) < set(record.metrics["test"])
    assert {"sdr", "nsdr", "sdr_vocals", "nsdr_vocals", "nsdri"} <= set(record.metrics["test"])
