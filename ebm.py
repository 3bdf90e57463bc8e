"""EBM: an energy-based model that learns to draw images. common.py loads the data.

A network gives each image x one number, its energy E(x). Low energy means likely, by definition:
    p(x) = exp(-E(x) / T) / Z,          Z = integral of exp(-E(x) / T) over all images
Here E(x) = |r(x)|^2 / 2, with a residual r(x) from a U-Net. The aim is half the squared distance
to the nearest image: its slope, grad E(x), is the noise in x. (r has the form of a guess of it, but
only the slope is taught.) Samples are drawn down this slope, from noise alone. In stage 2, Langevin
dynamics (Du & Mordatch 2019, arXiv:1903.08689) adds noise to steps of size h, and so walks on, in
balance with p:   x <- x - h grad E(x) + sqrt(2 h T) z,   z from N(0, I), h small (see langevin)

Stage 1, matching. The slope of E is to take noise off y = x + sigma z: an image x with noise z from
N(0, I), of any size sigma from `smooth`, a small number, up to one that hides x. If grad E(y) is
sigma z, a step y <- y - h grad E(y) leaves noise 1 - h times as large. Many images and noises make
the same y, so the network learns the mean of sigma z given y, by least squares. Steps then go
towards a mix of all images that y may come from; less noise leaves fewer, and in the end there is
one. It is denoising score matching (Vincent 2011) of one energy for all sigma, which can be read
from y (Li et al. 2019, arXiv:1910.07762):
    match = mean of |grad E(y) / sigma - z|^2 times a weight          (see matching_error)
The mean of sigma z given y is -sigma^2 times the score (grad log density) of images with noise of
this sigma (Tweedie's formula), and the score of p is -grad E / T. With T = smooth^2 they agree at
sigma = smooth: near images p is the density of images with that much noise.

Stage 2, chains: contrastive divergence. E was taught on noisy images only. Elsewhere it may be low
by mistake, and walks that get there stay. -T ln p(data) is E(data) + T ln Z, and the gradient in
the weights of T ln Z is minus the mean of that of E over draws from p. Walking chains are these:
    loss = match + weight * gap,         gap = mean E(data) - mean E(chains)
So E falls on data and rises where chains are (unless far above that of data) until it cannot tell
them apart. A buffer keeps the chains; each step of training lets some walk K steps on (persistent:
Tieleman 2008). Others begin anew each time, in decoys: images that E takes for too likely.

    python ebm.py --epochs 50                        trains on CIFAR-10, files in runs/ebm
    python ebm.py --generate 1000                    PNG files, from fresh noise
    python ebm.py --evaluate --inpaint --denoise     outliers, energies, pictures
Read as far as training_step(), then train(), its loop. In your own project, import torch, ebm:
    images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    net, settings = ebm.EnergyNet(8, mults=(1, 2), channels=1), ebm.Settings(smooth=0.1)
    optimizers, buffer = ebm.make_optimizers(net), ebm.Buffer(images)
    for x in images.split(16): ebm.training_step(net, optimizers, x, settings, "matching")
    for x in images.split(16): ebm.training_step(net, optimizers, x, settings, "chains", buffer)
    samples = ebm.quantise(ebm.draw(net, torch.randn(4, 1, 28, 28), settings))"""

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
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate, silu

NAME = "ebm"

# ------------------------------------------------------------------------------------------ network


