#!/usr/bin/env bash
# DiffQ, ImageNet: EfficientNet-B3 trained from scratch.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=efficientnet_imagenet quant=float "$@"
python -m src.run -m task=efficientnet_imagenet quant=ste bits=4,8 "$@"
python -m src.run -m task=efficientnet_imagenet quant=diffq penalty=0.005,0.01 "$@"
