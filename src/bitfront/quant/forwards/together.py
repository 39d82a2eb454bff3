"""Processes that quantize one network together, each with batches of its own (torch.distributed's default group).

What is measured is summed over the processes p, and each solves from the sums, which have the same bits in all:

    H = sum_p X_p X_pᵀ / sum_p n_p,      gradient = sum_p of the gradient of what p has of the loss

The n-th batches of all processes are parts of one batch: the result is what one process finds on such batches, up to
the rounding of sums. One may have fewer batches than another, or none.

Wherever processes meet, each first tells whether it has an error; one that leaves ``together`` with an error still
comes to the others' next meeting, so that all end and none waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from bitfront.errors import BitfrontError, first_line

T = TypeVar("T")
_PLACE: ContextVar[tuple[int, int]] = ContextVar("together", default=(0, 1))  # number of this process, of how many


class ElsewhereError(BitfrontError):
    """What another process has, or its end."""


@contextmanager
def together(wanted: bool = True) -> Iterator[None]:
    """Within it, the functions of this module reach all processes, if a process group is initialized; all must come to
    it. Outside, and within another one, it changes nothing.

    Args:
        wanted: whether there is something to share.

    Raises:
        BitfrontError: another process has an error, or is gone.
    """
    if not wanted or _PLACE.get()[1] > 1 or not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    before = _PLACE.set((distributed.get_rank(), distributed.get_world_size()))
    try:
        yield
        _meet()
    except ElsewhereError:
        raise
    except Exception as error:
        own = str(error) if isinstance(error, BitfrontError) else f"{type(error).__name__}: {first_line(error)}"
        _told((own, None))
        raise
    finally:
        _PLACE.reset(before)


def place() -> tuple[int, int]:
    """Number of this process among those that are together, and how many they are; 0 of 1 outside."""
    return _PLACE.get()


def share(n: int) -> int:
    """Of n samples, how many are this process's; at least one."""
    rank, world = place()
    return max(1, n // world + (rank < n % world))


def gathered(x: T) -> list[T]:
    """What all processes have, in their order: small objects that can be pickled.

    Raises:
        BitfrontError: another process has an error, or is gone.
    """
    if place()[1] == 1:
        return [x]
    told = _told((None, x))
    for rank, (error, _) in enumerate(told):
        if error is not None:
            raise ElsewhereError(f"process {rank}: {error}")
    return [other for _, other in told]


def of_first(call: Callable[[], T]) -> T:
    """What a call gives in process 0, which alone does it."""
    rank, world = place()
    found: list[Any] = [call() if rank == 0 else None]
    if world > 1:
        _meet()
        distributed.broadcast_object_list(found, 0)
    return found[0]


def summed(x: Tensor) -> Tensor:
    """The sum over all processes of a tensor that has the same shape and type in each."""
    if place()[1] == 1:
        return x
    total = x.detach().clone(memory_format=torch.contiguous_format)
    total = total.cuda() if distributed.get_backend() == "nccl" else total
    _meet()  # when nothing is left that could fail
    distributed.all_reduce(total)
    return total.to(x.device)


def summed_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of the sum of all processes' losses, the value, and the gradients in the place of those of this one's; one stays
    None where no loss depends on the parameter."""
    if place()[1] == 1:
        return loss.detach()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    used = loss.new_tensor([p.grad is not None for p in parameters])
    total = summed(torch.cat([*(g.flatten() for g in grads), used, loss.detach()[None]]))
    *grads, used, total = total.split([*(p.numel() for p in parameters), len(parameters), 1])
    for p, grad, anywhere in zip(parameters, grads, used.tolist(), strict=True):
        p.grad = grad.view_as(p) if anywhere else None
    return total[0]


def check_alike(told: Callable[[], Any], message: str) -> None:
    """Refuse what is not the same in all processes.

    Args:
        told: makes what is compared, where there are others.
        message: of the error.

    Raises:
        BitfrontError: with the message.
    """
    if place()[1] > 1 and len(set(gathered(told()))) > 1:
        raise BitfrontError(message)


def _meet() -> None:
    gathered(None)


def _told(x: tuple[str | None, T]) -> list[tuple[str | None, T]]:
    """What each process tells: its error, or what it has."""
    found: list[Any] = [None] * place()[1]
    try:
        distributed.all_gather_object(found, x)
    except RuntimeError as error:
        raise ElsewhereError(f"another process is gone, or was waited for in vain ({first_line(error)})") from error
    return found
