"""Low-bit weight quantization of any PyTorch module: ``quantize`` after training, ``prepare`` for it, ``load`` a file,
``to_onnx`` for other runtimes.

torch is imported with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitfront.errors import ArtifactError, BitfrontError
    from bitfront.library import load, prepare, quantize, to_onnx
    from bitfront.quant.artifact import Artifact
    from bitfront.quant.calibration import PostTraining
    from bitfront.quant.core import Float, Method, Trained
    from bitfront.quant.decoupleq import DecoupleQ
    from bitfront.quant.diffq import DiffQ
    from bitfront.quant.gptq import GPTQ
    from bitfront.quant.gsq import GSQ
    from bitfront.quant.lsq import LSQ
    from bitfront.quant.model import QuantizedModel, Quantizer
    from bitfront.quant.packed import Packed
    from bitfront.quant.parametrized import resolve
    from bitfront.quant.plan import Calibration
    from bitfront.quant.rtn import RTN
    from bitfront.quant.ste import STE

_HOMES = {
    "errors": ("ArtifactError", "BitfrontError"),
    "library": ("load", "prepare", "quantize", "to_onnx"),
    "quant.artifact": ("Artifact",),
    "quant.calibration": ("PostTraining",),
    "quant.core": ("Float", "Method", "Trained"),
    "quant.decoupleq": ("DecoupleQ",),
    "quant.diffq": ("DiffQ",),
    "quant.gptq": ("GPTQ",),
    "quant.gsq": ("GSQ",),
    "quant.lsq": ("LSQ",),
    "quant.model": ("QuantizedModel", "Quantizer"),
    "quant.packed": ("Packed",),
    "quant.parametrized": ("resolve",),
    "quant.plan": ("Calibration",),
    "quant.rtn": ("RTN",),
    "quant.ste": ("STE",),
}
__all__ = [
    "GPTQ",
    "GSQ",
    "LSQ",
    "RTN",
    "STE",
    "Artifact",
    "ArtifactError",
    "BitfrontError",
    "Calibration",
    "DecoupleQ",
    "DiffQ",
    "Float",
    "Method",
    "Packed",
    "PostTraining",
    "QuantizedModel",
    "Quantizer",
    "Trained",
    "load",
    "prepare",
    "quantize",
    "resolve",
    "to_onnx",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'bitfront' has no attribute '{name}'")
    return getattr(import_module(f"bitfront.{home}"), name)


def __dir__() -> list[str]:
    return __all__
