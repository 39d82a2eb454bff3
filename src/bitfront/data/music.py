"""Generated music in four stems: drum machine, bass, chords and a singing formant synthesizer.

Written once, in the folders of MUSDB18-HQ (``<root>/{train,test}/<song>/{mixture,drums,bass,other,vocals}.wav``).
Tempo, key, chords, patterns and timbres are of each song alone, so that the songs of the test split are new.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bitfront.data.generated import kept

VERSION = 1  # of the music below: raise it when a sample changes
SAMPLERATE, SECONDS = 8000, 16  # Hz, mono
SONGS = {"train": 40, "test": 10}
SCALES = ([0, 2, 4, 5, 7, 9, 11], [0, 2, 3, 5, 7, 8, 10])  # major, natural minor
PROGRESSIONS = ([0, 4, 5, 3], [0, 5, 3, 4], [0, 3, 4, 4], [5, 3, 0, 4], [0, 2, 3, 4])
VOWELS = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))  # Hz, formants


def music(root: Path) -> Path:
    """The folder of the generated songs below ``root``, made if it is not there.

    Raises:
        BitfrontError: a file was changed or is missing, or the folder cannot be written.
    """
    return kept(root, f"music-{VERSION}", write)


def write(folder: Path) -> None:
    """Generate all songs."""
    import soundfile

    for number, (split, name) in enumerate((s, f"song-{n:02}") for s, count in SONGS.items() for n in range(count)):
        (folder / split / name).mkdir(parents=True)
        for stem, samples in mixed(song(number)).items():
            soundfile.write(folder / split / name / f"{stem}.wav", samples, SAMPLERATE, subtype="PCM_16")


def mixed(stems: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stems in 16 bits, and the mixture, which is exactly their sum and does not clip."""
    loudest = np.abs(sum(stems.values())).max()
    rounded = {name: np.round(x * (29000 / loudest)).astype(np.int16) for name, x in stems.items()}
    return {"mixture": np.stack(list(rounded.values())).sum(0, dtype=np.int16), **rounded}


def song(number: int) -> dict[str, np.ndarray]:
    """The stems of one song, each ``[SECONDS * SAMPLERATE]``, float64."""
    rng = np.random.default_rng([VERSION, number])
    step = 60 / rng.uniform(80, 140) / 4  # seconds of a sixteenth
    scale, key = SCALES[rng.integers(2)], int(rng.integers(12))
    progression = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    bars = int(np.ceil(SECONDS / (16 * step)))
    chords = [[degree(scale, key, progression[bar % 4] + k) for k in (0, 2, 4)] for bar in range(bars)]
    stems = {
        "drums": drums(rng, step, bars),
        "bass": bass(rng, step, chords),
        "other": accompaniment(rng, step, chords),
        "vocals": vocals(rng, step, bars, scale, key),
    }
    return {name: x / np.sqrt(np.mean(x**2)) * 10 ** (rng.uniform(-3, 3) / 20) for name, x in stems.items()}


