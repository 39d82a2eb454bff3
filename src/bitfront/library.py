"""The library's functions: any network, any data, one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bitfront.errors import BitfrontError, first_line
from bitfront.quant.core import Method, Sampled
from bitfront.quant.engine.calibration import PostTraining
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.engine.sized import sized
from bitfront.quant.forwards.captured import copied
from bitfront.quant.forwards.narrow import check_convolutions
from bitfront.quant.forwards.parametrized import duplicate, resolve
from bitfront.quant.forwards.sharded import check_whole
from bitfront.quant.forwards.together import share, together
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.model import QuantizedModel
from bitfront.quant.storage.artifact import Artifact, check_storable

if TYPE_CHECKING:
    from bitfront.exports.onnx.network import Exported

N = TypeVar("N", bound=nn.Module)
M = TypeVar("M", bound=Method)


def quantize(
    network: nn.Module,
    method: PostTraining,
    data: Iterable[Any] | Tensor | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    valid: Callable[[Any], Tensor | None] | None = None,
    blocks: list[str] | None = None,
    states: Path | str | None = None,
    seed: int = 0,
    max_size: float = 0.0,
    about: Mapping[str, Any] | None = None,
    inplace: bool = False,
    offload: str = "",
) -> QuantizedModel:
    """Quantize a trained network after training. It stays as it is; the result is a copy, which has its hooks.

    Where a process group is initialized (``torchrun``) and the method needs data, all its processes call this, each
    with the same network and a part of the data, as ``data[rank::world]``; all get the same result, that of all parts
    (``forwards.together``). ``samples`` and ``batch_size`` are then shared out; what only one of them is to do, it does
    before the group is initialized.

    Args:
        network: any module, on the device to work on; ``DataParallel`` and ``torch.compile`` are taken off, weights
            that it computes from others (weight norm and the like) resolved.
        method: ``RTN``, ``GPTQ``, ``GSQ``, ``DecoupleQ`` or one of your own.
        data: batches of inputs, tuples or dicts, as a loader, a list or a generator gives them, of which the first
            ``method.samples`` samples count; or one tensor of samples, cut into batches of ``method.batch_size``. Round
            to nearest needs none.
        forward: does a forward of a network on a batch; None calls it as ``call`` does.
        valid: of a batch, what is not padding: the share of each sample, ``[samples]`` in 0..1, or a mask of steps,
            ``[samples, time]``, for inputs of as many steps; or None for all of it. By default ``not_padded``.
        blocks: names of the modules to work on one after the other; None finds them, [] takes the network as one.
        states: folder where finished blocks are kept, so that the same call goes on after an interruption.
        seed: of the order of the data where blocks are tuned.
        max_size: MiB that the file may have; ``sized`` chooses a width for each tensor then.
        about: what ``save`` will be told, which counts.
        inplace: overwrite the network, where there is no memory for a copy.
        offload: "cpu" or "disk": work on the accelerator, if there is one, on a network that is too large for it; where
            its blocks, and what is between them, stay but for the one at work; on disk below ``states``, or in the
            system's place of temporary files. The result is on the CPU.

    Returns:
        The quantized model in evaluation mode, which is called as the network is. With ``sft`` of the method, what
        ``requires_grad`` of its parameters is yet to be trained, as a model of ``prepare`` is: the values of codes, and
        norms.

    Raises:
        BitfrontError: there are no data, a weight or an input is not finite, a layer cannot be quantized as asked.
    """
    _check(method)
    method = _to_size(method, max_size)
    kept, device = None if states is None else Path(states), working(network, offload)
    with together(method.needs_data):
        network = unwrapped(network)
        check_storable(network)
        check_convolutions(network, device, "float32 weights (network.float())")
        network = resolve(network if inplace else duplicate(network))
        batches = _drawn(data, method) if method.needs_data else []
        run = forward or partial(call, device=device)
        calibration = Calibration(batches, run, blocks, valid or not_padded, kept, seed, device, offload)
        if batches:
            _try(network, calibration)
        method = sized(method, network, calibration, about) if method.max_size else method
        return method.attach(network, calibration).eval()


def prepare(
    network: nn.Module,
    method: Method,
    data: Iterable[Any] | Tensor | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_size: float = 0.0,
    steps: int = 0,
) -> QuantizedModel:
    """Wrap a network to be trained quantized, in any loop: call the result in its place, add ``penalty()`` to the loss,
    step ``optimizer(...)``.

    Args:
        network: any module; trained in place. Wrappers (``DataParallel``, ``torch.compile``) are taken off: wrap the
            result. Weights that it computes from others (weight norm) are resolved.
        method: ``DiffQ``, ``LSQ``, ``STE``, ``Float`` or one of your own.
        data, forward: as in ``quantize``; only ``max_size`` of methods with ``bits`` looks at them.
        max_size: MiB that the file may have; ``sized`` chooses a width for each tensor then; learned widths come to it
            along the training, in place of a penalty.
        steps: of the optimizer in the whole training, where widths are learned.

    Raises:
        BitfrontError: a layer cannot be quantized as asked, or the method as only a cell can use it.
    """
    if isinstance(method, PostTraining):
        raise BitfrontError(
            f"{type(method).__name__} quantizes after training; use bitfront.quantize(network, method, data)"
        )
    _check_without_task(method)
    method = _to_size(method, max_size)
    network = unwrapped(network)
    check_storable(network)
    network = resolve(network)
    if method.max_size and isinstance(method, Sampled):
        with together():
            calibration = Calibration(_drawn(data, method), forward or call, None, not_padded)
            return sized(method, network, calibration).attach(network)
    model = method.attach(network)
    if method.steered:
        model.steer(steps)
    return model


def load(path: Path | str, into: N) -> N:
    """Write a packed file into a plain network of the same architecture.

    Args:
        path: of what ``save`` wrote.
        into: overwritten; weights that it computes from others are resolved if they were in the file.

    Returns:
        The network; its outputs are those of the quantized model, bit for bit.

    Raises:
        ArtifactError: the file is missing or damaged, or of another architecture; the network is left as it was.
    """
    Artifact.load(path).load_into(into)
    return into


def to_onnx(
    network: nn.Module,
    file: Path | str,
    data: Iterable[Any] | Tensor,
    out: Path | str,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    matmul_nbits: bool = False,
    accuracy_level: int = 4,
) -> Exported:
    """Write a network with a packed file's weights as an ONNX file, whose weights are packed, too.

    Args:
        network: of the file's architecture; stays as it is.
        file: of what ``save`` wrote.
        data: examples of inputs, as in ``quantize``; sizes in which the first batches differ may change in the file, as
            the number of samples, and the length of tokens.
        out: the file to write.
        forward: as in ``quantize``; the first call of the network counts.
        matmul_nbits: whether linear layers compute with the codes, of up to 8 bits, by an operator of ONNX Runtime's.
        accuracy_level: of that operator: 4 is fast and rounds inputs to 8 bits, 0 does not.

    Returns:
        Its size, and how far its outputs are from those of the decoded network.

    Raises:
        BitfrontError: the file is another network's, torch cannot export it, or the outputs differ by more than 1e-5 of
            the largest (by 0.2 where inputs are rounded).
    """
    from bitfront.exports.onnx.examples import SAMPLES, Example
    from bitfront.exports.onnx.network import export

    network = unwrapped(network)
    examples = Example.some(network, forward or call, drawn(data, 2 * SAMPLES, SAMPLES))
    if not examples:
        raise BitfrontError("data gives no batch; ONNX needs an example of the inputs")
    return export(network, Artifact.load(file), examples, Path(out), accuracy_level if matmul_nbits else None)


def working(network: nn.Module, offload: str = "") -> torch.device:
    """The device to work on: the network's, or the accelerator that it does not fit on.

    Raises:
        BitfrontError: it is there already.
    """
    devices = [p.device for p in network.parameters()] or [torch.device("cpu")]
    if not offload:
        return devices[0]
    if set(devices) != {torch.device("cpu")}:
        raise BitfrontError(f"offload={offload} brings a network to the device in parts; give it on the CPU")
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or found.type == "mps" else found  # which has no float64


def call(network: nn.Module, batch: Any, device: torch.device | None = None) -> Any:
    """A forward on a batch, moved to the network's device, or the given one.

    A dict whose keys are arguments of the network's ``forward`` is passed by name, without what that does not take (as
    labels); of a tuple or list come as many parts as ``forward`` needs, from the first; all else is the argument. Where
    ``forward`` has a ``use_cache``, it is False.
    """
    device = device or working(network)
    known = inspect.signature(network.forward).parameters
    kinds = {p.kind for p in known.values()}
    extra = {"use_cache": False} if "use_cache" in known else {}
    if isinstance(batch, Mapping):
        batch = {key: _moved(value, device) for key, value in batch.items()}
        named = batch if inspect.Parameter.VAR_KEYWORD in kinds else {k: v for k, v in batch.items() if k in known}
        needed = {name for name, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        if named and needed <= named.keys():
            return network(**{**extra, **named})
    batch = _moved(batch, device)
    if isinstance(batch, (tuple, list)):
        positional = [p for p in known.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed_count = sum(p.default is p.empty for p in positional)
        every = inspect.Parameter.VAR_POSITIONAL in kinds and not positional
        return network(*(batch if every else batch[: max(needed_count, 1)]), **extra)
    return network(batch, **extra)


def not_padded(batch: Any) -> Tensor | None:
    """A batch's ``attention_mask`` ``[samples, time]`` of ones and zeros, if it has one; None also of a causal one, or
    where a decoder with steps of its own gets ``decoder_input_ids``."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or "decoder_input_ids" in batch:
        return None
    on = mask.bool()
    causal = on.shape[0] == on.shape[1] and torch.equal(on, on.tril()) and bool(on.diagonal().all())
    return None if causal or on.all() or not torch.equal(on.to(mask.dtype), mask) else on