class Block(nn.Module):
    """Residual block, (B, in_channels, H, W) -> (B, out_channels, H, W).

    There are no normalisation layers: as E is differentiated twice they would cost much.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity()
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)  # at first h adds nothing
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        h = self.conv2(silu(self.conv1(silu(x))))
        # The division is for later: once h has the variance of x, their sum has twice as much.
        return (self.skip(x) + h) / math.sqrt(2)


SIGMA_DATA = 0.5  # root mean square of images in [-1, 1], about


def noise_variance(y):
    """A guess of sigma^2, (B, 1, 1, 1), from images with noise of that size (B, C, H, W).

    Of four pixels in a square, the two on one diagonal less the other two make a number with
    variance 4 sigma^2, as noise is independent from pixel to pixel. What images have between
    neighbours mostly cancels, as they are smooth. The rest makes the guess too high where there is
    little noise: simple shapes without any seem to have noise of std 0.08.
    """
    d = y[:, :, 1:] - y[:, :, :-1]
    d = d[:, :, :, 1:] - d[:, :, :, :-1]
    return d.square().mean((1, 2, 3), keepdim=True) / 4 + 1e-4  # above 0, for the root of it


class EnergyNet(nn.Module):
    """E: images (B, C, H, W) in [-1, 1], with noise of any size or without, 2x2 or more, -> (B,).

    The U-Net has, at full, half, ... resolution, `blocks` blocks with width * mults channels on the
    way down and on the way up. amp: the blocks compute in bf16.
    """

    def __init__(self, width=64, mults=(1, 2, 3, 4), blocks=2, channels=3, amp=False):
        super().__init__()
        self.amp = amp
        widths = [width * mult for mult in mults]
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        before = widths[0]  # channels that come out of the layer before
        for after in widths:
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(Block(before, after))
                before = after
            self.down.append(level)
        self.middle = Block(before, before)
        self.up = nn.ModuleList()
        for after in reversed(widths):
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(Block(before + after, after))  # sees what its counterpart put out
                before = after
            self.up.append(level)
        self.out = nn.Conv2d(widths[0], channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)  # so the U-Net starts as 0
        nn.init.zeros_(self.out.bias)

    def unet(self, x):
        """Images of a mean square near 1 (B, C, H, W) -> the same shape."""
        halvings = len(self.down) - 1
        if x.shape[2] % 2**halvings or x.shape[3] % 2**halvings:
            raise ValueError(f"{x.shape[2]}x{x.shape[3]} pixels cannot be halved {halvings} times")
        h = self.stem(x)
        skips = []
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            for i, level in enumerate(self.down):
                if i > 0:
                    h = avg_pool2d(h, 2)
                for block in level:
                    h = block(h)
                    skips.append(h)
            h = self.middle(h)
            for i, level in enumerate(self.up):
                if i > 0:
                    h = interpolate(h, scale_factor=2.0)
                for block in level:
                    h = block(torch.cat([h, skips.pop()], dim=1))
        return self.out(silu(h.to(x.dtype)))

    def residual(self, y):
        """r, shaped like y and of the form of a guess of the noise in y, an image with any noise.

        A U-Net learns best if what it is given and what it is to give are near 1 in size, for noise
        of any size. So it sees y divided by its size, and where size^2 = sigma^2 + SIGMA_DATA^2
            r = share y + (sigma SIGMA_DATA / size) U(y / size),      share = sigma^2 / size^2
        Of all multiples of y, share y is the best guess of the noise. What it misses has the size
        of the factor before U. (Karras et al. 2022, arXiv:2206.00364: y - r is their c_skip y +
        c_out F(c_in y) with F = -U. Their network is told sigma; here it is guessed from y, and
        grad E goes through the guess, too.)
        """
        variance = noise_variance(y)
        mean_square = variance + SIGMA_DATA**2  # of y, about
        share = variance / mean_square
        u = self.unet(y / mean_square.sqrt())
        return share * y + share.sqrt() * SIGMA_DATA * u

    def forward(self, x):
        return self.residual(x).square().flatten(1).sum(1) / 2


# --------------------------------------------------------------------------------------------- loss


def dequantise(images, generator=None):
    """uint8 -> float in [-1, 1]: a byte becomes a uniform draw from its bin, 2/256 wide."""
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return (images + noise) / 128 - 1


def quantise(x):
    """float -> uint8: the bin that x in [-1, 1] lies in; values beyond go to 0 or 255."""
    return ((x + 1) * 128).clamp(0, 255).to(torch.uint8)


def add_noise(x, std, generator=None):
    """x + std z, z from N(0, I)."""
    return x + std * torch.randn(x.shape, generator=generator, device=x.device)


def sample_sigma(count, median, least, most, generator=None, device=None):
    """The size of noise for each of `count` images in training, (count,), within [least, most].

    Before it is brought within them, ln sigma is logistic with scale 0.8. With the default median,
    0.5, half of all sigma are between 0.2 and 1.2, where layout and shapes are decided: less noise
    hides only texture. The draws are stratified: the range of probability is cut into `count` equal
    slices, and each image gets one of them, by chance.
    """
    slices = torch.randperm(count, generator=generator, device=device)
    u = (slices + torch.rand(count, generator=generator, device=device)) / count
    return (median * torch.exp(0.8 * torch.logit(u))).clamp(least, most)


def matching_error(slope, z, sigma):
    """mean(|slope / sigma - z|^2) (1 + (sigma / SIGMA_DATA)^2), (B,); sigma is (B, 1, 1, 1).

    As y - slope is a guess of x = y - sigma z, this is the mean square error of that guess, over
    sigma^2 where there is little noise and over SIGMA_DATA^2 where there is much. The best guess
    there is the mean of all images, with an error of about SIGMA_DATA^2.
    """
    error = (slope / sigma - z).square() * (1 + (sigma / SIGMA_DATA) ** 2)
    return error.flatten(1).mean(1)


def contrastive_divergence(energy, data, chains, unit, margin=0.3):
    """(gap (), E(data) (B,), E(chains) (N,)) of data (B, ...) and chains (N, ...), in this unit.

    gap is the mean over chains of mean E(data) - E(chain), or 0 for a chain whose energy is above
    mean E(data) + margin: it need not be pushed up, and may be on its way down from noise.
    """
    energies = energy(torch.cat([data, chains.detach()])) / unit
    e_data, e_chains = energies.split([len(data), len(chains)])
    counts = (e_chains < e_data.mean() + margin).float().detach()
    gap = (counts * (e_data.mean() - e_chains)).mean()
    return gap, e_data, e_chains


# ----------------------------------------------------------------------------------------- samplers


def energy_and_gradient(energy, x):
    """E(x), (B,), and grad E(x), shaped like x; weights get no gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        e = energy(x)
        (grad,) = torch.autograd.grad(e.sum(), x)
    return e.detach(), grad


