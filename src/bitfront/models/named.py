"""Networks by a name: of timm, of torchvision, in a folder of transformers', or made by a function of the user's."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError, first_line
from bitfront.models import hf
from bitfront.theirs import FOLDER, MADE, imported

FORMS = f"timm.<name>, torchvision.<name>, {FOLDER}<folder>, {MADE}"
CLASSES = ("classes", "num_classes")  # by which a user's function may take their number


def build(
    name: str,
    classes: int | None = None,
    *,
    pretrained: bool = False,
    given: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """A network; the caller seeds.

    Args:
        name: ``timm.<name>``, ``torchvision.<name>``; ``hf:<folder>``, as ``save_pretrained`` leaves it, of the class
            that its config.json names, or ``hf:<file.gguf>``; or ``<package.module>:<function>``, also of the working
            directory.
        classes: of its output, where the library or the function takes their number.
        pretrained: with the weights that the library publishes, or of the folder; else fresh.
        given: what else a function may take, by the names of its parameters, as ``{"vocabulary": 1024}``.
        dtype: of the parameters of a network in a folder.
        options: of timm's networks, as ``drop_path_rate``.

    Raises:
        BitfrontError: there is none of that name, a package is missing, or it cannot be built.
    """
    check(name)
    try:
        if name.startswith(FOLDER):
            return hf.build(name, pretrained, dtype)
        if ":" in name:
            return _made(name, dict.fromkeys(CLASSES, classes) | dict(given or {}))
        return _of_library(name, {} if classes is None else {"num_classes": classes}, pretrained, options)
    except TypeError as error:
        raise BitfrontError(f"model={name} does not fit this task: {error}") from None
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise BitfrontError(f"could not build model={name}: {first_line(error)}") from None
        raise BitfrontError(
            f"no pretrained weights for {name} ({type(error).__name__}: {error}); they are downloaded once and kept "
            "below ~/.cache, which can be copied; or give init_from=<file>"
        ) from None


def check(name: str, known: Sequence[str] = ()) -> None:
    """Refuse a name that ``build`` has no network of.

    Args:
        name: of the network.
        known: all names that there are; none for what ``build`` takes.

    Raises:
        BitfrontError: with close names, or what is missing.
    """
    given = bool(known)
    if name.startswith(FOLDER) and not known:
        hf.kind(name)
    elif ":" in name and not known:
        _function(name)
    elif name not in (known := known or libraries()):
        if "." in name and name.partition(".")[0] not in ("timm", "torchvision"):
            raise BitfrontError(f"there is no model={name}; a function of yours is {name}:<function>")
        close = [other for other in known if name in other][:5]
        close = close or difflib.get_close_matches(name, known, 5) or list(known[:20])
        forms = "" if given else f"; it is one of {FORMS}"
        raise BitfrontError(f"there is no model={name}; choices: {', '.join(close)}{forms}")


@functools.cache
def libraries() -> tuple[str, ...]:
    """The names of all networks that timm and torchvision have."""
    import timm
    import torchvision

    names = {"timm": timm.list_models(), "torchvision": torchvision.models.list_models(torchvision.models)}
    return tuple(f"{library}.{name}" for library, known in names.items() for name in known)


def logits(output: Any) -> Tensor:
    """What a network gives: a tensor, or in transformers' networks an object that has it."""
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def check_outputs(network: nn.Module, name: str, x: Tensor, shape: Sequence[int], remedy: str) -> Tensor:
    """Try a network on an input, so that what does not fit is said before anything is trained.

    Args:
        network: is in training mode afterwards as before.
        name: of the network.
        x: an input.
        shape: that its logits must have.
        remedy: for the message.

    Returns:
        The logits.

    Raises:
        BitfrontError: it does not take the input, or gives something else.
    """
    training = network.training
    try:
        found = logits(network.eval()(x))
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BitfrontError(
            f"model={name} does not take inputs of shape {list(x.shape)} ({first_line(error)}); {remedy}"
        ) from None
    network.train(training)
    if list(found.shape) != list(shape):
        raise BitfrontError(f"model={name} gives {list(found.shape)}, where {list(shape)} is needed; {remedy}")
    return found


def _of_library(name: str, outputs: Mapping[str, Any], pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    library, _, network = name.partition(".")
    if library == "timm":
        import timm

        return timm.create_model(network, pretrained=pretrained, **outputs, **options)
    import torchvision

    weights = "IMAGENET1K_V1" if pretrained else None  # which the papers start from
    return torchvision.models.get_model(network, weights=weights, **outputs)


def _function(name: str) -> Callable[..., Any]:
    """What the user has written."""
    found = imported("model", name)
    if not callable(found):
        raise BitfrontError(f"model={name} is no function")
    return found


def _made(name: str, given: Mapping[str, Any]) -> nn.Module:
    function = _function(name)
    takes = inspect.signature(function).parameters
    try:
        network = function(**{key: value for key, value in given.items() if key in takes and value is not None})
    except Exception as error:
        raise BitfrontError(f"model={name} fails with {type(error).__name__}: {error}") from None
    if not isinstance(network, nn.Module):
        raise BitfrontError(f"model={name} gives {type(network).__name__}, and must give a torch.nn.Module")
    return network
