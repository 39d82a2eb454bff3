"""Speech: metrics at their extremes, independence of padding, the readers and what they refuse, synthesis, recipes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import REPOSITORY, command
from torch import Tensor, nn

from bitfront.cells import compose
from bitfront.cells.flow import build_task
from bitfront.cells.record import read_all
from bitfront.data import espeak, recordings
from bitfront.data.speech import LABELS, InMemory, LogMel, SpecAugment, decode, encode
from bitfront.errors import BitfrontError
from bitfront.models.conformer_ctc import ConformerCTC, behind
from bitfront.models.wav2vec2 import BASE, TINY, Wav2Vec2CTC, plain, published
from bitfront.quant.engine.blockwise import Captured, Tuning
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.engine.plan import Calibration, plan
from bitfront.quant.layers.inputs import Accumulator, Moments, Watch
from bitfront.quant.methods.gptq import GPTQ
from bitfront.quant.model import eligible
from bitfront.tasks.speech import Speech, greedy


def speech(name: str = "asr", *words: str) -> Speech:
    task = build_task(compose.load([f"task={name}", *words]))
    assert isinstance(task, Speech)
    return task


def spelled(text: str) -> list[int]:
    """Frames that spell a text: each label, then a blank."""
    return [label for letter in encode(text).tolist() for label in (letter, 0)]


class Told(nn.Module):
    """Spells what it was told, utterance after utterance."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.frames, self.at = [torch.tensor(spelled(text) if text else [0] * 60) for text in texts], 0

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        told = self.frames[self.at : self.at + len(x)]
        self.at += len(x)
        rows = [50.0 * nn.functional.one_hot(row, len(LABELS)) for row in told]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in told])


def texts_of(task: Speech, split: str = "test") -> list[str]:
    return [decode(y[:n].tolist()) for *_, ys, ns in task.loader(split) for y, n in zip(ys, ns, strict=True)]


def tiny() -> ConformerCTC:
    """With norms that are not the identity."""
    net = ConformerCTC(8, len(LABELS), 4, 16, 2, 2, 5, 0.0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.uniform_(-1, 1), module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.bias)
    return net


def padded(time: int = 24, garbage: float = 0.0) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([24, 13, 5, 20])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 24, 8, generator=generator)
    x = nn.functional.pad(x, (0, 0, 0, time - 24))
    return x.masked_fill(behind(lengths, time)[..., None], garbage), lengths


def test_perfect_silent_and_chance_predictors() -> None:
    task = speech("asr", "smoke=true", "task.beam=5")
    texts = texts_of(task)
    perfect = task.evaluate(Told(texts), "test")
    assert perfect == pytest.approx(dict.fromkeys(perfect, 0.0), abs=1e-4)
    assert set(perfect) == {"wer", "cer", "wer_beam", "cer_beam", "loss"}
    silent = task.evaluate(Told([""] * len(texts)), "test")
    assert {k: v for k, v in silent.items() if k != "loss"} == dict.fromkeys(
        ("wer", "cer", "wer_beam", "cer_beam"), 100
    )
    wrong = task.evaluate(Told([" ".join("z" for _ in text.split()) for text in texts]), "test")
    assert wrong["wer"] == 100  # as many words, none right
    torch.manual_seed(0)
    assert task.evaluate(task.model(), "test")["wer"] > 90


def test_error_rates_count_words_over_all_utterances() -> None:
    task = speech("asr", "smoke=true")
    texts = texts_of(task)
    half = [text.split()[0] for text in texts]  # the second word of some is left out
    missing, words = sum(len(t.split()) - 1 for t in texts), sum(len(t.split()) for t in texts)
    assert task.evaluate(Told(half), "test")["wer"] == pytest.approx(100 * missing / words, abs=1e-3)
    parts = [task.metrics(sync_on_compute=False) for _ in range(2)]  # as two processes
    told = Told(half)
    for n, batch in enumerate(task.loader("test")):
        task.update(parts[n % 2], told, batch)
    for name, metric in parts[0].items(keep_base=True):
        metric.merge_state(parts[1][name])
    assert parts[0].compute()["wer"].item() == pytest.approx(missing / words, abs=1e-6)