@torch.no_grad()
def denoise(energy, y):
    """y - grad E(y), like y: the guess of the image in y (Tweedie)."""
    return y - energy_and_gradient(energy, y)[1]


def unconstrained(x, sigma):
    """No constraint."""
    return x


def keep_known(truth, known, generator=None):
    """A constraint that inpaints: where `known`, the truth with as much noise as x has there."""

    def constrain(x, sigma):
        return torch.where(known, add_noise(truth, sigma, generator), x)

    return constrain


@torch.no_grad()
def langevin(energy, x, steps, step_size, temperature, generator=None, constrain=unconstrained):
    """Langevin dynamics from x (B, ...): x after `steps` steps, and its energies (B,) before.

    It samples exp(-E / temperature), nearly. Around an image E curves as 1 in most directions, as
    half a squared distance does. A step of size h turns the variance v of such a direction into
    (1 - h)^2 v plus that of the noise. With h (2 - h) temperature for the noise, v = temperature
    stays as it is, whatever h; for small h this is the usual 2 h temperature. After each step x
    becomes constrain(x, sigma), sigma being the root of the temperature.
    """
    noise = math.sqrt(step_size * (2 - step_size) * temperature)
    e_start = torch.zeros(len(x), device=x.device)
    for i in range(steps):
        e, grad = energy_and_gradient(energy, x)
        if i == 0:
            e_start = e
        x = add_noise(x - step_size * grad, noise, generator)
        x = constrain(x, math.sqrt(temperature))
    return x, e_start


def guide(energy, early, strength):
    """E + (strength - 1) (E - E_early), an energy (B, ...) -> (B,) again: autoguidance.

    energy: of the averaged weights. early: of the same as they were after a tenth of stage 1. The
    idea is that what is still wrong with energy was wrong with early in the same direction, only
    more so. So it is taken a little further along the way that it has come since: things in samples
    become clearer. The price is that they vary a little less and are no longer draws from p. (It is
    p^strength / p_early^(strength - 1). Karras et al. 2024, arXiv:2406.02507, do it with scores.)
    """

    def guided_energy(x):
        return strength * energy(x) - (strength - 1) * early(x)

    return guided_energy


GUIDED_BELOW = 4 * SIGMA_DATA  # in more noise guidance would make colours glaring ...
GUIDED_ABOVE = 0.6 * SIGMA_DATA  # ... and in less it left a fine chequered pattern


