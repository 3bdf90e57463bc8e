#!/usr/bin/env bash
# torchebm's score matching with an estimated Hessian learns a Gaussian that is too wide: d dimensions
# make its variance d times that of the data.
#
# Hyvarinen's loss is |grad E|^2 / 2 - trace(Hessian of E). ScoreMatching(hessian_method="approx")
# estimates the trace by a difference of two gradients along random noise, and divides it by the
# number of dimensions besides: both terms fall out of balance, the loss still falls. Unlike it the
# exact trace, and SlicedScoreMatching, find the data's precision (one over the variance), which is 1.
#
# Seen with torchebm 0.8.9 and torch 2.14.1, precision at which the loss of 4,096 draws is least:
#     dimensions       1       2       4      16
#     exact        1.014   0.996   0.992   1.003
#     approx       1.028   0.504   0.249   0.063
#     sliced       1.014   0.991   0.984   1.011
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy torchebm==0.8.9
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torchebm.core import BaseModel
from torchebm.losses import ScoreMatching, SlicedScoreMatching


class Gaussian(BaseModel):
    """E(x) = precision |x|^2 / 2 of x (N, d)."""

    def __init__(self):
        super().__init__()
        self.precision = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.precision * x.square().sum(1) / 2


kinds = {
    "exact": lambda model: ScoreMatching(model, hessian_method="exact"),
    "approx": lambda model: ScoreMatching(model, hessian_method="approx"),
    "sliced": SlicedScoreMatching,
}


def best_precision(kind, d):
    """The loss is quadratic in the precision: its gradients at 0 and 1 give its minimum."""
    torch.manual_seed(0)
    x = torch.randn(4096, d)
    model = Gaussian()
    loss = kind(model)
    gradients = []
    for precision in 0.0, 1.0:
        model.precision.data.fill_(precision)
        model.precision.grad = None
        torch.manual_seed(1)
        loss(x).backward()
        gradients.append(model.precision.grad.item())
    return gradients[0] / (gradients[0] - gradients[1])


dimensions = 1, 2, 4, 16
print("dimensions", *(f"{d:7}" for d in dimensions))
for name, kind in kinds.items():
    row = [best_precision(kind, d) for d in dimensions]
    print(f"{name:10}", *(f"{precision:7.3f}" for precision in row))
    for d, precision in zip(dimensions, row, strict=True):
        expected = 1 / d if name == "approx" else 1.0
        assert abs(precision / expected - 1) < 0.05, (name, d, precision)
PYTHON
