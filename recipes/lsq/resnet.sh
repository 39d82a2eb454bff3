#!/usr/bin/env bash
# LSQ, table 1: ResNet-18 and -50 on ImageNet at 2, 3 and 4 bits, first and last layer at 8.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=resnet_imagenet task.pretrained=true model=torchvision.resnet18,torchvision.resnet50 \
  quant=float "$@"
python -m src.run -m task=resnet_imagenet task.pretrained=true model=torchvision.resnet18,torchvision.resnet50 \
  quant=lsq bits=2 'quant.layers={conv1.weight: {bits: 8}, fc.weight: {bits: 8}}' train.weight_decay=2.5e-5 "$@"
python -m src.run -m task=resnet_imagenet task.pretrained=true model=torchvision.resnet18,torchvision.resnet50 \
  quant=lsq bits=3 'quant.layers={conv1.weight: {bits: 8}, fc.weight: {bits: 8}}' train.weight_decay=5e-5 "$@"
python -m src.run -m task=resnet_imagenet task.pretrained=true model=torchvision.resnet18,torchvision.resnet50 \
  quant=lsq bits=4 'quant.layers={conv1.weight: {bits: 8}, fc.weight: {bits: 8}}' "$@"
