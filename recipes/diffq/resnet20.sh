#!/usr/bin/env bash
# DiffQ, ResNet-20 on CIFAR-10 by the official preset "res20".
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=resnet_cifar10_res20 quant=float "$@"
python -m src.run -m task=resnet_cifar10_res20 quant=ste bits=2,3,4 "$@"
python -m src.run -m task=resnet_cifar10_res20 quant=diffq penalty=10 "$@"
