"""What a block is called with, kept for later passes: a forward may write into whatever it is given (append to a
key/value cache, change its input in place, pop from a dictionary), so every pass gets a copy of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitfront.errors import BitfrontError


@dataclass
class Captured:
    """One call of a block.

    Attributes:
        args, kwargs: its arguments.
        valid: what of the batch is not padding, as ``inputs.columns`` takes it.
        of: the number of the batch, and that of the call among those of its forward.
        shared: by ``id``, what passes hand on as it is: the network's modules and parameters.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    valid: Tensor | None
    of: tuple[int, int] = (0, 0)
    shared: dict[int, Any] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for one pass."""
        return copied((self.args, self.kwargs), device, self.shared)


class Detached(TorchFunctionMode):
    """``copy.deepcopy`` within it copies tensors that are results of others, too, wherever they are kept.

    Args:
        device: of the copies; None leaves each where it is.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        if id(x) not in memo:
            memo[id(x)] = _copy(x, self.device, memo)
        return memo[id(x)]


def _copy(x: Tensor, device: torch.device | str | None, memo: dict[Any, Any]) -> Tensor:
    """Of a result, too; what shares memory still does in the copies."""
    if device is None or x.device == torch.device(device) or x.layout is not torch.strided:
        return copy.deepcopy(x.detach(), memo).to(device or x.device)
    memory, moved = x.untyped_storage(), memo.setdefault("moved", {})
    if memory._cdata not in moved:
        moved[memory._cdata] = (
            torch.empty(0, dtype=torch.uint8, device=x.device).set_(memory).to(device).untyped_storage()
        )
    return x.new_empty(0, device=device).set_(moved[memory._cdata], x.storage_offset(), x.shape, x.stride())


def copied(tree: Any, device: torch.device | str | None = None, shared: dict[int, Any] | None = None) -> Any:
    """A deep copy that no later write to the original reaches, nor the other way round.

    Args:
        tree: tensors, containers, and any objects that ``copy.deepcopy`` takes. What is in there twice is so in the
            copy.
        device: of the copied tensors; None leaves each where it is.
        shared: by ``id``, what is handed on as it is.

    Raises:
        BitfrontError: an object cannot be copied.
    """
    return _copied(tree, device, dict(shared or {}))


def _copied(x: Any, device: torch.device | str | None, memo: dict[int, Any]) -> Any:
    if id(x) in memo:
        return memo[id(x)]
    new: Any
    if isinstance(x, Tensor):
        whole = x.layout is torch.strided and not x.is_nested and x.untyped_storage().nbytes() <= x.nbytes
        # Of a part of something large, the part alone.
        new = _copy(x, device, memo) if whole else x.detach().to(device or x.device, copy=True)
    elif type(x) in (list, tuple):
        new = type(x)(_copied(part, device, memo) for part in x)
    elif isinstance(x, tuple) and hasattr(x, "_fields") and not hasattr(x, "to"):
        new = type(x)(*(_copied(part, device, memo) for part in x))
    elif type(x) is dict:
        new = {key: _copied(part, device, memo) for key, part in x.items()}
    else:
        try:
            moves = device is not None and callable(getattr(x, "to", None))  # itself, as a packed sequence
            with Detached(None if moves else device):
                new = copy.deepcopy(x, memo)
            new = (new.to(device) or new) if moves else new  # some move in their place
        except Exception as error:  # whatever a stranger's __deepcopy__, or pickling, raises
            raise BitfrontError(
                f"an object of {type(x).__name__} among the inputs cannot be copied ({error}), as is needed for each "
                "pass to see the same; if a block is called with it, blocks=[] works on the network as a whole, else "
                "give batches, or a forward, without it"
            ) from None
    memo[id(x)] = new
    return new
