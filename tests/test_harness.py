"""Language models on tasks of lm-evaluation-harness, against log-likelihoods by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import cli
from test_quantize import hf, story
from tokenizers import Tokenizer

from bitfront.errors import BitfrontError
from bitfront.quant.storage.artifact import Artifact
from bitfront.tasks.harness import Harness, Score, _check, _scores

DATA = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {}}}}}\ntest_split: test\n"
TASKS = {
    "quiz": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{answers}}"
doc_to_target: "{{right}}"
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
- {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tale": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
- {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a small network, a text, and tasks for the harness."""
    place = tmp_path_factory.mktemp("data")
    hf(place / "llama", "decoder")
    lines = story().splitlines()
    for name, part in {"told/valid": lines[:60], "told/test": lines[60:120], "books/train": lines[120:]}.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / f"{name}.txt").write_text("\n".join(part) + "\n")
    (place / "tasks").mkdir()
    for name, samples in {"quiz": quiz(), "tale": [{"text": line} for line in lines[:20]]}.items():
        data = place / "tasks" / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, samples)))
        data.with_suffix(".yaml").write_text(f"task: {name}\n" + DATA.format(data) + TASKS[name])
    return place


def quiz() -> list[dict[str, Any]]:
    """Questions with four answers of different lengths."""
    words = story().split()
    return [
        {
            "question": " ".join(words[9 * n : 9 * n + 5]),
            "answers": [" ".join(words[9 * n + 5 + k : 9 * n + 6 + k + (n + k) % 4]) for k in range(4)],
            "right": n % 4,
        }
        for n in range(40)
    ]


@pytest.fixture(scope="module")
def artifact(place: Path) -> Path:
    """The network, rounded to three bits."""
    words = ["task=llm", "data=told", "model=hf:llama", f"data_root={place}", "task.train_data=[books]"]
    words += ["task.context=16", "task.valid_tokens=0", "quant=rtn", "bits=3", "quant.samples=2", f"root={place}/runs"]
    done = cli("run", *words, "quant.min_size=0.001", "trainer.accelerator=cpu")
    assert done.returncode == 0, done.stderr
    (path,) = place.glob("runs/llm/rtn/*/model.safetensors")
    return path


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and no cache from before."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", tmp_path)


class Reader:
    """The quantized network, and its tokenizer."""

    def __init__(self, artifact: Path, folder: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        self.network = transformers.AutoModelForCausalLM.from_config(config).eval()
        Artifact.load(artifact).load_into(self.network)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    @torch.no_grad()
    def nats(self, before: list[int], text: str) -> float:
        """log p of a text behind some tokens."""
        said = self.tokenizer.encode(text).ids
        tokens = torch.tensor([*before, *said])
        log_p = self.network(tokens[None]).logits[0].log_softmax(-1)[len(before) - 1 : -1]
        return log_p[torch.arange(len(said)), torch.tensor(said)].sum().item()


def by_hand(artifact: Path, place: Path) -> dict[str, float]:
    reader, right, normed = Reader(artifact, place / "llama"), [], []
    for sample in quiz():
        question = reader.tokenizer.encode(sample["question"]).ids
        nats = [reader.nats(question, answer) for answer in sample["answers"]]
        per_character = [n / len(answer) for n, answer in zip(nats, sample["answers"], strict=True)]
        right.append(nats.index(max(nats)) == sample["right"])
        normed.append(per_character.index(max(per_character)) == sample["right"])
    lines = story().splitlines()[:20]
    begin = reader.network.config.bos_token_id
    bits = -sum(reader.nats([begin], line) for line in lines) / math.log(2)
    n, wrong = len(right), 1 - sum(right) / len(right)
    return {
        "acc": sum(right) / n,
        "acc_norm": sum(normed) / n,
        "error": math.sqrt(wrong * (1 - wrong) / (n - 1)),
        "bits_per_byte": bits / sum(len(line.encode()) for line in lines),
    }


@pytest.mark.usefixtures("quiet")
def test_scores_are_those_of_the_log_likelihoods(artifact: Path, place: Path) -> None:
    words = [f"artifact={artifact}", f"data_root={place}", "accelerator=cpu", "task.network=hf:llama"]
    words += [f"lm_eval_path={place}/tasks"]
    done = cli("evaluate", *words, "lm_eval=quiz,tale")
    assert done.returncode == 0, done.stderr
    said = {line.split(":")[0].strip(): line.split(":")[1] for line in done.stdout.splitlines()}
    expected = by_hand(artifact, place)
    assert 0 < expected["acc"] != expected["acc_norm"] > 0
    assert f"acc {expected['acc']!r} ± {expected['error']:.2g}," in said["quiz"]
    assert f"acc_norm {expected['acc_norm']!r} ± " in said["quiz"]
    bits = float(said["tale"].split("bits_per_byte ")[1].split()[0])
    assert bits == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert str(artifact) in said and "valid" not in done.stdout
    few = cli("evaluate", *words, "lm_eval=quiz", "lm_eval_limit=1")
    assert few.returncode == 0 and few.stdout.count("acc 0.0") + few.stdout.count("acc 1.0") == 1


@pytest.mark.usefixtures("quiet")
def test_what_is_not_there_is_said_in_a_line(artifact: Path, place: Path, floats: Path) -> None:
    (place / "tasks" / "lost.yaml").write_text("task: lost\n" + DATA.format(place / "gone.json") + TASKS["tale"])
    (place / "tasks" / "far.yaml").write_text("task: far\ndataset_path: their/data\noutput_type: multiple_choice\n")
    own = [f"lm_eval_path={place}/tasks", "task.network=hf:llama"]
    (vision,) = floats.glob("vit/float/*/model.safetensors")
    for file, words, message in (
        (artifact, ["lm_eval=lost", *own], "lm_eval=lost: its data are not there"),
        (artifact, ["lm_eval=far", *own], "lm_eval=far: its data are not there"),
        (artifact, ["lm_eval=quiz", "lm_eval_path=nowhere", own[1]], "there is no folder lm_eval_path=nowhere"),
        (artifact, ["lm_eval_limit=3"], "are of lm_eval="),
        (artifact, ["lm_eval=quiz", "lm_eval_limit=-3", *own], "lm_eval_limit=-3"),
        (vision, ["lm_eval=quiz", own[0]], "lm_eval= is for language models"),
    ):
        done = cli("evaluate", f"artifact={file}", f"data_root={place}", "accelerator=cpu", *words)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_missing_tasks_and_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BitfrontError, match="no task 'quizz'; close names are quiz"):
        _check("quizz", ["quiz", "tale"])
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BitfrontError, match=r"pip install 'bitfront\[lm-eval\]'"):
        Harness(["piqa"])


def test_of_a_metric_the_filter_is_named_and_an_error_may_be_missing() -> None:
    told = {"alias": "a", "sample_len": 3, "acc,none": 1, "acc_stderr,none": 0.25}
    told |= {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"}
    assert _scores(told) == {"acc": Score(1.0, 0.25), "exact_match (strict-match)": Score(0.5, None)}
    assert [str(score) for score in _scores(told).values()] == ["1.0 ± 0.25", "0.5"]
