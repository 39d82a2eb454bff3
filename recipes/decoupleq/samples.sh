#!/usr/bin/env bash
# decoupleQ, figure 5: a language model at 2 bits in groups of 64, over the number of texts to calibrate on.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=lm_wikitext103 \
  quant=decoupleq bits=2 group_size=64 level=2 N=4 quant.target=block quant.held_out=0 \
  quant.samples=128,256,512,1024,2048 "$@"