@torch.no_grad()
def descend(energy, y, sigma, step_size, end, constrain=unconstrained, guided_energy=None):
    """Down the slope, from y (B, ...) with noise of size sigma until sigma is `end` or just below.

    A step takes away a share, step_size, of the noise; sigma only counts this, E is not told. After
    it y becomes constrain(y, sigma). Where sigma is from GUIDED_ABOVE to GUIDED_BELOW the slope is
    that of guided_energy, if there is one.
    """
    while sigma > end:
        guided = guided_energy is not None and GUIDED_ABOVE <= sigma <= GUIDED_BELOW
        _, slope = energy_and_gradient(guided_energy if guided else energy, y)
        sigma = sigma * (1 - step_size)
        y = constrain(y - step_size * slope, sigma)
    return y


@dataclass
class Settings:
    """Of Langevin dynamics and of the loss; the flags of the same names."""

    steps: int = 10  # K, for each step of training in stage 2
    step_size: float = 0.1  # h, also of the way from noise
    sigma_max: float = 40.0  # largest noise that is taught, where samples begin
    smooth: float = 0.03  # least noise that is taught, noise of chains and data, root of T
    fresh: float = 0.01  # share of drawn chains that begin anew in noise
    decoys: float = 0.5  # short chains that begin in decoys, as a share of the others
    weight: float = 0.1  # of the gap
    focus: float = 0.5  # median sigma in training
    guidance: float = 1.8  # strength of guide(), if an early network is given

    def walk(self, energy, x, steps, generator=None, constrain=unconstrained):
        """langevin() with these settings."""
        temperature = self.smooth**2
        return langevin(energy, x, steps, self.step_size, temperature, generator, constrain)


def draw(energy, z, settings, steps=0, generator=None, constrain=unconstrained, early=None):
    """Images in [-1, 1] from standard normal z (B, ...): down the slope, a walk, noise off.

    early: an energy from which guide() leads away on the way down. The walk of `steps` steps is
    one in p itself, without guidance.
    """
    guided_energy = None
    if early is not None and settings.guidance > 1:
        guided_energy = guide(energy, early, settings.guidance)
    sigma = settings.sigma_max
    end = settings.smooth
    x = descend(energy, sigma * z, sigma, settings.step_size, end, constrain, guided_energy)
    x, _ = settings.walk(energy, x, steps, generator, constrain)
    return denoise(energy, x).clamp(-1, 1)


class Buffer(nn.Module):
    """Persistent chains, (N, C, H, W), in fp16 to save memory, and the last hundred gaps.

    They begin at uint8 images. Each step of the second stage draws some, lets them walk K steps and
    puts them back. A share, `fresh`, of those drawn begins anew in noise, so a chain walks
    K / fresh steps on average (1,000 by default).
    """

    def __init__(self, images):
        super().__init__()
        self.register_buffer("chains", dequantise(images).half())
        self.register_buffer("gaps", torch.zeros(100, device=images.device))

    def draw(self, count, fresh, sigma_max, generator=None):
        """(slots, x): `count` different chains, some of them begun anew in noise of sigma_max."""
        if count > len(self.chains):
            raise ValueError(f"a buffer of {len(self.chains)} chains is too small for {count}")
        kind = {"generator": generator, "device": self.chains.device}
        slots = torch.randperm(len(self.chains), **kind)[:count]
        x = self.chains[slots].float()
        anew = torch.rand(count, *[1] * (x.dim() - 1), **kind) < fresh
        return slots, torch.where(anew, sigma_max * torch.randn(x.shape, **kind), x)

    def put(self, slots, x, gap, good):
        """Keep where chains got to, and the gap, if the step was good, a bool tensor ()."""
        self.chains[slots] = torch.where(good, x.half(), self.chains[slots])
        gaps = torch.cat([self.gaps[1:], gap[None]])  # the oldest goes
        self.gaps.copy_(torch.where(good, gaps, self.gaps))


