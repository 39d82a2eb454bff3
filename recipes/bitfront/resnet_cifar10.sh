#!/usr/bin/env bash
# ResNet-20 on CIFAR-10, every method.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=resnet_cifar10 quant=float seed=0,1,2 "$@"
python -m src.run -m task=resnet_cifar10 quant=rtn,gptq,decoupleq bits=2,3,4 seed=0,1,2 "$@"
python -m src.run -m task=resnet_cifar10 quant=decoupleq bits=2,3,4 J=0 seed=0,1,2 "$@"
python -m src.run -m task=resnet_cifar10 quant=decoupleq bits=2,3,4 quant.sft=true seed=0,1,2 "$@"
python -m src.run -m task=resnet_cifar10 quant=ste,lsq bits=2,3,4 seed=0,1,2 "$@"
python -m src.run -m task=resnet_cifar10 quant=diffq penalty=0.5,1,2,5,10,20 seed=0,1,2 "$@"
python -m src.run -m task=resnet_cifar10 quant=diffq penalty=5 group_size=4,16,0 "$@"
python -m src.run -m task=resnet_cifar10 quant=diffq penalty=5 quant.noise=uniform seed=0,1,2 "$@"
python -m src.run -m task=resnet_cifar10 quant=diffq penalty=5 init_from=null train.epochs=15 train.lr=0.1 "$@"
