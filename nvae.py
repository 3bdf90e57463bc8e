"""NVAE: a hierarchical variational autoencoder that draws images. common.py loads the data.

A VAE explains an image x by hidden causes z: draw z from p(z), then x from p(x|z). A second
network, q(z|x), guesses the z behind a given x. Both learn by raising a lower bound of ln p(x),
    mean of ln p(x|z) - KL,      KL = ln q(z|x) - ln p(z),      over z from q(z|x).
NVAE (Vahdat & Kautz 2020, arXiv:2007.03898) cuts z into groups z_1 ... z_G: maps with n numbers
(latents) per pixel at several resolutions, each drawn in view of those before, layout first.
    p(z) = prod_i p(z_i | z_1 ... z_i-1)           q(z|x) = prod_i q(z_i | z_1 ... z_i-1, x)

With --groups 2,1 there are two groups at half the resolution of x and one at a quarter. The encoder
reads x from fine to coarse and leaves a feature for each group. Then h, at first a learned
constant, goes from coarse to fine through cells (residual networks), and each group adds its z_i:
h <- cells(h), z_i drawn from p or q, h <- h + layer(z_i).
              encoder, bottom-up                              top-down
    32x32     x -> cells                                      cells -> logits, which give p(x|z)
                    v                                           ^
    16x16         cells ------------- feature 3 -------> group 3: cells, add z_3
                    v                                           ^
    16x16         cells ------------- feature 2 -------> group 2: cells, add z_2
                    v                                           ^
     8x8          cells ------------- feature 1 -------> group 1: add z_1  <-  learned constant

To train, z_i is drawn from q, which sees h and the feature; to sample, from p, which sees h alone.
    loss = -ln p(x|z) + beta sum_i gamma_i KL_i + lambda R                    in nats per image
beta rises to 1 in the first --kl-warmup epochs. Until then gamma_i, 1 on average, helps
groups whose latents say little (kl_loss). R keeps the network smooth (Spectral). p(x|z) is of
bytes; minus the bound over C H W ln 2, bits/dim, is what an ideal lossless code needs for each.

    python nvae.py --epochs 50                                trains on CIFAR-10, files in runs/nvae
    python nvae.py --generate 1000                            PNG files, from the averaged weights
    python nvae.py --evaluate --iw 100 --interpolate          bits/dim, KL by group, pictures

Read as far as training_step(), skipping Muon if you know it, and then train(), its loop.
In your own project, import torch, nvae (square images whose size halves; the rest as in train()):
    images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    net = nvae.NVAE(width=8, groups=(2, 1), channels=1, image_size=28)
    spectral, optimizers = nvae.Spectral(net), nvae.make_optimizers(net)
    for x in images.split(16): nvae.training_step(net, spectral, optimizers, x, beta=1.0)
    samples = nvae.sample(net, 4)"""

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
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import conv2d, elu, logsigmoid, normalize

NAME = "nvae"

# ------------------------------------------------------------------------------------------ network


class Cell(nn.Module):
    """Residual cell: skip(x) + residual * gate * body(x), (B, C, H, W) -> (B, C', H', W').

    The gate multiplies each channel by a number in (0, 1) that depends on the means of all channels
    (squeeze and excitation). `residual` is small, so that a deep stack of cells begins as little
    more than its skips: with Muon and R (Spectral) that is enough to do without the paper's
    BatchNorm, whose statistics differ between images and samples.
    """

    def __init__(self, skip, body, channels, residual):
        super().__init__()
        self.skip = skip
        self.body = body
        self.residual = residual
        hidden = max(channels // 16, 4)
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x):
        h = self.body(x)
        gate = self.gate(h.mean((2, 3)))[:, :, None, None]
        return self.skip(x) + self.residual * h * gate


def dense_cell(before, after, residual, down=False, up=False):
    """Cell with two 3x3 convolutions, from `before` to `after` channels (the paper's figure 3b).

    down: to half of H and W, in the encoder. up: to twice, in the top-down path.
    """
    skip = nn.Identity()
    if down:
        skip = nn.Sequential(nn.SiLU(), nn.Conv2d(before, after, 2, stride=2))
    if up:
        skip = enlarge(before, after)
    body = nn.Sequential(
        nn.SiLU(),
        nn.Conv2d(before, after, 3, stride=2 if down else 1, padding=1),
        nn.Upsample(scale_factor=2) if up else nn.Identity(),
        nn.SiLU(),
        nn.Conv2d(after, after, 3, padding=1),
    )
    return Cell(skip, body, after, residual)


def enlarge(before, after):
    """The skip of a cell that goes to twice H and W."""
    return nn.Sequential(nn.Conv2d(before, after, 1), nn.Upsample(scale_factor=2, mode="bilinear"))


def decoder_cell(before, after, residual, expand=0, up=False):
    """Cell of the top-down path, from `before` to `after` channels; up: to twice H and W.

    expand=0: a dense cell, as in the encoder. Otherwise the paper's (figure 3a), with a depthwise
    5x5 convolution, one filter per channel. It has so few weights that it can have `expand` times
    the channels, but all these must go through memory, and such filters are not for Muon. In our
    tries dense cells learned much more from each step, in less time. (The first 1x1 convolution
    comes before the upsampling, which repeats pixels: the same result from a quarter of them.)
    """
    if expand == 0:
        return dense_cell(before, after, residual, up=up)
    wide = expand * before
    body = nn.Sequential(
        nn.Conv2d(before, wide, 1),
        nn.SiLU(),
        nn.Upsample(scale_factor=2) if up else nn.Identity(),
        nn.Conv2d(wide, wide, 5, padding=2, groups=wide),
        nn.SiLU(),
        nn.Conv2d(wide, after, 1),
    )
    return Cell(enlarge(before, after) if up else nn.Identity(), body, after, residual)


