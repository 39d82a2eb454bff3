"""Language models for other runtimes: what independent readers make of MLX's and GGUF's bytes, against our decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import cli
from safetensors.torch import load_file
from test_quantize import hf, story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import bitfront
from bitfront import RTN, Artifact, Packed
from bitfront.exports.blocks import Blocks
from bitfront.exports.gguf import types
from bitfront.exports.mlx import bit_stream
from bitfront.models import hf as saved
from bitfront.models import named

ROWS, COLUMNS = 8, 512


def packed(bits: list[int], group_size: int, shape: tuple[int, int] = (ROWS, COLUMNS), rows: int = 0) -> Packed:
    """Random codes on grids of which one is constant and one falls."""
    groups = rows * -(-shape[1] // group_size) if rows else -(-shape[0] * shape[1] // group_size)
    widths = torch.tensor(bits, dtype=torch.uint8).repeat(groups // len(bits) if len(bits) > 1 else 1)
    largest = (1 << widths.int()).expand(groups)[:, None]
    codes = (torch.rand(groups, group_size) * largest).to(torch.uint8 if max(bits) <= 8 else torch.int16)
    lo, span = torch.randn(groups), torch.randn(groups)
    span[0] = 0 if groups > 1 else span[0]
    return Packed(codes, widths, lo, span, torch.Size(shape), rows)


CUT = [  # a tensor, and the largest of the sizes of blocks that it can be cut into
    (packed([3], 64), 64),
    (packed([4], 256), 256),
    (packed([2], ROWS * COLUMNS), 256),  # one grid for the tensor
    (packed([2, 4], 32), 32),
    (packed([4], 64, (6, 96)), 32),  # groups that go on in the next row
    (packed([4], 64, (6, 96), rows=6), 32),  # and that do not
    (packed([4], 16), 0),
    (packed([2], 48, (6, 48)), 0),
]


@pytest.mark.parametrize(("tensor", "largest"), CUT)
def test_blocks_are_the_tensor(tensor: Packed, largest: int) -> None:
    for size in (32, 64, 128, 256):
        blocks = Blocks.of(tensor, size)
        assert (blocks is not None) == (size <= largest)
        if blocks is not None:
            lo, step = (x.repeat_interleave(size, 1) for x in (blocks.lo, blocks.step))
            assert torch.equal(torch.from_numpy(blocks.codes).float() * step + lo, tensor.decode())
            assert blocks.moved(blocks.lo, blocks.step) == 0


def stream(words: Tensor, bits: int) -> np.ndarray:
    """Codes in MLX's words, by whole numbers of any length."""
    rows = [int.from_bytes(np.ascontiguousarray(row, "<u4").tobytes(), "little") for row in words.numpy()]
    n = words.shape[1] * 32 // bits
    return np.array([[row >> bits * i & (1 << bits) - 1 for i in range(n)] for row in rows])


