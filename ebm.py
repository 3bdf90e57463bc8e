"""EBM: an energy-based model that learns to draw images. common.py loads the data.

A network gives each image x one number, its energy E(x). Low energy means likely, by definition:
    p(x) = exp(-E(x) / T) / Z,          Z = integral of exp(-E(x) / T) over all images
Nobody can compute Z, but to draw images one need not. Langevin dynamics (Du & Mordatch 2019,
arXiv:1903.08689) walks down the energy with some noise, and small steps keep a balance at p:
    x <- x - a grad E(x) + s z,         z from N(0, I)                             T = s^2 / (2 a)

1. Denoising score matching (Vincent 2011) is quick and stable. The model's p is to be the density
of images with some noise, y = x + sigma z with sigma = smooth. The best guess of x is y + sigma^2
grad ln p(y), by Tweedie's formula; with ln p = -E / T - ln Z it is y - d grad E(y), where d =
smooth^2 / T. So
    score = mean((d grad E(x + sigma z) / sigma - z)^2)
teaches grad E. Chains come from afar, where E must slope towards images too; so sigma is drawn from
smooth to 1, with d as it is. That is a compromise: around a single image x it makes E(y) equal |y -
x|^2 / (2 d), a bowl that curves as 1 / d, and far from many images such a bowl around the guess. By
default T = 1e-5, d = 90, and a Langevin step, a = 20, goes 22 % of the way to the guess.

2. Contrastive divergence. Denoising shows E nothing but images with noise. Chains get elsewhere,
to smooth blobs for example, and stay where E is low by mistake. As grad ln Z in the weights is the
mean of -grad E / T over p, that of -T ln p is, over data, grad E(data) - grad E(draws from p) on
average. So let chains run, push data down and chains up, by
    gap = mean E(data) - mean E(chains)
until E cannot tell them apart. A buffer keeps the chains; some go on for K steps each time
(persistent, Tieleman 2008). In a bowl that curves as 1 / d they have noise of std sqrt(T d), about
smooth. Data get as much, or E would tell them apart by the noise alone. A penalty, alpha
mean(E(data)^2 + E(chains)^2), keeps E near 0.
    loss = 0.1 score in the first --warm-up of the steps, then gap + penalty + 0.1 score

    python ebm.py --epochs 50                          trains on CIFAR-10, files in runs/ebm
    python ebm.py --generate 1000 --chain 200          PNG files, from fresh noise
    python ebm.py --evaluate --inpaint --denoise       outliers, energies, pictures
The method ends with training_step(); train() is its loop. In your own project, import torch, ebm:
    images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    net, settings = ebm.EnergyNet(8, mults=(1, 2), channels=1), ebm.Settings(steps=5)
    optimizers = ebm.make_optimizers(net)
    for x in images.split(16): ebm.training_step(net, optimizers, x, settings)
    buffer = ebm.Buffer(32, images.shape[1:])
    for x in images.split(16): ebm.training_step(net, optimizers, x, settings, buffer)
    samples = ebm.quantise(ebm.draw(net, torch.rand(4, 1, 28, 28), 20, settings, settings.d()))"""

import argparse
import copy
import csv
import io
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, normalize, silu

NAME = "ebm"

# ------------------------------------------------------------------------------------------ network


class Block(nn.Module):
    """Residual block, (B, in_channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity()
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        return self.skip(x) + self.conv2(silu(self.conv1(silu(x))))


class EnergyNet(nn.Module):
    """E: images (B, C, H, W) in [0, 1], with noise or without, -> (B,).

    There are `blocks` blocks with width * mults channels at full, half, ... resolution. From what
    they put out at each resolution, h, the means over pixels of silu(h) and of h^2 are taken; E is
    linear in these means. Thanks to the squares it can grow as the square of noise, as the
    docstring above wants. amp: the blocks compute in bf16.
    """

    def __init__(self, width=64, mults=(1, 2, 4, 4), blocks=2, channels=3, amp=False):
        super().__init__()
        self.amp = amp
        widths = [width * mult for mult in mults]
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        before = widths[0]  # channels that come out of the layer before
        for after in widths:
            level = nn.Sequential()
            for _ in range(blocks):
                level.append(Block(before, after))
                before = after
            self.levels.append(level)
        self.head = nn.Linear(2 * sum(widths), 1)
        nn.init.zeros_(self.head.weight)  # E is flat at first
        self.convolutions = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]
        for layer in self.convolutions:
            layer.register_buffer("u", torch.randn(len(layer.weight)))
        self.project(iterations=30)

    @torch.no_grad()
    def project(self, iterations=1):
        """Keep E from getting steep: divide each W (C_out, rest) by its largest singular value > 1.

        W maps a patch of a layer's input to a pixel. With singular values up to 1 it stretches no
        difference between two patches. (A layer may still stretch somewhat, as patches overlap and
        skips add up.) Langevin steps are of one size, and in a steep landscape they would jump over
        the valleys. A layer whose largest value is below 1 is left alone: to scale it up to 1, as
        spectral normalisation does, would amplify what it has learned to ignore. The value is
        u . W v, found by power iteration, v along W^T u, u along W v. Weights change little in a
        step of training, so one iteration is enough if u is kept.
        """
        for layer in self.convolutions:
            w = layer.weight.flatten(1)
            for _ in range(iterations):
                v = normalize(layer.u @ w, dim=0)
                layer.u.copy_(normalize(w @ v, dim=0))
            largest = layer.u @ w @ v
            layer.weight.div_(largest.clamp(min=1))

    def forward(self, x):
        halvings = len(self.levels) - 1
        if x.shape[2] % 2**halvings or x.shape[3] % 2**halvings:
            raise ValueError(f"{x.shape[2]}x{x.shape[3]} pixels cannot be halved {halvings} times")
        # [-5, 5] was found to learn faster than [0, 1]. In fp32: bf16 would round x to 0.004.
        h = self.stem(10 * x - 5)
        means = []
        for i, level in enumerate(self.levels):
            if i > 0:
                h = avg_pool2d(h, 2)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
                h = level(h)
            precise = h.to(x.dtype)
            means.append(silu(precise).mean((2, 3)))
            means.append(precise.square().mean((2, 3)))
        return self.head(torch.cat(means, dim=1))[:, 0]


# --------------------------------------------------------------------------------------------- loss


def dequantise(images, generator=None):
    """uint8 -> float in [0, 1]: a byte becomes a uniform draw from its bin, 1/256 wide."""
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return (images + noise) / 256


def quantise(x):
    """float -> uint8: the bin that x in [0, 1] lies in; values beyond go to 0 or 255."""
    return (x * 256).clamp(0, 255).to(torch.uint8)


def add_noise(x, std, generator=None):
    """x + std z, z from N(0, I)."""
    return x + std * torch.randn(x.shape, generator=generator, device=x.device)


def denoising_score_matching(energy, x, sigma, d, generator=None):
    """mean((d grad E(y) / sigma - z)^2) with y = x + sigma z, a tensor (), for x (B, ...).

    sigma is (B, 1, ...). As y - x = sigma z, the square is that of (guess - x) / sigma with the
    guess y - d grad E(y): 1 while E is flat, and least where the guess is the mean of all x that y
    may come from. E does not know sigma, so this mean goes over all sigma too, with the weight
    1 / sigma^2 (Vincent 2011; one energy for many sigma: Li et al. 2019, arXiv:1910.07762).
    """
    z = torch.randn(x.shape, generator=generator, device=x.device)
    y = (x + sigma * z).requires_grad_()
    (grad,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)  # to learn from it
    return (d * grad / sigma - z).square().mean()


def contrastive_divergence(energy, data, chains, alpha=1.0):
    """(gap, penalty, E(data), E(chains)) of data and chains, each (B, ...); both in one forward."""
    energies = energy(torch.cat([data, chains.detach()]))
    e_data, e_chains = energies.split([len(data), len(chains)])
    gap = e_data.mean() - e_chains.mean()
    penalty = alpha * (e_data.square().mean() + e_chains.square().mean())
    return gap, penalty, e_data, e_chains


# ----------------------------------------------------------------------------------------- samplers


def energy_and_gradient(energy, x):
    """E(x), (B,), and grad E(x), shaped like x; weights get no gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        e = energy(x)
        (grad,) = torch.autograd.grad(e.sum(), x)
    return e.detach(), grad