def test_the_blank_begins_as_likely_as_all_others_together() -> None:
    net = tiny()
    with torch.no_grad():
        net.head.weight.zero_()  # what is heard has no say
        logits, _ = net.eval()(torch.randn(2, 40, 8), torch.tensor([40, 24]))
    assert logits.softmax(-1)[..., 0].sub(0.5).abs().max() < 1e-6


def test_metrics_do_not_depend_on_the_batches() -> None:
    torch.manual_seed(0)
    net = speech("asr", "smoke=true").model()
    one, many = (speech("asr", "smoke=true", f"train.batch_size={n}").evaluate(net, "test") for n in (1, 32))
    assert one == pytest.approx(many, rel=1e-5)


def test_greedy_decoding_merges_repetitions_and_drops_blanks() -> None:
    frames = [LABELS.index(c) for c in "||hh-e-l-lll--o||||-tt-o|"]
    scores = nn.functional.one_hot(torch.tensor([frames, frames]), len(LABELS)).float()
    assert greedy(scores, torch.tensor([25, 15])) == ["hello to", "hello"]
    assert encode("IT'S").tolist() == [LABELS.index(c) for c in "it's"]
    for text in ("", "3 birds", "naïve"):
        with pytest.raises(BitfrontError, match="is empty or has other characters"):
            encode(text)


def test_a_beam_search_uses_lexicon_and_language_model(tmp_path: Path) -> None:
    (tmp_path / "lexicon").write_text("cat\tc a t |\nbat\tb a t |\n")
    task = speech("asr", "smoke=true", "task.beam=20", f"task.lexicon={tmp_path / 'lexicon'}")
    scores = torch.full((1, 8, len(LABELS)), -20.0)
    for frame, (best, other) in enumerate(zip("c-a-r-|-", "c-a-t-|-", strict=True)):
        scores[0, frame, LABELS.index(best)], scores[0, frame, LABELS.index(other)] = -0.1, -2.0
    assert greedy(scores, torch.tensor([8])) == ["car"]
    assert task._search(scores, torch.tensor([8])) == ["cat"]
    # two frames "a" or blank: the label that most paths spell wins over the single best path
    merged = torch.full((1, 2, len(LABELS)), -20.0)
    merged[0, :, 0], merged[0, :, LABELS.index("a")] = np.log(0.6), np.log(0.4)
    assert greedy(merged, torch.tensor([2])) == [""]
    assert speech("asr", "smoke=true", "task.beam=20")._search(merged, torch.tensor([2])) == ["a"]
    (tmp_path / "wrong").write_text("cat\tc ä t |\n")
    with pytest.raises(BitfrontError, match="do not fit"):
        speech("asr", "smoke=true", "task.beam=5", f"task.lexicon={tmp_path / 'wrong'}")
    for words in (["task.lexicon=/nowhere", "task.beam=5"], [f"task.lexicon={tmp_path / 'lexicon'}"]):
        with pytest.raises(BitfrontError, match=r"task\.lexicon is a file for the beam search"):
            speech("asr", "smoke=true", *words)


def test_a_conformer_gives_the_same_alone_and_in_a_padded_batch() -> None:
    net = tiny().eval()
    x, lengths = padded()
    logits, frames = net(x, lengths)
    assert frames.tolist() == [6, 4, 2, 5] and logits.shape == (4, 6, len(LABELS))
    for row, n, found, m in zip(x, lengths, logits, frames, strict=True):
        alone, count = net(row[None, :n], n[None])
        assert count == m
        torch.testing.assert_close(alone[0], found[:m])
    for other in (padded(garbage=1e3), padded(40)):
        torch.testing.assert_close(net(*other)[0][:, :6][~behind(frames, 6)], logits[~behind(frames, 6)])