def affine(layer: dict[str, Tensor], bits: int, size: int) -> Tensor:
    """Weights by MLX, or by its rule where it is not installed."""
    try:
        import mlx.core as mx
    except ImportError:
        scales, biases = (layer[part].repeat_interleave(size, 1) for part in ("scales", "biases"))
        return torch.from_numpy(stream(layer["weight"], bits)).float() * scales + biases
    arrays = (mx.array(layer[part].numpy()) for part in ("weight", "scales", "biases"))
    return torch.from_numpy(np.array(mx.dequantize(*arrays, group_size=size, bits=bits)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_a_stream_of_bits(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 64))
    assert np.array_equal(stream(torch.from_numpy(bit_stream(codes, bits)), bits), codes)


EXACT = [(1, 256, "Q2_K"), (2, 512, "Q2_K"), (3, 256, "Q4_K"), (4, 256, "Q4_K")]
EXACT += [(2, 32, "Q4_1"), (4, 64, "Q4_1"), (5, 512, "Q5_1")]


@pytest.mark.parametrize(("bits", "size", "kind"), EXACT)
def test_ggufs_types_have_what_float16_has_exactly(bits: int, size: int, kind: str) -> None:
    tensor = packed([bits], size)
    step = (tensor.span * 64).round() / 1024
    tensor.span, tensor.lo = step * (2**bits - 1), (tensor.lo * 64).round() / 256
    found = types.smallest(tensor)
    assert found is not None and found[0] == kind and found[2] == 0
    read = gguf.quants.dequantize(found[1], gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read, tensor.decode().numpy())


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_what_float16_moves_is_told_and_bounded(bits: int) -> None:
    tensor = packed([bits], 32)
    tensor.lo = -tensor.span * torch.rand(len(tensor.span))
    tensor.lo[0] = 0.3
    found = types.smallest(tensor)
    assert found is not None and found[0] == {2: "Q4_1", 4: "Q4_1", 5: "Q5_1", 8: "F16"}[bits]
    read = gguf.quants.dequantize(found[1], gguf.GGMLQuantizationType[found[0]])
    error = np.abs(read - tensor.decode().numpy()).reshape(-1, 32).max(1)
    step, lo = tensor.span.abs().numpy() / (2**bits - 1), tensor.lo.abs().numpy()
    unit = np.where(step > 0, step, lo)
    assert 0.9 * found[2] <= (error / unit).max() <= 1.001 * found[2]
    assert found[2] <= 1.001 * ((lo + step * (2**bits - 1)) / unit).max() * 2**-11


def test_symmetric_grids_of_8_bits_are_q8_0() -> None:
    w = torch.randn(ROWS, COLUMNS)
    found = types.smallest(RTN(bits=8, group_size=64, symmetric=True).solve(w, None)[0])
    assert found is not None and found[0] == "Q8_0" and found[2] <= (128 + 255) * 2**-11
    ours = RTN(bits=8, group_size=64, symmetric=True).solve(w, None)[0]
    error = np.abs(gguf.quants.dequantize(found[1], gguf.GGMLQuantizationType.Q8_0) - ours.decode().numpy())
    assert (error.reshape(-1, 64) <= 1.001 * found[2] * ours.span.float().abs().numpy()[:, None] / 255).all()


def test_what_float16_would_move_too_far_is_float32() -> None:
    tensor = packed([4], 256)
    tensor.lo, tensor.span = torch.full_like(tensor.lo, 1.0003), torch.full_like(tensor.span, 1e-3)
    found = types.smallest(tensor)
    assert found is not None and found[0] == "F32" and np.array_equal(found[1], tensor.decode().numpy())


def llama(folder: Path, **options: Any) -> Any:
    """A network of the architecture, with a tokenizer of byte pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([story()], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=320,  # more than tokens
        hidden_size=256,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 2000.0, "rope_type": "default"},
        bos_token_id=0,
        eos_token_id=1,
        **options,
    )
    network = transformers.LlamaForCausalLM(config).eval()
    for name, p in network.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.1)
    network.save_pretrained(folder)
    return network


LAYERS: dict[str, dict[str, Any]] = {
    "*.0.self_attn.q_proj*": {"bits": 2},
    "*.0.self_attn.k_proj*": {"bits": 5},
    "*.1.self_attn*": {"group_size": 64},
    "*.1.mlp.up*": {"bits": 7},
    "*.1.mlp.down*": {"bits": 1, "group_size": 32},
}


@pytest.fixture(params=[{"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A folder with a network, ``llama``, and its artifact ``net``; and the decoded network."""
    network = llama(tmp_path / "llama", **request.param)
    bitfront.quantize(network, RTN(bits=4, layers=LAYERS, min_size=0.001)).save(tmp_path / "net")
    return tmp_path, bitfront.load(tmp_path / "net", into=network)


def export(folder: Path, kind: str, **words: str) -> Any:
    usual = {"artifact": f"{folder}/net", "model": f"hf:{folder}/llama", "out": f"{folder}/{kind}.gguf"}
    return cli("export", f"format={kind}", *(f"{key}={value}" for key, value in (usual | words).items()))


def test_a_gguf_file_is_the_network(made: tuple[Path, Any]) -> None:
    folder, network = made
    done = export(folder, "gguf")
    assert done.returncode == 0, done.stderr
    file = f"hf:{folder}/gguf.gguf"
    read = named.build(file, pretrained=True).eval()
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "gguf.gguf").tensors}
    assert {"Q2_K", "Q4_K", "Q4_1", "Q5_1", "F16", "F32"} == set(kinds.values())
    assert kinds["blk.0.attn_q.weight"] == "Q2_K" and kinds["blk.1.ffn_up.weight"] == "F16"
    assert ("output.weight" in kinds) != network.config.tie_word_embeddings
    artifact = Artifact.load(folder / "net")
    for name, w in read.state_dict().items():
        ours = network.state_dict()[name]
        top = ours.abs().max() if name in artifact.packed.keys() | artifact.tied.keys() else 0.0
        assert (w - ours).abs().max() <= 2**-10 * top
    tokens = torch.randint(250, (2, 20))
    with torch.no_grad():
        assert torch.allclose(read(tokens).logits, network(tokens).logits, atol=5e-3)
    text = story()[:200] + " It's 1789:\n\n naïve…"
    theirs, rules = (Tokenizer.from_str(saved.tokenizer(name)) for name in (file, f"hf:{folder}/llama"))
    assert theirs.encode(text).ids == rules.encode(text).ids
    assert saved.settings(file)["rope_parameters"]["rope_theta"] == 2000


