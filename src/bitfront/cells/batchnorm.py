"""Statistics of batch norms for the weights that are evaluated.

Those that training leaves behind belong to other weights: float ones before post-training quantization, ones with noise
in DiffQ. The official decoupleQ measures them anew in its last step (arXiv 2404.12759, ``recal_bn`` of its code).
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitfront.quant.layers.inputs import no_fast_path
from bitfront.tasks.core import Task, to_device

BATCHES = 64  # of the training


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep statistics."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def reestimate(model: nn.Module, task: Task, device: torch.device) -> None:
    """Measure the batch norms anew, over ``BATCHES`` batches with equal weight; all else is as in evaluation.

    The batches are the training's, augmented and padded as there: statistics of others fit neither the learned scales
    and shifts nor, as cropped images have black borders, the weights.

    Args:
        model: gives in evaluation mode what its quantized weights give.
        task: whose training set it is; the same batches for the same seed.
        device: where the model goes.
    """
    model.to(device).eval()
    norms = batch_norms(model)
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    with no_fast_path(), torch.random.fork_rng([]):
        torch.manual_seed(task.seed)
        for batch in islice(task.loader("train", shared=False), BATCHES):
            task.loss(model, to_device(batch, device))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
        m.eval()