@torch.no_grad()
def denoise(energy, y, d):
    """y - d grad E(y): the guess of the image in y, shaped like y (Tweedie's formula)."""
    return y - d * energy_and_gradient(energy, y)[1]


def unconstrained(x):
    """No constraint."""
    return x


@torch.no_grad()
def langevin(
    energy, x, steps, step_size, noise, clamp=math.inf, generator=None, constrain=unconstrained
):
    """Langevin dynamics from x (B, ...) in [0, 1]: x after `steps` steps, and what was seen.

    It samples exp(-E / T) on [0, 1], T = noise^2 / (2 step_size), but for three things: gradients
    are clamped, pixels stop at 0 and 1, and steps are not infinitely small (where E is c x^2 / 2
    the variance becomes T / (c (1 - c step_size / 2)) instead of T / c). What was seen: {name:
    tensor ()}, E at the start, the mean |gradient| of a pixel, and the share of those clamped.
    After each step x becomes constrain(x).
    """
    e_start = gradient = clamped = torch.zeros((), device=x.device)
    for i in range(steps):
        e, grad = energy_and_gradient(energy, x)
        if i == 0:
            e_start = e.mean()
        size = grad.abs()
        gradient = gradient + size.mean() / steps
        clamped = clamped + (size > clamp).float().mean() / steps
        z = torch.randn(x.shape, generator=generator, device=x.device)
        x = (x - step_size * grad.clamp(-clamp, clamp) + noise * z).clamp(0, 1)
        x = constrain(x)
    return x, {"E start": e_start, "gradient": gradient, "clamped": clamped}


@dataclass
class Settings:
    """Of Langevin dynamics and of the loss; the flags of the same names."""

    steps: int = 40  # K, for each step of training
    step_size: float = 20.0  # a
    noise: float = 0.02  # s
    clamp: float = 0.01  # of a pixel's gradient: about 1 / d, the pull on one that is off by 1
    smooth: float = 0.03  # std of the noise on data
    fresh: float = 0.05  # share of drawn chains that begin anew
    penalty: float = 1.0  # alpha

    def d(self):
        """smooth^2 / T: with it d E(y) is about half the squared distance of y from an image."""
        temperature = self.noise**2 / (2 * self.step_size)
        return self.smooth**2 / temperature

    def walk(self, energy, x, steps, generator=None, constrain=unconstrained):
        """langevin() with these settings."""
        a = self.step_size
        return langevin(energy, x, steps, a, self.noise, self.clamp, generator, constrain)


def draw(energy, x, steps, settings, d, generator=None):
    """Samples in [0, 1]: Langevin steps from x (B, ...), then the noise that chains have goes.

    d is that of training, settings.d(), even where the settings of sampling are others.
    """
    x, _ = settings.walk(energy, x, steps, generator)
    return denoise(energy, x, d).clamp(0, 1)


