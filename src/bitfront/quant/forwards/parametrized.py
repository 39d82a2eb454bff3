"""Weights that a module computes from other parameters: weight, spectral and orthogonal norm, pruning, LoRA that
is written as a parametrization. Such a parameter is not what the layer multiplies with; the composed weight is to be
quantized.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from bitfront.errors import BitfrontError, first_line
from bitfront.quant.forwards.captured import Detached

N = TypeVar("N", bound=nn.Module)


def parametrized(network: nn.Module) -> dict[str, list[str]]:
    """By module, the names of the weights that it computes."""
    found: dict[str, list[str]] = {}
    for owner, module in network.named_modules():
        names = [hook_name for _, hook_name in _hooks(module)]
        if parametrize.is_parametrized(module):
            names += [str(name) for name in module.parametrizations]
        if names:
            found[owner] = names
    return found


def resolve(network: N) -> N:
    """Put the composed weights in the place of what they are computed from, as the network in evaluation computes them.

    Args:
        network: changed in place: ``parametrizations.weight.original0`` and the like become ``weight``.

    Returns:
        The network.
    """
    for owner in parametrized(network):
        module = network.get_submodule(owner)
        mode, module.training = module.training, False  # in training, spectral norm would take a step
        for kind, name in _hooks(module):
            if issubclass(kind, WeightNorm):
                remove_weight_norm(module, name)
            elif issubclass(kind, SpectralNorm):
                remove_spectral_norm(module, name)
                _forget_loading(module)
            else:
                prune.remove(module, name)
        if parametrize.is_parametrized(module):
            _own_class(module)
            module.get_submodule("parametrizations").eval()
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, str(name), leave_parametrized=True)
                if not isinstance(weight := getattr(module, str(name)), nn.Parameter):  # of frozen parts
                    delattr(module, str(name))
                    module.register_parameter(str(name), nn.Parameter(weight.detach(), requires_grad=False))
        module.training = mode
    return network


def duplicate(network: N) -> N:
    """A deep copy, also of a network that has been called: what modules keep of a forward need not be leaves."""
    try:
        with Detached():
            return copy.deepcopy(network)
    except Exception as error:  # whatever a stranger's __deepcopy__, or pickling, raises
        raise BitfrontError(
            f"the network cannot be copied ({first_line(error)}); take locks, open files and the like out of it"
        ) from error


def _own_class(module: nn.Module) -> None:
    """Copies of a module share its class, whose properties are the weights: torch would remove them for all."""
    shared = type(module)
    own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)


def _forget_loading(module: nn.Module) -> None:
    """What ``remove_spectral_norm`` leaves behind: a hook that asks for its parameters when a state is loaded."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del hooks[key]


def _hooks(module: nn.Module) -> list[tuple[type, str]]:
    """Kind and weight of the older functions of torch.nn.utils, which compute it before each forward."""
    found: list[tuple[type, str]] = []
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            found.append((type(hook), hook.name))
        elif isinstance(hook, prune.BasePruningMethod):
            found.append((type(hook), hook._tensor_name))
    return found