def decoys(x, generator=None):
    """For each image of x (B, C, H, W) its mean with another or, as often, a coarse version of it.

    That has 1, 2x2, 4x4 or 8x8 pixels. Nothing in such images looks like noise, so E is low there
    by mistake. The chains of the buffer hardly ever get there, so they cannot mend it, and samples
    do not suffer from it. But an energy is also to tell images from others.
    """
    size = x.shape[2:]
    flat = [interpolate(adaptive_avg_pool2d(x, n), size) for n in (1, 2, 4, 8)]
    mixed = (x + x.roll(1, 0)) / 2
    versions = torch.stack([*flat, mixed, mixed, mixed, mixed])
    choice = torch.randint(len(versions), (len(x),), generator=generator, device=x.device)
    return versions[choice, torch.arange(len(x), device=x.device)]


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
    """[Muon for the convolutions of all blocks, Adam at lr / 10 for the other weights].

    With both, weights stay as they are if gradients are 0, as after cancel_bad_step(); with Adam
    because its momentum is 0.
    """
    blocks = nn.ModuleList([net.down, net.middle, net.up])
    hidden = [weight for weight in blocks.parameters() if weight.dim() > 1]
    ids = {id(weight) for weight in hidden}
    rest = [weight for weight in net.parameters() if id(weight) not in ids]
    optimizers = [Muon(hidden), torch.optim.Adam(rest, betas=(0.0, 0.999), fused=True)]
    set_rate(optimizers, lr)
    return optimizers


# ------------------------------------------------------------------------------------ training step

STAGES = ["matching", "chains"]


def match_loss(energy, x, settings, generator=None):
    """Add noise to images x (B, C, H, W): mean matching_error() of the slope there, ()."""
    most = settings.sigma_max
    sigma = sample_sigma(len(x), settings.focus, settings.smooth, most, generator, x.device)
    sigma = sigma.view(-1, 1, 1, 1)
    z = torch.randn(x.shape, generator=generator, device=x.device)
    y = (x + sigma * z).requires_grad_()
    (slope,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)  # to learn from it
    return matching_error(slope, z, sigma).mean()


def match_pass(net, images, settings, generator=None):
    """match_loss() of uint8 images (B, C, H, W), (). Only its gradients are left in net."""
    x = dequantise(images, generator)
    # Not net(), which train() compiles: compiled code has no second gradient.
    loss = match_loss(net.forward, x, settings, generator)
    net.zero_grad()
    loss.backward()
    return loss.detach()


def chain_loss(net, x, settings, buffer, generator=None):
    """Contrastive divergence: (loss, terms to log, slots and ends of the buffer's chains).

    Energies are in units of T dim, with dim = C H W. In these the noise in data, of std smooth,
    makes about 1/2, if r finds all of it. (Medians of chains are logged, as some have just begun in
    noise, where energies are huge.)
    """
    data = add_noise(x, settings.smooth, generator)
    slots, start = buffer.draw(len(x), settings.fresh, settings.sigma_max, generator)
    extra = decoys(x, generator)[: math.ceil(settings.decoys * len(x))]
    start = torch.cat([start, add_noise(extra, settings.smooth, generator)])
    chains, e_start = settings.walk(net, start, settings.steps, generator)
    unit = settings.smooth**2 * x[0].numel()
    gap, e_data, e_chains = contrastive_divergence(net, data, chains, unit)
    terms = {"gap": gap, "E data": e_data.mean(), "E chains": e_chains.median()}
    terms["E start"] = e_start.median() / unit
    return settings.weight * gap, terms, slots, chains[: len(slots)]


def cancel_bad_step(net, gap, norm, recent_gaps):
    """Set gradients to 0 if the step is bad. Returns whether it is good, a bool tensor ().

    Bad is a gap or gradient norm that is not finite, or a |gap| above 10 (for images like
    CIFAR-10's it is far below) that is also above five times the median of the last 100. All this
    stays on the device: masked_fill_(~good, 0) in place of `if not good`, for which the program
    would have to wait.
    """
    limit = (5 * recent_gaps.abs().median()).clamp(min=10)
    good = gap.isfinite() & norm.isfinite() & (gap.abs() <= limit)
    for p in net.parameters():
        if p.grad is not None:
            p.grad.masked_fill_(~good, 0)
    return good