def drawn(data: Iterable[Any] | Tensor, samples: int, batch_size: int) -> list[Any]:
    """The first batches of some data, copied, until there are so many samples.

    Raises:
        BitfrontError: it is a single sample or batch where a sequence of batches is meant.
    """
    if isinstance(data, Tensor):
        return [part.clone() for part in data[:samples].split(batch_size) if len(part)]
    if isinstance(data, Mapping):
        return [copied(data)]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise BitfrontError(
            f"data are batches, as a loader gives them, or one tensor of samples, not {type(data).__name__}"
        )
    batches: list[Any] = []
    left = samples
    for batch in data:
        batches.append(copied(batch))
        left -= _samples(batch)
        if left <= 0:
            break
    return batches


def _drawn(data: Iterable[Any] | Tensor | None, method: Sampled) -> list[Any]:
    """The batches of this process."""
    return [] if data is None else drawn(data, share(method.samples), share(method.batch_size))


def unwrapped(network: nn.Module) -> nn.Module:
    """The network within ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``.

    Raises:
        BitfrontError: it is sharded.
    """
    check_whole(network)
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):
            network = inner
        else:
            return network


def _check(method: Any) -> None:
    if not isinstance(method, PostTraining):
        raise BitfrontError(f"{type(method).__name__} quantizes in training; use bitfront.prepare(network, method)")
    _check_without_task(method)