def test_padding_stays_out_of_batch_norm_and_gradients() -> None:
    """In float64: single values of gradients that are sums of large ones differ by rounding in float32."""
    nets, (x, lengths) = [tiny().double().train()], padded()
    nets += [ConformerCTC(8, len(LABELS), 4, 16, 2, 2, 5, 0.0).double().train()]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, features in zip(nets, (x, padded(40, garbage=1e3)[0]), strict=True):
        logits, frames = net(features.double(), lengths)
        logits[~behind(frames, logits.shape[1])].square().sum().backward()
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_without_padding_it_is_the_conformer_of_torchaudio() -> None:
    ours = tiny().eval().layers[0]
    theirs = torchaudio.models.Conformer(16, 2, 64, 1, 5).eval().conformer_layers[0]
    names = {
        "ffn1": "ffn1.sequential",
        "ffn2": "ffn2.sequential",
        "attention_norm": "self_attn_layer_norm",
        "attention": "self_attn",
        "norm": "final_layer_norm",
        "convolution.norm": "conv_module.layer_norm",
        "convolution.expand": "conv_module.sequential.0",
        "convolution.depthwise": "conv_module.sequential.2",
        "convolution.batch_norm": "conv_module.sequential.3",
        "convolution.project": "conv_module.sequential.5",
    }
    shapes = {name: t.shape for name, t in theirs.state_dict().items()}
    state = {}
    for name, t in ours.state_dict().items():
        prefix = max((p for p in names if name.startswith(f"{p}.")), key=len)
        new = names[prefix] + name.removeprefix(prefix)
        state[new] = t.reshape(shapes[new])
    theirs.load_state_dict(state)
    x, nothing = torch.randn(3, 9, 16), torch.zeros(3, 9, dtype=torch.bool)
    torch.testing.assert_close(ours(x, nothing), theirs(x.transpose(0, 1), nothing).transpose(0, 1))


def test_calibration_sees_no_padding() -> None:
    net, (x, lengths) = tiny().eval(), padded(garbage=1e3)
    for name, weight in net.named_parameters():
        if weight.dim() > 1:
            together, alone = (Accumulator(name, torch.device("cpu")) for _ in range(2))
            together.valid = lengths.double() / x.shape[1]
            with torch.no_grad():
                with Watch({name: weight}, together.add):
                    net(x, lengths)
                with Watch({name: weight}, alone.add):
                    for row, n in zip(x, lengths, strict=True):
                        net(row[None, :n], n[None])
            assert together.moments().count == alone.moments().count, name
            torch.testing.assert_close(together.moments().H, alone.moments().H, rtol=1e-5, atol=1e-5)


def test_the_block_loss_of_a_layer_sees_no_padding() -> None:
    layer, x = tiny().eval().layers[0], torch.randn(4, 6, 16)
    lengths = torch.tensor([6, 4, 2, 5])
    padding, weight = behind(lengths, 6), layer.ffn2[4].weight
    packed, _ = GPTQ(bits=4).solve(weight.detach(), Moments(torch.eye(64).double()[None], 10))
    tuning = Tuning(layer, {"ffn2.4.weight": Frozen(packed, True)}, False)
    losses = []
    for garbage in (0.0, 1e3):
        spoiled = x.masked_fill(padding[..., None], garbage)
        with torch.no_grad():
            target = layer(x, padding).masked_fill(padding[..., None], -garbage)
            captured = Captured((spoiled, padding), {}, lengths / 6)
            losses.append(tuning._error(captured, [target], [1.0], tuning._stored()))
    assert 0 < losses[0] < 1
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("name", ["asr", "asr_wav2vec2"])
def test_blocks_are_the_layers_and_none_is_blind(name: str) -> None:
    task = speech(name, "smoke=true")
    net = task.model().eval()
    data = Calibration(task.calibration(8, 4), task.loss, valid=task.valid)
    units = plan(net, eligible(net, min_size=0.001), data)
    assert [unit.blind for unit in units] == [[]] * len(units)
    layers = [f"layers.{n}" for n in range(2)]
    if name == "asr":
        assert [unit.block for unit in units] == ["subsampling", *layers, "head"]
        assert all(unit.calls == 1 and not unit.time_last for unit in units)
    else:
        blocks = [unit.block for unit in units]
        assert {f"wav2vec2.encoder.transformer.{layer}" for layer in layers} <= set(blocks)