def training_step(
    net, optimizers, images, settings, stage, buffer=None, generator=None, backward=match_pass
):
    """One step on uint8 images (B, C, H, W), in one of the STAGES; "chains" needs a buffer.

    backward: match_pass, or on CUDA a Recorded of it, with the same generator.
    Returns what is logged, {name: tensor ()}, all 0 but "skipped" if the step was bad.
    """
    match = backward(net, images, settings, generator)
    loss = match
    gap = torch.zeros_like(match)
    recent_gaps = torch.zeros_like(match)
    terms = {}
    if stage == "chains":
        x = dequantise(images, generator)
        weighted_gap, terms, slots, chains = chain_loss(net, x, settings, buffer, generator)
        weighted_gap.backward()  # to the gradients of match it adds its own
        loss = loss + weighted_gap
        gap = terms["gap"].detach()
        recent_gaps = buffer.gaps
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    good = cancel_bad_step(net, gap, norm, recent_gaps)
    for optimizer in optimizers:
        optimizer.step()
    if stage == "chains":
        buffer.put(slots, chains, gap, good)
    terms.update({"match": match, "train loss": loss})
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
        if max(abs(last.get("E data", 0)), abs(last.get("E chains", 0))) > 100:
            return "energies above 100"
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


def start_buffer(args, images):
    """A Buffer of --buffer chains, a batch at least, that begin at the first images."""
    count = max(args.buffer, args.batch_size)
    return Buffer(images[torch.arange(count, device=images.device) % len(images)])


def schedule(step, total, facts):
    """(stage, steps since it began, steps that it takes, factor of the learning rate).

    Each stage has a schedule of its own. The rate of the chains is a fifth as high: they are to
    mend what is there.
    """
    chains_from = facts["chains_from"]
    caution = 0.5 ** facts["failures"]
    if step >= chains_from:
        return "chains", step - chains_from, total - chains_from, 0.2 * caution
    return "matching", step, chains_from, caution


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


def quick_pass(args, net, generator):
    """match_pass, on CUDA as a Recorded; with --compile net() is compiled, for the chains."""
    if args.compile:
        net.compile()
    if args.compile and args.device.type == "cuda":
        return Recorded(match_pass, generator)
    return match_pass


def train(args, checkpoint=None):
    """Train on --data from the start or, given a checkpoint, from where that was saved."""
    from common import fingerprint, load, save_grid

    settings = settings_of(args)
    images, test = (split.to(args.device) for split in load(args.data, args.subset))
    network = describe_network(args, images)
    torch.manual_seed(args.seed)
    net = build(args, network)
    ema = copy.deepcopy(net).requires_grad_(False)
    early = copy.deepcopy(ema)
    optimizers = make_optimizers(net)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    buffer = start_buffer(args, images)

    parts = {"net": net, "ema": ema, "early": early, "buffer": buffer}
    parts.update({"muon": optimizers[0], "adam": optimizers[1]})
    data = f"{len(images)} images {fingerprint(images)}"
    facts = {"network": network, "shape": list(images.shape[1:]), "data": data, "failures": 0}
    run = GuardedRun(args, images, parts, facts, generator)
    facts["chains_from"] = int(args.warm_up * run.total)
    if checkpoint:
        run.restore(checkpoint)  # and the facts
    quick = quick_pass(args, net, generator)

    for epoch in run.epochs():
        for batch in run.batches(images):
            if run.saved_step is None:
                run.save()  # something to go back to
            stage, step, steps, rate = schedule(run.step, run.total, facts)
            set_rate(optimizers, args.lr * rate * warmup_cosine(step, steps))
            if stage == "chains" and step == 0:
                draw_chains(args, ema, test, run.out / "chains_before.png")
            terms = training_step(net, optimizers, batch, settings, stage, buffer, generator, quick)
            update_ema(ema, net, step, args.ema)  # at step 0 of a stage ema becomes net
            if run.step < (facts["chains_from"] or run.total) / 10:  # see guide()
                early.load_state_dict(ema.state_dict())
            run.record(terms)
        run.end_epoch({"failures": facts["failures"]})
        if (epoch + 1) % args.sample_every == 0 or epoch + 1 == args.epochs:
            fixed = torch.Generator(args.device).manual_seed(args.seed)
            x = draw_samples(args, ema, early, facts, 64, fixed)
            save_grid(x, run.out / f"samples_{epoch + 1:04d}.png")
    draw_chains(args, ema, test, run.out / "chains.png")


# --------------------------------------------------------------------------------------------- uses
# What can be done with trained weights: a function for each flag. They write into --out.


