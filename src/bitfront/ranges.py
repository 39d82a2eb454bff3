"""Which values an option may have, said once, in the class that has it. Its objects refuse others, and so do the
commands, which read it from the class's source: to import that would import torch.

    ranges: ClassVar[Ranges] = {"bits": "1..15", "samples": "1..", "held_out": "[0, 1)", "target": ("network", "block")}

Whole numbers from ... to ..., real numbers in an interval, or choices. A literal; subclasses have what they add or
narrow.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitfront.errors import BitfrontError

Range = str | tuple[Any, ...]
Ranges = Mapping[str, Range]
WHOLE = re.compile(r"(-?\d+)\.\.(-?\d*)")
REAL = re.compile(r"([\[(])(.+), (.+)([\])])")


def refuse(values: Mapping[str, Any], ranges: Ranges, label: Callable[[str], str] = str) -> None:
    """Refuse values that are out of their range.

    Args:
        values: by name of the option; those that have no range are not looked at.
        ranges: by name.
        label: what an option is called in the message.

    Raises:
        BitfrontError: with the range.
    """
    for name, allowed in ranges.items():
        if name not in values or inside(values[name], allowed):
            continue
        if isinstance(allowed, tuple):
            choices = ", ".join(map(str, allowed))
            raise BitfrontError(f"there is no {label(name)}={values[name]}; choices: {choices}")
        raise BitfrontError(f"{label(name)} is {spoken(allowed)}, got {values[name]!r}")


def inside(value: Any, allowed: Range) -> bool:
    """Whether a value is in a range."""
    if isinstance(allowed, tuple):
        return value in allowed
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    if whole := WHOLE.fullmatch(allowed):
        return isinstance(value, int) and int(whole[1]) <= value and (not whole[2] or value <= int(whole[2]))
    left, low, high, right = _interval(allowed)
    above = low <= value if left == "[" else low < value
    return above and (value <= high if right == "]" else value < high)


def spoken(allowed: str) -> str:
    """A range of numbers in words."""
    if allowed in ("1..", "(0, inf)"):
        return "positive"
    if allowed in ("0..", "[0, inf)"):
        return "not negative"
    if allowed.endswith(".."):
        return f"{allowed[:-2]} or more"
    return allowed if WHOLE.fullmatch(allowed) else f"in {allowed}"


def of(kind: type) -> dict[str, Range]:
    """The ranges of a class and of those that it is derived from."""
    return {name: allowed for base in reversed(kind.__mro__) for name, allowed in vars(base).get("ranges", {}).items()}


@functools.cache
def declared(target: str) -> dict[str, Range]:
    """The same of a class that is not imported; empty where there is no source to read.

    Args:
        target: its module and name, as ``bitfront.quant.methods.gptq.GPTQ``.
    """
    order = dict.fromkeys(reversed(_lineage(target)))  # from the base that all have to the class
    return {name: allowed for kind in order for name, allowed in _own(kind).items()}


def _lineage(target: str) -> list[str]:
    """A class, and before the others those that it is derived from first."""
    module, _, name = target.rpartition(".")
    classes, imported = _source(module)
    if name not in classes:
        return _lineage(imported[name]) if name in imported else []
    bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
    return [target, *(kind for base in bases for kind in _lineage(f"{module}.{base}"))]


def _own(target: str) -> dict[str, Range]:
    """What stands in the class itself."""
    module, _, name = target.rpartition(".")
    for statement in _source(module)[0][name].body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "ranges" and statement.value:
            with suppress(ValueError):  # no literal
                return dict(ast.literal_eval(statement.value))
    return {}


@functools.cache
def _source(module: str) -> tuple[dict[str, ast.ClassDef], dict[str, str]]:
    """The classes of a module by name, and where each name that it imports is from."""
    try:
        spec = find_spec(module)
        tree = ast.parse(Path(spec.origin).read_bytes()) if spec and spec.origin else ast.Module([], [])
    except (ImportError, OSError, SyntaxError, ValueError):
        return {}, {}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return classes, {alias.asname or alias.name: f"{n.module}.{alias.name}" for n in imports for alias in n.names}


def _interval(allowed: str) -> tuple[str, float, float, str]:
    """Bracket, lowest, highest, bracket."""
    found = REAL.fullmatch(allowed)
    assert found, f"'{allowed}' is no range"
    return found[1], float(found[2]), float(found[3]), found[4]
