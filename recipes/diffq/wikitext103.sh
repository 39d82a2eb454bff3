#!/usr/bin/env bash
# DiffQ, WikiText-103: perplexity of the 16-layer transformer with adaptive input; float, QAT and LSQ beside it.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=lm_wikitext103 quant=float "$@"
python -m src.run -m task=lm_wikitext103 quant=ste bits=4,8 "$@"
python -m src.run -m task=lm_wikitext103 quant=lsq bits=4 "$@"
python -m src.run -m task=lm_wikitext103 quant=diffq penalty=1,5,10 "$@"
