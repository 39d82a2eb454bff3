#!/usr/bin/env bash
# A small vision transformer on CIFAR-10.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=float "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=rtn,gptq,decoupleq bits=2,3,4 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=decoupleq bits=2 J=0 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=lsq bits=4 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=diffq penalty=0.1,1,10 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=diffq quant.range=absmax penalty=10 "$@"
