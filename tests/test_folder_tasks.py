"""The user's own texts, speech and songs: from raw files to the report, layouts, splits, and what is refused."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import cli
from torch import Tensor, nn

from bitfront.cells import compose
from bitfront.cells.flow import build_task
from bitfront.cells.record import Record, read_all
from bitfront.data.folders import SPLITS
from bitfront.data.stems import stems
from bitfront.data.texts import texts
from bitfront.data.transcribed import OTHER, learned, transcribed
from bitfront.errors import BitfrontError
from bitfront.tasks import notes

MODULE = """
import torch
from torch import nn

class Words(nn.Module):
    def __init__(self, vocabulary, backwards=False):
        super().__init__()
        self.words, self.backwards = nn.Embedding(vocabulary, 16), backwards
        self.state, self.out = nn.GRU(16, 32, batch_first=True), nn.Linear(32, vocabulary)

    def forward(self, x):
        turned = self.words(x).flip(1) if self.backwards else self.words(x)
        return self.out(self.state(turned)[0].flip(1) if self.backwards else self.state(turned)[0])

class Frames(nn.Module):
    def __init__(self, mels, labels):
        super().__init__()
        self.first, self.out = nn.Conv1d(mels, 32, 5, stride=2, padding=2), nn.Linear(32, labels)

    def forward(self, x, lengths):
        return self.out(self.first(x.transpose(1, 2)).relu().transpose(1, 2)), (lengths + 1) // 2

class Masks(nn.Module):
    def __init__(self, sources, channels):
        super().__init__()
        self.sources, self.layer = sources, nn.Conv1d(channels, sources * channels, 9, padding=4)

    def forward(self, x):
        return self.layer(x).unflatten(1, (self.sources, -1))

def text(vocabulary): return Words(vocabulary)
def small(): return Words(7)
def backwards(vocabulary): return Words(vocabulary, True)
def audio(mels, labels): return Frames(mels, labels)
def frames(mels, labels): return nn.Linear(mels, labels)
def stems(sources, channels): return Masks(len(sources), channels)
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    notes.say.cache_clear()


def built(*words: str) -> Any:
    return build_task(compose.load(words))


def cells(root: Path, words: tuple[str, ...], training: tuple[str, ...]) -> dict[str, Record]:
    """Records of a float network on a folder and of methods that start from it, which the report shows and an
    evaluation finds again.
    """
    places = (f"root={root}/runs", f"data_root={root}/root", "trainer.accelerator=cpu")
    result = cli("run", *words, "quant=float", *training, *places)
    assert result.returncode == 0, result.stderr
    (start,) = read_all(root / "runs")
    methods = ("quant=lsq,decoupleq", "quant.min_size=0.0005", f"init_from={start.artifact}")
    result = cli("run", "-m", *words, *methods, *places)
    assert result.returncode == 0, result.stderr
    records = {record.method: record for record in read_all(root / "runs")}
    report = cli("report", f"{root}/runs")
    assert all(method in report.stdout for method in ("float", "lsq", "decoupleq")), report.stderr
    assert records["decoupleq"].sizes.file < records["float"].sizes.file / 2 > records["lsq"].sizes.file
    same = cli("evaluate", f"artifact={records['lsq'].artifact}", f"data_root={root}/root", "accelerator=cpu")
    assert "the same as in its record" in same.stdout, same.stderr
    return records


def refused(answer: str, *words: str) -> None:
    """By one message, before anything is trained."""
    result = cli("run", *words, "quant=float", "trainer.accelerator=cpu")
    assert result.returncode == 1 and answer in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


# Texts


def prose(lines: int, seed: int = 0) -> str:
    """Lines of made-up words in an order that can be learned."""
    words = ["the", "cat", "näht", "seven", "blue", "hats", "and", "a", "dog", "sings"]
    rng, at, text = np.random.default_rng(seed), 0, []
    for _ in range(lines):
        line = []
        for _ in range(rng.integers(4, 9)):
            at = int((at + 1 + 3 * (rng.random() < 0.2)) % len(words))
            line.append(words[at])
        text.append(" ".join(line) + "\n")
    return "".join(text)


TEXT = ("task=text", "task.vocabulary=270", "task.context=16", "task.overlap=8")


