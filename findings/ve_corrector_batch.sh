#!/usr/bin/env bash
# In diffusers' ScoreSdeVeScheduler the corrector couples the images of a batch.
#
# step_correct, the Langevin step of the predictor-corrector sampler (Song et al. 2021), takes its
# step size from norms of score and noise that are averaged over the batch. So the same start, score
# and noise give another image when the other images of the batch differ: samples do not survive a
# change of batch size, an image cannot be drawn again alone, and one outlier changes all. Scores
# here are -x, those of a standard normal: each image's is independent of the others.
#
# Seen with diffusers 0.42.1 and torch 2.14.1, in the first of two images after one step:
#     the other image is twice as bright: largest change 0.409
#     the other image is the same: largest change 0.0
#     step_pred, the other image is twice as bright: largest change 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/warnings"
import diffusers
import torch

scheduler = diffusers.ScoreSdeVeScheduler()
scheduler.set_timesteps(10)
scheduler.set_sigmas(10)
first, second = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def step(brightness, correct=True):
    """The first of two images after a step; the second is multiplied by brightness."""
    x = torch.stack([first, brightness * second])
    generator = torch.Generator().manual_seed(1)
    if correct:
        return scheduler.step_correct(-x, x, generator=generator).prev_sample[0]
    t = scheduler.timesteps[5]
    return scheduler.step_pred(-x, t, x, generator=generator).prev_sample[0]


def largest(a, b):
    return round((a - b).abs().max().item(), 3)


print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
corrected, same = largest(step(1.0), step(2.0)), largest(step(1.0), step(1.0))
predicted = largest(step(1.0, correct=False), step(2.0, correct=False))
print(f"the other image is twice as bright: largest change {corrected}")
print(f"the other image is the same: largest change {same}")
print(f"step_pred, the other image is twice as bright: largest change {predicted}")
assert corrected > 0.01 and same == predicted == 0
PYTHON
