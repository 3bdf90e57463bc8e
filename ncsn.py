"""NCSN: a noise conditional score network that learns to draw images. common.py loads the data.

The score of an image is the direction in which it becomes more likely, grad_x log p(x). Real images
fill so little of pixel space that their own score is undefined nearly everywhere. Song & Ermon
(2019, arXiv:1907.05600; 2020, arXiv:2006.09011) add Gaussian noise, which spreads images over all
of space, and teach one network the scores of noisy images, for noise of every size sigma.

    x      image, float (B, C, H, W) in [-1, 1]      z    noise from N(0, I), shaped like x
    sigma  standard deviation of the noise           y    noisy image, x + sigma z
    D      denoiser: D(y, sigma) is a guess of x     F    the network inside D

Training is denoising: add noise, guess the image. The guess with the least squared error is the
mean of x given y, and it tells the score (Tweedie's formula). For the density of noisy images is
p_sigma(y) = mean over x of N(y; x, sigma^2 I), and grad_y of this N is N (x - y) / sigma^2. So
grad p_sigma / p_sigma, the score, is the mean over x of (x - y) / sigma^2 weighted by N / p_sigma,
and so that given y:    score(y, sigma) = (D(y, sigma) - y) / sigma^2
NCSN's own network gives sigma * score, so D is y + sigma times its output, and where sigma is large
a small error of the network, times sigma, is larger than the image. Karras et al. (2022,
arXiv:2206.00364) mix y and F so that input and target of F have mean square 1 at every sigma:
    D(y, sigma) = c_skip y + c_out F(c_in y, ln sigma)       loss = mean((D - x)^2) / c_out^2
with c_skip, c_out and c_in as in ScoreNet.forward.

In pure noise D sees nothing: its guess is the mean of all images, a blur. So sampling follows the
scores and takes a little noise off at a time, down levels sigma_1 > ... > sigma_L. Three ways:
    langevin     the papers' own: some noisy steps at each level (about 560 calls of D)
    consistent   one step at each level, with new noise or without (about 280 calls)
    heun         an ODE that leads the same way without new noise (35 calls, 51 if Guided)

    python ncsn.py --epochs 50                          trains on CIFAR-10, files in runs/ncsn
    python ncsn.py --generate 1000 --sampler langevin   PNG files, from the trained weights
    python ncsn.py --evaluate --inpaint --interpolate   loss by sigma, bits/dim, pictures

Read as far as training_step(), skipping Muon if you know it, and then train(), its loop.
In your own project, import torch, ncsn (sides must halve twice; README has EMA and schedule):
    images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    net = ncsn.ScoreNet(*ncsn.measure(images), channels=1, width=16)
    optimizers = ncsn.make_optimizers(net)
    for batch in images.split(16): loss = ncsn.training_step(net, optimizers, batch)
    levels = ncsn.heun_levels(net.sigma_max)
    samples = ncsn.quantise(ncsn.heun(net.score, levels[0] * torch.randn(4, 1, 28, 28), levels))"""

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
from torch.nn.functional import (
    avg_pool2d,
    interpolate,
    scaled_dot_product_attention,
    silu,
)

NAME = "ncsn"

# ------------------------------------------------------------------------------------------ network


