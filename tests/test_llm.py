"""Pretrained language models: where they are read from, and perplexity as the papers measure it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from conftest import cli
from test_quantize import hf, story
from tokenizers import Tokenizer
from torch import Tensor

from bitfront.cells.compose import load
from bitfront.cells.flow import build_task
from bitfront.cells.record import read_all
from bitfront.data.texts import apart
from bitfront.errors import BitfrontError
from bitfront.models import hf as saved
from bitfront.models import named
from bitfront.quant.methods.rtn import RTN
from bitfront.quant.storage.artifact import Artifact
from bitfront.tasks.llm import LanguageModel

CONTEXT = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a small network, a text to train on and others to validate and test on."""
    root = tmp_path_factory.mktemp("data")
    hf(root / "llama", "decoder")
    lines = story().splitlines(keepends=True)
    for name, part in {"told/valid": lines[:60], "told/test": lines[60:200], "books/train": lines[200:]}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.txt").write_text("".join(part))
    return root


def words(root: Path, *more: str) -> list[str]:
    own = ["task=llm", "data=told", "model=hf:llama", f"data_root={root}", "task.train_data=[c4,books]"]
    return [*own, f"task.context={CONTEXT}", "task.valid_tokens=0", "wandb=disabled", *more]


def task_of(root: Path, *more: str) -> LanguageModel:
    task = build_task(load(words(root, *more)))
    assert isinstance(task, LanguageModel)
    return task


def perplexity(network: Any, tokens: Sequence[int]) -> tuple[float, float]:
    """Of whole windows, as GPTQ's code has it, and the nats of a token."""
    nats = []
    with torch.no_grad():
        for start in range(0, len(tokens) - CONTEXT + 1, CONTEXT):
            window = torch.tensor(tokens[start : start + CONTEXT])[None]
            nats.append(F.cross_entropy(network(window).logits[0, :-1].double(), window[0, 1:]))
    mean = torch.stack(nats).mean().item()
    return math.exp(mean), mean


@pytest.mark.parametrize("limit", [0, 100])
def test_perplexity_is_that_of_the_papers(root: Path, limit: int) -> None:
    task = task_of(root, f"task.test_tokens={limit}")
    network = transformers.AutoModelForCausalLM.from_pretrained(root / "llama").eval()
    tokenizer = Tokenizer.from_file(str(root / "llama" / "tokenizer.json"))
    tokens = tokenizer.encode((root / "told" / "test.txt").read_text(), add_special_tokens=False).ids
    tokens = tokens[: (limit or len(tokens)) // CONTEXT * CONTEXT]
    ppl, nats = perplexity(network, tokens)
    found = task.evaluate(task.initial(), "test")
    assert found["ppl"] == pytest.approx(ppl, rel=1e-4) and found["loss"] == pytest.approx(nats, rel=1e-5)
    said = tokenizer.decode(tokens, skip_special_tokens=False)
    assert found["bpb"] == pytest.approx(nats / math.log(2) * len(tokens) / len(said.encode()), rel=1e-4)


def test_training_text_is_the_first_that_is_there_and_none_of_the_test(root: Path, tmp_path: Path) -> None:
    task = task_of(root)
    assert task.content["train"] == (root / "books" / "train.txt").read_text()
    assert task.content["test"] == (root / "told" / "test.txt").read_text()
    batches = task.calibration(4, 2)
    assert [tuple(tokens.shape) for tokens, _ in batches] == [(2, CONTEXT + 1)] * 2
    with pytest.raises(BitfrontError, match=r"there is no task\.train_data=c4"):
        _ = task_of(root, "task.train_data=[c4]").content
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(BitfrontError, match=r"to test on alone; .* has train"):
        apart(tmp_path, root / "books")
    text = apart(root / "told" / "test.txt", root / "books" / "train.txt")
    assert text["train"] + text["valid"] == (root / "books" / "train.txt").read_text()  # a tenth validates


def test_a_window_needs_its_tokens(root: Path) -> None:
    with pytest.raises(BitfrontError, match=r"valid has fewer tokens than a window; lower task\.context=32"):
        task_of(root, "task.valid_tokens=31").dataset("valid")


def test_embeddings_are_wider_where_no_size_is_asked_for(root: Path, tmp_path: Path) -> None:
    again = words(root, f"root={tmp_path}", "quant.samples=4", "quant.min_size=0.001")
    wide = {8: "task.embedding_bits=8", 3: "task.embedding_bits=3", 5: "quant.layers={model.embed*: {bits: 5}}"}
    for expected, word in wide.items():
        done = cli("run", *again, "quant=rtn", "bits=2", word)
        assert done.returncode == 0, done.stderr
        (record,) = [r for r in read_all(tmp_path) if r.method == "rtn" and f"{r.id}" in done.stdout]
        bits = {name: {n for n, count in enumerate(w) if count} for name, w in record.widths.items()}
        assert bits["model.embed_tokens.weight"] == {expected}
        assert {tuple(b) for name, b in bits.items() if ".layers." in name} == {(2,)}


def test_the_embeddings_of_a_wide_network_have_widths_of_their_own_and_its_norms_stay_float(root: Path) -> None:
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1))  # 4096 wide
    own = [name for name, p in network.named_parameters() if "embed" in name or "lm_head" in name]
    assert task_of(root).layers(network) == {name: {"bits": 8} for name in own} and len(own) == 2
    quantized = set(RTN().eligible(network))
    assert set(own) < quantized and not any("norm" in name for name in quantized)


