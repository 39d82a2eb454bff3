"""Tasks of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), for a network that
was trained for none of them: of the answers a to a question q, ``acc`` takes the one with the largest

    log p(a | q) = sum_t log p(a_t | q, a_1 ... a_(t-1)),

``acc_norm`` the one where that is largest per character.
"""

from __future__ import annotations

import difflib
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bitfront.data.texts import read
from bitfront.errors import BitfrontError, first_line
from bitfront.models import hf
from bitfront.progress import phase
from bitfront.tasks.core import Task
from bitfront.tasks.text import OwnText

LOGGERS = ("lm_eval", "datasets", "huggingface_hub")
EDGES = ("bos", "eos")  # tokens that begin and end a text


class Score(NamedTuple):
    """A metric and its standard error over the samples, None where the harness has none."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return repr(self.value) + (f" ± {self.error:.2g}" if self.error is not None else "")


class Harness:
    """Some of its tasks, with their data.

    Args:
        names: of tasks, or of groups of them.
        folder: of yaml files with the user's own tasks; "" for none.

    Raises:
        BitfrontError: the package is missing; a task, or its data, are not there, or it fails.
    """

    def __init__(self, names: Sequence[str], folder: str = "") -> None:
        self.names = names
        if folder and not Path(folder).is_dir():
            raise BitfrontError(f"there is no folder lm_eval_path={folder}")
        with phase("getting the tasks"), self._speaking():
            manager = _manager(names, folder)
            for name in names:
                _check(name, manager.all_tasks)
            self.tasks = manager.load(list(names))

    def scores(self, network: nn.Module, task: Task, limit: int = 0) -> dict[str, dict[str, Score]]:
        """Metrics by task and, for a group, of all its tasks together.

        Args:
            network: of ``task``, with its weights, on the device that is to compute.
            task: what it was quantized for.
            limit: samples of a task, the first ones; 0 for all.

        Raises:
            BitfrontError: the network is not of the right kind, or a task fails.
        """
        if not isinstance(task, OwnText) or not task.pretrained:
            raise BitfrontError("lm_eval= is for language models of transformers, as those of task=llm")
        with self._speaking():
            from lm_eval.defaults import DEFAULT_OTHER_SEED
            from lm_eval.evaluator import evaluate
            from lm_eval.models.huggingface import HFLM

            for each in self.tasks["tasks"].values():
                each.set_fewshot_seed(DEFAULT_OTHER_SEED)
            model = HFLM(pretrained=network, tokenizer=_tokenizer(task), batch_size=task.recipe.batch_size)
            found = evaluate(model, self.tasks, limit=limit or None, log_samples=False)
        return {name: _scores(measured) for name, measured in found["results"].items()}

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Have what fails in the harness, or in a task's code, say so in a line; without its bars in a log file."""
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        words = f"lm_eval={','.join(self.names)}"
        with ExitStack() as quiet:
            if not sys.stderr.isatty():
                quiet.enter_context(redirect_stderr(io.StringIO()))
            quiet.enter_context(redirect_stdout(sys.stderr))
            try:
                yield
            except BitfrontError:
                raise
            except ModuleNotFoundError as error:
                package = (error.name or "").partition(".")[0]
                remedy = "'bitfront[lm-eval]'" if package == "lm_eval" else package
                raise BitfrontError(f"{words} needs {package}: pip install {remedy}") from None
            except OSError as error:
                raise BitfrontError(
                    f"{words}: its data are not there ({first_line(error)}); the harness downloads what it has tasks "
                    "of, once, to ~/.cache/huggingface, which can be copied"
                ) from None
            except Exception as error:  # whatever a task's code raises
                raise BitfrontError(f"{words} fails with {type(error).__name__}: {first_line(error)}") from None


def _manager(names: Sequence[str], folder: str) -> Any:
    """What knows all tasks, or, if that has those that are asked for, a folder's: the harness has 14,000 to read."""
    from lm_eval.tasks import TaskManager

    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=folder or None)


def _check(name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        told = f"close names are {', '.join(close)}; " * bool(close)
        raise BitfrontError(f"the harness has no task '{name}'; {told}`lm-eval ls tasks` prints all of them")


def _tokenizer(task: OwnText) -> Any:
    """The task's own, in the form that the harness takes."""
    found, where = read(task.rules, f"model={task.name}"), task.settings
    told = {edge: where.get(f"{edge}_token_id") for edge in EDGES}
    ids = {edge: n[0] if isinstance(n, list) else n for edge, n in told.items() if n not in (None, [])}
    if not ids:
        raise BitfrontError(f"lm_eval= needs the bos_token_id or eos_token_id of model={task.name} in its config.json")
    edges = {f"{edge}_token": found.id_to_token(n) for edge, n in ids.items()}
    return hf.library("lm_eval=").PreTrainedTokenizerFast(tokenizer_object=found, **edges)


def _scores(measured: Mapping[str, Any]) -> dict[str, Score]:
    """Of ``{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}``; the part behind the comma is a filter of the answers."""
    found = {}
    for key, value in measured.items():
        metric, comma, kept = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = measured.get(f"{metric}_stderr,{kept}")
            name = metric if kept == "none" else f"{metric} ({kept})"
            found[name] = Score(float(value), error if isinstance(error, float) else None)
    return found
