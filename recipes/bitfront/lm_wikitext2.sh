#!/usr/bin/env bash
# A small transformer trained on novels, tested on WikiText-2.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=float seed=0,1,2 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=float init_from=float train.epochs=5 train.lr=5e-4 seed=0,1,2 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=rtn,gptq,decoupleq bits=2,3,4 seed=0,1,2 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=ste bits=4 seed=0,1,2 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=lsq bits=2,4 seed=0,1,2 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=diffq penalty=0.1,0.3,1,3 seed=0,1,2 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=diffq quant.range=absmax penalty=0.3 seed=0,1,2 "$@"
python -m src.run -m task=lm_wikitext2 trainer.precision=bf16-mixed quant=rtn bits=3 group_size=0 seed=0,1,2 "$@"
