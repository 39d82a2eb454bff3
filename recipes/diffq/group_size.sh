#!/usr/bin/env bash
# DiffQ, ablation: weights that share a width; each width costs 4 bits of table.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=resnet_cifar10_paper model=resnet18 \
  quant=diffq penalty=1,5,10 group_size=1,4,8,16 "$@"
