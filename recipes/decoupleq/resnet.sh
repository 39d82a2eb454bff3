#!/usr/bin/env bash
# decoupleQ, table 2: ResNet-18 and -50 on ImageNet at 2, 3 and 4 bits, without and with fine-tuning; GPTQ beside it.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=resnet_imagenet task.pretrained=true model=torchvision.resnet18,torchvision.resnet50 \
  quant=float "$@"
python -m src.run -m task=resnet_imagenet task.pretrained=true model=torchvision.resnet18,torchvision.resnet50 \
  quant=gptq bits=3,4 "$@"
python -m src.run -m task=resnet_imagenet task.pretrained=true model=torchvision.resnet18,torchvision.resnet50 \
  quant=decoupleq bits=2,3,4 level=1 N=4 quant.K=50 "$@"
python -m src.run -m task=resnet_imagenet task.pretrained=true model=torchvision.resnet18 \
  quant=decoupleq bits=2,3,4 level=1 N=4 quant.K=50 quant.sft=true "$@"
python -m src.run -m task=resnet_imagenet task.pretrained=true model=torchvision.resnet50 \
  quant=decoupleq bits=2,3,4 level=1 N=4 quant.K=50 quant.sft=true train.batch_size=512 "$@"