def own_text(place: Path, root: Path, *words: str) -> Any:
    return built(*TEXT, f"data={place}", f"data_root={root}", *words)


def test_a_text_file_to_the_report(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(prose(400))
    words = (*TEXT, "task.dim=32", "task.depth=1", "task.heads=2", f"data={tmp_path}/book.txt")
    records = cells(tmp_path, words, ("train.epochs=4",))
    chance = own_text(tmp_path / "book.txt", tmp_path / "root").corpus.unigram("test")
    assert records["float"].primary.name == "bpb" and records["float"].primary.value < 0.7 * chance
    assert records["lsq"].primary.value < 0.8 * chance


def test_a_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = prose(500)
    (tmp_path / "book.txt").write_text(text.rstrip("\n"))
    parts = texts(tmp_path / "book.txt", tmp_path / "memory")
    assert "".join(parts[split] for split in SPLITS) == text and not (tmp_path / "memory").exists()
    assert all(part.endswith("\n") for part in parts.values())
    shares = {split: len(part) / len(text) for split, part in parts.items()}
    assert shares == pytest.approx({"train": 0.8, "valid": 0.1, "test": 0.1}, abs=0.01)


def test_texts_come_in_files_or_folders_of_splits(tmp_path: Path) -> None:
    content = {split: prose(30, seed) for seed, split in enumerate(SPLITS)}
    files, folders = tmp_path / "files", tmp_path / "folders"
    for split, name in zip(SPLITS, ("train", "dev", "Test"), strict=True):
        (folders / name).mkdir(parents=True)
        files.mkdir(exist_ok=True)
        (files / f"{name}.txt").write_text(content[split])
        cut = content[split].index("\n") + 1
        (folders / name / "b.txt").write_text(content[split][cut:].rstrip())
        (folders / name / "a.txt").write_text("\N{BYTE ORDER MARK}" + content[split][:cut])
    assert texts(files, tmp_path / "m") == texts(folders, tmp_path / "m") == content
    (files / "Test.txt").unlink()  # what validates is then for the test, and a tenth of train validates
    parts = texts(files, tmp_path / "m")
    assert parts["test"] == content["valid"] and parts["train"] + parts["valid"] == content["train"]
    assert len(parts["train"]) / len(content["train"]) == pytest.approx(0.9, abs=0.05)
    (files / "dev.txt").unlink()
    assert "".join(texts(files, tmp_path / "m")[split] for split in SPLITS) == content["train"]


def test_a_folder_of_texts_is_split_by_their_names_once(tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / "books" / f"{n % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / f"{n % 2}" / f"{n:02}.txt").write_text(f"{n:02}\n")
    parts = texts(tmp_path / "books", tmp_path / "memory")
    assert [len(parts[split].split()) for split in SPLITS] == [16, 2, 2]
    for n in range(20, 40):
        (tmp_path / "books" / "1" / f"{n}.txt").write_text(f"{n}\n")
    more = texts(tmp_path / "books", tmp_path / "memory")
    assert all(set(parts[split].split()) <= set(more[split].split()) for split in SPLITS)
    shutil.rmtree(tmp_path / "books" / "0")
    (tmp_path / "books" / "1" / "01.txt").rename(tmp_path / "one.txt")
    for path in (tmp_path / "books" / "1").iterdir():
        path.unlink()
    (tmp_path / "one.txt").rename(tmp_path / "books" / "1" / "01.txt")
    (tmp_path / "books" / "1" / "01.txt").write_text(prose(100))
    alone = texts(tmp_path / "books", tmp_path / "memory")
    assert "".join(alone[split] for split in SPLITS) == prose(100)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ({"book.txt": prose(700).encode("latin-1")}, "book.txt' is not UTF-8 at byte "),
        ({"book.txt": b" \n\n"}, "book.txt' is empty"),
        ({"book.txt": b"one line"}, "has too few lines to be split; give train.txt"),
        ({"book.txt": prose(20).encode()}, "does not fit the training text, which has 2"),
        ({"train.txt": b"short\n", "valid.txt": b"a\n", "test.txt": b"b\n"}, "lower task.context"),
        ({"train.txt": b"a\n", "valid.txt": b"", "test.txt": b"b\n"}, "valid.txt' is empty"),
        ({"train.txt": b"a\n", "notes.txt": b"b\n"}, "notes.txt' is beside"),
        ({"train.txt": b"a\n", "val.txt": b"b\n", "dev.txt": b"b\n"}, "are both for valid"),
        ({"a.txt": b"a\n", "b.txt": b"b\n"}, "leave none for "),
        ({"train/a.txt": b"a\n", "test/b.doc": b"b\n"}, "has no *.txt for test"),
        ({"train/a.txt": b"a\n", "a.txt": b"b\n"}, "a.txt' is in none of "),
        ({"book.pdf": b"a"}, "there is no *.txt in"),
    ],
)
def test_texts_that_do_not_do(tmp_path: Path, content: dict[str, bytes], answer: str) -> None:
    for name, text in content.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(text)
    vocabulary = "task.vocabulary=256" if "short" in str(content) else "task.vocabulary=1024"
    refused(answer, *TEXT, vocabulary, f"data={tmp_path}/data", f"root={tmp_path}", f"data_root={tmp_path}/root")