class Buffer(nn.Module):
    """The ends of `size` persistent chains, as bytes (size, *shape), and the last hundred gaps.

    A chain begins as uniform noise. Every step of training draws some chains, lets them go on for K
    steps and puts them back. Of those drawn a share, `fresh`, begins anew, so that none gets stuck
    for good: a chain lives for K / fresh steps on average (800 by default).
    """

    def __init__(self, size, shape, generator=None, device=None):
        super().__init__()
        noise = torch.rand(size, *shape, generator=generator, device=device)
        self.register_buffer("chains", quantise(noise))
        self.register_buffer("gaps", torch.zeros(100, device=device))

    def draw(self, count, fresh, generator=None):
        """(slots, x): `count` different chains (at most size), some of them replaced by noise."""
        if count > len(self.chains):
            raise ValueError(f"a buffer of {len(self.chains)} chains is too small for {count}")
        kind = {"generator": generator, "device": self.chains.device}
        slots = torch.randperm(len(self.chains), **kind)[:count]
        x = dequantise(self.chains[slots], generator)
        is_fresh = torch.rand(count, *[1] * (x.dim() - 1), **kind) < fresh
        return slots, torch.where(is_fresh, torch.rand(x.shape, **kind), x)

    def put(self, slots, x, gap, good):
        """Keep where chains got to, and the gap, if the step was good, a bool tensor ()."""
        self.chains[slots] = torch.where(good, quantise(x), self.chains[slots])
        gaps = torch.cat([self.gaps[1:], gap[None]])  # the oldest goes
        self.gaps.copy_(torch.where(good, gaps, self.gaps))


# --------------------------------------------------------------------------------------- optimisers
# orthogonal and Muon are the same in nvae.py, ncsn.py and ebm.py.


def orthogonal(matrix, iterations=5):
    """U V^T, nearly, of a matrix U S V^T (rows, columns): singular values near 1 in place of S.

    The Newton-Schulz iteration is X <- P X with P = a I + b X X^T + c (X X^T)^2. It keeps U and V,
    and turns each singular value s into a s + b s^3 + c s^5. With the a, b, c of K. Jordan et al.
    (2024, kellerjordan.github.io/posts/muon) small ones become 3.4 times as large each time, and
    after five times all from 0.01 to 1 lie between 0.68 and 1.14; smaller ones lag behind. None
    may be much above 1. So X is first divided by its norm, which is the root of the sum of the
    squares of all its singular values, and so not less than any.
    P is symmetric, so the next X X^T is P X X^T P. The loop needs no more than this matrix and the
    product of all P so far, both (rows, rows): for a wide X, as of a convolution, that is less.
    """
    a = 3.4445
    b = -4.7750
    c = 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    rows, columns = x.shape
    if rows > columns:
        x = x.mT  # so that it is wide
    x_xt = x @ x.mT
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    product = identity
    for _ in range(iterations):
        p = a * identity + b * x_xt + c * x_xt @ x_xt
        x_xt = p @ x_xt @ p
        product = p @ product
    x = product @ x
    return x.mT if rows > columns else x


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum made orthogonal, for weight matrices inside a network.

    A gradient U S V^T is mostly made of the few directions with large singular values, in which the
    loss is steep. Descent goes far along these and hardly moves along the others, though they may
    matter as much in the end, and Adam, which looks at each number alone, does not mend that.
    U V^T goes equally far along all of them. Its size is known, whatever the gradient's: a step
    changes what a layer makes of an input of length 1 by about `lr` at most (if it has more outputs
    than inputs by more: see below).
    A convolution counts as the matrix (C_out, rest) that maps a patch of its input to a pixel.
    Vectors are left to Adam (in nvae.py Adamax), and so are layers at the ends of a network, where
    a row or column stands for something by itself (a colour, a logit) and sizes differ for good
    reason.
    A weight stays where it is, in spite of momentum, while its whole gradient is 0: so a step can
    be skipped (ebm.py) without asking the device.
    """

    def __init__(self, weights, lr=0.02, momentum=0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:  # frozen, or not used
                    continue
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"].lerp_(weight.grad, 1 - group["momentum"])
                # Nesterov's momentum: the average as it will be if the next gradient is like this.
                ahead = weight.grad.lerp(average, group["momentum"])
                change = orthogonal(ahead.flatten(1)) * weight.grad.any()  # times 1 or 0
                # If there are more rows than columns, rows of U V^T have a length of only
                # sqrt(columns / rows), in root mean square. This makes it 1, as it is in wide ones.
                rows, columns = change.shape
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                weight.sub_(change.view_as(weight), alpha=rate)


def set_rate(optimizers, lr):
    """Set the learning rates of make_optimizers()."""
    muon, adam = optimizers
    muon.param_groups[0]["lr"] = lr
    adam.param_groups[0]["lr"] = lr / 20


def make_optimizers(net, lr=0.02):
    """[Muon for the convolutions of all blocks, Adam at lr / 20 for the other weights].

    Both stand still where gradients are 0, as after cancel_bad_step(); Adam does so because its
    momentum is 0.
    """
    hidden = [weight for weight in net.levels.parameters() if weight.dim() > 1]
    ids = {id(weight) for weight in hidden}
    rest = [weight for weight in net.parameters() if id(weight) not in ids]
    optimizers = [Muon(hidden), torch.optim.Adam(rest, betas=(0.0, 0.999), fused=True)]
    set_rate(optimizers, lr)
    return optimizers


# ------------------------------------------------------------------------------------ training step


def score_loss(net, x, settings, generator=None):
    """Denoising score matching of clean x (B, C, H, W), ln sigma uniform from ln smooth to 0."""
    u = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    sigma = settings.smooth**u
    # net.forward, because a compiled net() cannot be differentiated twice.
    return denoising_score_matching(net.forward, x, sigma, settings.d(), generator)


def chain_loss(net, data, settings, buffer, generator=None):
    """Contrastive divergence: (loss, terms to log, slots and ends of the chains)."""
    slots, start = buffer.draw(len(data), settings.fresh, generator)
    chains, seen = settings.walk(net, start, settings.steps, generator)
    gap, penalty, e_data, e_chains = contrastive_divergence(net, data, chains, settings.penalty)
    terms = {"E data": e_data.mean(), "E chains": e_chains.mean(), **seen}
    terms.update({"gap": gap, "penalty": penalty, "saturated": share_saturated(chains)})
    return gap + penalty, terms, slots, chains


def share_saturated(x):
    """Share of pixels at 0 or 1, where Langevin dynamics stops them."""
    return ((x == 0) | (x == 1)).float().mean()


def cancel_bad_step(net, gap, norm, recent_gaps):
    """Set gradients to 0 if the step is bad. Returns whether it is good, a bool tensor ().

    Bad is a gap or gradient norm that is not finite, or a |gap| above 1 (for images like CIFAR-10's
    it is far below) that is also above five times the median of the recent ones. All this stays on
    the device: where(good, ...) in place of `if good`, for which the program would have to wait.
    """
    limit = (5 * recent_gaps.abs().median()).clamp(min=1)
    good = gap.isfinite() & norm.isfinite() & (gap.abs() <= limit)
    for p in net.parameters():
        if p.grad is not None:
            p.grad = torch.where(good, p.grad, 0)
    return good


def training_step(net, optimizers, images, settings, buffer=None, generator=None):
    """One step on uint8 images (B, C, H, W): score matching, and with a buffer also chains.

    Returns what is logged, {name: tensor ()}, all 0 but "skipped" if the step was bad: the terms of
    the loss; E of data, and of chains before and after their steps; their mean gradient and the
    share clamped; the share of pixels at 0 or 1, of chains (saturated) and of data.
    """
    x = dequantise(images, generator)
    data = add_noise(x, settings.smooth, generator).clamp(0, 1)  # clamped, as chains are
    score = score_loss(net, x, settings, generator)
    loss = 0.1 * score
    gap = torch.zeros_like(score)
    recent_gaps = torch.zeros_like(score)
    terms = {}
    if buffer is not None:
        chains_loss, terms, slots, chains = chain_loss(net, data, settings, buffer, generator)
        loss = loss + chains_loss
        gap = terms["gap"].detach()
        recent_gaps = buffer.gaps
    net.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    good = cancel_bad_step(net, gap, norm, recent_gaps)
    for optimizer in optimizers:
        optimizer.step()
    net.project()
    if buffer is not None:
        buffer.put(slots, chains, gap, good)
    terms.update({"score": score, "data saturated": share_saturated(data), "train loss": loss})
    terms = {name: torch.where(good, value.detach(), 0) for name, value in terms.items()}
    return {**terms, "skipped": 1.0 - good.float()}


# -------------------------------------------------------------------------------------- bookkeeping
# The same in nvae.py, ncsn.py and ebm.py. After the first two functions it is all about keeping the
# checkpoint whole, and stopping and going on without loss: to learn the method, go on at train().


def warmup_cosine(step, total):
    """Factor of the learning rate: up over 5 % of a run (500 steps at most), then down to 0."""
    warmup = min(500, max(1, total // 20))
    half_cosine = (1 + math.cos(math.pi * step / total)) / 2
    return min((step + 1) / warmup, half_cosine)


@torch.no_grad()
def update_ema(ema, net, step, share):
    """Move the averaged weights `ema` towards those of net, after step number `step` = 0, 1, ...

    The half-life is `share` of the steps so far, so about half of the average is from the last
    `share` of them. With 0.05, that is the last 5 after 100 steps and the last 5,000 after 100,000:
    a young run forgets how it began, and an old one averages over many steps.
    """
    half_life = share * (step + 1)
    keep = 0.5 ** (1 / half_life)
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - keep)


def die(message):
    """End the program with one line on stderr and exit status 2."""
    one_line = " ".join(str(message).split())
    print("error:", one_line, file=sys.stderr)
    raise SystemExit(2)


def write_whole(path, data):
    """Write bytes to a file whole or not at all: beside it first, then in its place."""
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk, before the old file goes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


CHECKPOINT_KEYS = ["args", "step", "seconds", "sums", "rows", "random", "data", "network", "ema"]


def load_checkpoint(path):
    """The dict of tensors and plain values that Run.save() wrote; no code in the file is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["model"] != NAME:
            raise ValueError(f"{checkpoint['model']}.py wrote it")
        for key in CHECKPOINT_KEYS:
            if key not in checkpoint:
                raise ValueError(f"it has no {key}: another version of {NAME}.py wrote it")
        return checkpoint
    except Exception as error:  # missing, damaged, another model's: of many types
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        die(f"no {NAME} checkpoint in {path} ({reason}): train first, or name a run with --out")


