"""The packed file: what a quantized network is on disk.

The file is safetensors. Each quantized tensor is one uint8 entry under its own name, laid out as ``packed`` says;
everything else, small tensors and buffers, is stored as it is, or float32 ones in a narrower type. The JSON header
``bitfront`` holds the version, the quantized tensors' layouts, the tied names, the provenance, and two checksums: of
the tensors, and of itself (not in older files). The file knows no method.
"""

from __future__ import annotations

import json
import textwrap
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bitfront.errors import ArtifactError, BitfrontError
from bitfront.files import write_atomically
from bitfront.quant.forwards.parametrized import duplicate, parametrized, resolve
from bitfront.quant.storage.packed import Packed
from bitfront.quant.storage.scales import told

NARROW = (torch.float16, torch.bfloat16)
REMEDY = "copy it again, or make it anew"
PART = 1 << 30  # bytes of decoded weights at once
OWN = ',"own_crc32":'
VERSION = 4  # of files with axes in another order, or tables of rows that are not the first axis
# 3: with tables of few bits, coded widths or narrow floats; 2: with groups of a row by themselves


@dataclass
class Artifact:
    """A file's content.

    Attributes:
        packed: quantized tensors by name.
        raw: small tensors and buffers by name, in their stored type.
        narrow: names of those that are float32 in the network, and narrower here.
        tied: other names of the same tensor, ``{alias: name}``.
        about: provenance, plain JSON; ``about["task"]`` rebuilds the network.
    """

    packed: dict[str, Packed]
    raw: dict[str, Tensor]
    tied: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)
    narrow: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        network: nn.Module,
        packed: Mapping[str, Packed],
        about: Mapping[str, Any],
        raw_dtype: torch.dtype = torch.float32,
    ) -> Artifact:
        """Everything that ``network.state_dict()`` holds, with the tensors in ``packed`` in their packed form.

        Args:
            network: its parameters and persistent buffers are stored.
            packed: keyed by the first name of a tied tensor.
            about: plain JSON.
            raw_dtype: of the float32 tensors that are not quantized, where their values are not too large for it.
        """
        may_be = {id(t) for t in narrowable(network).values()} if raw_dtype != torch.float32 else set()
        raw: dict[str, Tensor] = {}
        narrow: set[str] = set()
        tied: dict[str, str] = {}
        first: dict[int, str] = {}
        check_storable(network)
        for name, tensor in network.state_dict(keep_vars=True).items():
            known = first.setdefault(id(tensor), name)
            if known != name:
                tied[name] = known
            elif name not in packed:
                stored = narrowed(tensor.detach(), raw_dtype) if id(tensor) in may_be else tensor.detach()
                narrow |= {name} if stored.dtype != tensor.dtype else set()
                raw[name] = stored.cpu()
        return cls(dict(packed), raw, tied, dict(about), narrow)

    @property
    def payload(self) -> int:
        """Bytes of the stored tensors, without the file's header."""
        return sum(p.nbytes for p in self.packed.values()) + sum(t.numel() * t.itemsize for t in self.raw.values())

    def to_bytes(self) -> bytes:
        """The file."""
        tensors = self.raw | {name: packed.to_bytes() for name, packed in self.packed.items()}
        tensors = _apart(tensors)
        layouts = {name: packed.layout() for name, packed in self.packed.items()}
        later = {key for layout in layouts.values() for key in layout}
        moved = "axes" in later or any(p.table and p.lines != p.shape[0] for p in self.packed.values())
        header: dict[str, Any] = {
            "version": 4 if moved else 3 if self.narrow or later & {"table", "coded"} else 2 if "rows" in later else 1,
            "quantized": layouts,
            "tied": self.tied,
            **({"narrow": self._narrow()} if self.narrow else {}),
            "about": self.about,
        }
        return safetensors.torch.save(tensors, {"bitfront": sealed(json.dumps(header, separators=(",", ":")), tensors)})

    def _narrow(self) -> dict[str, list[str]]:
        """By type, which tensors of it the network has as float32; [] for all of it."""
        types = {told(self.raw[name].dtype) for name in self.narrow}
        of = {kind: {name for name, t in self.raw.items() if told(t.dtype) == kind} for kind in sorted(types)}
        return {kind: [] if names <= self.narrow else sorted(names & self.narrow) for kind, names in of.items()}

    def save(self, path: Path, limit: int = 0) -> int:
        """Write the file atomically; return its size in bytes.

        Args:
            path: of the file.
            limit: bytes that it may have; 0 for any.

        Raises:
            ArtifactError: it is larger, the disk is full or the place is not writable; nothing is left behind.
        """
        data = self.to_bytes()
        if limit and len(data) > limit:
            raise ArtifactError(
                f"'{path}' would have {len(data):,} bytes, and max_size allows {limit:,}; give a larger one, or say "
                "less about it"
            )
        try:
            write_atomically(path, data)
        except BitfrontError as error:
            raise ArtifactError(str(error)) from None
        return len(data)

    @classmethod
    def load(cls, path: Path | str) -> Artifact:
        """Read a file.

        Raises:
            ArtifactError: missing, damaged, written by something else or by a newer version.
        """
        path = Path(path)
        if not path.is_file():
            raise ArtifactError(f"there is no artifact at '{path}'; give a file that save, or a run, has written")
        try:
            with safetensors.safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("bitfront", "null")
                header = json.loads(text)
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (safetensors.SafetensorError, ValueError, OSError, RecursionError) as error:
            with open(path, "rb") as file:
                torchs = file.read(2) == b"PK"
            cause = "was saved by torch; load it with torch.load" if torchs else f"is damaged ({error}); {REMEDY}"
            raise ArtifactError(f"'{path}' {cause}") from None
        except MemoryError:
            raise ArtifactError(f"'{path}' does not fit into the memory; free some") from None
        if not isinstance(header, dict):
            raise ArtifactError(f"'{path}' was not written by bitfront: its header has no 'bitfront' entry")
        try:
            if header["version"] > VERSION:
                raise ArtifactError(f"'{path}' has format {header['version']}, newer than {VERSION}; update bitfront")
            if header["crc32"] != _checksum(tensors):
                raise ArtifactError(f"'{path}' is damaged (its checksum differs); {REMEDY}")
            if "own_crc32" in header and header["own_crc32"] != _own_checksum(text.rpartition(OWN)[0], tensors):
                raise ArtifactError(
                    f"'{path}' is damaged (its header is not as it was written; if you have edited that, take "
                    f"'own_crc32' out); {REMEDY}"
                )
            packed = {name: Packed.from_bytes(tensors.pop(name), at) for name, at in header["quantized"].items()}
            tied, about = dict(header["tied"]), dict(header["about"])
            narrow = {
                name
                for kind, names in header.get("narrow", {}).items()
                for name in names or [name for name, t in tensors.items() if told(t.dtype) == kind]
            }
            if not {*tied.values()} <= packed.keys() | tensors.keys():
                raise ValueError("a tied name without its tensor")
            if any(tensors[name].dtype not in NARROW for name in narrow):
                raise ValueError("a narrow tensor that is none")
            return cls(packed, tensors, tied, about, narrow)
        except (LookupError, ArithmeticError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"'{path}' is damaged (header: {error!r}); {REMEDY}") from None
        except MemoryError:
            raise ArtifactError(f"'{path}' does not fit into the memory; free some") from None

    def tensor(self, name: str) -> Tensor:
        """One of the float network's, by the name that is no alias; quantized weights are float32."""
        if name in self.packed:
            return self.packed[name].decode()
        return self.raw[name].float() if name in self.narrow else self.raw[name]

    def state(self) -> dict[str, Tensor]:
        """The state dict of the float network."""
        state = {name: self.tensor(name) for name in (*self.raw, *self.packed)}
        return state | {alias: state[name] for alias, name in self.tied.items()}

    def _parts(self) -> Iterator[dict[str, Tensor]]:
        """The state dict in parts that are not much larger than ``PART``."""
        aliases: dict[str, list[str]] = {}
        for alias, name in self.tied.items():
            aliases.setdefault(name, [name]).append(alias)
        part: dict[str, Tensor] = {}
        held = 0
        for name in (*self.raw, *self.packed):
            part |= dict.fromkeys(aliases.get(name, [name]), self.tensor(name))
            held += part[name].nbytes
            if held > PART:
                yield part
                part, held = {}, 0
        yield part

    def load_into(self, network: nn.Module) -> None:
        """Write every tensor into a float network of the same architecture; exactly the same names.

        Weights that it computes from others (weight norm), where the file has the composed ones, are resolved first.

        Raises:
            ArtifactError: names, shapes or types differ; the network is left as it was.
        """
        names = {**self.raw, **self.packed, **self.tied}.keys()
        composed = bool(parametrized(network)) and not network.state_dict().keys() <= names
        problems = self._problems(resolve(duplicate(network)) if composed else network)
        if problems:
            told = "; ".join(textwrap.shorten(problem, 300) for problem in sorted(problems)[:5])
            raise ArtifactError(f"the artifact belongs to another network: {told}")
        network = resolve(network) if composed else network
        give_own_memory(network)
        for part in self._parts():
            network.load_state_dict(part, strict=part.keys() == names)

    def _problems(self, network: nn.Module) -> list[str]:
        """Where a network is another than the one that was stored."""
        wanted = network.state_dict(keep_vars=True)
        stored: dict[str, Tensor | Packed] = {**self.raw, **self.packed}
        ours = {name: name for name in stored} | self.tied
        problems = [f"'{name}' is missing" for name in wanted.keys() - ours.keys()]
        problems += [f"'{name}' is not in the network" for name in ours.keys() - wanted.keys()]
        first: dict[int, str] = {}
        for name in [name for name in wanted if name in ours]:
            tensor, own = wanted[name], ours[name]
            shape = stored[own].shape
            dtype = None if own in self.packed else torch.float32 if own in self.narrow else self.raw[own].dtype
            known = ours[first.setdefault(id(tensor), name)]
            if not isinstance(tensor, Tensor):
                problems.append(f"'{name}' of the network's state is no tensor")
            elif tensor.shape != shape:
                problems.append(f"'{name}' is {list(shape)}, not {list(tensor.shape)}")
            elif dtype not in (None, tensor.dtype):
                problems.append(f"'{name}' is {dtype}, not {tensor.dtype}")
            elif known != own and not torch.equal(self.tensor(known), self.tensor(own)):
                problems.append(f"'{name}' is not the same as '{known}', to which the network ties it")
        return problems


