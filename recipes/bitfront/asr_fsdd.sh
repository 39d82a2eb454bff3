#!/usr/bin/env bash
# A small Conformer-CTC on strings of spoken digits.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=float seed=0,1,2 "$@"
python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=float init_from=float train.epochs=5 train.lr=5e-4 seed=0,1,2 "$@"
python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=rtn,gptq,decoupleq bits=2,3,4 seed=0,1,2 "$@"
python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=decoupleq bits=2 J=0 seed=0,1,2 "$@"
python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=decoupleq bits=2 group_size=64 quant.sft=false,true seed=0,1,2 "$@"
python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=lsq bits=2,4 seed=0,1,2 "$@"
python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=diffq quant.range=minmax,absmax penalty=0.1,1,3,10 seed=0,1,2 "$@"
python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=rtn,decoupleq,lsq bits=2 quant.reestimate_bn=true seed=0,1,2 "$@"
python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=diffq quant.range=minmax,absmax penalty=10 quant.reestimate_bn=true seed=0,1,2 "$@"
python -m src.run -m task=asr_fsdd trainer.precision=bf16-mixed quant=rtn bits=2,3,4 group_size=0 seed=0,1,2 "$@"