class MaskedConv(nn.Conv2d):
    """A convolution whose weights count as 0 where the mask (out, in, k, k) is 0."""

    def __init__(self, mask):
        size = mask.shape[-1]
        super().__init__(mask.shape[1], mask.shape[0], size, padding=size // 2)
        self.register_buffer("mask", mask)

    def forward(self, x):
        return conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class Flow(nn.Module):
    """A step of inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934), which bends q.

    z (B, n, H, W), context (B, C, H, W) -> z' = exp(a) z + b, and a = ln |dz'/dz| elementwise. At
    each number of z, a and b depend on the context and on earlier numbers only: those of the pixels
    above and to the left, and of the same pixel those that come first (turned: the other way
    round). So the Jacobian is triangular with exp(a) on its diagonal. Samples of p need no flow.
    """

    def __init__(self, latents, channels, turned):
        super().__init__()
        self.turned_axes = (1, 2, 3) if turned else ()
        each = 4  # hidden channels for each latent
        mask = torch.zeros(each * latents, latents, 3, 3)
        mask[:, :, 0] = 1  # the three pixels above
        mask[:, :, 1, 0] = 1  # the pixel to the left
        before = torch.ones(latents, latents).tril(-1)  # of the same pixel, the latents before
        mask[:, :, 1, 1] = before.repeat_interleave(each, dim=0)
        self.first = MaskedConv(mask)
        self.context = nn.Conv2d(channels, each * latents, 1)
        self.last = nn.Conv2d(each * latents, 2 * latents, 1, groups=latents)  # each from its own
        nn.init.zeros_(self.last.weight)  # at first z' = z
        nn.init.zeros_(self.last.bias)

    def forward(self, z, context):
        # All that belongs to z is turned here and back again below: "before" becomes "behind".
        h = self.first(z.flip(self.turned_axes))
        h = h + self.context(context).flip(self.turned_axes[1:])  # its channels are not latents
        a, b = self.last(elu(h)).to(z.dtype).unflatten(1, (-1, 2)).unbind(2)
        a = 2 * torch.tanh(a / 2).flip(self.turned_axes)  # within 2, for exp(a) to stay tame
        return a.exp() * z + b.flip(self.turned_axes), a


def soft_clamped_normal(parameters):
    """(B, 2 n, H, W) -> Normal of (B, n, H, W) with |mu| < 5 and sigma from 0.017 to 7.4.

    If sigma could come near 0, or mu lie far out, the KL and its gradient would explode. Clamping
    by tanh leaves some gradient; tanh at 5 and the 0.01 are those of the paper's code. There sigma
    can reach 148: one odd image in 25,000 drove it up from group to group, until nothing was
    finite. So ln sigma is cut at 2, too, which training otherwise keeps below.
    """
    mu, log_sigma = (5 * torch.tanh(part / 5) for part in parameters.chunk(2, dim=1))
    log_sigma = log_sigma.clamp(max=2)
    sigma = log_sigma.exp() + 0.01
    return Normal(mu, sigma, validate_args=False)  # validating would wait for the device


@dataclass
class Draw:
    """z of one group, drawn from q, and all that its KL term needs. Each is (B, n, H, W)."""

    z: torch.Tensor
    p: Normal  # of z
    q: Normal  # of z before the flows
    z_before_flows: torch.Tensor
    log_det: torch.Tensor = None  # ln |dz / dz_before_flows|, None without flows

    def log_ratio(self):
        """ln q(z_i | ...) - ln p(z_i | ...), elementwise: the KL, on average over draws."""
        log_q = self.q.log_prob(self.z_before_flows)
        if self.log_det is not None:
            log_q = log_q - self.log_det
        return log_q - self.p.log_prob(self.z)

    def kl(self):
        """KL(q || p) given the groups before, elementwise: exact, or with flows from this draw."""
        return kl_divergence(self.q, self.p) if self.log_det is None else self.log_ratio()


class Group(nn.Module):
    """One group of latents on the top-down path: cells, p, q, and the layer that adds z to h."""

    def __init__(self, cells, channels, latents, flows):
        super().__init__()
        self.cells = nn.Sequential(*cells)
        self.prior = nn.Sequential(nn.ELU(), nn.Conv2d(channels, 2 * latents, 1))
        self.mix = nn.Conv2d(channels, channels, 1)
        self.posterior = nn.Conv2d(channels, 2 * latents, 3, padding=1)
        self.flows = nn.ModuleList(Flow(latents, channels, k % 2 == 1) for k in range(flows))
        self.merge = nn.Conv2d(latents, channels, 1)
        for layer in self.prior[1], self.posterior:  # p is N(0, 1) at first, nearly, and q = p
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h, feature, eps):
        """With an image: h and its feature (B, C, H, W), normal eps (B, n, H, W) -> h, Draw."""
        h = self.cells(h)
        context = feature + self.mix(h)
        of_p = self.prior(h).float()  # mu and ln sigma
        # q relative to p (the paper's section 3.2): what is added shifts mu and multiplies sigma.
        # So 0, where the image tells nothing new, costs no KL, whatever p is.
        of_q = of_p + self.posterior(context).float()
        p = soft_clamped_normal(of_p)
        q = soft_clamped_normal(of_q)
        z_before_flows = q.loc + q.scale * eps
        z = z_before_flows
        log_det = torch.zeros_like(z) if self.flows else None
        for flow in self.flows:
            z, a = flow(z, context)
            log_det = log_det + a
        return h + self.merge(z), Draw(z, p, q, z_before_flows, log_det)

    def sample(self, h, eps, temperature, z=None):
        """Without an image: z as given or from p, with sigma times the temperature -> h, z."""
        h = self.cells(h)
        if z is None:
            p = soft_clamped_normal(self.prior(h).float())
            z = p.loc + temperature * p.scale * eps
        return h + self.merge(z), z


