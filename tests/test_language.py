"""Language modelling: metrics at their extremes, windows, the paper's network and recipe, texts and their damage."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import torchrun
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.text import Perplexity

from bitfront.cells import compose
from bitfront.cells.flow import build_method, build_task
from bitfront.cells.record import read_all
from bitfront.commands import start
from bitfront.commands.evaluate import evaluate
from bitfront.data import docstrings, text
from bitfront.data.corpus import SPLITS, Windows
from bitfront.errors import BitfrontError
from bitfront.models.transformer_lm import TransformerLM, sinusoids
from bitfront.quant.engine.plan import Calibration, plan
from bitfront.quant.model import MB, eligible
from bitfront.tasks.batches import EpochBatches
from bitfront.tasks.language import Language, WikiText103

ADAPTIVE = {"vocabulary": 50, "dim": 16, "depth": 2, "heads": 2, "context": 12, "cutoffs": [10, 20], "factor": 2}
SMALL = ("task.dim=64", "task.depth=2", "task.heads=2", "task.context=32", "task.overlap=16", "task.cutoffs=[64,96]")


@pytest.mark.parametrize("cutoffs", [[], [10, 20]])
def test_words_are_drawn_as_often_as_they_are_likely(cutoffs: list[int]) -> None:
    torch.manual_seed(0)
    words, h = TransformerLM(**ADAPTIVE | {"cutoffs": cutoffs}).words, torch.randn(16)
    found = words.drawn(h.expand(40_000, 16), torch.Generator().manual_seed(0)).bincount(minlength=50) / 40_000
    wanted = words.logits(h).softmax(-1)
    assert (found - wanted).abs().max() < 0.01 and found[20:].sum() > 0.02


def task(name: str, *words: str) -> Language:
    return build_task(compose.load([f"task={name}", *words]))


class Flat(nn.Module):
    """Gives every target the same loss."""

    def __init__(self, nll: float) -> None:
        super().__init__()
        self.nll = nll

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        return torch.full(targets.shape, self.nll)


@pytest.mark.parametrize("name", ["lm", "lm_wikitext103"])
def test_perfect_and_chance_predictors(name: str) -> None:
    language = task(name, "smoke=true")
    perfect = language.evaluate(Flat(0.0), "test")
    assert perfect == {"bpb": 0, "loss": 0, "ppl": 1, "word_ppl": 1}
    net = language.model()
    for p in net.parameters():
        nn.init.zeros_(p)
    chance = language.evaluate(net, "test")
    if name == "lm":  # the same score for each of 192 words
        assert chance == pytest.approx({"bpb": math.log2(192), "loss": math.log(192), "ppl": 192, "word_ppl": 192})
    else:  # the same for 128 words and two bands of 32 words each
        stream = language.corpus.streams["test"][1:]
        bits = math.log2(130) + 5 * (stream >= 128).float().mean().item()
        assert chance["bpb"] == pytest.approx(bits) and chance["ppl"] == pytest.approx(2**bits)
    assert language.corpus.unigram("test") < math.log2(192)


def test_metrics_are_those_of_the_definitions() -> None:
    language = task("lm", "smoke=true")
    language.corpus.sizes = torch.arange(192) % 5 + 1
    net, stream = language.model().eval(), language.corpus.streams["test"][None, :17].long()
    language.corpus.streams["test"] = stream[0].int()
    with torch.no_grad():
        losses = net(stream[:, :-1], stream[:, 1:])
        every = torch.arange(192).expand(16, 192)  # all words as targets: the logits
        repeated = [net(stream[:, :-1], every[:, i][None])[0] for i in range(192)]
    logits = -torch.stack(repeated, dim=1)
    assert torch.allclose(logits.exp().sum(1), torch.ones(16))
    perplexity = Perplexity()
    perplexity.update(logits[None], stream[:, 1:])
    measured = language.evaluate(net, "test")
    size = language.corpus.sizes[stream[0, 1:]].sum()
    assert measured["ppl"] == pytest.approx(perplexity.compute().item())
    assert measured["bpb"] == pytest.approx((losses.sum() / math.log(2) / size).item())
    assert measured["loss"] == pytest.approx(losses.mean().item())
    assert measured["word_ppl"] == pytest.approx(math.exp(losses.sum().item() / 512))


def test_metrics_depend_neither_on_batches_nor_on_processes() -> None:
    language = task("lm", "smoke=true")
    net = language.model().eval()
    whole = language.evaluate(net, "test")
    assert replace(language, recipe=replace(language.recipe, batch_size=7)).evaluate(net, "test") == pytest.approx(
        whole
    )
    shares = [language.metrics(sync_on_compute=False) for _ in range(2)]
    windows = language.dataset("test")
    for rank, metrics in enumerate(shares):
        for indices in EpochBatches(len(windows), 16, None, rank, 2):
            with torch.no_grad():
                language.update(metrics, net, windows[indices])
    for name, metric in shares[0].items():
        metric.merge_state(shares[1][name])
        assert metric.compute().item() == pytest.approx(whole[name])


@pytest.mark.parametrize(
    ("n", "context", "overlap"), [(100, 16, 0), (100, 16, 12), (96, 16, 8), (7, 16, 4), (17, 16, 15)]
)
def test_windows_predict_each_token_once_and_with_context(n: int, context: int, overlap: int) -> None:
    windows = Windows(torch.arange(n + 1, dtype=torch.int32), context, overlap)
    tokens, new = windows[list(range(len(windows)))]
    assert tokens[:, 1:][new].tolist() == list(range(1, n + 1))
    before = tokens[:, 1:] - tokens[:, :1]  # how many tokens are known when one is predicted
    assert (before[1:][new[1:]] > overlap).all()
    assert all(torch.equal(windows[[i]][0][0], tokens[i]) for i in range(len(windows)))


def test_training_windows_are_drawn_anew() -> None:
    windows = Windows(torch.arange(1000, dtype=torch.int32), 16, drawn=160)
    assert len(windows) == 10
    tokens, new = windows[[0, 1, 2]]
    assert tokens.shape == (3, 17) and new.all() and torch.equal(tokens - tokens[:, :1], torch.arange(17).expand(3, 17))
    assert not torch.equal(windows[[0, 1, 2]][0], tokens)
    language = task("lm", "smoke=true")
    assert torch.equal(language.calibration(8, 8)[0][0], language.calibration(8, 8)[0][0])


def test_the_future_is_not_seen() -> None:
    net = TransformerLM(**ADAPTIVE).eval()
    words = torch.randint(50, (2, 13))
    other = words.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 50
    a, b = (net(w[:, :-1], w[:, 1:]) for w in (words, other))
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.allclose(a[:, 8:], b[:, 8:])


def test_adaptive_softmax_and_input_are_the_librarys() -> None:
    net = TransformerLM(**ADAPTIVE).eval()
    table = net.words
    oracle = nn.AdaptiveLogSoftmaxWithLoss(16, 50, [10, 20], div_value=2.0)
    with torch.no_grad():
        oracle.head.weight.copy_(torch.cat([table.embeddings[0].weight, table.bands.weight]))
        for band, tail in enumerate(oracle.tail, 1):
            tail[0].weight.copy_(table.projections[band].weight.t())
            tail[1].weight.copy_(table.embeddings[band].weight)
    h, targets = torch.randn(40, 16), torch.randint(50, (40,))
    assert torch.allclose(table.nll(h, targets), -oracle(h, targets).output, atol=1e-6)
    x = table(torch.arange(50).view(5, 10)).view(50, 16)
    for word in (0, 9, 10, 19, 20, 49):
        band = (word >= 10) + (word >= 20)
        vector = table.embeddings[band].weight[word - table.edges[band]]
        assert torch.allclose(x[word], table.projections[band].weight @ vector, atol=1e-6)


def test_positions_are_fairseqs() -> None:
    positions = sinusoids(5, 8)
    rates = [10000 ** (-i / 3) for i in range(4)]
    expected = [[f((t + 2) * r) for f in (math.sin, math.cos) for r in rates] for t in range(5)]
    assert torch.allclose(positions, torch.tensor(expected), atol=1e-5)


def test_every_parameter_has_a_gradient_also_of_what_is_left_out() -> None:
    net = TransformerLM(**ADAPTIVE, layerdrop=0.999, dropout=0.1, attention_dropout=0.1, relu_dropout=0.1)
    words = torch.randint(10, (2, 5))  # none of the rarer bands
    net(words[:, :-1], words[:, 1:]).mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(g is not None for g in gradients.values())
    assert not gradients["layers.0.fc1.weight"].any() and gradients["words.embeddings.0.weight"].any()


def test_the_papers_network_and_its_sizes() -> None:
    language = task("lm_wikitext103")
    with torch.device("meta"):
        net = language.model()
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == sum(t.numel() for t in net.state_dict().values()) == 246_933_504
    assert parameters * 4 / MB == pytest.approx(941.98, abs=0.005)
    method = build_method(compose.load(["task=lm_wikitext103", "quant=lsq"]))
    quantized = [p.numel() for p in method.eligible(net).values()]
    assert len(quantized) == 16 * 7 + 6  # with the first biases of the feed-forward parts
    for bits, size in ((4, 118.25), (8, 235.92)):
        rule = sum(bits * n + 64 for n in quantized) + 32 * (parameters - sum(quantized))
        assert rule / 8 / MB == pytest.approx(size, abs=0.005)
    assert language.summed == 3072 and language.primary == ("ppl", False)


def test_calibration_sees_what_every_matrix_gets() -> None:
    language = task("lm_wikitext103", "smoke=true")
    net = language.model()
    weights = {name: p for name, p in eligible(net, min_size=0.0).items() if p.dim() == 2}
    data = Calibration(language.calibration(8, 4), run=language.loss)
    units = plan(net, weights, data)
    assert not any(unit.blind for unit in units)
    assert {name for unit in units for stage in unit.stages for name in stage} == weights.keys()
    layer = next(unit for unit in units if unit.block == "layers.1")
    assert [len(stage) for stage in layer.stages] == [3, 1, 1, 1]
    assert all("words" in name for unit in units[:5] for stage in unit.stages for name in stage)  # what is used first


def test_nag_is_fairseqs() -> None:
    language = task("lm_wikitext103")
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = language.recipe.optimizer([p], language.decays)
    expected, velocity, old = p.detach().clone(), torch.zeros(5, dtype=torch.float64), language.recipe.lr
    for lr in (1e-7, 0.1, 1.0, 0.7, 1e-4):
        p.grad = gradient = torch.randn(5, dtype=torch.float64)
        expected += 0.99**2 * (lr / old) * velocity - 1.99 * lr * gradient
        velocity, old = 0.99 * (lr / old) * velocity - lr * gradient, lr
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert torch.allclose(p, expected, rtol=1e-12)


def test_the_papers_learning_rate() -> None:
    language = task("lm_wikitext103")
    recipe = language.recipe
    rates = {step: recipe.lr_factor(step, 1) * recipe.lr for step in (0, 8000, 16000, 151000, 285999, 286000, 556000)}
    wanted = {0: 1e-7, 8000: 0.5, 16000: 1, 151000: 0.50005, 285999: 1e-4, 286000: 0.75, 556000: 0.75 * 0.50005}
    assert rates == pytest.approx(wanted, rel=1e-5)
    assert recipe.lr_factor(286000 + 540000, 1) == pytest.approx(0.75**2)
    assert recipe.clip == 0.1 and recipe.keep == "best" and recipe.batch_size * language.context == 24 * 3072


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """The official layout with 160 words that get rarer, and a test word that the others do not have."""
    words = [f"w{i:03}" for i in range(160) for _ in range(1 + 800 // (i + 1))]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    folder = tmp_path / "wikitext-103"
    folder.mkdir()
    for split, size in {"train": len(words), "valid": 300, "test": 300}.items():
        body = [" ".join(words[i] for i in order[at : at + 40]) for at in range(0, size, 40)]
        extra = " <unk> neverseen" if split == "test" else " <unk>"
        rows = ["", "= Title =", "", *body[:-1], body[-1] + extra]
        (folder / f"wiki.{split}.tokens").write_text("".join(f" {row} \n" if row else " \n" for row in rows))
    return tmp_path


def test_words_are_numbered_as_in_fairseq(wikitext: Path) -> None:
    corpus = text.load(wikitext, "wikitext-103", 168)  # 4 + 160 + "=" + "Title", filled up
    counts: dict[str, int] = {}
    content = (wikitext / "wikitext-103" / "wiki.train.tokens").read_text()
    for word in content.split():
        counts[word] = counts.get(word, 0) + 1
    ordered = sorted(sorted(counts.keys() - {"<unk>"}), key=lambda word: -counts[word])
    numbers = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *ordered])}
    expected = [2]
    for line in content.split("\n")[:-1]:
        expected += [*(numbers[word] for word in line.split()), 2]
    assert corpus.streams["train"].tolist() == expected
    assert corpus.sizes[corpus.streams["train"][1:].long()].sum() == len(content.encode())
    assert corpus.streams["test"].tolist()[-3:] == [3, 3, 2]
    assert corpus.words["train"] == len(expected) - 1
    again = text.load(wikitext, "wikitext-103", 168)
    assert again.words == corpus.words and torch.equal(again.streams["valid"], corpus.streams["valid"])


def test_what_is_missing_or_damaged_is_named(wikitext: Path) -> None:
    with pytest.raises(
        BitfrontError, match=r"0 different words|different words, which makes a vocabulary of 168 and not"
    ):
        text.load(wikitext, "wikitext-103", 267744)
    text.load(wikitext, "wikitext-103", 168)
    test = wikitext / "wikitext-103" / "wiki.test.tokens"
    test.write_bytes(b" caf\xe9 \n")
    with pytest.raises(BitfrontError, match="damaged"):
        text.load(wikitext, "wikitext-103", 168)
    test.write_bytes(b"")
    with pytest.raises(BitfrontError, match=r"wiki.test.tokens', of wikitext-103-v1.zip.*data_root="):
        text.load(wikitext, "wikitext-103", 168)
    with pytest.raises(BitfrontError, match=r"no task.data=ptb; choices: docstrings, books, wikitext2, wikitext-103"):
        text.load(wikitext, "ptb", 168)
    books(wikitext)
    with pytest.raises(BitfrontError, match=r"wikitext2/test.txt', the raw test text of WikiText-2"):
        text.load(wikitext, "wikitext2", 300)
    with pytest.raises(BitfrontError, match="vocabulary=100000 does not fit"):
        text.load(wikitext, "books", 100000)
    (wikitext / "books" / "valid.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BitfrontError, match=r"valid.txt' is damaged: not UTF-8 at byte 3"):
        text.load(wikitext, "books", 300)


PARAGRAPH = "It was the best of times – it was the worst of times,\n\n  it was the age of wisdom…\n"


def books(root: Path) -> None:
    (root / "books").mkdir()
    for split, copies in {"train": 30, "valid": 1, "test": 2}.items():
        (root / "books" / f"{split}.txt").write_text(PARAGRAPH * copies)


def test_byte_pairs_lose_nothing(tmp_path: Path) -> None:
    books(tmp_path)
    corpus = text.load(tmp_path, "books", 290)
    sizes = {split: int(corpus.sizes[stream[1:].long()].sum()) for split, stream in corpus.streams.items()}
    assert sizes == {
        split: len(PARAGRAPH.encode()) * copies for split, copies in (("train", 30), ("valid", 1), ("test", 2))
    }
    assert corpus.words["valid"] == 19 + 3
    again = text.byte_pairs({s: (tmp_path / "books" / f"{s}.txt").read_text() for s in SPLITS}, 290)
    assert all(torch.equal(again.streams[split], stream) for split, stream in corpus.streams.items())
    (tmp_path / "books" / "test.txt").write_text("Another.\n")
    text.load(tmp_path, "books", 290)
    assert len(list((tmp_path / "generated").iterdir())) == 2


def test_wikitext_is_brought_back_to_running_text(tmp_path: Path) -> None:
    line = " He said : \" The 1 @,@ 000 @-@ year ( old ) king 's men don 't , \" twice @.@ \n = Title = \n"
    assert text.detokenized(line).startswith("He said: \"The 1,000-year (old) king's men don't,\"")
    assert text.detokenized(" \n = Title = \n \n") == "\n= Title =\n\n"
    books(tmp_path)
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text(" \n = A = \n \n It was , the best . \n")
    corpus = text.load(tmp_path, "wikitext2", 290)
    assert corpus.words["test"] == 9 + 4
    assert corpus.sizes[corpus.streams["test"][1:].long()].sum() == len("\n= A =\n\nIt was, the best.\n")


SOURCE = '''
def fit(x):
    """Fit the model to the :class:`~lib.Data` and the ``labels`` that are given here.

    This method works on all of the given samples, and it returns the model itself.

    >>> fit(1)  # Not a sentence that anyone would like to read here.

    Parameters
    ----------
    x : array
        The samples that the model is to be fitted to, in the order of their age.
    Fit the model to the Data and the labels that are given here.
    """
'''


def test_docstrings_become_prose(tmp_path: Path) -> None:
    lines = list(docstrings.prose(SOURCE.encode()))
    assert lines[0] == "Fit the model to the lib.Data and the labels that are given here."
    assert lines[1].startswith("This method works on") and lines[2].startswith("The samples that the model")
    assert len(lines) == 4
    (tmp_path / "lib").mkdir()
    for i in range(60):
        (tmp_path / "lib" / f"f{i}.py").write_text(SOURCE if i else SOURCE.replace("model", "tree"))
    (tmp_path / "lib" / "version.py").write_text("no python")
    texts = docstrings.corpus({"lib": tmp_path / "lib"})
    assert sum(content.count("returns the model itself") for content in texts.values()) == 1
    assert {docstrings.split_of(f"lib/f{i}.py") for i in range(60)} == set(SPLITS)


@pytest.mark.slow
def test_the_default_text_is_the_recorded_one() -> None:
    texts = docstrings.docstrings()  # checks its hash
    assert {split: len(content) for split, content in texts.items()} == {
        "test": 104_058,
        "valid": 61_816,
        "train": 1_635_982,
    }
    assert all(content.isascii() for content in texts.values())


def test_other_packages_than_the_locked_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "PACKAGES", {"tqdm": "tqdm"})
    with pytest.raises(BitfrontError, match="install with make"):
        docstrings.docstrings()


@pytest.mark.parametrize("word", ["task.heads=5", "task.overlap=128", "task.dropout=1", "task.valid_tokens=-1"])
def test_impossible_networks_and_windows_are_refused(word: str) -> None:
    with pytest.raises(BitfrontError, match=r"does not fit|dropout is in|valid_tokens is not negative"):
        task("lm", word)


@pytest.mark.parametrize("word", ["task.cutoffs=[60000,20000]", "train.cycle=0", "train.momentum=1.0"])
def test_impossible_recipes_are_refused(word: str) -> None:
    with pytest.raises(BitfrontError, match=word.partition("=")[0]):
        task("lm_wikitext103", word)


@pytest.mark.slow
def test_the_papers_recipe_on_two_processes(wikitext: Path, tmp_path: Path) -> None:
    words = ("task=lm_wikitext103", "quant=diffq", "wandb=disabled", "trainer.accelerator=cpu", *SMALL)
    recipe = ("task.vocabulary=168", "train.epochs=3", "train.warmup_steps=10", f"root={tmp_path / 'runs'}")
    torchrun(tmp_path, start, "run", (*words, *recipe, f"data_root={wikitext}", "trainer.devices=2"))
    (record,) = (r for r in read_all(tmp_path / "runs") if r.method == "diffq")
    assert record.processes == 2 and len(record.history) == 3
    assert record.primary.name == "ppl" and record.primary.value < 168
    artifact = Path(record.artifact)
    assert evaluate(artifact, str(wikitext), "cpu") == record.metrics
    otherwise = evaluate(artifact, str(wikitext), "cpu", ["task.overlap=0"])  # less context for each word
    assert otherwise["test"]["loss"] != record.metrics["test"]["loss"]
    for word, message in (("task.overlapp=0", "did you mean 'overlap'"), ("task.overlap=x", "takes a whole number")):
        with pytest.raises(BitfrontError, match=message):
            evaluate(artifact, str(wikitext), "cpu", [word])


@pytest.mark.slow
def test_the_papers_configuration_at_full_width(tmp_path: Path) -> None:
    folder = tmp_path / "wikitext-103"
    folder.mkdir()
    words = [f"w{i}" for i in range(267_733)]
    for split, some in {"train": words, "valid": words[:400], "test": words[-400:]}.items():
        rows = (" ".join(some[at : at + 100]) for at in range(0, len(some), 100))
        (folder / f"wiki.{split}.tokens").write_text("".join(f" {row} <unk> \n" for row in rows))
    short = ("task.context=32", "task.overlap=24", "train.batch_size=4")  # 3,072 words and 24 samples need a GPU
    language = task("lm_wikitext103", f"data_root={tmp_path}", *short)
    assert isinstance(language, WikiText103)
    net = language.model().train()
    recipe = language.recipe
    optimizer = recipe.optimizer(net.parameters(), language.decays)
    losses = []
    for step, batch in zip(range(20), language.loader("train"), strict=False):
        optimizer.param_groups[0]["lr"] = recipe.lr * recipe.lr_factor(80 * step, 1)
        loss = language.loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 20 and all(map(math.isfinite, losses)) and sum(losses[-3:]) < 3 * losses[0]
    assert math.isfinite(language.evaluate(net, "test")["loss"])


def test_softmax_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    net = TransformerLM(**ADAPTIVE).eval()
    words = torch.randint(50, (3, 13))
    whole = net(words[:, :-1], words[:, 1:])
    monkeypatch.setattr("bitfront.models.transformer_lm.CHUNK", 5)
    assert torch.allclose(net(words[:, :-1], words[:, 1:]), whole, atol=1e-6)
    plain = TransformerLM(**ADAPTIVE | {"cutoffs": []}).eval()
    x = math.sqrt(16) * plain.words(words[:, :-1]) + plain.positions
    for layer in plain.layers:
        x = layer(x)
    logits = plain.norm(x) @ plain.words.embeddings[0].weight.t()
    expected = F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten(), reduction="none")
    assert torch.allclose(plain(words[:, :-1], words[:, 1:]).flatten(), expected, atol=1e-5)
