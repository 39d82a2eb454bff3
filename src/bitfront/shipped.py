"""Where the folders lie that come with the package: inside it once installed, beside the code in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parents[1]


def shipped(name: str) -> Path:
    """The folder of that name: ``conf`` or ``recipes``."""
    return PACKAGE / name if (PACKAGE / name).is_dir() else CHECKOUT / name


def module(command: str) -> str:
    """What starts a command here: ``python -m src.run`` in the folder of a checkout, ``bitfront run`` elsewhere."""
    here = Path.cwd() == CHECKOUT and (CHECKOUT / "src" / f"{command}.py").is_file()
    return f"python -m src.{command}" if here else f"bitfront {command}"
