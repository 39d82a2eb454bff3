#!/usr/bin/env bash
# DiffQ, CIFAR-10: accuracy against size of ResNet-18, MobileNet, Wide ResNet and ViT; float, QAT and LSQ beside it.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=resnet_cifar10_paper model=resnet18,mobilenet,wrn28_10,vit quant=float "$@"
python -m src.run -m task=resnet_cifar10_paper model=resnet18,mobilenet,wrn28_10,vit quant=ste bits=2,3,4 "$@"
python -m src.run -m task=resnet_cifar10_paper model=resnet18,mobilenet,wrn28_10,vit quant=lsq bits=2,3,4 "$@"
python -m src.run -m task=resnet_cifar10_paper model=resnet18,mobilenet,wrn28_10,vit \
  quant=diffq penalty=1,5,10 group_size=16 "$@"
