#!/usr/bin/env bash
# decoupleQ, table 4: a language model at 2 bits, without and with the block-wise stage.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=lm_wikitext103 \
  quant=decoupleq bits=2 level=2 N=4 J=0,4 quant.target=block quant.held_out=0 "$@"
