"""Views of the project in Weights & Biases: per task, which method keeps the metric at which size.

    python -m src.dashboard dry_run=true            what would be made; needs no login and no network
    python -m src.dashboard                         a view for every task with finished runs below runs/
    python -m src.dashboard results/records task=vit entity=my-team

Each call saves new views; an old one is deleted in the app.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitfront.cells import tracking
from bitfront.commands.options import folder, options
from bitfront.commands.options import usage as usage_of
from bitfront.console import CONSOLE


@dataclass
class Options:
    """Of the command; the project is that of the runs and the entity the user's, unless others are named."""

    task: str = ""
    entity: str = ""
    project: str = ""
    dry_run: bool = False


def usage() -> str:
    """The help."""
    return usage_of(__doc__, Options)


def main(words: list[str]) -> None:
    """Save the views that the words ask for, or print them.

    Raises:
        BitfrontError: there are no runs, or W&B does not take the views.
    """
    from bitfront.reports.dashboard import outline, save, views

    root, words = folder(words)
    chosen = options(Options, words)
    for view in views(root, chosen.task, chosen.project or tracking.project()):
        if chosen.dry_run:
            CONSOLE.print(outline(view._to_model().model_dump(by_alias=True, exclude_none=True)))
        else:
            CONSOLE.print(f"{view.name}: {save(view, chosen.entity)}")