def test_wav2vec2_has_plain_weights_and_does_not_depend_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = torchaudio.pipelines.WAV2VEC2_ASR_BASE_960H
    theirs = BASE | {"aux_num_out": len(LABELS), "encoder_layer_drop": 0.05}
    assert bundle._params == theirs and bundle.sample_rate == 16000
    assert "".join(bundle.get_labels()).lower() == LABELS
    original = torchaudio.models.wav2vec2_model(**TINY, aux_num_out=len(LABELS)).eval()
    x, lengths = torch.randn(3, 4000), torch.tensor([4000, 2500, 3100])
    wanted = [original(row[None, :n])[0][0] for row, n in zip(x, lengths, strict=True)]
    monkeypatch.setattr(type(bundle), "get_model", lambda self: original)
    net = Wav2Vec2CTC(TINY, len(LABELS)).eval()
    net.load_state_dict(published())
    logits, frames = net(x, lengths)
    for row, count, alone in zip(logits, frames, wanted, strict=True):
        assert count == len(alone)
        torch.testing.assert_close(row[:count], alone, rtol=0, atol=0)
    assert not any("parametrizations" in name for name, _ in plain(original).named_parameters())

    def offline(self: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr(type(bundle), "get_model", offline)
    with pytest.raises(BitfrontError, match=r"put https://.*_ls960.pth into .*/checkpoints"):
        speech("asr_wav2vec2").initial()
    with pytest.raises(BitfrontError, match=r"task\.pretrained=true is for"):
        speech("asr_wav2vec2", "task.network=conformer")


def test_features_are_normalized_and_masked_in_training_alone() -> None:
    samples = torch.randn(8000) * torch.linspace(0.1, 1, 8000)
    x = LogMel(8000, 40)(samples)
    assert x.shape == (101, 40)
    torch.testing.assert_close(x.mean(0), torch.zeros(40), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(40), atol=0.01, rtol=0)
    masked = SpecAugment(2, 6, 3, 0.1)(x) == 0
    assert 0 < masked.all(0).sum() <= 2 * 6 and 0 < masked.all(1).sum() <= 3 * 10
    task = speech("asr", "smoke=true")
    train = task.dataset("train")
    assert train.augment is not None and task.undisturbed(train).augment is None
    assert task.dataset("valid").augment is None
    (a, *_), (b, *_) = (task.calibration(4, 4)[0] for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(train[[0, 1]][0], train[[0, 1]][0])
    features, lengths, *_ = train[[0, 1, 2]]
    assert features.shape[1] % 4 == 0 and task.valid((features, lengths, *_)).tolist() == pytest.approx(
        (lengths / features.shape[1]).tolist()
    )


@pytest.fixture(scope="module")
def synthesised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    espeak.load(root, "test")
    return root


def test_synthesis_is_the_same_in_every_process(synthesised: Path, tmp_path: Path) -> None:
    splits = {"train": (30, *espeak.SPLITS["train"][1:])}
    code = f"from pathlib import Path; from bitfront.data import espeak; espeak.SPLITS = {splits!r}; "
    code += f"espeak.synthesise(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    again = torch.from_numpy(np.load(tmp_path / "samples.npy"))
    waves, texts = espeak.load(synthesised, "train")
    assert torch.equal(torch.cat(waves[:30]), again)
    assert len(waves) == len(texts) == espeak.SPLITS["train"][0]
    assert {word for text in texts for word in text.split()} == set(espeak.WORDS.split())


def test_voices_and_sentences_of_the_test_are_unseen(synthesised: Path) -> None:
    import json

    entries = json.loads((synthesised / "generated" / espeak.VERSION / "texts.json").read_text())
    voices = {split: {e["voice"] for e in entries if e["split"] == split} for split in espeak.SPLITS}
    assert not voices["test"] & (voices["train"] | voices["valid"]) and not voices["train"] & voices["valid"]
    assert [sum(e["split"] == split for e in entries) for split in ("train", "valid", "test")] == [2000, 200, 400]


def test_without_espeak_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(BitfrontError, match="run `make setup`"):
        speech("asr", f"data_root={tmp_path}").loader("train")
    assert not list((tmp_path / "generated").iterdir())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers, whose recordings are as loud as their index."""
    root = tmp_path_factory.mktemp("data")
    (root / "fsdd").mkdir()
    for digit in range(10):
        for speaker, sign in (("ann", 1), ("bob", -1)):
            for i in range(50):
                wave = np.full(200 + 10 * digit, sign * (100 + i), np.int16)
                soundfile.write(root / "fsdd" / f"{digit}_{speaker}_{i}.flac", wave, 8000)
    return root


def test_digit_strings_keep_speakers_and_recordings_apart(digits: Path) -> None:
    task = speech("asr_fsdd", f"data_root={digits}")
    found = {}
    for split in ("train", "valid", "test"):
        source = task.dataset(split).source
        values = set()
        for n in range(len(source)):
            samples, text = source.utterance(n)
            levels = (samples * 32768).round().int()
            assert len(set(levels.sign().tolist()) - {0}) == 1 and 3 <= len(text.split()) <= 7
            assert (levels != 0).sum() == sum(200 + 10 * recordings.DIGITS.index(word) for word in text.split())
            values |= set(levels.abs().tolist()) - {0}
        found[split] = {value - 100 for value in values}
    assert found == {split: set(part) for split, part in recordings.PARTS.items()}
    assert isinstance(task.dataset("test").source, InMemory)
    train = task.dataset("train").source
    torch.manual_seed(0)
    first = [train.utterance(0)[1] for _ in range(3)]
    torch.manual_seed(0)
    assert first == [train.utterance(0)[1] for _ in range(3)] and len(set(first)) > 1


def test_missing_digits_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(BitfrontError, match="lacks all recordings: expected <digit>_<speaker>_<index>"):
        speech("asr_fsdd", "data_root=/nowhere").loader("train")
    shutil.copytree(digits / "fsdd", tmp_path / "fsdd")
    victim = tmp_path / "fsdd" / "3_bob_2.flac"
    soundfile.write(victim, np.ones(100), 16000)
    with pytest.raises(BitfrontError, match=r"3_bob_2.flac.* at 16000 Hz; expected one channel at 8000 Hz"):
        speech("asr_fsdd", f"data_root={tmp_path}").loader("train")  # a test recording, before training
    victim.write_bytes(b"no audio")
    with pytest.raises(BitfrontError, match=r"could not read .*3_bob_2.flac"):
        recordings.fsdd(tmp_path / "fsdd", "test")
    victim.unlink()
    with pytest.raises(BitfrontError, match=r"lacks 3_bob_2:"):
        recordings.fsdd(tmp_path / "fsdd", "train")


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    """The official layout with 40 training utterances of half a second to three, and few others."""
    rng = np.random.default_rng(0)
    for subset, n in (("train-clean-100", 40), ("dev-clean", 4), ("test-clean", 4)):
        for speaker in (19, 26):
            folder = tmp_path / "LibriSpeech" / subset / str(speaker) / "198"
            folder.mkdir(parents=True)
            lines = []
            for i in range(n // 2):
                name = f"{speaker}-198-{i:04}"
                lines.append(f"{name} {' '.join(rng.choice(['THE', 'BOY', 'DIDN' + chr(39) + 'T', 'RUN'], 2))}")
                wave = rng.normal(0, 1000, rng.integers(8000, 48000)).astype(np.int16)
                soundfile.write(folder / f"{name}.flac", wave, 16000)
            (folder / f"{speaker}-198.trans.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


ONE_SUBSET = "task.train_subsets=[train-clean-100]"


def test_librispeech_is_read_in_its_layout(librispeech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = speech("asr_librispeech", f"data_root={librispeech}", ONE_SUBSET, "train.batch_size=8", "train.workers=0")
    batches = list(task.loader("train"))
    assert sum(len(lengths) for _, lengths, *_ in batches) == 40
    frames = sum(int(lengths.sum()) for _, lengths, *_ in batches)
    assert frames / sum(x.shape[0] * x.shape[1] for x, *_ in batches) > 0.9  # little padding
    assert {word for text in texts_of(task) for word in text.split()} <= {"the", "boy", "didn't", "run"}
    source = task.dataset("test").source
    assert [len(source.utterance(i)[0]) for i in range(4)] == list(source.lengths)
    monkeypatch.setattr(soundfile, "info", None)  # the lengths are kept
    assert len(speech("asr_librispeech", f"data_root={librispeech}", ONE_SUBSET).dataset("train")) == 40


def test_damage_in_librispeech_is_named(librispeech: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(BitfrontError, match=message):
            speech("asr_librispeech", f"data_root={librispeech}", ONE_SUBSET).loader("train")

    with pytest.raises(BitfrontError, match=r"no speech in .*train-clean-360.*openslr.org/12.*data_root=<folder>"):
        speech("asr_librispeech", f"data_root={librispeech}").loader("train")
    folder = librispeech / "LibriSpeech" / "test-clean" / "26" / "198"
    transcripts, flac = folder / "26-198.trans.txt", folder / "26-198-0001.flac"
    audio, text = flac.read_bytes(), transcripts.read_text()
    flac.write_bytes(b"no audio")
    refused(r"could not read .*26-198-0001.flac")
    flac.unlink()
    refused(r"names 26-198-0001.flac, which is not there; unpack test-clean again")
    flac.write_bytes(audio)
    transcripts.write_text(text.splitlines()[0] + "\n")
    refused(r"lacks 26-198-0001.flac")
    transcripts.write_text(text.replace("26-198-0001 ", "26-198-0001 3 "))
    refused(r"26-198-0001: the transcript '3.*other characters")
    shutil.rmtree(librispeech / "LibriSpeech" / "test-clean")
    refused(r"no speech in .*test-clean")


def trained(task: Speech, steps: int) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    net, losses = task.initial().train(), []
    recipe = task.recipe
    optimizer = recipe.optimizer(net.parameters(), task.decays)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.lr_factor(step, steps))
    for epoch in range(steps):
        for batch in task.loader("train", epoch=epoch):
            optimizer.zero_grad()
            loss = task.loss(net, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) == steps:
                return net, losses
    raise AssertionError("no steps")


@pytest.mark.parametrize(
    "size",
    [
        ["task.dim=32", "task.depth=2", "task.channels=8", "train.workers=1"],
        pytest.param(["train.workers=2"], marks=pytest.mark.slow),
    ],
    ids=["small", "full"],
)
def test_the_recipe_for_librispeech_runs(librispeech: Path, size: list[str]) -> None:
    words = [ONE_SUBSET, "train.batch_size=8", "train.warmup_steps=10"]
    task = speech("asr_librispeech", f"data_root={librispeech}", *words, *size)
    net, losses = trained(task, 20)
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])
    metrics = task.evaluate(net, "test")
    assert set(metrics) == {"wer", "cer", "loss"} and all(np.isfinite(v) for v in metrics.values())


def test_the_papers_size_optimizer_and_schedule() -> None:
    task = speech("asr_librispeech")
    net = task.model()
    layer = sum(p.numel() for p in net.layers[0].parameters())
    d, k = task.dim, task.kernel
    feed_forward = 2 * d + 2 * 4 * d * d + 5 * d
    convolution = 2 * d + 2 * d * d + 2 * d + k * d + d + 2 * d + d * d + d
    assert layer == 2 * feed_forward + (2 * d + 4 * d * d + 4 * d) + convolution + 2 * d
    rest = 10 * d + (9 * d + 1) * d + (20 * d + 1) * d + (d + 1) * 29  # convolutions, projection, head
    assert len(net.layers) == 16 and sum(p.numel() for p in net.parameters()) == 16 * layer + rest
    recipe = task.recipe
    optimizer = recipe.optimizer(net.parameters(), task.decays)
    assert type(optimizer) is torch.optim.Adam
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-9, 1e-6)
    for step in (1, 100, 9_999, 10_000, 40_000):  # transformer schedule with peak 0.05 / sqrt(d) after 10k steps
        rate = 0.05 * 100 * d**-0.5 * min(step**-0.5, step * 10_000**-1.5)
        assert recipe.lr * recipe.lr_factor(step - 1, 110_000) == pytest.approx(rate)
    assert (task.bands, task.band_width, task.spans, task.span_share) == (2, 27, 10, 0.05)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task.data=timit", "choices: espeak, fsdd, LibriSpeech"),
        ("task.data=LibriSpeech", "task=asr_librispeech"),
        ("task.rate=16000", "8000 samples per second"),
        ("task.network=rnn", "choices: conformer, wav2vec2"),
        ("train.schedule=noam", "choices: cosine, step, constant, inverse_sqrt"),
        ("train.schedule=inverse_sqrt", r"train\.warmup_steps=0 is out of range"),
        ("task.kernel=4", "kernel be odd"),
        ("task.heads=5", "heads must divide"),
        ("task.beam=-1", "beam is not negative"),
    ],
)
def test_impossible_speech_tasks_are_refused(word: str, message: str) -> None:
    with pytest.raises(BitfrontError, match=message):
        speech("asr", word).loader("train")


@pytest.mark.slow
def test_the_default_learns_voices_that_it_has_not_heard(tmp_path: Path) -> None:
    words = ("task=asr", "quant=float", f"root={tmp_path}", f"data_root={tmp_path}")
    assert command("src.run", *words, timeout=1800).returncode == 0
    (record,) = read_all(tmp_path)
    assert record.metrics["test"]["wer"] <= 25