def load_states(checkpoint, parts):
    """Give each part, {name: module or optimizer}, its state from the checkpoint."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        die(f"the checkpoint does not fit this version of {NAME}.py ({str(error)[:200]})")


def plot(path, lines, **axes_options):
    """Draw lines {name: (xs, ys)}."""
    from matplotlib.figure import Figure

    axes = Figure(layout="constrained").add_subplot(**axes_options)
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, marker=".", label=name)
    axes.legend()
    axes.figure.savefig(path)


def write_log(rows, out):
    """log.csv with a row an epoch, from dicts, and its losses and energies as curves.png."""
    names = list(max(rows, key=len))  # in ebm.py the first rows have fewer
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out / "log.csv", text.getvalue().encode())
    lines = {}
    for name in names:
        if "loss" in name or name.startswith("E "):
            there = [row for row in rows if name in row]
            lines[name] = [row["epoch"] for row in there], [row[name] for row in there]
    plot(out / "curves.png", lines, xlabel="epoch")


class Run:
    """A training run: where it stands, its log and checkpoint, and when it ends.

    parts: {name: module or optimizer}, whose states a checkpoint keeps. facts: {name: plain value}
    that it keeps too; facts["data"] says which training images. generator: the source of all noise.
    """

    def __init__(self, args, images, parts, facts, generator):
        self.args = args
        self.out = Path(args.out)
        self.parts = parts
        self.facts = facts
        self.generator = generator
        self.steps_per_epoch = len(images) // args.batch_size
        self.total = args.epochs * self.steps_per_epoch
        self.step = 0  # steps done
        self.saved_step = None  # steps done in checkpoint.pt
        self.seconds = 0.0  # of training
        self.sums = {}  # name: (sum over this epoch, on the device; number of steps)
        self.rows = []  # of log.csv
        self.exit_status = None  # once there is a reason to stop
        if self.steps_per_epoch == 0:
            die(f"{len(images)} training images do not fill a batch: lower --batch-size")

    def save(self):
        state = {
            "model": NAME,
            "args": {flag: v for flag, v in vars(self.args).items() if flag not in HERE + USES},
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "rows": self.rows,
            "random": self.generator.get_state(),
            **self.facts,
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        file = io.BytesIO()  # not the file itself, as torch.save hides the error of a full disk
        torch.save(state, file)
        write_whole(self.out / "checkpoint.pt", file.getbuffer())
        self.saved_step = self.step
        self.saved_time = time.time()

    def restore(self, checkpoint):
        """Go on from a checkpoint of the same training images."""
        trained = checkpoint["data"]
        given = self.facts["data"]
        if given != trained:
            die(f"{self.out} was trained on {trained}, but --data {self.args.data} has {given}")
        load_states(checkpoint, self.parts)
        self.facts.update({name: checkpoint[name] for name in self.facts})
        self.step = self.saved_step = checkpoint["step"]
        self.seconds = checkpoint["seconds"]
        self.sums = checkpoint["sums"]
        self.rows = checkpoint["rows"]
        if self.rows:
            write_log(self.rows, self.out)  # it may lack the last row, if the end came in between
        if len(checkpoint["random"]) == len(self.generator.get_state()):  # the same kind of device
            self.generator.set_state(checkpoint["random"])

    def epochs(self):
        """The epochs to go. While they last, Ctrl-C and SIGTERM stop the run after a step."""
        from tqdm import tqdm

        args = self.args
        count = sum(p.numel() for p in self.parts["net"].parameters())
        where = f"{args.device} in {'bf16' if args.amp else 'fp32'}"
        print(f"{count / 1e6:.2f} M parameters, step {self.step} of {self.total}, on {where}")
        self.out.mkdir(parents=True, exist_ok=True)
        total = self.total * args.batch_size
        done = self.step * args.batch_size
        self.bar = tqdm(total=total, initial=done, unit="img", disable=None)
        self.started = self.checked_time = self.saved_time = time.time()
        signals = signal.SIGINT, signal.SIGTERM
        before = {number: signal.signal(number, self.on_signal) for number in signals}
        try:
            yield from range(self.step // self.steps_per_epoch, args.epochs)
        finally:
            self.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def batches(self, images):
        """What is left of this epoch's images, in batches."""
        from common import batches

        epoch, skip = divmod(self.step, self.steps_per_epoch)
        self.clock = time.time()
        yield from batches(images, self.args.batch_size, self.args.seed, epoch, skip)

    def record(self, terms):
        """Count a step with its terms, {name: tensor ()}; stop the run if it is time.

        It waits for the device, to check what came out, once a second and where an epoch ends.
        """
        self.latest = terms  # for ebm.py's check
        for name, value in terms.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)
        self.step += 1
        self.bar.update(self.args.batch_size)
        now = time.time()
        self.seconds += now - self.clock
        self.clock = now
        limit = self.args.time_limit
        if self.exit_status is None and limit is not None and now - self.started > 60 * limit:
            self.exit_status = 0
        stops = self.exit_status is not None
        ends_epoch = self.step % self.steps_per_epoch == 0
        if now - self.checked_time < 1 and not stops and not ends_epoch:
            return
        self.checked_time = now
        self.check()
        if not ends_epoch:  # else end_epoch() does it
            if stops or now - self.saved_time > 600:
                self.save()
            if stops:
                self.leave(self.exit_status)

    def means(self):
        """{name: mean over this epoch's steps so far}."""
        return {name: (total / count).item() for name, (total, count) in self.sums.items()}

    def check(self):
        """Show the means; end the run if weights are not finite, before such are saved."""
        self.bar.set_postfix({name: f"{mean:.4g}" for name, mean in self.means().items()})
        weights = [*self.parts["net"].parameters(), *self.parts["ema"].parameters()]
        if not nn.utils.get_total_norm(weights).isfinite():
            lower = f"--lr {self.args.lr / 3:.1g}"
            advice = f"start again with {lower}"
            if self.saved_step is not None:
                out = shlex.quote(str(self.out))
                advice = f"step {self.saved_step} is saved: --resume {lower} --out {out}"
            raise FloatingPointError(f"weights are not finite at step {self.step}; {advice}")

    def end_epoch(self, measured):
        """Log the epoch, with what was measured after it as {name: number}; save; stop if due."""
        before = self.rows[-1]["seconds"] if self.rows else 0.0
        images = self.steps_per_epoch * self.args.batch_size
        row = {"epoch": self.step // self.steps_per_epoch, "seconds": self.seconds}
        row["images/s"] = images / max(self.seconds - before, 1e-9)
        row.update(self.means())
        row.update(measured)
        self.rows.append(row)
        self.sums = {}
        self.save()
        write_log(self.rows, self.out)
        self.bar.write("  ".join(f"{name} {value:.5g}" for name, value in row.items()))
        if self.exit_status is not None:
            self.leave(self.exit_status)

    def on_signal(self, number, frame):
        """Stop after this step; at once if it is the second signal or nothing would be lost."""
        if self.exit_status is not None or self.step == self.saved_step:
            self.leave(128 + number)
        self.exit_status = 128 + number

    def leave(self, status):
        """End the program and say how to go on."""
        self.bar.close()
        why = {0: "time limit", 128 + signal.SIGINT: "interrupted"}.get(status, "terminated")
        saved = "nothing is saved"
        if self.saved_step is not None:
            out = shlex.quote(str(self.out))
            saved = f"saved step {self.saved_step} of {self.total}, go on with --resume --out {out}"
        print(f"{why}: {saved}")
        raise SystemExit(status)


# ----------------------------------------------------------------------------------------- training


class GuardedRun(Run):
    """A Run that puts back the weights and chains of its last checkpoint if training diverges."""

    def trouble(self):
        """What is wrong, or ""."""
        last = {name: value.item() for name, value in self.latest.items()}
        skipped, _ = self.sums["skipped"]  # in this epoch
        if not nn.utils.get_total_norm(self.parts["net"].parameters()).isfinite():
            return "weights not finite"
        if skipped >= min(50, self.steps_per_epoch):
            return f"{skipped:.0f} steps skipped"
        if max(abs(last.get("E data", 0)), abs(last.get("E chains", 0))) > 10:
            return "energies above 10"
        halfway = (1 + last["data saturated"]) / 2  # from the data's share to all pixels
        if last.get("saturated", 0) > halfway:
            return "chains black and white"
        return ""

    def check(self):
        """Before anything is saved: go back if need be; the third time, end.

        Net, averaged weights, optimizer and buffer go back. The count of steps and the noise go on,
        and the learning rate is halved, so that the same does not happen again.
        """
        why = self.trouble()
        if why:
            self.facts["failures"] += 1
            if self.facts["failures"] == 3:
                rate = f"{self.args.lr / 10:.1g}"
                message = f"diverged three times, at step {self.step} too ({why})"
                raise FloatingPointError(f"{message}: start again with --lr {rate}")
            load_states(load_checkpoint(self.out / "checkpoint.pt"), self.parts)
            self.sums = {}
            self.bar.write(f"step {self.step}: {why}; back to the last checkpoint, half the rate")
        super().check()


@torch.no_grad()
def centre_energy(net, images, settings, generator):
    """Make E of uint8 images 0 on average: score matching alone leaves a constant in E open."""
    data = add_noise(dequantise(images, generator), settings.smooth, generator).clamp(0, 1)
    net.head.bias -= net(data).mean()


def describe_network(args, images):
    """The arguments of EnergyNet, by name; a checkpoint keeps them."""
    flags = {flag: getattr(args, flag) for flag in NETWORK_FLAGS}
    return {**flags, "channels": images.shape[1]}


def build(args, network):
    """The network with these arguments, by name, on the device of the run."""
    try:
        net = EnergyNet(**network, amp=args.amp)
    except (TypeError, ValueError) as error:
        die(error)
    return net.to(args.device, memory_format=torch.channels_last)


def train(args, checkpoint=None):
    """Train on --data from the start or, given a checkpoint, from where that was saved."""
    from common import fingerprint, load, save_grid

    images, test = (split.to(args.device) for split in load(args.data, args.subset))
    shape = list(images.shape[1:])
    network = describe_network(args, images)
    settings = settings_of(args)
    torch.manual_seed(args.seed)
    net = build(args, network)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizers = make_optimizers(net)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    buffer = Buffer(max(args.buffer, args.batch_size), shape, generator, args.device)

    parts = {"net": net, "ema": ema, "muon": optimizers[0], "adam": optimizers[1], "buffer": buffer}
    data = f"{len(images)} images {fingerprint(images)}"
    facts = {"network": network, "shape": shape, "data": data}
    facts.update(d=settings.d(), smooth=settings.smooth, failures=0)
    run = GuardedRun(args, images, parts, facts, generator)
    facts["warm_steps"] = int(args.warm_up * run.total)
    if checkpoint:
        run.restore(checkpoint)  # and the facts
    if args.compile:
        net.compile()
        ema.compile()

    for epoch in run.epochs():
        for batch in run.batches(images):
            if run.saved_step is None:
                run.save()  # something to go back to
            rate = args.lr * warmup_cosine(run.step, run.total) / 2 ** facts["failures"]
            set_rate(optimizers, rate)
            if run.step <= facts["warm_steps"] and run.step % 50 == 0:
                centre_energy(net, batch, settings, generator)
            chains = buffer if run.step >= facts["warm_steps"] else None
            terms = training_step(net, optimizers, batch, settings, chains, generator)
            update_ema(ema, net, run.step, args.ema)
            run.record(terms)
        run.end_epoch({"failures": facts["failures"]})
        if (epoch + 1) % args.sample_every == 0 or epoch + 1 == args.epochs:
            fixed = torch.Generator(args.device).manual_seed(args.seed)
            x = draw_samples(args, ema, facts, 64, fixed)
            save_grid(x, run.out / f"samples_{epoch + 1:04d}.png")
    draw_chains(args, ema, test, run.out)


# --------------------------------------------------------------------------------------------- uses
# What can be done with trained weights: a function for each flag. They write into --out.
# d and smooth belong to the weights and come from the facts in the checkpoint, whatever the flags.


def settings_of(args):
    """The flags that make up Settings."""
    return Settings(**{flag: getattr(args, flag) for flag in SETTINGS_FLAGS})


def draw_samples(args, net, facts, count, generator):
    """uint8 images (count, C, H, W), --chain steps from uniform noise, never from the buffer."""
    noise = torch.rand(count, *facts["shape"], generator=generator, device=args.device)
    return quantise(draw(net, noise, args.chain, settings_of(args), facts["d"], generator))


def draw_chains(args, net, test, out):
    """chains.png: eight chains from noise, eight from test images, in rows up to 2 --chain steps.

    If chains from test images soon look like none, E is lowest elsewhere, and samples are good only
    if their chains are not too long. The steps of the rows grow by a factor from row to row.
    """
    from common import save_grid

    generator = torch.Generator(args.device).manual_seed(args.seed)
    x = dequantise(test[:8], generator)
    noise = torch.rand(8, *x.shape[1:], generator=generator, device=args.device)
    x = torch.cat([noise, x])
    rows = [quantise(x)]
    before = 0
    for row in range(1, 8):
        after = int((2 * args.chain) ** (row / 7))
        x, _ = settings_of(args).walk(net, x, after - before, generator)
        rows.append(quantise(x))
        before = after
    save_grid(torch.cat(rows), out / "chains.png", columns=len(x))


def generate(args, net, facts):
    """--generate N: PNG files, drawn 256 at a time."""
    from common import export, save_grid

    out = Path(args.out)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for start in range(0, args.generate, 256):
        count = min(256, args.generate - start)
        x = draw_samples(args, net, facts, count, generator)
        export(x, out / "generated", start)
        if start == 0:
            save_grid(x[:64], out / "generated.png")
        print(f"{start + count} of {args.generate} images in {out / 'generated'}")


def save_triples(truth, before, after, path):
    """Write each image beside what was made of it, and what became of that."""
    from common import save_grid

    triples = torch.stack([truth, before, after], dim=1)
    save_grid(quantise(triples.flatten(0, 1)), path, columns=12)


def inpaint(args, net, facts, test):
    """--inpaint: test images, the same without their middle, and with that filled by a chain."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    truth = dequantise(test[:16], generator)
    height, width = truth.shape[2:]
    known = torch.ones(height, width, dtype=torch.bool, device=args.device)
    known[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = False

    def keep_known(x):  # with the noise that data had in training
        return torch.where(known, add_noise(truth, facts["smooth"], generator).clamp(0, 1), x)

    x = torch.rand(truth.shape, generator=generator, device=args.device)
    x, _ = settings_of(args).walk(net, x, args.chain, generator, keep_known)
    x = torch.where(known, truth, denoise(net, x, facts["d"]))
    save_triples(truth, torch.where(known, truth, 0), x, Path(args.out) / "inpaint.png")


def remove_noise(args, net, facts, test):
    """--denoise: test images, with noise of std 0.1, and after one step of denoise()."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    truth = dequantise(test[:16], generator)
    noisy = add_noise(truth, 0.1, generator)
    clean = denoise(net, noisy, facts["d"]).clamp(0, 1)
    save_triples(truth, noisy, clean, Path(args.out) / "denoise.png")

    def psnr(x):
        return -10 * (x - truth).square().mean((1, 2, 3)).log10().mean()

    dB = f"PSNR {psnr(noisy):.2f} dB before, {psnr(clean):.2f} dB after"
    print(f"{dB}, of {len(truth)} test images")


def outliers(images, generator=None):
    """{name: uint8 images like none of `images` (N, C, H, W), as many and of the same shape}."""
    count, channels, height, width = images.shape
    kind = {"generator": generator, "device": images.device}
    greys = torch.randint(256, (count, channels, 1, 1), dtype=torch.uint8, **kind)
    order = torch.rand(count, 1, height * width, **kind).argsort(2)  # of each image's pixels
    shuffled = images.flatten(2).gather(2, order.expand(-1, channels, -1))
    return {
        "uniform": torch.randint(256, images.shape, dtype=torch.uint8, **kind),
        "constant": greys.expand_as(images),
        "shuffled": shuffled.view_as(images),
        "interpolated": ((images.int() + images.roll(1, 0)) // 2).to(torch.uint8),
        "upside-down": images.flip(2),
    }


def auroc(inside, outside):
    """Share of pairs in which `outside` (M,) has more energy than `inside` (N,); ties count 1/2."""
    inside = inside.sort().values
    lower = torch.searchsorted(inside, outside)
    lower_or_equal = torch.searchsorted(inside, outside, right=True)
    return (lower + lower_or_equal).double().mean().item() / 2 / len(inside)


def evaluate(args, net, facts):
    """--evaluate: how well E tells other images from test images, and histograms of energies."""
    from common import load

    generator = torch.Generator(args.device).manual_seed(args.seed)

    @torch.no_grad()
    def energies(images):  # with the noise that data had in training
        parts = []
        for batch in images.split(250):
            x = dequantise(batch.to(args.device), generator)
            parts.append(net(add_noise(x, facts["smooth"], generator).clamp(0, 1)).cpu())
        return torch.cat(parts)

    train, test = load(args.data, args.subset)
    inside = {
        "test": energies(test),
        "train": energies(train[: len(test)]),
        "samples": energies(draw_samples(args, net, facts, 100, generator)),
    }
    others = outliers(test.to(args.device), generator)
    others[args.ood] = torch.cat(load(args.ood))
    for name, images in others.items():
        area = auroc(inside["test"], energies(images))
        print(f"AUROC {area:.3f}  of test images against {name}")
    every = torch.cat(list(inside.values()))
    low = every.min().item()
    high = every.max().item()
    middles = torch.linspace(low, high, 101)[1::2].tolist()  # of fifty bins
    lines = {}
    for name, e in inside.items():
        lines[name] = middles, (e.histc(50, low, high) / len(e)).tolist()
    plot(Path(args.out) / "histogram.png", lines, xlabel="energy")


def use(args, checkpoint):
    """Do what the flags ask for with the averaged weights of a checkpoint."""
    from common import load

    net = build(args, checkpoint["network"]).requires_grad_(False)
    load_states(checkpoint, {"ema": net})
    if args.generate:
        generate(args, net, checkpoint)
    if args.inpaint or args.denoise:
        test = load(args.data)[1].to(args.device)
        if args.inpaint:
            inpaint(args, net, checkpoint, test)
        if args.denoise:
            remove_noise(args, net, checkpoint, test)
    if args.evaluate:
        evaluate(args, net, checkpoint)


# ------------------------------------------------------------------------------------- command line

HERE = ["device", "amp", "compile", "out", "resume", "time_limit"]  # checkpoints do not keep them


class Parser(argparse.ArgumentParser):
    """An error is one line, without the usage."""

    def error(self, message):
        die(f"{message} (see --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the docstring as it is."""


def number(kind, low, above=False, most=2**31 - 1):
    """For add_argument(type=...): an int or float from low (or above it) to most."""

    def convert(text):
        value = kind(text)
        if not low <= value <= most or (above and value == low):
            raise ValueError
        return value

    convert.__name__ = (
        f"{kind.__name__} {'above' if above else 'from'} {low} to {most}"  # in errors
    )
    return convert


def numbers(low, most):
    """For add_argument(type=...): up to `most` ints of at least `low`, as in 1,2,3."""

    def convert(text):
        values = [int(part) for part in text.split(",")]
        if min(values) < low or max(values) < 1 or len(values) > most:
            raise ValueError
        return values

    convert.__name__ = f"list of up to {most} ints of at least {low}"
    return convert


def device(text):
    """For add_argument(type=...): a torch.device that can compute."""
    try:
        place = torch.device(text)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({reason})") from None
    return place


def shared_parser(lr):
    """The flags that nvae.py, ncsn.py and ebm.py have in common."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    count = number(int, 1)
    share = number(float, 0, above=True)
    fastest = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("--data", default="cifar10", help="cifar10, shapes, a folder of images or a .npz file")
    add("--subset", default=0, type=number(int, 0), help="train on that many images, 0 for all")
    add("--epochs", default=50, type=count, help="passes over the training images")
    add("--batch-size", default=128, type=count, help="images a step")
    add("--lr", default=lr, type=number(float, 0), help="highest learning rate, of Muon")
    add("--ema", default=0.05, type=share, help="half-life of averaged weights / steps so far")
    add("--seed", default=0, type=number(int, 0), help="of weights, order of images and noise")
    add("--device", default=str(fastest), type=device, help="cpu, cuda, cuda:1, mps, xpu, ...")
    add("--amp", action=switch, help="bf16 in the network; if not given, where it is native")
    add("--compile", action=switch, help="torch.compile; if not given, on cuda")
    add("--out", default=f"runs/{NAME}", help="folder of the run")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--time-limit", type=number(float, 0), metavar="MINUTES", help="save and stop after that")
    add("--sample-every", default=5, type=count, help="epochs from one picture to the next")
    add("--generate", type=count, metavar="N", help="only write N samples as PNG files")
    add("--evaluate", action="store_true", help="only measure on the test images")
    return parser


USES = ["generate", "evaluate", "inpaint", "denoise"]  # of trained weights
NETWORK_FLAGS = ["width", "mults", "blocks"]  # cannot be changed when weights are there
RUN_FLAGS = ["batch_size", "seed", "subset", "buffer"]  # nor can these when training goes on
RUN_FLAGS += ["step_size", "noise", "smooth", "warm_up"]
SETTINGS_FLAGS = ["steps", "step_size", "noise", "clamp", "smooth", "fresh", "penalty"]


def make_parser():
    """All flags of this script."""
    parser = shared_parser(lr=0.02)
    add = parser.add_argument_group(NAME).add_argument
    count = number(int, 1)
    share = number(float, 0, most=1)
    positive = number(float, 0, above=True)
    widths = numbers(1, most=6)
    add("--width", default=64, type=count, help="channels at full resolution")
    add("--mults", default=[1, 2, 4, 4], type=widths, metavar="M,M,...", help="widths by level")
    add("--blocks", default=2, type=count, help="residual blocks at a resolution")
    add("--warm-up", default=0.7, type=share, help="share of the run before there are chains")
    add("--steps", default=40, type=count, metavar="K", help="Langevin steps an update")
    add("--step-size", default=20.0, type=positive, help="a: gradients times this are a step")
    add("--noise", default=0.02, type=positive, help="s: std of a step's noise on [0, 1]")
    add("--clamp", default=0.01, type=positive, help="largest gradient of a pixel")
    add("--chain", default=500, type=count, help="Langevin steps from noise to a sample")
    add("--buffer", default=10_000, type=count, help="persistent chains")
    add("--fresh", default=0.05, type=share, help="share of drawn chains that start anew")
    add("--penalty", default=1.0, type=number(float, 0), help="alpha: weight of squared energies")
    add("--smooth", default=0.03, type=positive, help="std of the noise on data")
    add("--inpaint", action="store_true", help="only complete test images without their middle")
    add("--denoise", action="store_true", help="only take noise off test images")
    add("--ood", default="shapes", help="other images for --evaluate, like --data")
    return parser


def parse(argv=None):
    """(args, checkpoint or None). A checkpoint's flags stand in for those that are not given."""
    parser = make_parser()
    args = parser.parse_args(argv)
    path = Path(args.out) / "checkpoint.pt"
    uses = any(getattr(args, use) for use in USES)
    if not uses and not args.resume:
        if path.exists():
            die(f"{path} is there already: go on with --resume, or name another folder with --out")
        return args, None
    checkpoint = load_checkpoint(path)
    parser.set_defaults(**checkpoint["args"])
    args = parser.parse_args(argv)
    for flag in NETWORK_FLAGS + ([] if uses else RUN_FLAGS):
        trained = checkpoint["args"].get(flag)
        if getattr(args, flag) != trained:
            name = flag.replace("_", "-")
            die(f"{path} was trained with --{name} {trained}: leave that flag out")
    return args, checkpoint


def bf16_is_native(place):
    """Whether the device multiplies in bf16; where it only imitates that, fp32 is faster."""
    if place.type == "cuda":
        return torch.cuda.get_device_capability(place) >= (8, 0)
    if place.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def main(argv=None):
    """Train, or use trained weights, as the command line says."""
    if sys.version_info < (3, 10):  # noqa: UP036
        die("Python 3.10 or later is needed")
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):  # lines at once, in any terminal's characters
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    args, checkpoint = parse(argv)
    if args.amp is None:
        args.amp = bf16_is_native(args.device)
    if args.compile is None:  # its compiler, Triton, needs a GPU of capability 7
        cuda = args.device.type == "cuda"
        args.compile = cuda and torch.cuda.get_device_capability(args.device) >= (7, 0)
    try:
        if any(getattr(args, use) for use in USES):
            use(args, checkpoint)
        else:
            train(args, checkpoint)
    except OSError as error:
        die(f"{error} (checkpoint.pt and log.csv are written whole or not at all)")
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        die(error)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
