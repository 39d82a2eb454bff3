#!/usr/bin/env bash
# decoupleQ, table 1: a speech recognizer at 2 bits in groups of 64, without and with fine-tuning.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=asr_wav2vec2 quant=float "$@"
python -m src.run -m task=asr_wav2vec2 \
  quant=decoupleq bits=2 group_size=64 level=2 N=4 J=3 quant.target=block quant.held_out=0 quant.sft=false,true "$@"
