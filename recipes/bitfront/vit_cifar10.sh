#!/usr/bin/env bash
# A small vision transformer on CIFAR-10.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=float seed=0,1,2 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=float init_from=float train.epochs=2 train.lr=2e-4 seed=0,1,2 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=rtn,gptq,decoupleq bits=2,3,4 seed=0,1,2 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=decoupleq bits=2 J=0 seed=0,1,2 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=lsq bits=2,4 seed=0,1,2 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=ste bits=2,3 seed=0,1,2 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=diffq penalty=0.1,1,10 seed=0,1,2 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=diffq penalty=10 quant.noise=uniform seed=0,1,2 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=diffq quant.range=absmax penalty=10 seed=0,1,2 "$@"
python -m src.run -m task=vit_cifar10 trainer.precision=bf16-mixed quant=rtn bits=2,3,4 group_size=0 seed=0,1,2 "$@"
