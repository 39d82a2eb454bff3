"""What the end of the network feels of an error in a weight, so that errors of all weights are in one unit.

With ``J`` the Jacobian of the outputs in the output of a layer, an error ``dW`` of its weight costs
``sum |J dW x|²`` over the samples. Of ``Jᵀ J`` one number per layer is kept (as if it were ``c I``), found by
backward passes of outputs times random signs, whose squared gradients have the mean ``sum |Jᵀ v|² |x|²``
(Hutchinson):

    loss(dW) = c tr(dW H dWᵀ),      c = E |gradient of W|² / (rows · tr H)

Where nothing is known of the inputs, H is the unit matrix. (In the manner of HAWQ-V2, arXiv 1911.03852, and of the
Fisher weights of OAC, arXiv 2405.15025.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitfront.quant.engine.blockwise import floats
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.forwards.functional import differentiable
from bitfront.quant.forwards.together import gathered, place
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.layers.felt import probe
from bitfront.quant.layers.inputs import Moments


def gradients(
    network: nn.Module, weights: dict[str, nn.Parameter], data: Calibration, seed: int = 0
) -> dict[str, float]:
    """The squared gradient of each weight, summed over its values and all batches, for random signs at the outputs.

    Each output counts by its power. Outputs are what the network gives, whatever loss ``data.run`` makes of them.

    Args:
        network: float, on the device to work on.
        weights: of it.
        data: batches.
        seed: of the signs, which differ between processes.
    """
    total = dict.fromkeys(weights, 0.0)
    generator = torch.Generator().manual_seed(seed + place()[0])
    found: list[Tensor] = []
    hook = network.register_forward_hook(lambda _module, _args, output: found.extend(floats(output)))
    learning = {p: p.requires_grad for p in network.parameters()}
    try:
        with undisturbed(network):
            network.eval()
            for name, p in network.named_parameters():
                p.requires_grad_(name in weights)
            for batch in data.batches:
                found.clear()
                for name, g in _of_batch(network, weights, data, batch, found, generator).items():
                    total[name] += g
    finally:
        hook.remove()
        for p, kept in learning.items():
            p.requires_grad_(kept)
    everyone = gathered(total)
    return {name: sum(one[name] for one in everyone) for name in total}


def _of_batch(
    network: nn.Module,
    weights: dict[str, nn.Parameter],
    data: Calibration,
    batch: Any,
    found: list[Tensor],
    generator: torch.Generator,
) -> dict[str, float]:
    with differentiable(network):
        data.forward(network, batch)
        probed = probe(found, generator)
        if not probed.requires_grad:
            return {}
        grads = torch.autograd.grad(probed, list(weights.values()), allow_unused=True)
    return {name: g.double().square().sum().item() for name, g in zip(weights, grads, strict=True) if g is not None}


def price(w: Tensor, gradient: float, inputs: Moments | None) -> float:
    """What a squared error of 1 of the layer's output, or of the weight where nothing is known of its inputs, costs.

    Args:
        w: the weight.
        gradient: its squared gradient.
        inputs: as ``PostTraining.solve`` takes them.
    """
    if inputs is None:
        return gradient / w.numel()
    trace = inputs.H.diagonal(dim1=1, dim2=2).sum().item()
    return gradient * inputs.batch / (w.numel() / inputs.columns * trace) if trace else 0.0


def error(quantized: Tensor, w: Tensor, inputs: Moments | None) -> float:
    """The squared error itself: ``tr(dW H dWᵀ)``."""
    difference = (quantized - w).float()
    if inputs is None:
        return difference.double().square().sum().item()
    rows = inputs.rows(difference)
    return ((rows @ inputs.H.float()) * rows).sum(dtype=torch.float64).item()
