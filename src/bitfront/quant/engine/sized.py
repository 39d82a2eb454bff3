"""A method with a width for each tensor, such that the file has at most a given size and the least predicted loss.

All tensors are tried at all widths, after training also in smaller groups, on the float network with the method's own
solver or one near it (``tried``; for what trains, with the range that is best for the weights it starts from). The cost
of each error is weighed by what the end of the network feels of it (``sensitivity``), and what each tensor gets is
chosen (``budget``) by the bytes that the file has with it: all else in it is priced first. A part of the data is enough
for that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError
from bitfront.progress import Bar
from bitfront.quant.core import WIDTHS, FixedBits, Method
from bitfront.quant.engine.budget import Option, allocate
from bitfront.quant.engine.calibration import PostTraining, check_processes
from bitfront.quant.engine.plan import Calibration, plan
from bitfront.quant.engine.sensitivity import error, gradients, price
from bitfront.quant.forwards.together import together
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.layers.inputs import Accumulator, Moments, Watch, no_fast_path, of_weight
from bitfront.quant.layers.uses import Form
from bitfront.quant.model import MB
from bitfront.quant.storage.artifact import Artifact
from bitfront.quant.storage.packed import Packed, ordered
from bitfront.quant.storage.rounding import fitted_range

M = TypeVar("M", bound=Method)
FLOOR = 1e-3  # of the median tensor's importance: what one has that no output depends on
SHARE, LEAST = 1 / 4, 8  # of the batches, and how many: one number for a tensor needs no more
ROWS = 128  # of a tensor, at least, that are solved at each width
HELD = 1 << 30  # bytes of second moments at once; where there are more, the data are gone through again


@dataclass
class Tried:
    """A tensor in all ways in which it may be stored.

    Attributes:
        settings: of the method, for each.
        options: their loss is the squared error of the layer's output.
        shells: the packed tensors without their codes, for the size of the file.
        power: of the layer's output, in the unit of the losses.
        price: what an error of 1 costs at the end of the network.
    """

    settings: list[dict[str, Any]]
    options: list[Option]
    shells: list[Packed]
    power: float
    price: float


def sized(method: M, network: nn.Module, data: Calibration, about: Mapping[str, Any] | None = None) -> M:
    """The method with ``layers`` such that the file is not larger than its ``max_size``.

    Args:
        method: with one width for a tensor, and a ``max_size``.
        network: float, on the device to work on; stays as it is.
        data: to measure losses on, a part of it.
        about: what the file says of itself, which counts.

    Raises:
        BitfrontError: even the smallest file is larger, with what takes the room; or the method has no such widths.
    """
    if not isinstance(method, FixedBits):
        raise BitfrontError(f"{type(method).__name__} has no widths that max_size= could choose")
    if data.offload and data.device and data.device.type != "cpu":
        raise BitfrontError("max_size needs gradients of the whole network at once; give widths, or leave offload out")
    about, weights = about or {}, method.eligible(network)
    if not weights:
        raise BitfrontError("max_size has no tensor to choose a width for; a smaller min_size quantizes more")
    with together(), undisturbed(network), no_fast_path():
        if data.empty:
            raise BitfrontError("max_size chooses widths by what errors do on data; give data")
        check_processes(network, method, data)
        network.eval()
        number = max(LEAST, math.ceil(SHARE * len(data.batches)))
        few = replace(data, batches=list(islice(data.batches, number)))
        tried = _tried(network, method, weights, few)
    options = _costs(tried)
    limit = room = int(method.max_size * MB)
    smallest = {name: some[0] for name, some in options.items()}

    def file(widths: Mapping[str, Option]) -> Artifact:
        shells = {name: tried[name].shells[option.which] for name, option in widths.items()}
        return Artifact.of(network, shells, about, getattr(torch, method.raw_dtype))

    rest = len(file(smallest).to_bytes()) - sum(option.nbytes for option in smallest.values())
    while (chosen := allocate(list(options.values()), room - rest)) is not None:
        widths = dict(zip(options, chosen, strict=True))
        excess = len(file(widths).to_bytes()) - limit
        if excess <= 0:
            layers = {
                name: method.settings(name) | tried[name].settings[option.which] for name, option in widths.items()
            }
            return replace(method, layers=(method.layers or {}) | layers)
        room -= excess  # the header has a few digits more or less
    raise BitfrontError(_too_small(file(smallest), method.max_size))


def _tried(
    network: nn.Module, method: FixedBits, weights: dict[str, nn.Parameter], data: Calibration
) -> dict[str, Tried]:
    found: dict[str, Tried] = {}
    units = plan(network, weights, data)
    device = next(iter(weights.values())).device
    felt = gradients(network, weights, data, units[-1].time_last, method.computed_in(device))
    forms = {name: form for unit in units for name, form in unit.forms.items()}
    stages = [stage for unit in units for stage in unit.stages]
    bar = Bar(weights, desc="trying widths", unit="tensor")
    for part in _parts(stages, weights, forms):
        for stage, sums in zip(part, _summed(network, part, weights, data, forms), strict=True):
            moments = sums.moments()
            for name in stage:
                own = of_weight(weights[name].detach(), forms[name], moments, sums.lookup)
                found[name] = _at_all_widths(method, name, weights[name], own, felt[name])
                bar.update()
    for name in (name for unit in units for name in (*unit.looked_up, *unit.blind)):
        found[name] = _at_all_widths(method, name, weights[name], None, felt[name])
        bar.update()
    bar.close()
    return {name: found[name] for name in weights}


def _parts(
    stages: Sequence[list[str]], weights: Mapping[str, Tensor], forms: Mapping[str, Form]
) -> Iterator[list[list[str]]]:
    """Stages whose second moments may be in memory together."""
    part: list[list[str]] = []
    held = 0
    for stage in stages:
        form = forms[stage[0]]
        size = 8 * ordered(weights[stage[0]], form.view, form.axes)[0].numel() ** 2  # or less, of a batch
        if part and held + size > HELD:
            yield part
            part, held = [], 0
        part.append(stage)
        held += size
    if part:
        yield part


@torch.no_grad()
def _summed(
    network: nn.Module,
    stages: Sequence[list[str]],
    weights: dict[str, nn.Parameter],
    data: Calibration,
    forms: Mapping[str, Form],
) -> list[Accumulator]:
    """What the layers of each stage see in the float network."""
    sums = {stage[0]: Accumulator(stage[0], weights[stage[0]].device, forms[stage[0]]) for stage in stages}
    with undisturbed(network):
        for batch in data.batches:
            valid = data.valid(batch)
            for accumulator in sums.values():
                accumulator.valid = valid
            with Watch({name: weights[name] for name in sums}, lambda name, use: sums[name].add(name, use)):
                data.forward(network, batch)
    return list(sums.values())


@torch.no_grad()
def _at_all_widths(method: FixedBits, name: str, w: nn.Parameter, inputs: Moments | None, gradient: float) -> Tried:
    own: Any = method.of(name)
    v = w.detach()
    found = Tried([], [], [], error(torch.zeros_like(v), v, inputs), price(v, gradient, inputs))
    set_already = method.settings(name).keys()
    widths = (own.bits,) if "bits" in set_already else WIDTHS
    rows = None if inputs is None else inputs.rows(v)
    every = 1 if rows is None else max(1, rows.shape[1] // ROWS)
    for form in (
        own.forms(v if rows is None else rows.flatten(0, 1)) if not {"group_size", "scale_bits"} & set_already else [{}]
    ):
        for bits in widths:
            packed, decoded = _solved(replace(own, bits=bits, **form), v, inputs, every)
            found.settings.append({"bits": bits, **form})
            found.options.append(Option(len(found.options), packed.nbytes, error(decoded, v, inputs, every)))
            found.shells.append(replace(packed, codes=packed.codes.new_zeros(1, 1).expand(packed.codes.shape)))
    return found


def _solved(method: Any, w: Tensor, inputs: Moments | None, every: int) -> tuple[Packed, Tensor]:
    """As it is stored, and its values, of every so many rows."""
    if isinstance(method, PostTraining):
        packed = method.tried(w, inputs, every)
        return packed, packed.decode().to(w.device)
    packed = method.quantizer(w).encode(w)  # whose range is yet to be trained
    lo, span = fitted_range(w, method.group_size, method.bits)
    return packed, Packed.nearest(w, packed.bits.to(w.device), lo, span, method.group_size).decode()


def _costs(tried: Mapping[str, Tried]) -> dict[str, list[Option]]:
    """The options of each tensor by size, with what they cost at the end of the network; relative to the layer's output
    where that is not known of any."""
    importance = {name: t.price * t.power for name, t in tried.items()}
    if not any(importance.values()):
        importance = dict.fromkeys(tried, 1.0)
    floor = FLOOR * statistics.median(importance.values())
    options = {}
    for name, t in tried.items():
        scale = max(importance[name], floor) / (t.power or 1.0)
        some = [replace(option, loss=scale * option.loss) for option in t.options]
        options[name] = sorted(some, key=lambda option: option.nbytes)
    return options


def _too_small(artifact: Artifact, asked: float) -> str:
    whole, raw = len(artifact.to_bytes()), sum(t.nbytes for t in artifact.raw.values())
    tables = sum(p.scales_bytes for p in artifact.packed.values())
    return (
        f"max_size={asked:g} MiB cannot be kept: at the smallest widths the file has {whole / MB:.4g} MiB, of "
        f"which {raw / MB:.3g} are tensors that stay float, {tables / MB:.3g} scales and zeros, "
        f"{(whole - artifact.payload) / MB:.3g} names and layout; raw_dtype=float16 halves what stays float, a smaller "
        "min_size (quant.min_size= of a command) quantizes more of it, and larger groups have smaller tables"
    )