def _check_without_task(method: Method) -> None:
    """Refuse what only a cell can do."""
    for option, instead in (
        ("reestimate_bn", "is of training data; leave it out here, or use a cell"),
        ("distill", "is of a cell's training; leave it out here, and write it into the loss of your own loop"),
    ):
        if getattr(method, option, False):
            raise BitfrontError(f"{option} {instead}")


def _to_size(method: M, max_size: float) -> M:
    method = replace(method, max_size=max_size or method.max_size)
    for option in ("bits", "penalty") if method.max_size else ():
        usual, value = getattr(type(method), option, None), getattr(method, option, None)
        if usual is not None and value != usual:
            raise BitfrontError(f"max_size is in place of {option}={value}; give one of them")
    return method


@torch.no_grad()
def _try(network: nn.Module, data: Calibration) -> None:
    """A forward before all others, whose fault is the data's or the network's.

    Raises:
        BitfrontError: with what it was given; the cause is its.
    """
    try:
        with undisturbed(network), data.offloaded(network).streamed():
            data.forward(network.eval(), data.batches[0])
    except BitfrontError:
        raise
    except Exception as error:  # whatever a stranger's forward raises
        raise BitfrontError(
            f"the network does not run on the first batch, {_told(data.batches[0])} ({type(error).__name__}: "
            f"{first_line(error)}); give batches as its forward takes them, or forward=lambda net, batch: ..."
        ) from error


def _told(x: Any) -> str:
    """What a batch is made of."""
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)}"
    if isinstance(x, Mapping):
        return f"a dict of {', '.join(f'{key}: {_told(part)}' for key, part in x.items())}"
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {', '.join(map(_told, x)) or 'nothing'}"
    return f"a {type(x).__name__}"


def _samples(batch: Any) -> int:
    """How many samples a batch has: what an object says, as a graph's; the length of its first tensor; or 1."""
    for name in ("num_graphs", "batch_size"):
        if type(told := getattr(batch, name, None)) is int:
            return told
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(part) for part in leaves if isinstance(part, Tensor) and part.dim()), 1)


def _moved(batch: Any, device: torch.device) -> Any:
    """What a batch is made of, on a device: tensors, and objects that can be moved likewise."""

    def moves(part: Any) -> bool:
        return callable(getattr(part, "to", None))

    return tree_map(lambda part: part.to(device) if moves(part) else part, batch, is_leaf=moves)
