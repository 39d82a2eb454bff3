#!/usr/bin/env bash
# decoupleQ, figure 2: ResNet-18 at 2 bits over K, the gradient steps after each column, against level 2; without and
# with fine-tuning.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=resnet_imagenet task.pretrained=true \
  quant=decoupleq bits=2 level=1 N=4 quant.K=1,2,4,8,16,50 quant.sft=false,true "$@"
python -m src.run -m task=resnet_imagenet task.pretrained=true \
  quant=decoupleq bits=2 level=2 N=4 quant.sft=false,true "$@"
