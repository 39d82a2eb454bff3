#!/usr/bin/env bash
# DiffQ, CIFAR-100: accuracy against size of ResNet-18, MobileNet and Wide ResNet; float, QAT and LSQ beside it.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=resnet_cifar100_paper model=resnet18,mobilenet,wrn28_10 quant=float "$@"
python -m src.run -m task=resnet_cifar100_paper model=resnet18,mobilenet,wrn28_10 quant=ste bits=2,3,4 "$@"
python -m src.run -m task=resnet_cifar100_paper model=resnet18,mobilenet,wrn28_10 quant=lsq bits=2,3,4 "$@"
python -m src.run -m task=resnet_cifar100_paper model=resnet18,mobilenet,wrn28_10 \
  quant=diffq penalty=1,5,10 group_size=16 "$@"