class NVAE(nn.Module):
    """The encoder, the top-down path, and p(x|z) as logits for dmol_log_prob() and dmol_sample().

    width, mults: width * mults channels at full, half, ... resolution, the last mult for all below.
    groups: how many groups at half, a quarter, ... of the resolution, 0 for none.
    cells: residual cells before each group, in the encoder and (but for the first) top-down.
    outer: residual cells at full resolution, likewise, with the one that halves or doubles it.
    expand (half of it at full resolution), flows, residual: see decoder_cell, Flow and Cell.
    mixtures, latents: M of p(x|z), and n of each group.
    amp: compute in bf16, but for the distributions.
    """

    def __init__(
        self,
        width=64,
        mults=(1, 2),
        groups=(12, 8),
        cells=1,
        outer=2,
        expand=0,
        flows=0,
        residual=0.3,
        mixtures=10,
        latents=20,
        channels=3,
        image_size=32,
        amp=False,
    ):
        super().__init__()
        if image_size % 2 ** len(groups):
            raise ValueError(f"a size of {image_size} cannot be halved {len(groups)} times")
        if not any(groups):
            raise ValueError("there must be at least one group")
        self.channels = channels
        self.groups_by_level = groups
        self.amp = amp
        self.image_size = image_size
        self.latents = latents
        widths = [width * mults[min(level, len(mults) - 1)] for level in range(len(groups) + 1)]
        self.make_encoder(widths, cells, outer, residual)
        self.make_top_down(widths, cells, outer, residual, expand, flows)
        self.out.append(nn.ELU())
        logits = mixtures * logits_per_logistic(channels)
        self.out.append(nn.Conv2d(widths[0], logits, 3, padding=1))

    def make_encoder(self, widths, cells, outer, residual):
        """The stem and, from fine to coarse, a stage for each group, which puts out its feature.

        The first stage of a level begins with the cells that lead down to it.
        """
        self.stem = nn.Sequential(nn.Conv2d(self.channels, widths[0], 3, padding=1))
        for _ in range(outer - 1):  # one more is the first of the encoder, which leads down
            self.stem.append(dense_cell(widths[0], widths[0], residual))
        self.encoder = nn.ModuleList()
        stage = []
        for level, count in enumerate(self.groups_by_level, start=1):
            stage.append(dense_cell(widths[level - 1], widths[level], residual, down=True))
            for _ in range(count):
                for _ in range(cells):
                    stage.append(dense_cell(widths[level], widths[level], residual))
                self.encoder.append(nn.Sequential(*stage))
                stage = []

    def make_top_down(self, widths, cells, outer, residual, expand, flows):
        """The first h and, from coarse to fine, the groups; at last the cells at full resolution.

        The first group of a level begins with the cells that lead up to it.
        """
        coarsest = self.image_size // 2 ** len(self.groups_by_level)
        self.start = nn.Parameter(torch.randn(1, widths[-1], coarsest, coarsest))
        self.groups = nn.ModuleList()
        self.latent_shapes = []  # (n, H, W) of each group
        alpha = []  # of each group, for kl_loss: pixels at its level / groups there
        outer_expand = expand // 2 if expand > 1 else expand  # full resolution costs most
        path = []  # cells on the way to the next group
        for level in range(len(self.groups_by_level), 0, -1):
            count = self.groups_by_level[level - 1]
            size = self.image_size // 2**level
            for _ in range(count):
                if len(self.groups) > 0:  # before the first group, h is only a constant
                    for _ in range(cells):
                        path.append(decoder_cell(widths[level], widths[level], residual, expand))
                self.groups.append(Group(path, widths[level], self.latents, flows))
                self.latent_shapes.append((self.latents, size, size))
                alpha.append(size**2 / count)
                path = []
            factor = expand if level > 1 else outer_expand
            path.append(decoder_cell(widths[level], widths[level - 1], residual, factor, up=True))
        self.register_buffer("alpha", torch.tensor(alpha))
        self.out = nn.Sequential(*path)
        for _ in range(outer - 1):
            self.out.append(decoder_cell(widths[0], widths[0], residual, outer_expand))

    def autocast(self):
        return torch.autocast(self.start.device.type, torch.bfloat16, enabled=self.amp)

    def first_h(self, count):
        h = self.start.expand(count, -1, -1, -1)
        return h.contiguous(memory_format=torch.channels_last)

    def noise(self, count, generator=None):
        """eps for `count` images: a list, from coarse to fine, of normal (count, n, H_i, W_i)."""
        kind = {"generator": generator, "device": self.start.device}
        return [torch.randn(count, *shape, **kind) for shape in self.latent_shapes]

    def encode(self, x):
        """x (B, C, H, W) in [-1, 1] -> the features of the groups, from coarse to fine."""
        with self.autocast():
            h = self.stem(x)
            features = []
            for stage in self.encoder:
                h = stage(h)
                features.append(h)
        return features[::-1]

    def infer(self, features, eps):
        """With an image: z from q -> logits (B, K M, H, W), and the Draw of each group."""
        draws = []
        with self.autocast():
            h = self.first_h(len(features[0]))
            for group, feature, e in zip(self.groups, features, eps, strict=True):
                h, draw = group(h, feature, e)
                draws.append(draw)
            logits = self.out(h)
        return logits.float(), draws

    def forward(self, x, eps):
        """Encode and decode x (B, C, H, W) in [-1, 1] -> logits, Draws."""
        return self.infer(self.encode(x), eps)

    def generate(self, eps, temperature=1.0, given=()):
        """Without an image: z from p, but for the first groups, whose z are given -> logits, z."""
        drawn = []
        with self.autocast():
            h = self.first_h(len(eps[0]))
            for i, group in enumerate(self.groups):
                z = given[i] if i < len(given) else None
                h, z = group.sample(h, eps[i], temperature, z)
                drawn.append(z)
            logits = self.out(h)
        return logits.float(), drawn