def norm(channels):
    """GroupNorm with 16 channels or more in a group, if there are: small groups slow down a CPU."""
    groups = math.gcd(max(1, channels // 16), channels)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """Residual block that is told the noise level, if wanted with self-attention behind it.

    x (B, in_channels, H, W), embedding (B, E) -> (B, out_channels, H, W)
    """

    def __init__(self, in_channels, out_channels, embedding_size, attention=False):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulate = nn.Linear(embedding_size, 2 * out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity()
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels) if attention else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # at first the block adds nothing
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, embedding):
        h = self.conv1(silu(self.norm1(x)))
        gain, bias = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(silu(self.norm2(h) * (1 + gain) + bias))
        # The division is for later: once h has the variance of x, their sum has twice as much.
        return self.attention((self.skip(x) + h) / math.sqrt(2))


class Attention(nn.Module):
    """Self-attention between all pixels, with a residual connection: (B, C, H, W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.heads = math.gcd(max(1, channels // 64), channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        q, k, v = (
            layer(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, H*W, C / heads)
            for layer in (self.query, self.key, self.value)
        )
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.out(h).transpose(1, 2).reshape(x.shape)
        return (x + h) / math.sqrt(2)


def as_column(sigma, y):
    """A number or a tensor () or (B,) as (1 or B, 1, 1, 1), to go with y (B, C, H, W)."""
    return torch.as_tensor(sigma, dtype=torch.float32, device=y.device).reshape(-1, 1, 1, 1)


class ScoreNet(nn.Module):
    """The denoiser D(y, sigma), and the score that follows from it.

    F is a U-Net with width * mults channels at full, half, quarter ... resolution, and at each of
    them `blocks` blocks on the way down and on the way up; if there are fewer numbers of blocks
    than mults, the last holds for the rest. At the depths in `attention` (0 is full resolution, 1
    half), and in the middle, all pixels see each other, at a cost that grows with the square of
    their number: (1, 2) is for 32x32 pixels; 64x64 want (2, 3) and one more of mults.
    measure() finds sigma_data, the root mean square of the images, and sigma_max, the largest noise
    of use. amp computes F in bf16.
    """

    def __init__(
        self,
        sigma_data=0.5,
        sigma_max=100.0,
        width=128,
        mults=(1, 2, 2),
        blocks=(3,),
        channels=3,
        attention=(1, 2),
        amp=False,
    ):
        super().__init__()
        self.sigma_data = sigma_data
        self.sigma_max = sigma_max
        self.amp = amp
        widths = [width * mult for mult in mults]
        counts = [blocks[min(depth, len(blocks) - 1)] for depth in range(len(mults))]

        # F is told ln sigma, which goes from about -6 to 5, by sines of ln sigma times a frequency:
        # over this range the slowest (0.03) hardly bends, the fastest (3.2) goes five times round.
        self.register_buffer("frequencies", torch.logspace(-1.5, 0.5, width // 2))
        size = 4 * width
        self.embed = nn.Sequential(
            nn.Linear(2 * len(self.frequencies), size), nn.SiLU(), nn.Linear(size, size), nn.SiLU()
        )
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)

        self.make_down(widths, counts, size, attention)
        self.middle = Block(widths[-1], widths[-1], size, attention=True)
        self.make_up(widths, counts, size, attention)
        self.out = nn.Sequential(
            norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1)
        )
        nn.init.zeros_(self.out[-1].weight)  # so F starts as 0, and the loss as 1 at every sigma
        nn.init.zeros_(self.out[-1].bias)

    def make_down(self, widths, counts, embedding_size, attention):
        """For each depth, from fine to coarse, a list of blocks."""
        self.down = nn.ModuleList()
        before = widths[0]  # channels that come out of the layer before
        for depth, after in enumerate(widths):
            stage = nn.ModuleList()
            for _ in range(counts[depth]):
                stage.append(Block(before, after, embedding_size, depth in attention))
                before = after
            self.down.append(stage)

    def make_up(self, widths, counts, embedding_size, attention):
        """The same from coarse to fine; a block also sees what its counterpart in `down` put out.

        Only the last block of a list has attention, to save time.
        """
        self.up = nn.ModuleList()
        before = widths[-1]
        for depth in reversed(range(len(widths))):
            after = widths[depth]
            stage = nn.ModuleList()
            for i in range(counts[depth]):
                attends = depth in attention and i == counts[depth] - 1
                stage.append(Block(before + after, after, embedding_size, attends))
                before = after
            self.up.append(stage)

    def F(self, x, ln_sigma):
        """The U-Net: x (B, C, H, W), ln_sigma (B,) -> like x."""
        halvings = len(self.down) - 1
        if x.shape[2] % 2**halvings or x.shape[3] % 2**halvings:
            raise ValueError(f"{x.shape[2]}x{x.shape[3]} pixels cannot be halved {halvings} times")
        angles = ln_sigma[:, None] * self.frequencies
        embedding = self.embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        h = self.stem(x)
        skips = []
        for i, stage in enumerate(self.down):
            if i > 0:
                h = avg_pool2d(h, 2)
            for block in stage:
                h = block(h, embedding)
                skips.append(h)
        h = self.middle(h, embedding)
        for i, stage in enumerate(self.up):
            if i > 0:
                h = interpolate(h, scale_factor=2.0)
            for block in stage:
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h)

    def forward(self, y, sigma):
        """D(y, sigma), shaped like y; sigma is a number or a tensor () or (B,).

        y has mean square r^2 = sigma^2 + sigma_data^2, so F sees y / r. c_skip y is the best guess
        that is a multiple of y. What it lacks, x - c_skip y, has mean square c_out^2, so the target
        of F is (x - c_skip y) / c_out.
        """
        sigma = as_column(sigma, y)
        r = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / r**2
        c_out = sigma * self.sigma_data / r
        c_in = 1 / r
        # bf16 for F only: the score divides by sigma^2, which would magnify rounding of D.
        with torch.autocast(y.device.type, torch.bfloat16, enabled=self.amp):
            f = self.F(c_in * y, sigma.log().flatten().expand(len(y)))
        return c_skip * y + c_out * f.float()

    def score(self, y, sigma):
        """grad_y log p_sigma(y), shaped like y; sigma is a number or a tensor () or (B,)."""
        return (self(y, sigma) - y) / as_column(sigma, y) ** 2


# ------------------------------------------------------------------------------------- noise levels

# dequantise() adds noise of this standard deviation, that of a uniform draw from a bin 2/256 wide.
# Finer noise has nothing to teach.
SIGMA_MIN = 2 / 256 / math.sqrt(12)


def measure(images):
    """(sigma_data, sigma_max) of uint8 images (N, C, H, W), in units of pixels in [-1, 1].

    sigma_max is the largest distance between two images: in that much noise they can hardly be
    told apart, so sampling may begin with noise alone (2020, technique 1). To save time only the
    500 images farthest from the mean are compared with all. But it is not less than the largest
    distance of an image from 0, where the noise has its centre.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.numel() == 0:
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be uint8 (N, C, H, W), 0 to 255, not {found}")
    x = (images.flatten(1) + 0.5) / 128 - 1
    sigma_data = x.square().mean().sqrt().item()
    from_mean = (x - x.mean(0)).norm(dim=1)
    far = x[from_mean.topk(min(500, len(x))).indices]
    between = torch.cdist(far, x).max().item()
    return sigma_data, max(between, x.norm(dim=1).max().item())


def make_ladder(sigma_max, dim, sigma_min=SIGMA_MIN):
    """Levels of langevin() and consistent(), a list from sigma_max down to sigma_min; dim = C H W.

    Each level is gamma times the next. In many dimensions noise is a thin shell: its norm |sigma z|
    is nearly N(sqrt(dim) sigma, sigma^2 / 2). A chain that has settled in the shell of one level
    must find itself in that of the next, or the network would be shown what it never saw in
    training (2020, technique 2). As in the paper, half of the narrower shell shall lie in the
    wider. So the edge of the wider, its mean minus 3 standard deviations, is at the mean of the
    narrower:
        sqrt(dim) gamma sigma - 3 gamma sigma / sqrt(2) = sqrt(dim) sigma
    Times sqrt(2) / sigma, and with root = sqrt(2 dim), this is gamma (root - 3) = root. In few
    dimensions shells are thick and any gamma would do; it is then 3. The number of levels follows,
    rounded up. CIFAR-10: gamma = 1.0398, 277 levels.
    """
    root = math.sqrt(2 * dim)
    gamma = root / (root - 3) if root > 4.5 else 3.0
    count = max(2, math.ceil(math.log(sigma_max / sigma_min) / math.log(gamma)) + 1)
    return torch.logspace(math.log10(sigma_max), math.log10(sigma_min), count).tolist()


def langevin_settings(levels, excess=0.06, most=0.2):
    """(step_size, repeats) for langevin(): the fewest steps that keep up with the falling levels.

    Suppose all images were 0. Then y is all noise and its score -y / sigma^2, and a step of
    langevin() brings its variance v, in units of sigma^2, nearer to 1: v - 1 becomes
    (1 - step_size)^2 (v - 1), and in the n steps of a level r (v - 1) with
    r = (1 - step_size)^(2 n). The next level has a smaller unit, in which v is gamma^2 times as
    much. After some levels each leaves the same v = 1 + excess, with
        excess = r (gamma^2 (1 + excess) - 1),
    which tells r, and n is the least for which step_size is at most `most`. There is this limit as
    large steps go wrong the other way where images vary much more than the noise: in balance the
    variance is 1 - step_size / 2 of what it should be. With the defaults the two errors nearly
    cancel: Gaussian images of std 0.1 to 3 come out with a std that is right to half a percent.
    CIFAR-10: n = 2, step_size = 0.2.
    (The paper's rule, technique 4 of 2020, neglects what is left over from level to level. For
    CIFAR-10 its n = 5 and step_size = 0.065 leave v = 1.13, and Gaussian images 7 % too large.)
    """
    gamma = levels[0] / levels[1]
    r = excess / (gamma**2 * (1 + excess) - 1)
    repeats = max(1, math.ceil(math.log(r) / (2 * math.log(1 - most))))
    return 1 - r ** (1 / (2 * repeats)), repeats


def sample_sigma(count, sigma_data, sigma_max, focus=0.6, generator=None, device=None):
    """A noise level for each of `count` images in training, (count,).

    sigma has the median focus * sigma_data, and ln sigma is logistic with scale 0.7 (both were
    found by trying). Near the median shapes are decided. Less noise hides only texture, and more
    leaves only mean colours, for which few examples are enough.
    The draws are stratified: the range of probability is cut into `count` equal slices, and each
    image gets one of them, by chance. So every batch has the same mix of sigma, and its gradient
    depends little on luck in drawing them.
    """
    slices = torch.randperm(count, generator=generator, device=device)
    u = (slices + torch.rand(count, generator=generator, device=device)) / count
    return (focus * sigma_data * torch.exp(0.7 * torch.logit(u))).clamp(SIGMA_MIN, sigma_max)


# --------------------------------------------------------------------------------------------- loss


def dequantise(images, generator=None):
    """uint8 -> float in [-1, 1]: a byte becomes a uniform draw from its bin, 2/256 wide."""
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return (images + noise) / 128 - 1


def quantise(x):
    """float -> uint8: the bin that x in [-1, 1] lies in; values beyond go to 0 or 255."""
    return ((x + 1) * 128).clamp(0, 255).to(torch.uint8)


def denoising_loss(denoise, x, sigma, sigma_data, generator=None):
    """mean((D(x + sigma z, sigma) - x)^2) / c_out^2 for each image: (B, C, H, W), (B,) -> (B,).

    With the weight 1 / c_out^2 = 1 / sigma^2 + 1 / sigma_data^2 it is the squared error of F, whose
    targets have mean square 1: how much a sigma counts is up to sample_sigma alone. NCSN's own
    weight is 1 / sigma^2.
    """
    z = torch.randn(x.shape, generator=generator, device=x.device)
    y = x + sigma[:, None, None, None] * z
    weight = 1 / sigma**2 + 1 / sigma_data**2
    return weight * (denoise(y, sigma) - x).square().flatten(1).mean(1)


# ----------------------------------------------------------------------------------------- samplers
# Each takes score(y, sigma) -> like y, starts at y = sigma_1 z (B, C, H, W) and walks down the
# levels, a list of numbers. Noise of sigma_L is left in y then, and the last line of each takes it
# off: y + sigma_L^2 score(y, sigma_L) = D(y, sigma_L). After every step y becomes
# constrain(y, sigma), by which inpainting puts known pixels back.


@dataclass
class Guided:
    """Autoguidance (Karras et al. 2024, arXiv:2406.02507): scores that lead away from mistakes.

    net: the averaged weights. early: the same as they were after a tenth of training. The idea is
    that what net still does wrong early did wrong in the same direction, only more so: unsure what
    it sees, it blends features that no image has together. So D is taken a little further along the
    way that it has come since:
        D + (strength - 1) (D - D_early)
    As these weights of D and D_early sum to 1, scores are mixed likewise. Things in samples become
    clearer. The price is that samples vary a little less and are no longer draws from the
    density that was learned: losses and bits/dim are those of net alone. Strength 1 turns guidance
    off, and so does sigma above sigma_limit, in units of sigma_data: there it would make colours
    glaring. (The defaults were found by trying.) Elsewhere a call of net costs one more, of early.
    It is for consistent() and heun(), which pass each level once. langevin() stays until it is in
    balance with p^strength / p_early^(strength - 1), which has glaring colours at any level.
    """

    net: nn.Module
    early: nn.Module
    strength: float = 1.8
    sigma_limit: float = 4.0

    @property
    def sigma_max(self):
        """Where sampling begins, as with net alone."""
        return self.net.sigma_max

    def score(self, y, sigma):
        """Like net.score(); sigma is a number."""
        score = self.net.score(y, sigma)
        if self.strength == 1 or sigma > self.sigma_limit * self.net.sigma_data:
            return score
        return score + (self.strength - 1) * (score - self.early.score(y, sigma))


def unconstrained(y, sigma):
    """No constraint."""
    return y


def keep_known(truth, known, generator=None):
    """A constraint that inpaints: where `known`, the truth with as much noise as y has there."""

    def constrain(y, sigma):
        z = torch.randn(y.shape, generator=generator, device=y.device)
        return torch.where(known, truth + sigma * z, y)

    return constrain


@torch.no_grad()
def langevin(score, y, levels, step_size, repeats, generator=None, constrain=unconstrained):
    """Annealed Langevin dynamics (2020, algorithm 1): y <- y + alpha score + noise.

    Steps along the score alone would end on the nearest peak of p_sigma. With noise of the right
    size many small ones lead any distribution to p_sigma. Where y is all noise its score is
    -y / sigma^2, and a step with alpha = step_size sigma^2 turns its variance v into
    (1 - step_size)^2 v plus that of the new noise. To keep v = sigma^2, the new noise must have
    (1 - (1 - step_size)^2) sigma^2, which is step_size (2 - step_size) sigma^2. (The paper's has
    2 alpha, the same for very small steps. Its alpha is epsilon sigma^2 / sigma_L^2, so step_size
    stands for epsilon / sigma_L^2.)
    """
    for sigma in levels:
        alpha = step_size * sigma**2
        noise = math.sqrt(step_size * (2 - step_size)) * sigma
        for _ in range(repeats):
            z = torch.randn(y.shape, generator=generator, device=y.device)
            y = y + alpha * score(y, sigma) + noise * z
            y = constrain(y, sigma)
    last = levels[-1]
    return constrain(y + last**2 * score(y, last), 0.0)


@torch.no_grad()
def consistent(score, y, levels, freshness=1.0, generator=None, constrain=unconstrained):
    """Consistent annealed sampling (Jolicoeur-Martineau et al. 2020, arXiv:2009.05475).

    As sigma^2 score(y) = D - y, about minus the noise in y, the first step shrinks this noise from
    sigma to ratio^freshness * following. The second adds new noise of such a size that the squares
    of both sum to following^2, the noise of the next level. With freshness 0 there is no new
    noise, which is Euler's method for the ODE of heun(). With 1 the new noise is that of ancestral
    sampling in diffusion models, a share of 1 - ratio^2 of the variance.
    """
    for sigma, following in zip(levels[:-1], levels[1:], strict=True):
        ratio = following / sigma
        z = torch.randn(y.shape, generator=generator, device=y.device)
        y = y + (1 - ratio ** (1 + freshness)) * sigma**2 * score(y, sigma)
        y = y + math.sqrt(1 - ratio ** (2 * freshness)) * following * z
        y = constrain(y, following)
    last = levels[-1]
    return constrain(y + last**2 * score(y, last), 0.0)


def heun_levels(sigma_max, count=18, sigma_min=SIGMA_MIN, rho=7):
    """Levels for heun() and bits_per_dim(), denser towards sigma_min (Karras et al., eq. 5)."""
    ends = [sigma_max ** (1 / rho), sigma_min ** (1 / rho)]
    return (torch.linspace(*ends, count, dtype=torch.float64) ** rho).tolist()


def precise(y):
    """y in fp64, where its device has it: Apple's has none."""
    return y.float() if y.device.type == "mps" else y.double()


@torch.no_grad()
def heun(score, y, levels, constrain=unconstrained):
    """The probability flow dy/dsigma = -sigma score(y, sigma), by Heun's method (Karras et al.).

    By Tweedie's formula the slope is (y - D) / sigma, the noise in y per unit of sigma: as sigma
    falls, the noise shrinks with it. If y starts as a draw from p_sigma_1 and follows this slope,
    it is a draw from p_sigma at every smaller sigma (Song et al. 2021, arXiv:2011.13456). A step of
    Heun's goes along the mean of the slopes at its two ends; the second end is where Euler's method
    would arrive. y is kept in fp64, as in Karras et al.
    """
    y = precise(y)
    for sigma, following in zip(levels[:-1], levels[1:], strict=True):
        slope = -sigma * score(y.float(), sigma)
        euler = y + (following - sigma) * slope
        second_slope = -following * score(euler.float(), following)
        y = y + (following - sigma) * (slope + second_slope) / 2
        y = constrain(y, following)
    last = levels[-1]
    return constrain(y + last**2 * score(y.float(), last), 0.0).float()


@torch.no_grad()
def bits_per_dim(score, x, levels, generator=None):
    """Bits for each number of x that a code made from the model would need: (B, C, H, W) -> (B,).

    The flow of heun() is taken upwards, from y = x at sigma_L to sigma_1, where y is distributed
    as N(0, sigma_1^2 I), nearly. Where a flow diverges, density thins: along the path log p
    changes by minus the divergence of dy/dsigma, so (Song et al. 2021, equation 39)
        log p(x) = log N(y at sigma_1; 0, sigma_1^2 I) + integral of the divergence over sigma
    The divergence is the trace of the Jacobian J, and for a vector v of random signs v . J v has
    that trace as its mean, as v_i v_i = 1 and v_i v_j is 0 on average (Hutchinson). One v is an
    estimate with noise. x should be dequantised, as images were in training: it counts as a draw at
    sigma_L, which is no more than the noise of dequantise().
    """
    signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device)
    v = signs * 2.0 - 1

    def slope_and_divergence(y, sigma):
        with torch.enable_grad():
            y = y.float().detach().requires_grad_()
            slope = -sigma * score(y, sigma)
            (v_times_J,) = torch.autograd.grad((slope * v).sum(), y)
        return slope.detach(), (v_times_J * v).flatten(1).sum(1)

    y = precise(x)
    integral = 0.0
    upwards = levels[::-1]
    for sigma, following in zip(upwards[:-1], upwards[1:], strict=True):
        rise = following - sigma
        slope, divergence = slope_and_divergence(y, sigma)
        second_slope, second_divergence = slope_and_divergence(y + rise * slope, following)
        y = y + rise * (slope + second_slope) / 2
        integral = integral + rise * (divergence + second_divergence) / 2
    end = torch.distributions.Normal(0.0, upwards[-1])
    log_p = end.log_prob(y).flatten(1).sum(1) + integral
    dim = x[0].numel()
    # A bin is 2^-7 wide in each dimension and so has about the probability p(x) 2^(-7 dim).
    return 7 - log_p / (dim * math.log(2))


# --------------------------------------------------------------------------------------- optimisers
# orthogonal, Muon and set_rate are the same in nvae.py, ncsn.py and ebm.py.


def orthogonal(matrices, iterations=5):
    """U V^T, nearly, of matrices U S V^T (N, rows, columns): singular values near 1 in place of S.

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
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    _, rows, columns = x.shape
    if rows > columns:
        x = x.mT  # so that it is wide
    x_xt = x @ x.mT
    product = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand_as(x_xt)
    for _ in range(iterations):
        p = torch.baddbmm(x_xt, x_xt, x_xt, beta=b, alpha=c)  # b X X^T + c (X X^T)^2 ...
        p.diagonal(dim1=1, dim2=2).add_(a)  # + a I
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
    changes what a layer makes of an input of length 1 by about `lr` at most, or by somewhat more if
    the layer has more outputs than inputs (see below).
    A convolution counts as the matrix (C_out, rest) that maps a patch of its input to a pixel.
    Vectors are left to Adam, and so are layers at the ends of a network, where a row or column
    stands for something by itself (a colour, a logit) and sizes differ for good reason.
    A weight stays where it is, in spite of momentum, while its whole gradient is 0: so a step can
    be skipped (ebm.py) without asking the device.
    """

    def __init__(self, weights, lr=0.02, momentum=0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}  # one product of many matrices is quicker, above all on a GPU, than many
            for weight in group["params"]:
                if weight.grad is not None:  # neither frozen nor left out
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self.step_together(weights, group["lr"], group["momentum"])

    def step_together(self, weights, lr, momentum):
        """A step of weights of the same shape: orthogonal() takes all their matrices at once."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["average"] = torch.zeros_like(weight)
        averages = [self.state[weight]["average"] for weight in weights]
        gradients = [weight.grad for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        # Nesterov's momentum: the averages as they will be if the next gradients are like these.
        ahead = torch._foreach_lerp(gradients, averages, momentum)
        changes = orthogonal(torch.stack([matrix.flatten(1) for matrix in ahead]))
        stays = torch.stack(torch._foreach_norm(gradients)) == 0
        changes = changes.masked_fill(stays[:, None, None], 0)
        # If there are more rows than columns, rows of U V^T have a length of only
        # sqrt(columns / rows), in root mean square. This makes it 1, as it is in wide ones.
        _, rows, columns = changes.shape
        changes *= lr * math.sqrt(max(1, rows / columns))
        changes = [change.view_as(w) for w, change in zip(weights, changes, strict=True)]
        torch._foreach_sub_(weights, changes)


def set_rate(optimizers, lr):
    """Set the learning rates of make_optimizers(); lr is a number or a tensor ()."""
    muon, adam = optimizers
    muon.param_groups[0]["lr"] = lr
    adam.param_groups[0]["lr"] = lr / 10


def make_optimizers(net, lr=0.02):
    """[Muon for the weight matrices of all blocks, Adam at lr / 10 for the other weights].

    The others are all vectors, and the stem, the last layer and the embedding of sigma.
    """
    blocks = nn.ModuleList([net.down, net.middle, net.up])
    hidden = [weight for weight in blocks.parameters() if weight.dim() > 1]
    ids = {id(weight) for weight in hidden}
    rest = [weight for weight in net.parameters() if id(weight) not in ids]
    optimizers = [Muon(hidden), torch.optim.Adam(rest, fused=True)]
    set_rate(optimizers, lr)
    return optimizers


# ------------------------------------------------------------------------------------ training step


def training_step(net, optimizers, images, focus=0.6, generator=None):
    """One step on uint8 images (B, C, H, W). Returns the loss before it, a tensor ()."""
    x = dequantise(images, generator)
    sigma = sample_sigma(len(x), net.sigma_data, net.sigma_max, focus, generator, x.device)
    loss = denoising_loss(net, x, sigma, net.sigma_data, generator).mean()
    net.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # or a rare large one would fill the momentum
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


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


@torch.no_grad()
def test_loss(net, images, sigma=None):
    """Mean loss of uint8 images with noise that is always the same, at one sigma or at all."""
    generator = torch.Generator(images.device).manual_seed(0)
    total = 0.0
    for batch in images.split(250):
        count = len(batch)
        if sigma is None:  # whatever --focus is, so that runs compare
            sigmas = sample_sigma(
                count, net.sigma_data, net.sigma_max, 0.6, generator, batch.device
            )
        else:
            sigmas = torch.full((count,), sigma, device=batch.device)
        x = dequantise(batch, generator)
        total += denoising_loss(net, x, sigmas, net.sigma_data, generator).sum().item()
    return total / len(images)


def describe_network(args, images):
    """The arguments of ScoreNet, by name; a checkpoint keeps them."""
    sigma_data, sigma_max = measure(images)
    flags = {flag: getattr(args, flag) for flag in NETWORK_FLAGS}
    return {**flags, "channels": images.shape[1], "sigma_data": sigma_data, "sigma_max": sigma_max}


def build(args, network):
    """The network with these arguments, by name, on the device of the run."""
    try:
        net = ScoreNet(**network, amp=args.amp)
    except (TypeError, ValueError) as error:
        die(error)
    return net.to(args.device, memory_format=torch.channels_last)


def train(args, checkpoint=None):
    """Train on --data from the start or, given a checkpoint, from where that was saved."""
    from common import fingerprint, load, save_grid

    images, test = (split.to(args.device) for split in load(args.data, args.subset))
    shape = list(images.shape[1:])
    network = checkpoint["network"] if checkpoint else describe_network(args, images)
    torch.manual_seed(args.seed)
    net = build(args, network)
    ema = copy.deepcopy(net).requires_grad_(False)
    early = copy.deepcopy(ema)  # what Guided leads away from
    optimizers = make_optimizers(net)
    generator = torch.Generator(args.device).manual_seed(args.seed)

    parts = {"net": net, "ema": ema, "early": early, "muon": optimizers[0], "adam": optimizers[1]}
    data = f"{len(images)} images {fingerprint(images)}"
    facts = {"network": network, "shape": shape, "data": data}
    run = Run(args, images, parts, facts, generator)
    if checkpoint:
        run.restore(checkpoint)
    if args.compile:
        net.F = torch.compile(net.F, mode="reduce-overhead")  # on CUDA one launch for all of F

    for epoch in run.epochs():
        for batch in run.batches(images):
            set_rate(optimizers, args.lr * warmup_cosine(run.step, run.total))
            loss = training_step(net, optimizers, batch, args.focus, generator)
            update_ema(ema, net, run.step, args.ema)
            if run.step < run.total / 10:  # early is ema, and then stays as it is: see Guided
                early.load_state_dict(ema.state_dict())
            run.record({"train loss": loss})
        run.end_epoch({"test loss": test_loss(ema, test[:1000])})
        if (epoch + 1) % args.sample_every == 0 or epoch + 1 == args.epochs:
            fixed = torch.Generator(args.device).manual_seed(args.seed)
            z = torch.randn(64, *shape, generator=fixed, device=args.device)
            x = sample(args, Guided(ema, early, args.guidance), z, "heun")
            save_grid(quantise(x), run.out / f"samples_{epoch + 1:04d}.png")
    draw_stages_and_nearest(args, Guided(ema, early, args.guidance), images, run.out)


# --------------------------------------------------------------------------------------------- uses
# What can be done with trained weights: a function for each flag. They write into --out.


def sample(args, net, z, sampler=None, generator=None, constrain=unconstrained):
    """Images in [-1, 1] from standard normal z (B, C, H, W), by --sampler or by the one named.

    net: a ScoreNet or Guided.
    """
    from tqdm import tqdm

    with tqdm(desc="sampling", unit="call", leave=False, disable=None) as bar:

        def score(y, sigma):
            bar.update()
            return net.score(y, sigma)

        y = net.sigma_max * z
        sampler = sampler or args.sampler
        if sampler == "heun":
            return heun(score, y, heun_levels(net.sigma_max), constrain)
        ladder = make_ladder(net.sigma_max, y[0].numel())
        if sampler == "consistent":
            return consistent(score, y, ladder, args.freshness, generator, constrain)
        return langevin(score, y, ladder, *langevin_settings(ladder), generator, constrain)


def draw_stages_and_nearest(args, net, images, out):
    """stages.png: eight chains, a row a stage. nearest.png: their ends and the nearest images."""
    from common import save_grid

    chain = []

    def remember(y, sigma):
        chain.append(quantise(y))
        return y

    generator = torch.Generator(images.device).manual_seed(args.seed)
    z = torch.randn(8, *images.shape[1:], generator=generator, device=images.device)
    x = quantise(sample(args, net, z, "consistent", generator, remember))
    ninths = range(2, 10)  # the first ninth is nothing but noise
    stages = [chain[len(chain) * k // 9 - 1] for k in ninths]
    save_grid(torch.cat(stages), out / "stages.png")

    distances = torch.cdist(x.flatten(1).float(), images.flatten(1).float())
    nearest = distances.topk(min(7, len(images)), largest=False).indices
    rows = torch.cat([x[:, None], images[nearest]], dim=1)  # (8, 1 + 7, C, H, W)
    save_grid(rows.flatten(0, 1), out / "nearest.png", columns=rows.shape[1])


def generate(args, net, shape):
    """--generate N: PNG files, drawn 256 at a time."""
    from common import export, save_grid

    out = Path(args.out)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for start in range(0, args.generate, 256):
        count = min(256, args.generate - start)
        z = torch.randn(count, *shape, generator=generator, device=args.device)
        x = quantise(sample(args, net, z, generator=generator))
        export(x, out / "generated", start)
        if start == 0:
            save_grid(x[:64], out / "generated.png")
        print(f"{start + count} of {args.generate} images in {out / 'generated'}")


def interpolate_noise(args, net, shape):
    """--interpolate: a row leads from one noise to another; cos^2 + sin^2 = 1 keeps its std."""
    from common import save_grid

    generator = torch.Generator(args.device).manual_seed(args.seed)
    start, end = torch.randn(2, 8, 1, *shape, generator=generator, device=args.device)
    angle = torch.linspace(0, math.pi / 2, 8, device=args.device)[:, None, None, None]
    z = angle.cos() * start + angle.sin() * end  # (8 rows, 8 columns, C, H, W)
    x = sample(args, net, z.flatten(0, 1), "heun")
    save_grid(quantise(x), Path(args.out) / "interpolate.png")


def inpaint(args, net, test):
    """--inpaint: a test image a row, the same without its middle, and six ways to fill that.

    langevin() is best: it stays at each level, so that the middle comes to agree with the rest.
    """
    from common import save_grid

    generator = torch.Generator(args.device).manual_seed(args.seed)
    truth = dequantise(test[:6, None], generator)  # (6, 1, C, H, W)
    height, width = truth.shape[-2:]
    known = torch.ones(height, width, dtype=torch.bool, device=args.device)
    known[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = False
    six = truth.expand(-1, 6, -1, -1, -1).flatten(0, 1)
    z = torch.randn(six.shape, generator=generator, device=args.device)
    x = sample(args, net, z, None, generator, keep_known(six, known, generator))
    hidden = torch.where(known, truth, 0)
    rows = torch.cat([truth, hidden, x.unflatten(0, (-1, 6))], dim=1)
    save_grid(quantise(rows.flatten(0, 1)), Path(args.out) / "inpaint.png")


def evaluate(args, net, test):
    """--evaluate: the loss at seventeen noise levels, and bits/dim of some test images."""
    sigmas = torch.logspace(math.log10(SIGMA_MIN), math.log10(net.sigma_max), 17).tolist()
    losses = [test_loss(net, test[:1000], sigma) for sigma in sigmas]
    for sigma, loss in zip(sigmas, losses, strict=True):
        print(f"sigma {sigma:9.4f}  loss {loss:.4f}")
    lines = {"test loss": (sigmas, losses)}
    plot(Path(args.out) / "loss_by_sigma.png", lines, xlabel="sigma", xscale="log")

    generator = torch.Generator(args.device).manual_seed(args.seed)
    net.amp = False  # a density in bf16 would be a guess
    levels = heun_levels(net.sigma_max, 128)
    bits = []
    for batch in test[: args.bits_images].split(100):
        bits.append(bits_per_dim(net.score, dequantise(batch, generator), levels, generator))
    bits = torch.cat(bits)
    error = f", standard error {bits.std() / len(bits) ** 0.5:.3f}" if len(bits) > 1 else ""
    print(f"bits/dim {bits.mean():.3f}{error}, of {len(bits)} test images")


def use(args, checkpoint):
    """Do what the flags ask for with the averaged weights of a checkpoint."""
    from common import load

    net = build(args, checkpoint["network"]).requires_grad_(False)
    early = copy.deepcopy(net)
    load_states(checkpoint, {"ema": net, "early": early})
    guided = Guided(net, early, args.guidance)
    model = net if args.sampler == "langevin" else guided  # see Guided
    if args.generate:
        generate(args, model, checkpoint["shape"])
    if args.interpolate:
        interpolate_noise(args, guided, checkpoint["shape"])
    if args.inpaint or args.evaluate:
        test = load(args.data)[1].to(args.device)
        if args.inpaint:
            inpaint(args, model, test)
        if args.evaluate:
            evaluate(args, net, test)


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
    add("--compile", action=switch, help="torch.compile and CUDA graphs; if not given, on cuda")
    add("--out", default=f"runs/{NAME}", help="folder of the run")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--time-limit", type=number(float, 0), metavar="MINUTES", help="save and stop after that")
    add("--sample-every", default=5, type=count, help="epochs from one picture to the next")
    add("--generate", type=count, metavar="N", help="only write N samples as PNG files")
    add("--evaluate", action="store_true", help="only measure on the test images")
    return parser


USES = ["generate", "evaluate", "inpaint", "interpolate"]  # of trained weights
NETWORK_FLAGS = ["width", "mults", "blocks"]  # cannot be changed when weights are there
RUN_FLAGS = ["batch_size", "seed", "subset"]  # nor can these when training goes on


def make_parser():
    """All flags of this script."""
    parser = shared_parser(lr=0.02)
    add = parser.add_argument_group(NAME).add_argument
    count = number(int, 1)
    median = number(float, 0, above=True)
    share = number(float, 0, most=1)
    widths = numbers(1, most=6)
    samplers = ["heun", "consistent", "langevin"]
    add("--width", default=128, type=number(int, 2), help="channels at full resolution")
    add("--mults", default=[1, 2, 2], type=widths, metavar="M,M,...", help="widths by resolution")
    add("--blocks", default=[3], type=widths, metavar="N,N,...", help="residual blocks each way")
    add("--focus", default=0.6, type=median, help="median sigma in units of the images' rms")
    add("--sampler", default="heun", choices=samplers, help="how --generate and --inpaint draw")
    add(
        "--guidance",
        default=1.8,
        type=number(float, 1),
        help="strength, 1 for none; not for langevin",
    )
    add(
        "--freshness", default=1.0, type=share, help="new noise in consistent: 0 none, 1 as in DDPM"
    )
    add("--inpaint", action="store_true", help="only complete test images without their middle")
    add("--interpolate", action="store_true", help="only draw the ways between samples")
    add("--bits-images", default=100, type=count, help="test images for bits/dim in --evaluate")
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


def choose_speed(args):
    """Fill in --amp and --compile if they were not given, and let CUDA be quick."""
    if args.amp is None:
        args.amp = bf16_is_native(args.device)
    cuda = args.device.type == "cuda"
    if args.compile is None:  # its compiler, Triton, needs a GPU of capability 7
        args.compile = cuda and torch.cuda.get_device_capability(args.device) >= (7, 0)
    if cuda:
        if args.device.index is not None:
            torch.cuda.set_device(args.device)  # where streams and graphs go, too
        torch.set_float32_matmul_precision("high")  # TF32 where it is not bf16 anyway
        torch.backends.cudnn.benchmark = True  # finds the quickest convolution for each shape


def main(argv=None):
    """Train, or use trained weights, as the command line says."""
    if sys.version_info < (3, 10):  # noqa: UP036
        die("Python 3.10 or later is needed")
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):  # lines at once, in any terminal's characters
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    args, checkpoint = parse(argv)
    choose_speed(args)
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
