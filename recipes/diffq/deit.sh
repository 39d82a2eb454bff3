#!/usr/bin/env bash
# DiffQ, ImageNet: DeiT-B trained from scratch.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=vit_imagenet quant=float "$@"
python -m src.run -m task=vit_imagenet quant=ste bits=4,8 "$@"
python -m src.run -m task=vit_imagenet quant=diffq penalty=0.01,0.1 "$@"