# ----------------------------------------------------------- p(x|z): mixture of logistics for bytes
# A pixel is a mixture of M logistics (Salimans et al. 2017, arXiv:1701.05517); within one of them a
# colour has mean m and scale s, and a byte has the probability that falls into its bin. With byte v
# at x = v / 127.5 - 1 and the logistic's distribution function S(a) = 1 / (1 + exp(-a)),
#     P(v) = S(a) - S(b),     a = (x - m + 1/255) / s,     b = (x - m - 1/255) / s.
# Where both are near 1, rounding takes their difference, and near 0 they underflow. But it is
#     S(a) S(b) (1/S(b) - 1/S(a)) = S(a) S(b) (exp(-b) - exp(-a)),
# and as S(b) exp(-b) = S(-b), that is S(a) S(-b) (1 - exp(b - a)): a product, whose logarithm can
# be computed well anywhere. The bin of byte 0 has no lower edge (b is minus infinity, P = S(a)) and
# that of byte 255 no upper one (P = S(-b)), so that the 256 probabilities sum to 1. (NVAE's code
# drops the upper edge for all x > 0.99, so for byte 254 too, at 0.992: the sum is more than 1.)


def scaled(images):
    """uint8 -> float: bytes 0 ... 255 evenly over [-1, 1], in bins 2/255 wide."""
    return images / 127.5 - 1


def quantise(x):
    """float -> uint8, the nearest byte."""
    return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def logits_per_logistic(channels):
    """K: a weight, a mean and a scale for each colour, and a coefficient for each pair of them."""
    return 1 + 2 * channels + channels * (channels - 1) // 2


