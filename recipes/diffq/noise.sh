#!/usr/bin/env bash
# DiffQ, ablation: Gaussian noise of half a step against uniform noise within a step.
. "$(dirname "$0")/../lines.sh"

python -m src.run -m task=resnet_cifar10_paper model=resnet18 \
  quant=diffq penalty=1,5,10 group_size=16 quant.noise=gaussian,uniform "$@"