def test_a_language_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(prose(500))
    task = own_text(tmp_path / "book.txt", tmp_path, "model=own_nets:text")
    net = task.model()
    assert set(net.state_dict()) == {"words.weight", *(f"state.{n}" for n in dict(net.state.named_parameters()))} | {
        "out.weight", "out.bias",
    }  # fmt: skip
    stream = task.corpus.streams["test"].long()
    whole = own_text(tmp_path / "book.txt", tmp_path, "model=own_nets:text", f"task.context={len(stream) - 1}")
    measured = whole.evaluate(net, "test")
    with torch.no_grad():
        scores = net(stream[None, :-1])[0].log_softmax(-1)
    nats = -scores[torch.arange(len(stream) - 1), stream[1:]].sum().item()
    assert measured["loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-4)
    text = whole.content["test"]
    assert measured["bpb"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)
    for name, answer in {
        "small": r"gives \[2, 16, 7\], where \[2, 16, 270\] is needed",
        "backwards": "own_nets:backwards is not causal",
    }.items():
        with pytest.raises(BitfrontError, match=answer):
            own_text(tmp_path / "book.txt", tmp_path, f"model=own_nets:{name}").model()
    with pytest.raises(BitfrontError, match="there is no model=gpt; choices: transformer, hf:<folder>"):
        own_text(tmp_path / "book.txt", tmp_path, "model=gpt")


def saved(folder: Path, text: str) -> Any:
    """A language model of transformers with a tokenizer that has no size for each token."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=90, special_tokens=["?", "<s>"]))
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 4096}
    torch.manual_seed(0)
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, bos_token_id=1, eos_token_id=1, **sizes))
    net.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return net.eval(), tokenizer


def test_a_folder_of_transformers_has_its_own_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text := prose(300))
    net, tokenizer = saved(tmp_path / "gpt", text)
    words = (f"data={tmp_path}/book.txt", f"data_root={tmp_path}/root", f"model=hf:{tmp_path}/gpt")
    words = (*words, "task.context=500")
    task = built("task=text", *words)
    ids = torch.tensor([[1, *tokenizer.encode(task.content["test"], add_special_tokens=False).ids]])
    assert task.corpus.streams["test"].tolist() == ids[0].tolist()
    with torch.no_grad():
        nats = net(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    result = cli("run", "task=text", *words, "quant=rtn", "bits=8", "quant.min_size=0", f"root={tmp_path}/runs",
                 "quant.samples=8", "trainer.accelerator=cpu")  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = {record.method: record for record in read_all(tmp_path / "runs")}
    assert records["float"].history == []  # its weights are trained
    size = len(task.content["test"].encode())
    assert records["float"].primary.value == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert records["rtn"].primary.value == pytest.approx(records["float"].primary.value, rel=0.02)
    refused("does not take inputs of shape [2, 5000]", "task=text", *words, "task.context=5000", f"root={tmp_path}")
    (tmp_path / "gpt" / "tokenizer.json").unlink()
    refused("has no tokenizer.json", "task=text", *words, f"root={tmp_path}")


# Speech

LETTERS = "abé"
RATE = 8000


def spoken(text: str, rate: int = RATE) -> np.ndarray:
    """A tone for each letter."""
    step = rate // 8
    pitch = np.repeat([0 if c == " " else 500.0 * (1 + LETTERS.index(c)) for c in text], step)
    return 0.4 * np.sin(2 * np.pi * np.cumsum(pitch) / rate) * np.tile(np.hanning(step), len(text))


def sentences(count: int) -> dict[str, str]:
    """Texts by names."""
    rng = np.random.default_rng(0)
    word = lambda: "".join(rng.choice(list(LETTERS), rng.integers(2, 5)))  # noqa: E731
    return {f"u{n:02}": f"{word()} {word()}" for n in range(count)}


def recorded(folder: Path, said: dict[str, str], suffix: str = ".wav", rate: int = RATE) -> Path:
    """A folder of audio files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in said.items():
        soundfile.write(folder / f"{name}{suffix}", spoken(text, rate), rate)
    return folder


def table(folder: Path, said: dict[str, str], name: str = "transcripts.csv", row: str = "{}.wav,{}") -> Path:
    """A table of transcripts."""
    head = ["file,text"] if row == "{}.wav,{}" else []
    (folder / name).write_text("\n".join([*head, *(row.format(*item) for item in said.items())]))
    return folder


AUDIO = ("task=audio", f"task.rate={RATE}", "task.channels=8", "task.dim=32", "task.depth=1", "task.heads=2")


def read(folder: Path, root: Path, lower: bool = True) -> tuple[dict[str, Any], list[str]]:
    return transcribed(folder, root / "memory.json", RATE, lower)


def heard(found: dict[str, Any]) -> dict[str, str]:
    return {path.stem: text for part in found.values() for path, text in zip(part.paths, part.texts, strict=True)}


def test_recordings_to_the_report(tmp_path: Path) -> None:
    folder = table(recorded(tmp_path / "speech", sentences(60)), sentences(60))
    records = cells(tmp_path, (*AUDIO, f"data={folder}"), ("train.batch_size=8", "train.lr=8e-3", "train.epochs=15"))
    assert records["float"].primary.name == "wer" and records["float"].primary.value < 40
    assert records["lsq"].primary.value < 60


def rows(file: str, row: str, head: str = "") -> Callable[[Path, dict[str, str]], object]:
    """Writes transcripts into one file of a folder, a row each."""
    return lambda folder, said: (folder / file).write_text(
        head + "".join(row.format(name=name, text=text, folder=folder) + "\n" for name, text in said.items())
    )


def beside(folder: Path, said: dict[str, str]) -> None:
    for name, text in said.items():
        (folder / "below" / f"{name}.txt").write_text(f"{text}\n")


LAYOUTS = {
    "beside": beside,
    "librispeech": rows("below/1-2.trans.txt", "{name} {text}"),
    "headless": rows("transcripts.csv", 'below/{name}.flac,"{text}"'),
    "header": rows("metadata.csv", "7,{text},{name}", "age,Sentence,path\n"),
    "inside": rows("below/metadata.csv", "{name}.flac,{text}", "file_name,transcription\n"),
    "bars": rows("metadata.csv", "{name}|{text}|other"),
    "tabs": rows("transcripts.tsv", "below/{name}.flac\t{text}"),
    "absolute": rows("transcripts.csv", "{folder}/below/{name}.flac,{text}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transcripts_come_in_many_layouts(layout: str, tmp_path: Path) -> None:
    said = sentences(12) | {"u00": 'A  "b," É'} if layout in ("bars", "tabs", "beside") else sentences(12)
    folder = tmp_path / "speech"
    recorded(folder / "below", sentences(12), ".flac")
    LAYOUTS[layout](folder, said)
    found, told = read(folder, tmp_path)
    assert heard(found) == {name: " ".join(text.lower().split()) for name, text in said.items()} and not told
    assert [len(found[split]) for split in SPLITS] == [8, 2, 2]
    assert heard(read(folder, tmp_path, lower=False)[0]) == {n: " ".join(text.split()) for n, text in said.items()}


def test_recordings_keep_their_splits(tmp_path: Path) -> None:
    said = sentences(30)
    folder = recorded(tmp_path / "speech", dict(list(said.items())[:20]))
    before, _ = read(table(folder, dict(list(said.items())[:20])), tmp_path)
    after, _ = read(table(recorded(folder, said), said), tmp_path)
    assert all(set(before[split].paths) <= set(after[split].paths) for split in SPLITS)
    for name, split in zip(said, ["train"] * 20 + ["dev"] * 5 + ["test"] * 5, strict=True):
        (folder / split).mkdir(exist_ok=True)
        (folder / f"{name}.wav").rename(folder / split / f"{name}.wav")
    parts, _ = read(folder, tmp_path)
    assert [len(parts[split]) for split in SPLITS] == [20, 5, 5]
    recorded(folder, {"u00b": said["u00"]})
    with pytest.raises(BitfrontError, match=r"u00b.wav' is in none of .*train"):
        read(table(folder, {**said, "u00b": said["u00"]}), tmp_path)


def test_recordings_of_any_rate_in_mono(tmp_path: Path) -> None:
    def tone(rate: int) -> np.ndarray:
        t = np.arange(rate // 2) / rate
        return 0.3 * np.sin(2 * np.pi * 440 * t) * np.sin(np.pi * t / 0.5)

    folder, said = tmp_path / "speech", dict.fromkeys(("a", "b", "c"), "ab ba")
    folder.mkdir()
    for name, rate in zip(said, (RATE, 11025, 44100), strict=True):
        soundfile.write(folder / f"{name}.wav", np.stack([2 * tone(rate), 0 * tone(rate)], 1), rate, subtype="FLOAT")
    parts, _ = read(table(folder, said), tmp_path)
    for part in parts.values():
        samples, text = part.utterance(0)
        assert text == "ab ba" and len(samples) == part.lengths[0] == RATE // 2
        torch.testing.assert_close(samples, torch.from_numpy(tone(RATE)).float(), atol=2e-3, rtol=0)


class Told(nn.Module):
    """Spells what it is told, utterance after utterance, as sure as can be."""

    def __init__(self, rows: list[Tensor], outputs: int) -> None:
        super().__init__()
        self.rows, self.outputs, self.at = rows, outputs, 0

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        told, self.at = self.rows[self.at : self.at + len(x)], self.at + len(x)
        frames = [nn.functional.one_hot(torch.stack([row, 0 * row], 1).flatten(), self.outputs) for row in told]
        return 50.0 * nn.utils.rnn.pad_sequence(frames, batch_first=True), torch.tensor([len(row) for row in frames])


def test_a_character_that_training_lacks_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in SPLITS:
        recorded(tmp_path / "speech" / split, sentences(10))
        table(tmp_path / "speech" / split, sentences(10) | ({"u03": "abà ba"} if split == "test" else {}))
    task = built(*AUDIO, f"data={tmp_path}/speech", f"data_root={tmp_path}")
    alphabet = task.alphabet
    assert alphabet.labels[1:-1] == " abé" and alphabet.labels[-1] == OTHER
    truth = [
        alphabet.encode(task.found["test"].texts[i])
        for i in torch.tensor(task.found["test"].lengths).argsort(stable=True)
    ]
    assert sum(len(alphabet.labels) - 1 in row for row in truth) == 1
    assert task.evaluate(Told(truth, len(alphabet.labels)), "test")["wer"] == pytest.approx(100 / 20)
    assert task.evaluate(Told(truth, len(alphabet.labels)), "valid")["wer"] > 0  # other texts
    said = capsys.readouterr().err
    assert said.count("characters that only valid and test have count as errors: à") == 1
    assert learned(["A b", "-|"]).decode(learned(["A b", "-|"]).encode("b -|A")) == "b -|A"


def test_a_recogniser_of_ones_own(tmp_path: Path) -> None:
    folder = table(recorded(tmp_path / "speech", sentences(30)), sentences(30))
    words = (*AUDIO, f"data={folder}", f"data_root={tmp_path}")
    result = cli("run", *words, "model=own_nets:audio", "quant=diffq", "quant.min_size=0", "train.epochs=1",
                 "init_from=null", f"root={tmp_path}/runs", "trainer.accelerator=cpu")  # fmt: skip
    assert result.returncode == 0, result.stderr
    (record,) = read_all(tmp_path / "runs")
    assert record.sizes.parameters == 32 * (40 * 5 + 1) + 33 * 6 and record.metrics["test"]["loss"] > 0
    for name, answer in {
        "audio:frames": "there is no model=audio:frames|could not import audio",
        "own_nets:frames": r"does not take inputs of shape \[2, 160, 40\].*logits of 6 labels and their lengths",
        "hf:speech": "choices: conformer, <package.module>:<function>",
    }.items():
        with pytest.raises(BitfrontError, match=answer):
            built(*words, f"model={name}").model()


def test_a_few_recordings_that_do_not_do_are_left_out_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = sentences(120)
    folder = table(recorded(tmp_path / "speech", said), {**said, "u07": " ", "gone": "ab"})
    soundfile.write(folder / "u08.wav", np.zeros(80), RATE)
    soundfile.write(folder / "u09.wav", np.zeros(RATE // 8), RATE)
    soundfile.write(folder / "u10.wav", np.array([0.1] * RATE + [np.nan]), RATE, subtype="FLOAT")
    task = built(*AUDIO, f"data={folder}", f"data_root={tmp_path}")
    for split in SPLITS:
        task.dataset(split)
    told = capsys.readouterr().err.splitlines()
    assert len(task.found["train"]) + len(task.found["valid"]) + len(task.found["test"]) == 117
    wanted = ("1 of 121 .*gone", "1 of 120 .*u07", "1 of 119 .*u10.*NaN", "1 of 118 .*u08", "1 of 117 .*u09")
    for line, about in zip(told, wanted, strict=True):
        assert re.search(about, line), line


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "unreadable": (lambda f: (f / "u03.wav").write_bytes(b"no audio"), "1 of 20 audio files cannot be read, as '"),
    "infinite": (
        lambda f: soundfile.write(f / "u03.wav", np.full(RATE, np.inf), RATE, subtype="FLOAT"),
        "u03.wav' (NaN or infinity)",
    ),
    "silent": (
        lambda f: [soundfile.write(p, np.zeros(9), RATE) for p in f.glob("*.wav")],
        "20 of 20 audio files are sho",
    ),
    "brief": (
        lambda f: [soundfile.write(p, np.zeros(900), RATE) for p in f.glob("*.wav")],
        "20 of 20 utterances have fe",
    ),
    "untold": (lambda f: (f / "transcripts.csv").unlink(), "and no transcripts of them; expected transcripts.csv"),
    "few": (lambda f: table(f, sentences(15)), "5 of 20 audio files have no transcript, as "),
    "gone": (lambda f: [(f / f"u0{n}.wav").unlink() for n in range(3)], "3 of 20 transcripts are of audio that is not"),
    "twice": (lambda f: (f / "transcripts.csv").open("a").write("\nu03.wav,other") and None, "has two transcripts"),
    "names": (lambda f: shutil.copy(f / "u03.wav", f / "u03.flac"), "have one name"),
    "latin": (lambda f: (f / "transcripts.csv").write_bytes("u03.wav,é".encode("latin-1")), "is not UTF-8 at byte 8"),
    "column": (lambda f: (f / "transcripts.csv").write_text("u03.wav"), "has 1 columns; expected file and text"),
    "none": (lambda f: [path.unlink() for path in f.glob("*.wav")], "there is no audio (.wav .flac"),
    "samples": (
        lambda f: [(f / f"u{n:02}.wav").unlink() for n in range(2, 20)] + [table(f, sentences(2))],
        "none for va",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_recordings_that_do_not_do(fault: str, tmp_path: Path) -> None:
    folder = table(recorded(tmp_path / "speech", sentences(20)), sentences(20))
    spoil, answer = SPOILT[fault]
    spoil(folder)
    refused(answer, *AUDIO, f"data={folder}", f"root={tmp_path}", f"data_root={tmp_path}/root")


# Songs


def song(folder: Path, names: str, n: int, rate: int = 2000, channels: int = 1, mixture: bool = False) -> Path:
    """A song of one second in which each stem is a tone."""
    folder.mkdir(parents=True)
    rng, t = np.random.default_rng(n), np.arange(rate) / rate
    parts = {name: 0.2 * np.sin(2 * np.pi * (100 * 2**k) * rng.uniform(1, 1.5) * t) for k, name in enumerate(names)}
    for name, wave in {**parts, **({"mixture": sum(parts.values())} if mixture else {})}.items():
        suffix = "flac" if n % 2 else "wav"
        soundfile.write(folder / f"{name}.{suffix}", np.stack([wave] * channels, 1), rate)
    return folder


STEMS = ("task=stems", "task.segment=0.5", "task.stride=0.1", "task.window=0.5")
SMALL_STEMS = (*STEMS, "task.demucs.channels=8", "task.demucs.depth=2")


def test_songs_to_the_report(tmp_path: Path) -> None:
    for n in range(10):
        song(tmp_path / "songs" / f"song {n}", "ab", n, mixture=n == 3)
    records = cells(tmp_path, (*SMALL_STEMS, f"data={tmp_path}/songs"), ("train.lr=1e-2", "train.epochs=8"))
    assert records["float"].primary.name == "nsdr" and records["float"].primary.value > 2
    assert {"nsdr_a", "nsdr_b"} <= set(records["lsq"].metrics["test"])


def found(folder: Path, root: Path, samplerate: int = 0, channels: int = 0) -> Any:
    return stems(folder, root / "memory.json", samplerate, channels)


def test_songs_are_split_once_and_their_form_is_found(tmp_path: Path) -> None:
    for n in range(10):
        song(tmp_path / "songs" / f"{n}", "dbc", n, 2000, 2, mixture=True)
    (tmp_path / "songs" / "3" / "notes.txt").write_text("")
    parts, form, told = found(tmp_path / "songs", tmp_path)
    assert (form.sources, form.samplerate, form.channels) == (["b", "c", "d"], 2000, 2) and not told
    assert [len(parts[split]) for split in SPLITS] == [8, 1, 1]
    song(tmp_path / "songs" / "more", "dbc", 0, 2000, 2)
    again, *_ = found(tmp_path / "songs", tmp_path)
    assert all({s.folder for s in parts[split]} <= {s.folder for s in again[split]} for split in SPLITS)
    (tmp_path / "sorted").mkdir()
    for n, split in enumerate(("train", "train", "val", "test")):
        (tmp_path / "songs" / f"{n}").rename(tmp_path / "sorted" / f"{n}")
        (tmp_path / "sorted" / split).mkdir(exist_ok=True)
        (tmp_path / "sorted" / f"{n}").rename(tmp_path / "sorted" / split / f"song {n}")
    parts, *_ = found(tmp_path / "sorted", tmp_path)
    assert {k: [s.folder.name for s in v] for k, v in parts.items()} == {
        "train": ["song 0", "song 1"], "valid": ["song 2"], "test": ["song 3"],
    }  # fmt: skip


def test_a_part_of_a_song_is_that_of_the_whole(tmp_path: Path) -> None:
    """At another rate, too: as torchaudio resamples the whole file."""
    rng = np.random.default_rng(0)
    for rate in (2000, 1764, 4000, 1999):
        waves = {name: rng.uniform(-0.3, 0.3, (5 * rate, 2)).astype(np.float32) for name in "ab"}
        for n in range(3):
            (tmp_path / f"{rate}" / f"{n}").mkdir(parents=True)
            for name, wave in waves.items():
                soundfile.write(tmp_path / f"{rate}" / f"{n}" / f"{name}.wav", wave, rate, subtype="FLOAT")
        read = found(tmp_path / f"{rate}", tmp_path, 2000, 1)[0]["train"][0]
        mono = torch.from_numpy(np.stack([waves["a"], waves["b"]])).mean(2)
        whole = torchaudio.transforms.Resample(rate, 2000)(mono)
        assert read.length == whole.shape[1]
        for start, length in ((0, -1), (0, 100), (1, 1), (777, 500), (9000, -1), (9990, 10)):
            mixture, a, b = read.read(["mixture", "a", "b"], start, length)
            wanted = whole[:, start:] if length < 0 else whole[:, start : start + length]
            torch.testing.assert_close(torch.cat([a, b]), wanted, atol=1e-5, rtol=0)
            torch.testing.assert_close(mixture, a + b)
        if rate == 2000:
            stereo = found(tmp_path / f"{rate}", tmp_path)[0]["train"][0].read(["b"], 5, 3)
            torch.testing.assert_close(stereo[0], torch.from_numpy(waves["b"][5:8].T))
        with pytest.raises(BitfrontError, match="ends early"):
            read.read(["a"], 9990, 20)


def test_songs_are_brought_to_a_form_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(4):
        song(tmp_path / "songs" / f"{n}", "ab", 0, 2000 if n else 1000, 2 if n else 1, mixture=n == 2)
    soundfile.write(tmp_path / "songs" / "2" / "mixture.wav", np.random.default_rng(0).normal(0, 0.2, 2000), 2000)
    task = built(*STEMS, f"data={tmp_path}/songs", f"data_root={tmp_path}", "model=own_nets:stems")
    net = task.model()
    assert set(net.state_dict()) == {"layer.weight", "layer.bias"}
    assert net(torch.zeros(1, 1, 50)).shape == (1, 2, 1, 50) and task.dataset("test")[[0]].shape == (3, 1, 1000)
    brought, unlike = capsys.readouterr().err.splitlines()
    assert "3 of 4 songs" in brought and "1000 Hz and 1 channel" in brought
    assert "in 1 of 4 songs" in unlike and "songs/2'" in unlike
    with pytest.raises(BitfrontError, match=r"gives \[1, 1, 400, 32\]|does not take inputs"):
        built(*STEMS, f"data={tmp_path}/songs", f"data_root={tmp_path}", "model=own_nets:small").model()
    with pytest.raises(BitfrontError, match="choices: demucs, hdemucs, htdemucs, <package"):
        built(*STEMS, f"data={tmp_path}/songs", "model=tasnet")


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "lacks": (lambda f: (f / "2" / "a.wav").unlink(), "2' has b, and most songs a, b; add a"),
    "more": (lambda f: shutil.copy(f / "2" / "a.wav", f / "2" / "c.wav"), "most songs a, b; move away c"),
    "alone": (lambda f: [path.unlink() for path in f.rglob("b.*")], "songs of a alone; two stems are needed"),
    "length": (lambda f: soundfile.write(f / "2" / "a.wav", np.zeros(900), 2000), "differ in length: a.wav 0.45 s, "),
    "bad": (lambda f: (f / "2" / "a.wav").write_bytes(b"no audio"), "1 of 6 songs cannot be read, as '"),
    "nan": (
        lambda f: soundfile.write(f / "2" / "a.wav", np.full(2000, np.nan), 2000, subtype="FLOAT"),
        "a.wav' (NaN or infinity)",
    ),
    "twice": (lambda f: soundfile.write(f / "2" / "a.flac", np.zeros(2000), 2000), "are for the same stem"),
    "loose": (lambda f: shutil.copy(f / "2" / "a.wav", f / "a.wav"), "a.wav' is in no song's folder; expected"),
    "loose split": (lambda f: (f / "2").rename(f / "train"), "is in no song's folder; expected"),
    "none": (lambda f: shutil.rmtree(f) or f.mkdir() or (f / "a.txt").write_text(""), "there are no songs in "),
    "few": (lambda f: [shutil.rmtree(f / f"{n}") for n in range(2, 6)], "leave none for "),
    "wide": (lambda f: [soundfile.write(p, np.zeros((2000, 3)), 2000) for p in f.rglob("*.*")], "audio_channels=1 or"),
    "brief": (lambda f: [soundfile.write(p, np.zeros(300), 2000) for p in f.rglob("*.*")], "lower task.segment"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ODD)
def test_songs_that_do_not_do(fault: str, tmp_path: Path) -> None:
    for n in range(6):
        song(tmp_path / "songs" / f"{n}", "ab", n if n != 2 else 0)
    spoil, answer = ODD[fault]
    spoil(tmp_path / "songs")
    refused(answer, *SMALL_STEMS, f"data={tmp_path}/songs", f"root={tmp_path}", f"data_root={tmp_path}/root")


@pytest.mark.parametrize("task", ["text", "audio", "stems"])
def test_data_that_are_not_given_or_not_there(task: str, tmp_path: Path) -> None:
    refused(f"task={task} needs data=<", f"task={task}", f"root={tmp_path}")
    refused("there is no data=nowhere", f"task={task}", "data=nowhere", f"root={tmp_path}")