def check_storable(network: nn.Module) -> None:
    """Refuse a network whose state no file has a place for.

    Raises:
        BitfrontError: with the first such tensor.
    """
    if any(map(nn.parameter.is_lazy, (*network.parameters(), *network.buffers()))):
        raise BitfrontError("the network has lazy modules without their weights yet; call it on a batch first")
    for name, x in network.state_dict(keep_vars=True).items():
        if not isinstance(x, Tensor):
            raise BitfrontError(f"'{name}' of the network's state is no tensor; such networks cannot be stored")
        if x.is_meta:
            raise BitfrontError(f"'{name}' is on the meta device, where tensors have no values; load the network first")
        if x.layout != torch.strided or x.is_quantized:
            kind = x.dtype if x.is_quantized else x.layout
            raise BitfrontError(
                f"'{name}' of the network's state is {kind}, which files have no place for; make it dense and of plain "
                "numbers, or, of a buffer that the network can make anew, register it with persistent=False"
            )


@torch.no_grad()
def give_own_memory(network: nn.Module) -> None:
    """So that a state can be loaded: what is one number seen as many (``expand``) becomes as many."""
    for x in (*network.parameters(), *network.buffers()):
        dense = x.layout == torch.strided
        if dense and any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
            x.data = x.data.clone(memory_format=torch.contiguous_format)