def mixture(logits, channels):
    """Logits (B, K M, H, W) -> weights' logits (B, M, H, W), and means, ln s and coefficients.

    The last three are (B, C, M, H, W), (B, C, M, H, W) and (B, C (C - 1) / 2, M, H, W).
    """
    parts = logits.unflatten(1, (logits_per_logistic(channels), -1))  # (B, K, M, H, W)
    sizes = [1, channels, channels, channels * (channels - 1) // 2]
    weights, means, log_s, c = parts.split(sizes, dim=1)
    # Below -7, s would shrink for ever where images are of one colour. Far above 7, 1 / s would
    # round to 0, and with it the probability of a byte.
    log_s = log_s.clamp(-7, 7)
    return weights[:, 0], means, log_s, torch.tanh(c)


def mean_given(means, c, before):
    """The mean of the next colour, which is linear in a list of the colours before it."""
    colour = len(before)
    first = colour * (colour - 1) // 2  # of its coefficients
    mean = means[:, colour]
    for k, value in enumerate(before):
        mean = mean + c[:, first + k] * value
    return mean


def dmol_log_prob(logits, x):
    """ln p(x|z), (B,), of x (B, C, H, W) on the 256 values of scaled(); logits (B, K M, H, W)."""
    weights, means, log_s, c = mixture(logits, x.shape[1])
    x = x[:, :, None]  # (B, C, 1, H, W), against M logistics
    colours = x.unbind(1)
    m = torch.stack([mean_given(means, c, colours[:k]) for k in range(len(colours))], dim=1)
    far = 1e30  # in place of infinity, as infinity times a gradient of 0 is NaN
    is_0 = x < -0.999  # byte 1 is at -0.992
    is_255 = x > 0.999
    upper = (x + 1 / 255).masked_fill(is_255, far)
    lower = (x - 1 / 255).masked_fill(is_0, -far)
    width = torch.full_like(x, 2 / 255).masked_fill(is_0 | is_255, far)
    inverse_s = torch.exp(-log_s)
    a = (upper - m) * inverse_s  # (B, C, M, H, W)
    b = (lower - m) * inverse_s
    log_P = logsigmoid(a) + logsigmoid(-b) + torch.log(-torch.expm1(-width * inverse_s))
    log_p = weights.log_softmax(1) + log_P.sum(1)  # (B, M, H, W): all colours of a logistic
    return log_p.logsumexp(1).sum((1, 2))


def dmol_sample(logits, temperature=1.0, generator=None, channels=3):
    """x (B, C, H, W) from p(x|z), on the 256 values of scaled(); logits (B, K M, H, W).

    The temperature multiplies s and divides the weights' logits: below 1, likelier colours. The
    clamps of u keep its logarithms finite.
    """
    weights, means, log_s, c = mixture(logits, channels)
    u = torch.rand(weights.shape, generator=generator, device=logits.device).clamp(1e-20, 1 - 1e-7)
    gumbel = -torch.log(-torch.log(u))  # the largest of logit + gumbel is a draw by the weights
    chosen = (weights / temperature + gumbel).argmax(1)[:, None, None]  # (B, 1, 1, H, W)
    means, log_s, c = (
        part.gather(2, chosen.expand(-1, part.shape[1], -1, -1, -1))[:, :, 0]
        for part in (means, log_s, c)
    )
    u = torch.rand(means.shape, generator=generator, device=logits.device).clamp(1e-5, 1 - 1e-5)
    away = temperature * log_s.exp() * torch.logit(u)  # (B, C, H, W), from the mean
    colours = []
    for k in range(channels):
        colour = mean_given(means, c, colours) + away[:, k]
        colours.append(scaled(quantise(colour)))  # as bytes, which the next colour's mean is told
    return torch.stack(colours, dim=1)


def dmol_mean(logits, channels=3):
    """About the mean of p(x|z), (B, C, H, W): it clamps each logistic's mean, not its draws."""
    weights, means, _, c = mixture(logits, channels)
    colours = []
    for _ in range(channels):
        colours.append(mean_given(means, c, colours).clamp(-1, 1))
    return (weights.softmax(1)[:, None] * torch.stack(colours, dim=1)).sum(2)


# --------------------------------------------------------------------------------------------- loss


def nats_of_one_bit(images):
    """Nats of an image (., C, H, W) that has one bit per dimension: C H W ln 2."""
    return images[0].numel() * math.log(2)


def elbo(net, x, generator=None):
    """-ln p(x|z) (B,) and KL (B, G, n) of x (B, C, H, W) in [-1, 1], in nats.

    Their sum is, on average over draws of z, an upper bound of -ln p(x). KL says how much each of
    the n latents of each of the G groups tells.
    """
    logits, draws = net(x, net.noise(len(x), generator))
    kl = [draw.kl().sum((2, 3)) for draw in draws]
    return -dmol_log_prob(logits, x), torch.stack(kl, dim=1)


@torch.no_grad()
def iw_bound(net, x, k, generator=None):
    """A tighter bound of ln p(x), (B,) in nats (Burda et al. 2016, arXiv:1509.00519).

    ln p(x) >= mean of ln (1/k sum_j w_j) with w_j = p(x|z_j) p(z_j) / q(z_j|x), over k draws z_j
    from q. With k = 1 it is minus the sum of elbo(), on average, and it rises with k to ln p(x).
    """
    features = net.encode(x)
    log_sum = x.new_full((len(x),), -math.inf)
    for _ in range(k):
        logits, draws = net.infer(features, net.noise(len(x), generator))
        log_w = dmol_log_prob(logits, x)
        for draw in draws:
            log_w = log_w - draw.log_ratio().sum((1, 2, 3))
        log_sum = torch.logaddexp(log_sum, log_w)
    return log_sum - math.log(k)


def kl_loss(kl, beta, alpha):
    """beta sum_i gamma_i KL_i, with KL_i the mean of kl (B, G) over images (paper, appendix A).

    A group may fall asleep early on: q = p, z says nothing, and the layers behind it learn to
    ignore z. So while beta < 1, gamma_i is in proportion to KL_i / alpha_i: each nat costs less in
    groups that spend few of them. alpha_i, the pixels at a level over the number of groups there,
    is the share that a group may spend. (abs, as with flows the KL of one image is an estimate from
    one draw and may be negative; 0.01, so that no nat is for free.) When beta has reached 1, all
    gamma_i are 1, as in the bound.
    beta: a number, or a tensor () for Recorded, so nothing here asks the device for its value.
    """
    gamma = (kl.detach().abs().mean(0) + 0.01) / alpha
    gamma = gamma / gamma.mean()
    beta = torch.as_tensor(beta, device=kl.device)
    gamma = torch.where(beta < 1, gamma, 1.0)
    return beta * (gamma * kl.mean(0)).sum()


def weight_matrix(layer):
    """The weights of a convolution as a matrix (C_out, the rest)."""
    weight = layer.weight * layer.mask if isinstance(layer, MaskedConv) else layer.weight
    return weight.flatten(1)


class Spectral(nn.Module):
    """R: the largest singular value of each convolution, summed.

    They limit how much a small change of x or z can grow from layer to layer, and where it grows
    without limit, KL and gradients explode. A convolution counts as the matrix that maps a patch of
    its input to a pixel (a depthwise one counts for more, as its rows see different channels). Its
    largest singular value is the largest u . W v of unit vectors u and v. Power iteration finds
    these two: v along W^T u, u along W v, again and again. As weights change little in a step of
    training, one iteration per step is enough if u is kept. Matrices of the same shape are stacked,
    to save time.
    """

    def __init__(self, net, iterations=40):
        super().__init__()
        self.stacks = {}  # shape: layers
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                rows, columns = weight_matrix(layer).shape
                self.stacks.setdefault(f"{rows}x{columns}", []).append(layer)
        for shape, layers in self.stacks.items():
            u = torch.randn(len(layers), len(layers[0].weight), 1)
            self.register_buffer(shape, u.to(layers[0].weight.device))
        self(iterations)

    def forward(self, iterations=1):
        total = 0.0
        for shape, layers in self.stacks.items():
            w = torch.stack([weight_matrix(layer) for layer in layers])  # (layers, rows, columns)
            u = getattr(self, shape)
            with torch.no_grad():
                for _ in range(iterations):
                    v = normalize(w.mT @ u, dim=1)
                    u.copy_(normalize(w @ v + 1e-9 * u, dim=1))  # if W is still 0, u stays
            total = total + (u.clone() * (w @ v)).sum()  # a copy, as the next call changes u
        return total


# ------------------------------------------------------------------------------------------ samples


@torch.no_grad()
def sample(net, count, temperature=1.1, pixels=0.5, generator=None):
    """uint8 images (count, C, H, W).

    The temperature multiplies sigma of all p(z_i): below 1, images are duller. `pixels` is the
    temperature of dmol_sample(): below 1, smoother. Draws from p(x), with 1 and 1, are noisy, and
    have less contrast than images: over all images z_1 of neighbouring pixels go together, while
    p(z_1) draws each by itself. 1.1 gives back some contrast, and 0.5 takes noise off: each lowers
    the Frechet distance on CIFAR-10.
    """
    logits, _ = net.generate(net.noise(count, generator), temperature)
    return quantise(dmol_sample(logits, pixels, generator, net.channels))


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
    """[Muon for convolutions inside, if not depthwise, Adam at lr / 10 for the other weights].

    Others are, besides vectors, the ends of the network: the constant `start`, the first layer of
    the stem and the one that puts out p(x|z); depthwise convolutions, whose rows see different
    channels; and the small gates and flows.
    """
    inside = [layer for layer in net.modules() if isinstance(layer, Cell)]
    for group in net.groups:
        inside += [group.prior, group.mix, group.posterior, group.merge]
    layers = nn.ModuleList(inside).modules()
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    hidden = [layer.weight for layer in convolutions if layer.groups == 1]
    ids = {id(weight) for weight in hidden}
    rest = [weight for weight in net.parameters() if id(weight) not in ids]
    optimizers = [Muon(hidden), torch.optim.Adam(rest, fused=True)]
    set_rate(optimizers, lr)
    return optimizers


# ------------------------------------------------------------------------------------ training step


def training_step(
    net, spectral, optimizers, images, beta=1.0, spectral_weight=1e-2, generator=None
):
    """One step on uint8 images (B, C, H, W). Returns the loss before it, {name: tensor ()}.

    beta: see kl_loss; spectral_weight is lambda. What is returned is in bits/dim: the parts of the
    loss, without beta and gamma, and "train loss", the first two together, whose counterpart on
    test images is "test loss".
    """
    x = scaled(images)
    reconstruction, kl = elbo(net, x, generator)
    regulariser = spectral_weight * spectral()
    loss = reconstruction.mean() + kl_loss(kl.sum(2), beta, net.alpha) + regulariser
    net.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    terms = {"reconstruction": reconstruction.mean(), "kl": kl.sum((1, 2)).mean()}
    terms["train loss"] = terms["reconstruction"] + terms["kl"]
    terms["regulariser"] = regulariser
    return {name: value.detach() / nats_of_one_bit(images) for name, value in terms.items()}


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
def test_bound(net, images):
    """Mean of -ln p(x|z), (), and of KL, (G, n), over uint8 images, in bits/dim; fixed noise."""
    generator = torch.Generator(images.device).manual_seed(0)
    reconstructions = []
    kls = []
    for batch in images.split(100):
        reconstruction, kl = elbo(net, scaled(batch), generator)
        reconstructions.append(reconstruction)
        kls.append(kl)
    nats = nats_of_one_bit(images)
    return torch.cat(reconstructions).mean() / nats, torch.cat(kls).mean(0) / nats


def kl_weight(step, warmup_steps):
    """beta: up to 1 over the warm-up; never quite 0, or nothing would limit the KL at first."""
    return 1.0 if step >= warmup_steps else max(1e-4, step / warmup_steps)


def describe_network(args, images):
    """The arguments of NVAE, by name; a checkpoint keeps them."""
    flags = {flag: getattr(args, flag) for flag in NETWORK_FLAGS}
    return {**flags, "channels": images.shape[1], "image_size": images.shape[2]}


def build(args, network):
    """The network with these arguments, by name, on the device of the run."""
    try:
        net = NVAE(**network, amp=args.amp)
    except (TypeError, ValueError) as error:
        die(error)
    return net.to(args.device, memory_format=torch.channels_last)


def compile_cells(net):
    """torch.compile() cell by cell, as the whole network would be a very long program."""
    torch._dynamo.config.recompile_limit = 64  # kinds of cells; more would stay uncompiled
    for layer in net.modules():
        if isinstance(layer, Cell):
            layer.compile()


class Recorded:
    """A function for a GPU, recorded at its fourth call and replayed from then on.

    A training step is some thousand small pieces of work. Launching them one by one takes the CPU
    longer than they take the GPU, so they are recorded as a CUDA graph, which is launched as a
    whole. A graph does the same to the same memory again, and Python is not run. So tensors and
    floats that a call is given are copied to the memory of those that were recorded, where floats
    are tensors (), too; other arguments stay as they were. What comes out, gradients too, is
    written over what came out before. Weights and an optimiser's averages may be changed in place,
    but not be replaced, as its load_state_dict() would.
    The same in nvae.py and ebm.py.
    """

    def __init__(self, function, generator):
        self.function = function
        self.generator = generator  # of the function's noise
        self.first_calls = 3  # for what happens at first only, such as compiling
        self.stream = torch.cuda.Stream()  # a queue for these, as PyTorch's manual wants
        self.graph = None

    def __call__(self, *arguments):
        if self.first_calls > 0:
            self.first_calls -= 1
            return self.call(arguments)
        if self.graph is None:
            self.capture(arguments)
        for ours, given in zip(self.arguments, arguments, strict=True):
            if isinstance(given, torch.Tensor):
                ours.copy_(given)
            elif isinstance(given, float):
                ours.fill_(given)
        self.graph.replay()
        return self.outputs

    def call(self, arguments):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self, arguments):
        self.arguments = [self.own(given) for given in arguments]
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)  # each replay draws new noise
        with torch.cuda.graph(graph):
            self.outputs = self.function(*self.arguments)
        self.graph = graph

    def own(self, given):
        """The memory for an argument."""
        if isinstance(given, torch.Tensor):
            return given.clone()
        if isinstance(given, float):
            return torch.full((), given, device=self.generator.device)
        return given


