#!/usr/bin/env bash
# DiffQ, MUSDB18: signal-to-distortion ratio of Demucs v2; the float network with three seeds, as published.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=separation_musdb quant=float seed=0,1,2 "$@"
python -m src.run -m task=separation_musdb quant=ste bits=4,5 "$@"
python -m src.run -m task=separation_musdb quant=diffq penalty=3e-4 "$@"
