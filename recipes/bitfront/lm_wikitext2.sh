#!/usr/bin/env bash
# A small transformer trained on novels, tested on WikiText-2.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=float "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=float init_from=float train.epochs=5 train.lr=5e-4 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=rtn,gptq,decoupleq bits=2,3,4 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=ste bits=4 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=lsq bits=2,4 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=diffq penalty=0.3,1 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=diffq quant.range=absmax penalty=0.3 "$@"
