"""English prose from the docstrings of installed packages: a text corpus that needs no download.

The files are read, never imported, so the text depends on the packages' sources alone: the same bytes with every Python
and on every platform, which a checksum of the whole verifies.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bitfront.errors import BitfrontError

PACKAGES = {"scikit-learn": "sklearn", "torch": "torch"}  # distribution: package; one version for every Python
SKIPPED = {"_internal", "externals", "test", "testing", "tests", "version.py"}  # vendored or made by a build
SHA256 = "815528308d52816e8ab4906bae0bc7502b3bed73a7ffb75a7f2f73ba092ed9f5"  # of the text, all splits
SHARES = {"test": 0.05, "valid": 0.05}  # of the files
GRAM, REPEATED = 5, 0.3  # a paragraph with a larger share of its runs of five words seen before is a repetition

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MARKUP = re.compile(r":[a-z:]+:(?=`)|(?<=\w) ?<[^<>`]*>(?=`)|[`*]|(?<=`)~")
PROSE = re.compile(r"[A-Z][\w ,.;:!?'\"()/-]+[.!?]")


def docstrings() -> dict[str, str]:
    """The corpus by split, a paragraph a line.

    Raises:
        BitfrontError: the installed packages are not those of the lock file, so that the text would be another one.
    """
    texts = corpus({package: folder(package) for package in PACKAGES.values()})
    found = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    if found != SHA256:
        installed = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        raise BitfrontError(
            f"the docstrings of the installed packages ({installed}) make another text than those of "
            "requirements.lock, so that results could not be compared; install with make"
        )
    return texts


def folder(package: str) -> Path:
    """Where a package's files are."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BitfrontError(f"the package {package} is not installed; install with make")
    return Path(spec.submodule_search_locations[0])


def corpus(roots: dict[str, Path]) -> dict[str, str]:
    """Prose by split. A file is in one split by the hash of its name; what the splits before it have said, is dropped.

    Args:
        roots: folder of each package.
    """
    files: dict[str, list[Path]] = {"test": [], "valid": [], "train": []}
    for package, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if SKIPPED.isdisjoint(inside.parts):
                files[split_of(f"{package}/{inside.as_posix()}")].append(path)
    seen: set[str] = set()
    texts = {}
    for split, paths in files.items():
        lines = (line for path in paths for line in prose(path.read_bytes()))
        texts[split] = "".join(f"{line}\n" for line in lines if not repeats(line, seen))
    return texts


def split_of(name: str) -> str:
    """Of a file, by its name."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def repeats(line: str, seen: set[str]) -> bool:
    """Whether too much of a paragraph was said before; if not, remember it."""
    words = re.findall(r"\w+", line.lower())
    grams = {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}
    if len(grams & seen) > REPEATED * len(grams):
        return True
    seen |= grams
    return False


def prose(source: bytes) -> Iterator[str]:
    """The paragraphs of the docstrings of a Python file that read as prose, markup taken out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that are none
        tree = ast.parse(source)
    for node in ast.walk(tree):
        text = ast.get_docstring(node, clean=False) if isinstance(node, DOCUMENTED) else None
        for paragraph in paragraphs(text or ""):
            plain = " ".join(MARKUP.sub("", paragraph).split())
            words = plain.split()
            letters = sum(word.strip(",.;:!?'\"()").isalpha() for word in words)
            if PROSE.fullmatch(plain) and plain.isascii() and len(words) >= 8 and letters >= 0.8 * len(words):
                yield plain


def paragraphs(text: str) -> Iterator[str]:
    """Runs of lines with the same indentation: a code block or the text below a parameter's name is one of its own."""
    lines: list[str] = []
    depth = 0
    for line in text.expandtabs().split("\n"):
        stripped = line.lstrip()
        indent = len(line) - len(stripped)
        if lines and (not stripped or indent != depth):
            yield " ".join(lines)
            lines = []
        if stripped:
            lines.append(stripped)
            depth = indent
    if lines:
        yield " ".join(lines)
