"""Fine-tuning on what the float network makes of the training data, in the place of labels or beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitfront.tasks.core import Task


class Distillation:
    """``(1 - share)`` of a task's loss, and ``share`` of how far a network's answers are from those of another one.

    Args:
        task: says how networks are called, and how far answers are apart.
        teacher: the network to follow.
        share: 0..1.
    """

    def __init__(self, task: Task, teacher: nn.Module, share: float) -> None:
        self.task, self.share = task, share
        self.teacher = teacher.eval().requires_grad_(False)

    def __call__(self, net: nn.Module, batch: Any) -> Tensor:
        answers = self.task.answers(net, batch)
        with torch.no_grad():
            wanted = self.task.answers(self.teacher.to(answers.device), batch)
        loss = self.share * self.task.divergence(answers, wanted)
        return loss if self.share == 1 else loss + (1 - self.share) * self.task.loss(net, batch)
