#!/usr/bin/env bash
# Demucs on MIR-1K: singing voice and accompaniment.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=separation_mir1k trainer.precision=bf16-mixed quant=float seed=0,1,2 "$@"
python -m src.run -m task=separation_mir1k trainer.precision=bf16-mixed quant=float init_from=float train.epochs=3 train.lr=5e-4 seed=0,1,2 "$@"
python -m src.run -m task=separation_mir1k trainer.precision=bf16-mixed quant=rtn,gptq,decoupleq bits=2,4 seed=0,1,2 "$@"
python -m src.run -m task=separation_mir1k trainer.precision=bf16-mixed quant=ste bits=4 seed=0,1,2 "$@"
python -m src.run -m task=separation_mir1k trainer.precision=bf16-mixed quant=lsq bits=2,4 seed=0,1,2 "$@"
python -m src.run -m task=separation_mir1k trainer.precision=bf16-mixed quant=diffq penalty=0.01,0.1,1 seed=0,1,2 "$@"
python -m src.run -m task=separation_mir1k trainer.precision=bf16-mixed quant=diffq quant.range=absmax penalty=0.1,1 seed=0,1,2 "$@"
