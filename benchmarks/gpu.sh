#!/usr/bin/env bash
# Measure cratelm on one GPU: parity with the CPU, training step, harvest, and twins trained for a few minutes.
#
#     bash benchmarks/gpu.sh
#
# in a checkout of the repository, on a machine with an NVIDIA GPU (meant for one H100 or H200) and a python3 that has
# torch >= 2.11, transformers >= 5.17, accelerate, tokenizers, safetensors, numpy and tqdm. Nothing is installed or
# downloaded, and no other package of cratelm's is needed. It takes at most 9 minutes, prints one screen of results,
# and writes into the folder $OUT, or --out, or runs/gpu:
#
#     results.json          versions, card, driver, command, and the figures of each part
#     curves.jsonl          loss curves of the twins
#     weights/*.safetensors weights of the twins in bf16, each file below 16 MB (benchmarks/gpu_weights.py unpacks them)
#
# To train the twins on your own tokens, make a file of them where cratelm is installed, and carry it:
#
#     python benchmarks/gpu_tokens.py runs/mine benchmarks/gpu_tokens.safetensors
#
# Other options: `bash benchmarks/gpu.sh --help`. PYTHON=/path/to/python chooses the interpreter. Without a GPU,
# `bash benchmarks/gpu.sh --device cpu --tiny` runs every part on tiny models in less than a minute; its figures
# mean nothing. The exit status is 0 if every part finished and agreed with the CPU, otherwise 1; 2 for bad options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$@"
