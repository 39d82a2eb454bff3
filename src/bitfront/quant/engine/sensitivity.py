"""What the end of the network, or of a block, feels of an error in a weight, so that errors of all weights are in one
unit.

With ``J`` the Jacobian of the outputs in the output of a layer, an error ``dW`` of its weight costs
``sum |J dW x|²`` over the samples. Of ``Jᵀ J`` one number per layer is kept (as if it were ``c I``), found by
backward passes of outputs times random signs, whose squared gradients have the mean ``sum |Jᵀ v|² |x|²``
(Hutchinson):

    loss(dW) = c tr(dW H dWᵀ),      c = E |gradient of W|² / (rows · tr H)

Where it is known what the network's answers are, the passes are of ``Calibration.loss``: with labels drawn from odds,
it is what the error costs in relative entropy (Fisher). Where nothing is known of the inputs, H is the unit matrix. (In
the manner of HAWQ-V2, arXiv 1911.03852, and of the Fisher weights of OAC, arXiv 2405.15025.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bitfront.progress import Bar
from bitfront.quant.engine.blockwise import floats, kept
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.forwards.captured import copied
from bitfront.quant.forwards.functional import differentiable
from bitfront.quant.forwards.narrow import check_convolutions
from bitfront.quant.forwards.together import gathered, place
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.layers.felt import Pass, probe
from bitfront.quant.layers.inputs import Moments


@contextmanager
def probed(
    module: nn.Module,
    forwards: Iterable[tuple[int, Tensor | None, Callable[[], object]]],
    seed: int,
    time_last: bool,
) -> Iterator[Iterator[Pass]]:
    """Passes to a scalar: a module's output times random signs, without what is padding.

    Args:
        module: of the network.
        forwards: number of the batch, what is not padding, and a forward that calls the module.
        seed: of the signs, which differ between processes.
        time_last: where padding is, as of a ``Unit``.
    """
    generator, found = torch.Generator().manual_seed(seed + place()[0]), list[Tensor]()

    def run(forward: Callable[[], object], valid: Tensor | None) -> Tensor:
        found.clear()
        forward()
        return probe([kept(x, valid, time_last) for x in found], generator)

    hook = module.register_forward_hook(lambda _module, _args, output: found.extend(floats(output)))
    try:
        yield ((n, valid, partial(run, forward, valid)) for n, valid, forward in forwards)
    finally:
        hook.remove()


@contextmanager
def at_the_end(
    network: nn.Module, data: Calibration, time_last: bool, dtype: torch.dtype = torch.float32
) -> Iterator[Iterator[Pass]]:
    """For each batch, a pass that has gradients to a scalar: of ``data.loss``, if that is known, else of the network's
    outputs. Products are of a type.

    Raises:
        BitfrontError: this processor's are not to be trusted (``check_convolutions``).
    """
    device = next(network.parameters()).device
    check_convolutions(network, device, "block_dtype=float32", dtype)

    def narrow(run: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return run()

    def narrowed(passes: Iterable[Pass]) -> Iterator[Pass]:
        return ((n, valid, partial(narrow, run)) for n, valid, run in passes)

    bar = Bar(data.batches, desc="what the end feels", unit="batch")
    numbered = ((n, data.valid(batch), batch) for n, batch in enumerate(bar))
    with undisturbed(network), differentiable(network):
        if loss := data.loss:
            generator = torch.Generator().manual_seed(data.seed + place()[0])
            yield narrowed((n, v, partial(loss, network, copied(batch), generator)) for n, v, batch in numbered)
            return
        forwards = ((n, valid, partial(data.forward, network, batch)) for n, valid, batch in numbered)
        with probed(network, forwards, data.seed, time_last) as passes:
            yield narrowed(passes)


def gradients(
    network: nn.Module,
    weights: dict[str, nn.Parameter],
    data: Calibration,
    time_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """The squared gradient of each weight, summed over its values and all batches.

    Args:
        network: float, in evaluation mode, on the device to work on.
        weights: of it.
        data: batches.
        time_last: where padding is, in outputs, as of a ``Unit``.
        dtype: of products.
    """
    total = dict.fromkeys(weights, 0.0)
    learning = {p: p.requires_grad for p in network.parameters()}
    try:
        for name, p in network.named_parameters():
            p.requires_grad_(name in weights)
        with at_the_end(network, data, time_last, dtype) as passes:
            for _, _, run in passes:
                if not (end := run()).requires_grad:
                    continue
                grads = torch.autograd.grad(end, list(weights.values()), allow_unused=True)
                for name, g in zip(weights, grads, strict=True):
                    total[name] += 0.0 if g is None else g.double().square().sum().item()
    finally:
        for p, before in learning.items():
            p.requires_grad_(before)
    everyone = gathered(total)
    return {name: sum(one[name] for one in everyone) for name in total}


def price(w: Tensor, gradient: float, inputs: Moments | None) -> float:
    """What a squared error of 1 of the layer's output, or of the weight where nothing is known of its inputs, costs.

    Args:
        w: the weight.
        gradient: its squared gradient.
        inputs: as ``ByBlocks.solve`` takes them.
    """
    if inputs is None:
        return gradient / w.numel()
    trace = inputs.H.diagonal(dim1=1, dim2=2).sum().item()
    return gradient * inputs.batch / (w.numel() / inputs.columns * trace) if trace else 0.0


def error(quantized: Tensor, w: Tensor, inputs: Moments | None, every: int = 1) -> float:
    """The squared error itself: ``tr(dW H dWᵀ)``, as the first of every so many of ``Moments.rows`` tells."""
    difference = (quantized - w).float()
    if inputs is None:
        return difference.double().square().sum().item()
    rows = inputs.rows(difference)
    part = rows[:, ::every]
    share = part.shape[1] / rows.shape[1]
    return ((part @ inputs.H.float()) * part).sum(dtype=torch.float64).item() / share