def test_a_network_is_known_by_its_content_wherever_it_lies(root: Path, tmp_path: Path) -> None:
    def named_after(*more: str) -> str:
        from bitfront.cells.cell import Cell

        return Cell(words(root, "quant=float", *more)).run().path.name  # type: ignore[union-attr]

    (tmp_path / "moved").symlink_to(root / "llama")
    assert named_after() == named_after(f"model=hf:{tmp_path}/moved")
    hf(tmp_path / "other", "decoder")
    (tmp_path / "other" / "generation_config.json").write_text("{}")
    assert named_after() != named_after(f"model=hf:{tmp_path}/other")


def test_the_default_network_is_fetched(root: Path, tmp_path: Path) -> None:
    done = cli("run", *words(root, "model=hf:smollm2", f"root={tmp_path}"))
    assert done.returncode == 1 and "fetch smollm2` downloads it" in done.stderr


LETTERS = [chr(n) for n in range(33, 127)] + ["Ġ", "Ċ", "ab"]


def in_gguf(network: Any, path: Path) -> None:
    """A Llama as llama.cpp has it: rows of queries and keys in pairs, not halves, for the rotation."""
    config, state = network.config, network.state_dict()
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(["<s>", "</s>", *LETTERS])
    file.add_token_types([3, 3] + [1] * len(LETTERS))
    file.add_token_merges(["a b"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for key, w in state.items():
        name = key.removesuffix(".weight")
        if name in outer:
            file.add_tensor(f"{outer[name]}.weight", w.numpy())
            continue
        _, _, n, part = name.split(".", 3)
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        w = paired(w, heads[part]) if part in heads else w
        file.add_tensor(f"blk.{n}.{names[part]}.weight", w.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def paired(w: Tensor, heads: int) -> Tensor:
    return w.reshape(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape).contiguous()


def test_a_gguf_file_is_the_network_that_it_was_made_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2 + len(LETTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    network = transformers.LlamaForCausalLM(config).eval()
    in_gguf(network, tmp_path / "small.gguf")
    name = f"hf:{tmp_path}/small.gguf"
    loaded = named.build(name, pretrained=True).eval()
    tokens = torch.randint(config.vocab_size, (2, 20))
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, network(tokens).logits, atol=1e-5)
    assert saved.settings(name)["vocab_size"] == config.vocab_size
    assert Tokenizer.from_str(saved.tokenizer(name)).encode("to be").tokens[-2:] == ["b", "e"]
    fresh = named.build(name)
    assert type(fresh) is type(loaded) and fresh.config.hidden_size == 32
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "small.gguf").read_bytes()[:2000])
    with pytest.raises(BitfrontError, match=r"could not read model=hf:.*cut\.gguf"):
        named.build(f"hf:{tmp_path}/cut.gguf", pretrained=True)


def test_a_network_of_half_precision_stays_one_also_on_disk(root: Path, tmp_path: Path) -> None:
    """Without a float cell before it, and wherever its blocks stay, its file and metrics are the same."""
    network = transformers.AutoModelForCausalLM.from_pretrained(root / "llama").bfloat16()
    shutil.copytree(root / "llama", tmp_path / "half")
    network.save_pretrained(tmp_path / "half")
    base = words(root, f"model=hf:{tmp_path}/half", "quant.samples=4", "quant.min_size=0.001", "init_from=null")
    records = {}
    for place in ("", "disk"):
        done = cli("run", *base, "quant=gptq", "bits=3", f"root={tmp_path}/runs{place}", f"offload={place}")
        assert done.returncode == 0, done.stderr
        (records[place],) = read_all(tmp_path / f"runs{place}")
    assert records[""].artifact_sha256 == records["disk"].artifact_sha256
    assert records[""].metrics == records["disk"].metrics
    artifact = Artifact.load(records["disk"].artifact)
    assert artifact.raw["model.norm.weight"].dtype == torch.bfloat16
    assert records["disk"].sizes.float == 2 * records["disk"].sizes.parameters
    at = f"task.network=hf:{tmp_path}/half"
    done = cli("evaluate", f"artifact={records['disk'].artifact}", f"data_root={root}", at, "offload=cpu")
    assert "the same as in its record" in done.stdout


def test_what_trains_is_not_offloaded(root: Path, tmp_path: Path) -> None:
    for more in (["quant=lsq"], ["quant=gptq", "quant.reestimate_bn=true"]):
        done = cli("run", *words(root, *more, "offload=cpu", f"root={tmp_path}"))
        assert done.returncode == 1 and "offload=cpu is of methods that quantize after training" in done.stderr
    assert task_of(root, "task.dtype=float32").precision == torch.float32
