"""Songs of the user's own, ``<song>/<stem>.wav``: any rate, one or two channels, with a mixture or without."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfront.data.audio import MIXTURE, Form, Song
from bitfront.data.checked import faults
from bitfront.data.folders import completed, files, split_folders
from bitfront.data.own import by_split, few
from bitfront.data.recordings import finite
from bitfront.data.transcribed import REMEDY, fault, resampler
from bitfront.errors import BitfrontError

AUDIO = (".wav", ".flac")
SAMPLED, SAME = (
    2.0,
    0.1,
)  # seconds of a song that are compared with its mixture, and the most that may differ, of energy


@dataclass
class Stems(Song):
    """A song on disk.

    Attributes:
        paths: of the sources, and of the mixture, if it has a file.
        form: that it is brought to; ``length`` is in its samples.
    """

    paths: dict[str, Path]
    form: Form

    def read(self, names: Sequence[str], start: int = 0, length: int = -1) -> Tensor:
        end = self.length if length < 0 else start + length
        if MIXTURE not in names or MIXTURE in self.paths:
            return torch.stack([self._part(self.paths[name], start, end) for name in names])
        parts = {name: self._part(self.paths[name], start, end) for name in self.form.sources}
        mixture = torch.stack(list(parts.values())).sum(0)
        return torch.stack([mixture if name == MIXTURE else parts[name] for name in names])

    def _part(self, path: Path, start: int, end: int) -> Tensor:
        """Some samples of a file, the same as if all of it had been resampled, ``[channels, end - start]``."""
        import soundfile

        try:
            with soundfile.SoundFile(path) as file:
                rate, wanted = file.samplerate, self.form.samplerate
                old, new = (n // math.gcd(rate, wanted) for n in (rate, wanted))
                margin = 0 if old == new else -(-resampler(rate, wanted).width // old) + 1
                first = max(start // new - margin, 0)  # in steps of old samples, which are new ones
                file.seek(first * old)
                wav = file.read((-(-end // new) + margin - first) * old, "float32", always_2d=True)
        except (OSError, soundfile.SoundFileError) as error:
            raise BitfrontError(f"could not read '{path}' ({error}); repair it or take the song out") from None
        part = mixed(torch.from_numpy(finite(wav, path, REMEDY).T), self.form.channels)
        if margin:
            part = resampler(rate, wanted)(part)
        part = part[:, start - first * new : end - first * new]
        if part.shape[1] != end - start:
            raise BitfrontError(f"'{path}' ends early, at sample {start + part.shape[1]}; repair it or take it out")
        return part


def mixed(wav: Tensor, channels: int) -> Tensor:
    """Samples ``[channels, length]`` in one channel, or in two of which there is one."""
    return wav.mean(0, keepdim=True) if channels == 1 else wav.expand(channels, -1)


def stems(folder: Path, memory: Path, samplerate: int, channels: int) -> tuple[dict[str, list[Song]], Form, list[str]]:
    """The songs of each split.

    Args:
        folder: with ``<song>/<stem>.wav`` or ``.flac``, or ``{train,valid,test}/<song>/*``. Where splits are missing,
            ``folders.completed`` makes them of the songs' names.
        memory: of that, see ``folders.memory``.
        samplerate, channels: that songs are brought to; 0 for those of the first.

    Returns:
        The songs in the order of their names, their form with all files but the mixture as sources, and notes.

    Raises:
        BitfrontError: there are no songs, one has other files than most, more than a few cannot be read, or one cannot
            be brought to the form.
    """
    found = _files(folder)
    usual = Counter(frozenset(paths) - {MIXTURE} for paths in found.values()).most_common(1)[0][0]
    for name, paths in found.items():
        if odd := sorted((paths.keys() - {MIXTURE}) ^ usual):
            raise BitfrontError(
                f"'{folder / name}' has {', '.join(sorted(paths))}, and most songs {', '.join(sorted(usual))}; "
                f"{'add' if odd[0] in usual else 'move away'} {', '.join(odd)}"
            )
    if len(usual) < 2:
        raise BitfrontError(
            f"'{folder}' has songs of {', '.join(usual)} alone; two stems are needed beside a {MIXTURE}"
        )
    found, notes = _readable(found, folder, memory)
    info = _info(found[min(found)][min(usual)])
    form = Form(sorted(usual), samplerate or info.samplerate, channels or info.channels)
    if form.channels not in (1, 2):
        raise BitfrontError(f"'{folder}' has songs of {form.channels} channels; give task.audio_channels=1 or 2")
    songs = {name: Stems(folder / name, _length(paths, form), paths, form) for name, paths in found.items()}
    parts = completed(by_split(folder, songs), memory)
    notes += [*_brought(list(songs.values())), *_unlike(list(songs.values()))]
    return {split: [songs[name] for name in part] for split, part in parts.items()}, form, notes


def _files(folder: Path) -> dict[str, dict[str, Path]]:
    """The files of each song, by their names without the ending; of each song, by its place in the folder."""
    layout = f"expected {folder}/<song>/<stem>.wav or {folder}/{{train,valid,test}}/<song>/<stem>.wav (or .flac)"
    if not folder.is_dir():
        raise BitfrontError(f"'{folder}' is no folder; {layout}")
    found: dict[str, dict[str, Path]] = {}
    for path in files(folder, AUDIO):
        if path.parent in (folder, *split_folders(folder).values()):
            raise BitfrontError(f"'{path}' is in no song's folder; {layout}")
        song = found.setdefault(path.parent.relative_to(folder).as_posix(), {})
        if path.stem in song:
            raise BitfrontError(f"'{path}' and '{song[path.stem]}' are for the same stem; take one of them out")
        song[path.stem] = path
    if not found:
        raise BitfrontError(f"there are no songs in '{folder}'; {layout}")
    return found


def _readable(
    found: dict[str, dict[str, Path]], folder: Path, memory: Path
) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """The songs of which all files can be read, and a note on the others, if there are any."""
    bad = faults([path for paths in found.values() for path in paths.values()], fault, folder, memory)
    odd = {name: bad[path] for name, paths in found.items() for path in paths.values() if path in bad}
    return {name: found[name] for name in found if name not in odd}, few(
        [*odd.values()], len(found), "songs cannot be read"
    )


def _info(path: Path) -> Any:
    import soundfile

    try:
        return soundfile.info(path)
    except (OSError, soundfile.SoundFileError) as error:
        raise BitfrontError(f"could not read '{path}' ({error}); repair it or take the song out") from None


def _length(paths: dict[str, Path], form: Form) -> int:
    """Samples of a song in a form."""
    lengths = {}
    for path in paths.values():
        info = _info(path)
        if info.channels not in (1, form.channels) and form.channels != 1:
            raise BitfrontError(f"'{path}' has {info.channels} channels, the first song {form.channels}")
        lengths[path.name] = math.ceil(info.frames * form.samplerate / info.samplerate)
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {n / form.samplerate:.2f} s" for name, n in lengths.items())
        raise BitfrontError(f"the files of '{path.parent}' differ in length: {told}; they begin and end together")
    return lengths.popitem()[1]


def _brought(songs: list[Stems]) -> list[str]:
    """A note on songs that are of another form, if there are any."""
    other = []
    for song in songs:
        kinds = {(info.samplerate, info.channels) for info in map(_info, song.paths.values())}
        if kinds != {(song.form.samplerate, song.form.channels)}:
            other.append(song.folder)
    about = f"{len(other)} of {len(songs)} songs" + (f", as '{other[0]}'," if other else "")
    form = songs[0].form
    return [f"{about} are brought to {form.samplerate} Hz and {form.channels} channels"] if other else []


def _unlike(songs: list[Stems]) -> list[str]:
    """A note on songs whose mixture is not the sum of their stems, if there are any."""
    unlike = []
    for song in songs:
        if MIXTURE in song.paths:
            length = min(round(SAMPLED * song.form.samplerate), song.length)
            mixture, *parts = song.read([MIXTURE, *song.form.sources], (song.length - length) // 2, length)
            if (mixture - torch.stack(parts).sum(0)).square().sum() > SAME * mixture.square().sum():
                unlike.append(song.folder)
    if not unlike:
        return []
    return [
        f"in {len(unlike)} of {len(songs)} songs, as '{unlike[0]}', the stems do not sum to the mixture: training adds "
        "the stems, evaluation takes the mixture"
    ]
