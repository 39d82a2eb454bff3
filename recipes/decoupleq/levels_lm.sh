#!/usr/bin/env bash
# decoupleQ, figures 3 and 4: a language model at 2 bits over K, against level 2; layer by layer (J=0), and tuned by
# block.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=lm_wikitext103 \
  quant=decoupleq bits=2 level=1 N=2 J=0,4 quant.K=1,2,3,4,5 quant.samples=512 quant.target=block quant.held_out=0 "$@"
python -m src.run -m task=lm_wikitext103 \
  quant=decoupleq bits=2 level=2 N=2 J=0,4 quant.samples=512 quant.target=block quant.held_out=0 "$@"