def record_step(step, optimizers, generator):
    """A Recorded of step, a function that moves weights by make_optimizers()."""
    adam = optimizers[1].param_groups[0]
    adam["capturable"] = True  # else Adam refuses to be recorded ...
    warnings.filterwarnings("ignore", ".*capturable")  # ... but then warns of calls that are not
    return Recorded(step, generator)


def train(args, checkpoint=None):
    """Train on --data from the start or, given a checkpoint, from where that was saved."""
    from common import fingerprint, load, save_grid

    images, test = (split.to(args.device) for split in load(args.data, args.subset))
    network = checkpoint["network"] if checkpoint else describe_network(args, images)
    torch.manual_seed(args.seed)
    net = build(args, network)
    ema = copy.deepcopy(net).requires_grad_(False)
    spectral = Spectral(net)
    optimizers = make_optimizers(net)
    generator = torch.Generator(args.device).manual_seed(args.seed)

    parts = {"net": net, "ema": ema, "spectral": spectral}
    parts.update({"muon": optimizers[0], "adam": optimizers[1]})
    facts = {"network": network, "data": f"{len(images)} images {fingerprint(images)}"}
    run = Run(args, images, parts, facts, generator)
    if checkpoint:
        run.restore(checkpoint)

    def step(batch, rate, beta):  # arguments are what changes from step to step: see Recorded
        set_rate(optimizers, rate)
        return training_step(net, spectral, optimizers, batch, beta, args.spectral, generator)

    if args.compile:
        compile_cells(net)
        if args.device.type == "cuda":
            step = record_step(step, optimizers, generator)
    warmup_steps = args.kl_warmup * run.steps_per_epoch
    for epoch in run.epochs():
        for batch in run.batches(images):
            rate = args.lr * warmup_cosine(run.step, run.total)
            terms = step(batch, rate, kl_weight(run.step, warmup_steps))
            update_ema(ema, net, run.step, args.ema)
            run.record(terms)
        reconstruction, kl = test_bound(ema, test[:1000])
        run.end_epoch({"test loss": (reconstruction + kl.sum()).item()})
        if (epoch + 1) % args.sample_every == 0 or epoch + 1 == args.epochs:
            x = draw_samples(args, ema, 64, args.temperature)
            save_grid(x, run.out / f"samples_{epoch + 1:04d}.png")
    draw_reconstructions(args, ema, test, run.out)
    draw_scales(args, ema, test, run.out)
    rows = [draw_samples(args, ema, 8, temperature) for temperature in (0.6, 0.8, 1.0, 1.2, 1.4)]
    save_grid(torch.cat(rows), run.out / "temperatures.png")


