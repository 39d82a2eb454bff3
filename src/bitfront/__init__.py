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
    from bitfront.quant.core import Float, Method, Trained
    from bitfront.quant.engine.calibration import PostTraining
    from bitfront.quant.engine.plan import Calibration
    from bitfront.quant.forwards.parametrized import resolve
    from bitfront.quant.methods.decoupleq import DecoupleQ
    from bitfront.quant.methods.diffq import DiffQ
    from bitfront.quant.methods.diffq_lsq import DiffQLSQ
    from bitfront.quant.methods.gptq import GPTQ
    from bitfront.quant.methods.gsq import GSQ
    from bitfront.quant.methods.lsq import LSQ
    from bitfront.quant.methods.rtn import RTN
    from bitfront.quant.methods.ste import STE
    from bitfront.quant.model import QuantizedModel, Quantizer
    from bitfront.quant.storage.artifact import Artifact
    from bitfront.quant.storage.packed import Packed

_HOMES = {
    "errors": ("ArtifactError", "BitfrontError"),
    "library": ("load", "prepare", "quantize", "to_onnx"),
    "quant.core": ("Float", "Method", "Trained"),
    "quant.engine.calibration": ("PostTraining",),
    "quant.engine.plan": ("Calibration",),
    "quant.forwards.parametrized": ("resolve",),
    "quant.methods.decoupleq": ("DecoupleQ",),
    "quant.methods.diffq": ("DiffQ",),
    "quant.methods.diffq_lsq": ("DiffQLSQ",),
    "quant.methods.gptq": ("GPTQ",),
    "quant.methods.gsq": ("GSQ",),
    "quant.methods.lsq": ("LSQ",),
    "quant.methods.rtn": ("RTN",),
    "quant.methods.ste": ("STE",),
    "quant.model": ("QuantizedModel", "Quantizer"),
    "quant.storage.artifact": ("Artifact",),
    "quant.storage.packed": ("Packed",),
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
    "DiffQLSQ",
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