def settings_of(args):
    """The flags that make up Settings."""
    if args.smooth >= args.sigma_max:
        die(f"--smooth {args.smooth} must be below --sigma-max {args.sigma_max}")
    return Settings(**{flag: getattr(args, flag) for flag in SETTINGS_FLAGS})


def draw_samples(args, net, early, facts, count, generator):
    """uint8 images (count, C, H, W) from fresh noise, with --chain steps of a walk on the way."""
    z = torch.randn(count, *facts["shape"], generator=generator, device=args.device)
    return quantise(draw(net, z, settings_of(args), args.chain, generator, early=early))


CHAIN_ROWS = [0, 1, 3, 10, 30, 100, 300]  # steps


def draw_chains(args, net, test, path):
    """Eight chains from noise beside eight from test images, a row for each of CHAIN_ROWS.

    If chains from test images soon look like none, p has its mass elsewhere, and samples are good
    only if their chains are not too long.
    """
    from common import save_grid

    settings = settings_of(args)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    x = add_noise(dequantise(test[:8], generator), settings.smooth, generator)
    z = torch.randn(8, *x.shape[1:], generator=generator, device=args.device)
    y = settings.sigma_max * z
    y = descend(net, y, settings.sigma_max, settings.step_size, settings.smooth)
    x = torch.cat([y, x])
    rows = []
    before = 0
    for after in CHAIN_ROWS:
        x, _ = settings.walk(net, x, after - before, generator)
        rows.append(quantise(denoise(net, x)))
        before = after
    save_grid(torch.cat(rows), path, columns=len(x))


def generate(args, net, early, facts):
    """--generate N: PNG files, drawn 256 at a time."""
    from common import export, save_grid

    out = Path(args.out)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for start in range(0, args.generate, 256):
        count = min(256, args.generate - start)
        x = draw_samples(args, net, early, facts, count, generator)
        export(x, out / "generated", start)
        if start == 0:
            save_grid(x[:64], out / "generated.png")
        print(f"{start + count} of {args.generate} images in {out / 'generated'}")


def save_triples(truth, before, after, path):
    """Write each image beside what was made of it, and what became of that."""
    from common import save_grid

    triples = torch.stack([truth, before, after], dim=1)
    save_grid(quantise(triples.flatten(0, 1)), path, columns=12)


def inpaint(args, net, early, test):
    """--inpaint: test images, the same without their middle, and with that filled."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    truth = dequantise(test[:16], generator)
    height, width = truth.shape[2:]
    known = torch.ones(height, width, dtype=torch.bool, device=args.device)
    known[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = False
    z = torch.randn(truth.shape, generator=generator, device=args.device)
    constrain = keep_known(truth, known, generator)
    x = draw(net, z, settings_of(args), args.chain, generator, constrain, early)
    x = torch.where(known, truth, x)
    save_triples(truth, torch.where(known, truth, -1), x, Path(args.out) / "inpaint.png")


def remove_noise(args, net, test):
    """--denoise: test images, the same with noise of std 0.2, and after one step back."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    truth = dequantise(test[:16], generator)
    noisy = add_noise(truth, 0.2, generator)
    clean = denoise(net, noisy).clamp(-1, 1)
    save_triples(truth, noisy, clean, Path(args.out) / "denoise.png")

    def psnr(x):  # pixels from -1 to 1
        return -10 * ((x - truth) / 2).square().mean((1, 2, 3)).log10().mean()

    dB = f"PSNR {psnr(noisy):.2f} dB before, {psnr(clean):.2f} dB after"
    print(f"{dB}, of {len(truth)} test images")


def outliers(images, generator=None):
    """{name: uint8 images like none of `images` (N, C, H, W), as many and of the same shape}.

    Training knows constant and interpolated ones, as decoys(); the others it never saw.
    """
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