# --------------------------------------------------------------------------------------------- uses
# What can be done with trained weights: a function for each flag. They write into --out.


def draw_samples(args, net, count, temperature):
    """uint8 images from noise that is always the same."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    return sample(net, count, temperature, args.pixels, generator)


@torch.no_grad()
def draw_reconstructions(args, net, test, out):
    """reconstructions.png: test images, each left of what is decoded from its latents."""
    from common import save_grid

    generator = torch.Generator(args.device).manual_seed(args.seed)
    x = test[:32]
    logits, _ = net(scaled(x), net.noise(len(x), generator))
    pairs = torch.stack([x, quantise(dmol_mean(logits, net.channels))], dim=1)
    save_grid(pairs.flatten(0, 1), out / "reconstructions.png")


@torch.no_grad()
def redraw(net, batch, known, generator):
    """Images like those of the batch: z of the first `known` groups from q, the others from p."""
    _, draws = net(scaled(batch), net.noise(len(batch), generator))
    given = [draw.z for draw in draws[:known]]
    logits, _ = net.generate(net.noise(len(batch), generator), given=given)
    return quantise(dmol_mean(logits, net.channels))


def draw_scales(args, net, test, out):
    """scales.png: for each of four images a row for each level of latents, coarsest first.

    A row has the image, and seven draws that keep its latents of the levels in the rows above:
    the first row keeps none, the last all but those of the finest level.
    """
    from common import save_grid

    generator = torch.Generator(args.device).manual_seed(args.seed)
    counts = [count for count in reversed(net.groups_by_level) if count > 0]
    grids = []
    for level in range(len(counts)):
        known = sum(counts[:level])  # groups of the levels above
        rows = []
        for x in test[:4].split(1):
            seven = x.expand(7, -1, -1, -1)
            drawn = redraw(net, seven, known, generator)
            rows.append(torch.cat([x, drawn]))
        grids.append(torch.stack(rows))  # (4 images, 1 + 7, C, H, W)
    save_grid(torch.stack(grids, dim=1).flatten(0, 2), out / "scales.png")


def generate(args, net):
    """--generate N: PNG files, drawn 256 at a time."""
    from common import export, save_grid

    out = Path(args.out)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for start in range(0, args.generate, 256):
        count = min(256, args.generate - start)
        x = sample(net, count, args.temperature, args.pixels, generator)
        export(x, out / "generated", start)
        if start == 0:
            save_grid(x[:64], out / "generated.png")
        print(f"{start + count} of {args.generate} images in {out / 'generated'}")


@torch.no_grad()
def interpolate(args, net):
    """--interpolate: a row leads from one noise to another; cos^2 + sin^2 = 1 keeps its std."""
    from common import save_grid

    generator = torch.Generator(args.device).manual_seed(args.seed)
    angle = torch.linspace(0, math.pi / 2, 8, device=args.device)[:, None, None, None]
    eps = []
    for start, end in zip(net.noise(8, generator), net.noise(8, generator), strict=True):
        between = angle.cos() * start[:, None] + angle.sin() * end[:, None]
        eps.append(between.flatten(0, 1))  # 8 rows of 8
    logits, _ = net.generate(eps, args.temperature)
    save_grid(quantise(dmol_mean(logits, net.channels)), Path(args.out) / "interpolate.png")


def evaluate(args, net, test):
    """--evaluate: the bound on all test images, KL and active latents by group, a tighter bound."""
    from matplotlib.figure import Figure

    nats = nats_of_one_bit(test)
    reconstruction, kl = test_bound(net, test)
    for i, latents in enumerate(kl, start=1):
        active = (latents * nats > 0.1).sum()  # from 0.1 nats an image on
        print(
            f"group {i:3}  KL {latents.sum():.4f} bits/dim  active units {active} of {len(latents)}"
        )
    axes = Figure().add_subplot(xlabel="group, from coarse to fine", ylabel="KL, bits/dim")
    axes.bar(range(1, len(kl) + 1), kl.sum(1).tolist())
    axes.figure.savefig(Path(args.out) / "kl_by_group.png")
    print(
        f"ELBO {reconstruction + kl.sum():.4f} bits/dim: reconstruction {reconstruction:.4f}, "
        f"KL {kl.sum():.4f}, of {len(test)} test images"
    )
    few = test[: args.iw_images]
    generator = torch.Generator(args.device).manual_seed(args.seed)
    bounds = [iw_bound(net, scaled(batch), args.iw, generator) for batch in few.split(100)]
    reconstruction, kl = test_bound(net, few)
    print(
        f"IW bound, K = {args.iw}: {-torch.cat(bounds).mean() / nats:.4f} bits/dim, of {len(few)} "
        f"test images whose ELBO is {reconstruction + kl.sum():.4f}"
    )


def use(args, checkpoint):
    """Do what the flags ask for with the averaged weights of a checkpoint."""
    from common import load

    net = build(args, checkpoint["network"]).requires_grad_(False)
    load_states(checkpoint, {"ema": net})
    if args.generate:
        generate(args, net)
    if args.interpolate:
        interpolate(args, net)
    if args.evaluate:
        _, test = load(args.data)
        evaluate(args, net, test.to(args.device))


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


USES = ["generate", "evaluate", "interpolate"]  # of trained weights
# When weights are there, NETWORK_FLAGS cannot be changed, nor RUN_FLAGS when training goes on.
NETWORK_FLAGS = [
    "width",
    "mults",
    "groups",
    "cells",
    "outer",
    "expand",
    "flows",
    "residual",
    "mixtures",
]
RUN_FLAGS = ["batch_size", "seed", "subset"]


def make_parser():
    """All flags of this script."""
    parser = shared_parser(lr=0.02)
    add = parser.add_argument_group(NAME).add_argument
    count = number(int, 1)
    natural = number(int, 0)
    positive = number(float, 0, above=True)
    widths = numbers(1, most=5)
    counts = numbers(0, most=4)
    add("--width", default=64, type=count, help="channels at full resolution")
    add("--mults", default=[1, 2], type=widths, metavar="M,M,...", help="widths by resolution")
    add("--groups", default=[12, 8], type=counts, metavar="N,N,...", help="at 1/2, 1/4, ...")
    add("--cells", default=1, type=count, help="residual cells each way before a group")
    add("--outer", default=2, type=count, help="residual cells each way at full resolution")
    add(
        "--expand",
        default=0,
        type=natural,
        help="depthwise cells with so many times the channels, 0: dense",
    )
    add("--flows", default=0, type=natural, help="inverse autoregressive flows a group")
    add("--residual", default=0.3, type=positive, help="scale of what a cell adds")
    add("--mixtures", default=10, type=count, help="logistics a pixel")
    add("--kl-warmup", default=0.3, type=number(float, 0), help="epochs until the KL counts fully")
    add("--spectral", default=1e-2, type=number(float, 0), help="lambda, weight of R")
    add("--temperature", default=1.1, type=positive, help="of latents: below 1 duller images")
    add("--pixels", default=0.5, type=positive, help="temperature of pixels: below 1 smoother")
    add("--interpolate", action="store_true", help="only draw the ways between samples")
    add("--iw", default=20, type=count, metavar="K", help="draws of z for the tighter bound")
    add("--iw-images", default=1000, type=count, help="test images for the tighter bound")
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