def degree(scale: list[int], key: int, n: int) -> int:
    """Semitones of the n-th note of a scale."""
    return key + 12 * (n // 7) + scale[n % 7]


def hertz(semitones: float) -> float:
    """Frequency above C1."""
    return 32.703 * 2 ** (semitones / 12)


def clock(seconds: float) -> np.ndarray:
    """Times of the samples."""
    return np.arange(int(seconds * SAMPLERATE)) / SAMPLERATE


def add(track: np.ndarray, at: float, x: np.ndarray) -> None:
    """A sound at a time, cut at the end."""
    start = int(at * SAMPLERATE)
    track[start : start + len(x)] += x[: max(len(track) - start, 0)]


def silence() -> np.ndarray:
    """An empty track."""
    return np.zeros(SECONDS * SAMPLERATE)


def drums(rng: np.random.Generator, step: float, bars: int) -> np.ndarray:
    """Kick, snare and hi-hat in a pattern of one bar, with fills."""
    t = clock(0.4)
    fall, depth = rng.uniform(0.02, 0.05), rng.uniform(60, 140)
    phase = 2 * np.pi * (rng.uniform(45, 60) * t + depth * fall * (1 - np.exp(-t / fall)))
    kick = np.sin(phase) * np.exp(-t / rng.uniform(0.08, 0.2))
    noise = rng.standard_normal(len(t))
    snare = 0.5 * noise * np.exp(-t / rng.uniform(0.05, 0.12))
    snare += 0.5 * np.sin(2 * np.pi * rng.uniform(160, 220) * t) * np.exp(-t / 0.06)
    hat = 0.3 * np.diff(noise, n=2, prepend=[0, 0]) * np.exp(-t / rng.uniform(0.015, 0.05))
    kicks = (rng.random(16) < 0.15) | (np.arange(16) % 8 == 0)
    track, dense = silence(), rng.integers(1, 3)
    for n in range(16 * bars):
        loudness = rng.uniform(0.7, 1)
        if kicks[n % 16]:
            add(track, n * step, loudness * kick)
        if n % 8 == 4 or rng.random() < 0.03:
            add(track, n * step, loudness * snare)
        if n % dense == 0:
            add(track, n * step, loudness * hat)
    return track


def bass(rng: np.random.Generator, step: float, chords: list[list[int]]) -> np.ndarray:
    """Roots and fifths in eighths, a few harmonics."""
    pattern, brightness = rng.random(8) < 0.75, rng.uniform(0.4, 0.8)
    decay, track = rng.uniform(0.3, 1.0), silence()
    for bar, (root, _, fifth) in enumerate(chords):
        for eighth in np.flatnonzero(pattern):
            note = fifth if rng.random() < 0.2 else root
            t = clock(2 * step * rng.uniform(0.7, 1))
            wave = sum(brightness**k / k * np.sin(2 * np.pi * k * hertz(note % 12 + 4) * t) for k in range(1, 8))
            add(track, (16 * bar + 2 * eighth) * step, wave * gate(t, 0.01) * np.exp(-t / decay))
    return track


def accompaniment(rng: np.random.Generator, step: float, chords: list[list[int]]) -> np.ndarray:
    """Chords, held or broken, as an organ, an electric piano or a pad."""
    harmonics = [(1, 0.5, 0.3, 0.25, 0.1), (1, 0.1, 0.02, 0.3), tuple(1 / k for k in range(1, 9))][rng.integers(3)]
    decay, attack = rng.uniform(0.3, 3), rng.choice([0.005, 0.08])
    length, broken = rng.choice([4, 8, 16]), rng.random() < 0.5
    track = silence()
    for bar, chord in enumerate(chords):
        for at in range(0, 16, 2 if broken else length):
            for note in [chord[at // 2 % 3]] if broken else chord:
                frequency = hertz(note % 12 + 36) * (1 + 0.002 * rng.standard_normal())
                t = clock(step * (4 if broken else length))
                wave = sum(a * np.sin(2 * np.pi * k * frequency * t) for k, a in enumerate(harmonics, 1))
                add(track, (16 * bar + at) * step, wave * gate(t, attack) * np.exp(-t / decay))
    return track


def vocals(rng: np.random.Generator, step: float, bars: int, scale: list[int], key: int) -> np.ndarray:
    """A melody sung on changing vowels, in phrases with rests: harmonics with vibrato, shaped by formants."""
    octave, size = rng.choice([24, 36]), rng.uniform(0.9, 1.15)  # of the voice, and of the vocal tract
    rate, depth = rng.uniform(4.5, 6.5), rng.uniform(0.003, 0.012)
    track, at, line = silence(), rng.integers(0, 8), 4
    while at < 16 * bars:
        length = rng.choice([2, 3, 4, 6, 8])
        line = int(np.clip(line + rng.integers(-2, 3), 0, 9))
        if rng.random() > 0.2:
            t = clock(length * step)
            f0 = hertz(degree(scale, key % 7, line) + octave)
            glide = 0.03 * rng.standard_normal() * np.exp(-t / 0.05)
            phase = 2 * np.pi * np.cumsum(f0 * (1 + glide + depth * np.sin(2 * np.pi * rate * t))) / SAMPLERATE
            formants = size * np.array(VOWELS[rng.integers(len(VOWELS))])
            order = np.arange(1, int(0.45 * SAMPLERATE / f0) + 1)
            resonance = sum(
                g / (1 + ((order * f0 - f) / 90) ** 2) for g, f in zip((1, 0.6, 0.3), formants, strict=True)
            )
            voice = (resonance + 0.02) / order**0.5 @ np.sin(order[:, None] * phase)
            add(track, at * step, (voice + 0.02 * rng.standard_normal(len(t))) * gate(t, 0.04))
        at += length
    return track


def gate(t: np.ndarray, attack: float) -> np.ndarray:
    """Rises in ``attack`` seconds, falls in the last 20 ms."""
    return np.minimum(np.minimum(t / attack, 1), np.minimum((t[-1] - t) / 0.02, 1))
