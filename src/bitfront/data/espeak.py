"""Speech synthesised by eSpeak NG: random sentences, many voices, those of the test unseen in training.

Which voices are in the test was decided knowing how well they are understood, for a task of medium difficulty: error
rates on it compare methods and say nothing about speech recognition at large.

``python -m bitfront.data.espeak <folder>`` writes the whole set: repeated calls of eSpeak NG in one process differ by a
few samples, the same calls in a fresh process do not.
"""

from __future__ import annotations

import ctypes
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from bitfront.data.generated import kept
from bitfront.errors import BitfrontError

RATE = 8000  # samples per second
VERSION = "espeak-1"
WORDS = """
all and bad bat bear big bird black blue boat book bread brown call cat child cold day dog door down drink eight fall
fire five four from give green hand her his horse house in late light long man moon nine night not now old one open
over rain red river road round sea seven ship six sleep small song stone sun ten the then thing three to tree two
under water white wind with yellow you
"""
ACCENTS = ["en-us", "en", "en-gb-x-rp", "en-us-nyc"]
VARIANTS = "m1 m2 m3 m5 m7 f1 f4 linda steph michel boris gustave ian grandma robert paul antonio anika"
SPLITS = {  # utterances, accents, variants of the voice: none with breath, which is noise seeded by the clock
    "train": (2000, ACCENTS, ["", *(f"+{variant}" for variant in VARIANTS.split())]),
    "valid": (200, ACCENTS, ["+m4", "+aunty"]),
    "test": (400, [*ACCENTS, "en-gb-x-gbclan"], ["+m6", "+m8", "+belinda", "+shelby"]),
}
TRACTS = range(90, 111, 5)  # percent: vocal tracts of training are also shorter and longer
SYNCHRONOUS, UTF8 = 2, 1  # constants of eSpeak NG's speak_lib.h
SPEED, PITCH, RANGE = 1, 3, 4
Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def load(root: Path, split: str) -> tuple[list[torch.Tensor], list[str]]:
    """Waveforms, int16 at ``RATE``, and what is said; synthesised once, and then kept in ``root/generated``.

    Raises:
        BitfrontError: eSpeak NG is not installed, the folder cannot be written, or its content has changed.
    """
    folder = kept(root, VERSION, _in_a_fresh_process)
    entries = json.loads((folder / "texts.json").read_text())
    waves = torch.from_numpy(np.load(folder / "samples.npy")).split([entry["samples"] for entry in entries])
    chosen = [(wave, entry["text"]) for wave, entry in zip(waves, entries, strict=True) if entry["split"] == split]
    return [wave for wave, _ in chosen], [text for _, text in chosen]


def _in_a_fresh_process(folder: Path) -> None:
    library()
    words = [sys.executable, "-m", "bitfront.data.espeak", str(folder.resolve())]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise BitfrontError(f"eSpeak NG could not synthesise the speech: {done.stderr.strip() or done.returncode}")


def library() -> tuple[str, str]:
    """Paths of eSpeak NG's library and of its data.

    Raises:
        BitfrontError: it is not installed.
    """
    try:
        import espeakng_loader
    except ImportError:
        raise BitfrontError(
            "this task's speech is synthesised by eSpeak NG, which is not installed; run `make setup`, or "
            "`pip install espeakng-loader==0.2.4`"
        ) from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def synthesise(folder: Path) -> None:
    """Write the whole set: one order of calls, made of one random stream."""
    import torchaudio

    torch.set_num_threads(1)  # waveforms this short only wait for each other's threads: ten seconds instead of minutes
    path, data = library()
    speak = ctypes.CDLL(path)
    rate = speak.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), 0)
    heard: list[np.ndarray] = []

    @Callback
    def hear(samples: ctypes._Pointer[ctypes.c_short], n: int, _: int) -> int:
        if samples and n > 0:
            heard.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0

    speak.espeak_SetSynthCallback(hear)
    draw, words = random.Random(0), WORDS.split()
    waves: list[np.ndarray] = []
    entries: list[dict[str, str | int]] = []
    for split, (n, accents, variants) in SPLITS.items():
        for _ in range(n):
            voice = draw.choice(accents) + draw.choice(variants)
            text = " ".join(draw.choice(words) for _ in range(draw.randint(2, 7)))
            heard.clear()
            states = [speak.espeak_SetVoiceByName(voice.encode())]
            for parameter, low, high in ((SPEED, 110, 180), (PITCH, 30, 70), (RANGE, 20, 80)):
                states.append(speak.espeak_SetParameter(parameter, draw.randint(low, high), 0))
            states.append(speak.espeak_Synth(text.encode(), len(text) + 1, 0, 0, 0, UTF8, None, None))
            if any(states) or not heard:
                raise RuntimeError(f"'{text}' by {voice}: {states}")
            wave = torch.from_numpy(np.concatenate(heard)).double()  # so that machines round alike
            tract = draw.choice(TRACTS) if split == "train" else 100
            wave = torchaudio.functional.resample(wave, rate, RATE * tract // 100)
            waves.append(wave.round().clamp(-32768, 32767).short().numpy())
            entries.append({"split": split, "voice": voice, "text": text, "samples": len(waves[-1])})
    np.save(folder / "samples.npy", np.concatenate(waves))
    (folder / "texts.json").write_text(json.dumps(entries))


if __name__ == "__main__":
    synthesise(Path(sys.argv[1]))