def test_an_mlx_folder_is_the_network_bit_for_bit(made: tuple[Path, Any]) -> None:
    folder, _ = made
    done = export(folder, "mlx", out=f"{folder}/mlx")
    assert done.returncode == 0, done.stderr
    tensors, config = (
        load_file(folder / "mlx" / "model.safetensors"),
        json.loads((folder / "mlx/config.json").read_text()),
    )
    assert config["rope_theta"] == 2000 and (folder / "mlx" / "tokenizer.json").is_file()
    artifact = Artifact.load(folder / "net")
    for name, ours in artifact.packed.items():
        layer = name.removesuffix(".weight")
        bits, size = (config["quantization"].get(layer, config["quantization"])[key] for key in ("bits", "group_size"))
        assert bits == {1: 2, 7: 8}.get(int(ours.bits.max()), int(ours.bits.max()))
        parts = {part: tensors.pop(f"{layer}.{part}") for part in ("weight", "scales", "biases")}
        assert torch.equal(affine(parts, bits, size), ours.decode())
    assert tensors.keys() == artifact.raw.keys() and all(torch.equal(tensors[n], t) for n, t in artifact.raw.items())


def test_biases_of_queries_stand_in_pairs_with_their_rows(tmp_path: Path) -> None:
    network = llama(tmp_path / "llama", attention_bias=True)
    bitfront.quantize(network, RTN(bits=4, min_size=0.001)).save(tmp_path / "net")
    assert export(tmp_path, "gguf").returncode == 0
    read = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "gguf.gguf").tensors}
    for name, heads in {"q": 8, "k": 2}.items():
        halves = network.state_dict()[f"model.layers.1.self_attn.{name}_proj.bias"].view(heads, 2, -1)
        assert np.array_equal(read[f"blk.1.attn_{name}.bias"], halves.transpose(1, 2).flatten())


def test_norms_that_are_quantized_are_stored_as_floats(tmp_path: Path) -> None:
    model = bitfront.quantize(llama(tmp_path / "llama"), RTN(bits=4, min_size=0.0005, include=["*norm*"]))
    model.save(tmp_path / "net")
    norm = model.encode()["model.norm.weight"].decode()
    assert export(tmp_path, "gguf").returncode == export(tmp_path, "mlx", out=f"{tmp_path}/mlx").returncode == 0
    read = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "gguf.gguf").tensors}
    assert np.array_equal(read["output_norm.weight"], norm)
    assert torch.equal(load_file(tmp_path / "mlx" / "model.safetensors")["model.norm.weight"], norm)


def test_a_runs_file_names_its_network_below_the_data_root(tmp_path: Path) -> None:
    network = llama(tmp_path / "llama")
    about: dict[str, Any] = {"task": "llm", "config": {"task": {"network": "hf:llama"}}}
    bitfront.quantize(network, RTN(bits=4, min_size=0.001)).save(tmp_path / "net", about)
    done = export(tmp_path, "gguf", model="", data_root=str(tmp_path))
    assert done.returncode == 0, done.stderr
    about["config"]["task"]["network"] = f"hf:{tmp_path}/llama"  # a file may come from anyone
    bitfront.quantize(network, RTN(bits=4, min_size=0.001)).save(tmp_path / "net", about)
    done = export(tmp_path, "gguf", model="", data_root=str(tmp_path))
    assert done.returncode == 1 and "model=hf:<folder> is needed" in done.stderr


def test_mistakes_are_told(tmp_path: Path) -> None:
    network = llama(tmp_path / "llama")
    hf(tmp_path / "bert", "encoder")
    hf(tmp_path / "words", "decoder")
    for name, options in {"net": {}, "groups": {"group_size": 16}, "wide": {"bits": 9}}.items():
        bitfront.quantize(network, RTN(**{"bits": 4, "min_size": 0.001, **options})).save(tmp_path / name)
    words = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "words")
    bitfront.quantize(words, RTN(bits=4, min_size=0.001)).save(tmp_path / "small")
    small = {"artifact": f"{tmp_path}/small", "model": f"hf:{tmp_path}/words"}
    cases: list[tuple[str, dict[str, str], str]] = [
        ("mlx", {"model": f"hf:{tmp_path}/bert"}, "BertModel, gelu; LlamaForCausalLM with silu alone"),
        ("gguf", {"model": f"hf:{tmp_path}/words"}, "the artifact is not of the network in"),
        ("gguf", {"model": f"hf:{tmp_path}/x.gguf"}, "as save_pretrained leaves it"),
        ("gguf", {"model": "hf:nowhere"}, "there is no model=hf:nowhere"),
        ("mlx", {"artifact": f"{tmp_path}/groups"}, "is not in groups that MLX has; quantize with group_size=32"),
        ("gguf", {"artifact": f"{tmp_path}/groups"}, "is not in groups that a type of GGUF has; quantize with"),
        ("mlx", {"artifact": f"{tmp_path}/wide"}, "has codes of 9 bits, and MLX up to 8"),
        ("mlx", {"out": str(tmp_path)}, "give the name of a new folder"),
        ("mlx", {"data": "photos"}, "data: of format=onnx alone"),
        ("gguf", small, "is none that format=gguf knows"),
    ]
    for kind, changes, told in cases:
        done = export(tmp_path, kind, **({"out": f"{tmp_path}/out"} | changes))
        assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".export*"))