def evaluate(args, net, early, facts):
    """--evaluate: how well E tells other images from test images, and histograms of energies.

    Of outliers that are smoother than images E may be too low in place of too high; so there is a
    second AUROC, by how far E is from the median of test images, on either side.
    """
    from common import load

    settings = settings_of(args)
    unit = settings.smooth**2 * math.prod(facts["shape"])
    generator = torch.Generator(args.device).manual_seed(args.seed)

    @torch.no_grad()
    def energies(images):  # with the noise that data had in training
        parts = []
        for batch in images.split(250):
            x = dequantise(batch.to(args.device), generator)
            parts.append(net(add_noise(x, settings.smooth, generator)).cpu() / unit)
        return torch.cat(parts)

    train, test = load(args.data, args.subset)
    inside = {
        "test": energies(test),
        "train": energies(train[: len(test)]),
        "samples": energies(draw_samples(args, net, early, facts, 100, generator)),
    }
    others = outliers(test.to(args.device), generator)
    others[args.ood] = torch.cat(load(args.ood))
    middle = inside["test"].median()
    for name, images in others.items():
        e = energies(images)
        area = auroc(inside["test"], e)
        either = auroc((inside["test"] - middle).abs(), (e - middle).abs())
        print(f"AUROC {area:.3f}, by |E - median| {either:.3f}, of test images against {name}")
    every = torch.cat(list(inside.values()))
    low = every.min().item()
    high = every.max().item()
    middles = torch.linspace(low, high, 101)[1::2].tolist()  # of fifty bins
    lines = {}
    for name, e in inside.items():
        lines[name] = middles, (e.histc(50, low, high) / len(e)).tolist()
    plot(Path(args.out) / "histogram.png", lines, xlabel="energy / (T dim)")


def use(args, checkpoint):
    """Do what the flags ask for with the averaged weights of a checkpoint."""
    from common import load

    net = build(args, checkpoint["network"]).requires_grad_(False)
    early = copy.deepcopy(net)
    load_states(checkpoint, {"ema": net, "early": early})
    if args.generate:
        generate(args, net, early, checkpoint)
    if args.inpaint or args.denoise:
        test = load(args.data)[1].to(args.device)
        if args.inpaint:
            inpaint(args, net, early, test)
        if args.denoise:
            remove_noise(args, net, test)
    if args.evaluate:
        evaluate(args, net, early, checkpoint)


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


USES = ["generate", "evaluate", "inpaint", "denoise"]  # of trained weights
NETWORK_FLAGS = ["width", "mults", "blocks"]  # cannot be changed when weights are there
RUN_FLAGS = ["batch_size", "seed", "subset", "buffer"]  # nor can these when training goes on
RUN_FLAGS += ["sigma_max", "smooth", "warm_up"]
SETTINGS_FLAGS = ["steps", "step_size", "sigma_max", "smooth", "fresh", "decoys", "weight", "focus"]
SETTINGS_FLAGS += ["guidance"]


def make_parser():
    """All flags of this script."""
    parser = shared_parser(lr=0.02)
    add = parser.add_argument_group(NAME).add_argument
    count = number(int, 1)
    share = number(float, 0, most=1)
    below_1 = number(float, 0, above=True, most=0.9)
    sigma = number(float, 0, above=True, most=1000)
    widths = numbers(1, most=6)
    add("--width", default=64, type=count, help="channels at full resolution")
    add("--mults", default=[1, 2, 3, 4], type=widths, metavar="M,M,...", help="widths by level")
    add("--blocks", default=2, type=count, help="residual blocks each way at a resolution")
    add("--warm-up", default=0.9, type=share, help="share of the run before there are chains")
    add("--focus", default=0.5, type=sigma, help="median noise in training, more for large things")
    add("--sigma-max", default=40.0, type=sigma, help="std of the most noise, where samples begin")
    add("--steps", default=10, type=count, metavar="K", help="Langevin steps an update")
    add("--step-size", default=0.1, type=below_1, help="h: gradients times this are a step")
    small = number(float, 0, above=True, most=0.4)
    add("--smooth", default=0.03, type=small, help="std of noise on data, root of T")
    add("--weight", default=0.1, type=number(float, 0), help="of the gap, in units of T dim")
    add("--buffer", default=1000, type=count, help="persistent chains")
    add("--fresh", default=0.01, type=share, help="share of drawn chains that begin anew in noise")
    add("--decoys", default=0.5, type=share, help="chains from decoys, as a share of the others")
    add("--chain", default=0, type=number(int, 0), help="Langevin steps after the way from noise")
    add("--guidance", default=1.8, type=number(float, 1), help="strength of guide(), 1 for none")
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
