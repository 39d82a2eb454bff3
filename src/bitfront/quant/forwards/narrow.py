"""Convolutions in bfloat16 that a processor does wrongly. With AMX, oneDNN's kernels give noise for some shapes (as in
pytorch's issue 169688; here for inputs of 24 channels and fewer), without a word: such a training ends in a plausible
number.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from bitfront.errors import BitfrontError

LIKE: tuple[dict[int, Any], dict[int, Any]] = (
    {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d},
    {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d},
)  # whatever a network's are derived from
SIZES = {1: (8, 25), 2: (8, 25), 3: (4, 7)}  # of the smaller of input and output, along each of so many axes
MOST = 0.1  # relative error; bfloat16's own is 0.003


def check_convolutions(
    network: nn.Module, device: torch.device, without: str, dtype: torch.dtype = torch.float32
) -> None:
    """Refuse to compute in bfloat16 where one of a network's convolutions, or its gradients, would be noise.

    Args:
        network: whose layers' shapes are tried.
        device: that it is on; only a CPU's are tried.
        without: the setting that does without.
        dtype: that all layers compute in (autocast); where it is float32, those with weights of bfloat16 are tried.

    Raises:
        BitfrontError: with what is wrong, and what to do.
    """
    if device.type != "cpu":
        return
    for name, module in network.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd) or isinstance(module, nn.modules.lazy.LazyModuleMixin):
            continue
        if torch.bfloat16 not in (dtype, module.weight.dtype):
            continue
        own = (module.kernel_size, module.stride, module.dilation)
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        wrong = _error(transposed, module.in_channels, module.out_channels, *own, module.groups)
        if wrong > MOST:
            raise BitfrontError(
                f"this processor computes the convolution '{name}' wrongly in bfloat16 (off by {wrong:.0%}; a fault of "
                f"oneDNN's AMX kernels); set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment, or give {without}"
            )


@cache
def _error(
    transposed: bool,
    channels: int,
    out: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> float:
    """The largest relative error of output and gradients, of random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        module = LIKE[transposed][len(kernel)](channels, out, kernel, stride, dilation=dilation, groups=groups)
    worst = 0.0
    for size in SIZES[len(kernel)]:
        wide = [(size - 1) * s + d * (k - 1) + 1 for k, s, d in zip(kernel, stride, dilation, strict=True)]
        x = torch.randn(1, channels, *([size] * len(kernel) if transposed else wide), generator=generator)
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            given = x.clone().requires_grad_()
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                output = module(given)
            felt = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            grads = torch.autograd.grad(output, [given, module.weight], felt)
            found.append([output.detach().float(), *grads])
        errors = [((b - a).norm() / a.norm()).item() for a, b in zip(*found, strict=True) if a.norm() > 0]
        worst = max(worst, *errors)
    return worst