def narrowable(network: nn.Module) -> dict[str, Tensor]:
    """What may be stored in a narrower type, by its first name: float32 parameters, and the statistics of norms. Other
    buffers may be whole numbers, or be written to."""
    found: dict[str, Tensor] = dict(network.named_parameters())
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{key}": t for key, t in module.named_buffers(recurse=False)}
    return {name: t for name, t in found.items() if t.dtype == torch.float32}


def narrowed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor as it is stored in another type; as it is where it is too large for that."""
    stored = t.to(dtype)
    return stored if torch.equal(stored.isfinite(), t.isfinite()) else t


def float_bytes(network: nn.Module) -> int:
    """Bytes of all that a network's file would hold without quantization, tied tensors once."""
    state = {id(t): t for t in network.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.itemsize for t in state.values())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors each with a memory of its own, as safetensors wants them."""
    apart: dict[str, Tensor] = {}
    memories: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        memory = tensor.untyped_storage()
        shared = memory.nbytes() != tensor.nbytes or memory.data_ptr() in memories
        apart[name] = tensor.clone() if shared else tensor
        memories.add(memory.data_ptr())
    return apart


def sealed(header: str, tensors: Mapping[str, Tensor]) -> str:
    """A header's JSON with both checksums behind its other keys; as long whatever they are, so that the size of a file
    is known beforehand."""
    text = f'{header[:-1]},"crc32":{_checksum(tensors):>10}'
    return f"{text}{OWN}{_own_checksum(text, tensors):>10}}}"


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        content: Any = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(content, checksum)
    return checksum


def _own_checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    """Of the header's text, and of what else says how bytes are read."""
    told_too = [f"{name} {t.dtype} {list(t.shape)}" for name, t in sorted(tensors.items())]
    return zlib.crc32("\n".join([text, *told_too]).encode())
