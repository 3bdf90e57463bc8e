#!/usr/bin/env bash
# torch.manual_seed takes 64 bits, but on a CPU only the low 32 reach the generator.
#
# Whoever packs (seed, step) into one number, as (seed << 32) + step, to give each training step
# noise of its own, gets the same noise for every seed on a CPU. initial_seed() returns all 64 bits,
# so the two states look different. seed * 1000003 + step has no such trouble for small seeds.
#
# Seen with torch 2.14.1 on a CPU:
#     seeds 7 and 7 + 2^32: initial_seed() 7 and 4294967303, equal noise: True
#     seeds 7 and 8: equal noise: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return generator.initial_seed(), torch.randn(1000, generator=generator)


(low, a), (high, b), (_, c) = (noise(seed) for seed in (7, 7 + 2**32, 8))
print(f"torch {torch.__version__}")
print(f"seeds 7 and 7 + 2^32: initial_seed() {low} and {high}, equal noise: {torch.equal(a, b)}")
print(f"seeds 7 and 8: equal noise: {torch.equal(a, c)}")
assert (low, high) == (7, 7 + 2**32) and torch.equal(a, b) and not torch.equal(a, c)
PYTHON
