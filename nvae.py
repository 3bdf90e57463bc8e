"""NVAE, a deep hierarchical variational autoencoder for images.

    python nvae.py --epochs 50                          train on CIFAR-10, results in runs/nvae
    python nvae.py --small --data shapes --out shapes   the same on a CPU, in minutes
    python nvae.py --generate 1000                      draw samples with the trained weights
    python nvae.py --evaluate                           bits/dim, KL of each group, two pictures

A variational autoencoder explains images x by latent variables z, drawn from a prior p(z); then x
is drawn from p(x|z), the output of a decoder network. The posterior p(z|x) is intractable, so an
encoder network learns an approximate one, q(z|x). Both networks maximise a lower bound, the ELBO:
    log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z))
NVAE (Vahdat & Kautz 2020, arXiv:2007.03898) splits z into groups z_1 ... z_G, feature maps from
coarse to fine, (B, 20, H_i, W_i). Each is a diagonal normal, conditioned on those before it:
    p(z) = prod_i p(z_i | z_<i)        q(z|x) = prod_i q(z_i | z_<i, x)
so KL(q || p) = sum_i E_q[KL_i], with KL_i = KL(q(z_i | z_<i, x) || p(z_i | z_<i)).
`--groups 2 1`, from fine to coarse: groups 3 and 2 at 1/2 of the resolution, group 1 at 1/4:

              encoder (bottom-up)                      decoder (top-down)
    32x32     x -> cells                                     cells -> parameters of p(x|z)
                    v                                          ^
    16x16         cells ------------ feature 3 ------> group 3: h = cells(h), add z_3
                    v                                          ^
    16x16         cells ------------ feature 2 ------> group 2: h = cells(h), add z_2
                    v                                          ^
     8x8          cells ------------ feature 1 ------> group 1: h = a learned constant, add z_1

Sampling draws z_i from p, whose mu and ln sigma the decoder computes from its state h; training
from q: the same mu and ln sigma plus offsets, from h and the feature. Offsets of 0 give KL_i = 0.
    loss = -log p(x|z) + beta sum_i gamma_i KL_i + lambda sum_l s_l        in nats per image
beta rises from 0 to 1 over the first 5 % of the run (KL annealing). Until then gamma_i balances
groups; then it is 1 (kl_loss). s_l: largest singular value of convolution l's weights (Spectral).

Differences from NVAE: p(z_1) is learned, not N(0, I); z_i is added to h, not concatenated; residual
branches are scaled by 0.3, not 0.1; decoder cells are not depthwise, but see --depthwise; there is
no BatchNorm, weight normalisation or flow. The optimisers are Muon with weight decay and Adam.
In another project copy this file alone. It takes uint8 images (N, C, H, W). For grey ones of 64x64:
    net = NVAE((1, 64, 64), groups=(12, 8, 4)).to(device)
    ema, spectral, optimizers = copy.deepcopy(net), Spectral(net), make_optimizers(net)
    lr, beta = 0.02 * warmup_cosine(step, total), min(1, (step + 1) / (0.05 * total))
    training_step(net, spectral, optimizers, batch, lr, beta)  # on a GPU amp=True: bfloat16
    update_ema(ema, net, step)  # after each training_step, step = 0, 1 ... total - 1
    samples = ema.generate(16).sample()
"""

import argparse
import copy
import csv
import functools
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn import functional as F

MIXTURES = 5  # components of p(x|z); NVAE has 10
LATENTS = 20  # channels of each z_i

# ------------------------------------------------------------------------------------------- p(x|z)


def scaled(images):
    """uint8 -> floats: bytes 0 ... 255 evenly over [-1, 1]."""
    if images.dtype != torch.uint8:  # floats in [0, 1] would pass for almost black images
        raise ValueError(f"images must be uint8, 0 to 255, not {images.dtype}")
    return images / 127.5 - 1


def quantise(x):
    """floats -> uint8, the nearest byte; values outside [-1, 1] are clipped."""
    return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


class DMOL:
    """Discretised mixture of logistics for bytes (Salimans et al. 2017, arXiv:1701.05517).

    A pixel has a mixture of M components. In each, a colour has a logistic distribution of mean m
    and scale s; the means of green and blue are linear in the colours before them. A byte v at
    x = v / 127.5 - 1 has the probability of its bin, 2/255 wide. With the sigmoid S it is
        P(v) = S(a) - S(b),      a = (x + 1/255 - m) / s,      b = (x - 1/255 - m) / s
    Far from m both are nearly equal, and rounding spoils the difference. As 1 / S(a) = 1 + exp(-a)
    and S(b) exp(-b) = S(-b), P(v) equals a product whose logarithm is accurate everywhere:
        S(a) S(b) (1/S(b) - 1/S(a)) = S(a) S(b) (exp(-b) - exp(-a)) = S(a) S(-b) (1 - exp(b - a))
    Byte 0 has no lower end, P = S(a), and 255 no upper end, P = S(-b): the 256 P(v) sum to 1.
    """

    def __init__(self, parameters, channels):
        sizes = [1, channels, channels, channels * (channels - 1) // 2]
        parameters = parameters.unflatten(1, (sum(sizes), -1))  # (B, sum(sizes), M, H, W)
        logits, self.means, log_scales, coefficients = parameters.split(sizes, dim=1)
        self.logits = logits[:, 0]  # of the weights, (B, M, H, W); means are (B, C, M, H, W)
        self.log_scales = log_scales.clamp(-7, 7)  # unbounded, s may go to 0 in flat regions
        self.coefficients = torch.tanh(coefficients)  # (B, C (C - 1) / 2, M, H, W)

    def mean(self, k, colours):
        """The means of colour k, (B, M, H, W), given a list of those before it."""
        terms = [self.coefficients[:, k * (k - 1) // 2 + j] * colours[j] for j in range(k)]
        return sum(terms, start=self.means[:, k])

    def log_prob(self, x):
        """log p(x|z), (B,) in nats, of scaled bytes x (B, C, H, W)."""
        x = x[:, :, None]  # (B, C, 1, H, W), against M components
        means = torch.stack([self.mean(k, x.unbind(1)) for k in range(x.shape[1])], dim=1)
        inverse_scales = torch.exp(-self.log_scales)
        far = 1e30  # stands for infinity, with which gradients would be NaN
        upper = (x + 1 / 255).masked_fill(x > 0.999, far)  # byte 254 is at 0.992
        lower = (x - 1 / 255).masked_fill(x < -0.999, -far)
        width = torch.full_like(x, 2 / 255).masked_fill(x.abs() > 0.999, far)
        log_upper = F.logsigmoid((upper - means) * inverse_scales)
        log_lower = F.logsigmoid((means - lower) * inverse_scales)
        log_bin = log_upper + log_lower + torch.log(-torch.expm1(-width * inverse_scales))
        log_component = self.logits.log_softmax(1) + log_bin.sum(1)  # (B, M, H, W)
        return log_component.logsumexp(1).sum((1, 2))

    def sample(self, temperature=1.0):
        """uint8 images (B, C, H, W). The temperature multiplies s, divides logits: 1 is p(x|z)."""
        weights = Categorical(logits=self.logits.movedim(1, -1) / max(temperature, 1e-9))
        component = weights.sample()[:, None, None]  # (B, 1, 1, H, W)
        u = torch.rand_like(self.means).clamp(1e-5, 1 - 1e-5)
        noise = temperature * self.log_scales.exp() * torch.logit(u)  # logistic
        colours = []  # of all components, each (B, M, H, W)
        for k in range(self.means.shape[1]):
            colour = self.mean(k, colours) + noise[:, k]
            colours.append(scaled(quantise(colour)))  # the next mean depends on the rounded value
        return quantise(torch.stack(colours, dim=1).take_along_dim(component, dim=2)[:, :, 0])


# ------------------------------------------------ groups: p(z_i) and q(z_i | x); network and losses


def soft_clamped_normal(parameters):
    """mu and ln sigma, (B, 2 n, H, W) -> normal of (B, n, H, W), |mu| < 5, .016 < sigma < 7.4."""
    # Without bounds the KL may explode; with NVAE's tanh alone, sigma < 149, it still did at times.
    mu, log_sigma = (5 * torch.tanh(part / 5) for part in parameters.chunk(2, dim=1))
    return Normal(mu, log_sigma.clamp(max=2).exp() + 0.01, validate_args=False)


class Group(nn.Module):
    """A group of latent variables in the decoder: its cells, p and q."""

    def __init__(self, cells, channels):
        super().__init__()
        self.cells = nn.Sequential(*cells)
        self.prior = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, 2 * LATENTS, 1))
        self.combine = nn.Conv2d(channels, channels, 1)  # of h, then added to the feature
        self.posterior = nn.Conv2d(channels, 2 * LATENTS, 3, padding=1)  # of q relative to p
        self.merge = nn.Conv2d(LATENTS, channels, 1)  # of z, then added to h
        for weight in [*self.prior.parameters(), *self.posterior.parameters()]:
            nn.init.zeros_(weight)  # at first p = N(0, 1), nearly, and q = p

    def forward(self, h, feature):
        """With an image: z from q. h and feature are (B, channels, H, W). Returns h, (z, q, p)."""
        h = self.cells(h)
        prior = self.prior(h).float()  # mu and ln sigma
        # Residual normal (section 3.2), added before the clamp: an output of 0 costs no KL.
        residual = self.posterior(feature + self.combine(h)).float()
        p = soft_clamped_normal(prior)
        q = soft_clamped_normal(prior + residual)
        z = q.rsample()  # mu + sigma noise: gradients reach mu and sigma
        return h + self.merge(z), (z, q, p)

    def generate(self, h, temperature):
        """Without an image: z from p, with sigma times the temperature. Returns h."""
        h = self.cells(h)
        p = soft_clamped_normal(self.prior(h).float())
        return h + self.merge(torch.normal(p.loc, temperature * p.scale))


class Cell(nn.Module):
    """Residual cell, skip(x) + 0.3 gate body(x): (B, c_in, H, W) -> (B, c_out, H', W').

    resample: "down" halves H and W, "up" doubles them. The body is NVAE's figure 3b; with expansion
    figure 3a, depthwise, on expansion * c_in channels. The gate is squeeze and excitation.
    """

    def __init__(self, c_in, c_out, resample=None, expansion=0):
        super().__init__()
        wide = expansion * c_in
        stride = 2 if resample == "down" else 1
        up = nn.Upsample(scale_factor=2) if resample == "up" else nn.Identity()
        layers = [nn.SiLU(), nn.Conv2d(c_in, c_out, 3, stride, padding=1), up]
        layers += [nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1)]
        if expansion > 0:
            layers = [nn.Conv2d(c_in, wide, 1), nn.SiLU(), up]
            layers += [nn.Conv2d(wide, wide, 5, stride, padding=2, groups=wide), nn.SiLU()]
            layers.append(nn.Conv2d(wide, c_out, 1))
        self.body = nn.Sequential(*layers)
        self.skip = nn.Identity()
        if resample == "down":
            self.skip = nn.Sequential(nn.SiLU(), nn.Conv2d(c_in, c_out, 2, stride=2))
        if resample == "up":
            smooth = nn.Upsample(scale_factor=2, mode="bilinear")
            self.skip = nn.Sequential(nn.Conv2d(c_in, c_out, 1), smooth)
        n = max(c_out // 16, 4)
        self.gate = nn.Sequential(nn.Linear(c_out, n), nn.ReLU(), nn.Linear(n, c_out), nn.Sigmoid())

    def forward(self, x):
        h = self.body(x)
        return self.skip(x) + 0.3 * h * self.gate(h.mean((2, 3)))[:, :, None, None]


class NVAE(nn.Module):
    """Encoder and decoder for images (C, H, W), with H and W multiples of 2^len(groups).

    Level i = 0, 1 ... has 1 / 2^i of the resolution, width * mults[i] channels (the last of mults
    repeats) and, if i > 0, groups[i - 1] groups. With `--groups 2 1` the encoder's stages are
    [cell, down, cell], [cell], [down, cell]; the decoder's [], [up, cell], [cell] and [up, cell].
    """

    def __init__(self, shape, width=64, mults=(1, 2, 2), groups=(12, 8), depthwise=False):
        super().__init__()
        widths = [width * mults[min(level, len(mults) - 1)] for level in range(len(groups) + 1)]
        self.stem = nn.Conv2d(shape[0], width * mults[0], 3, padding=1)
        self.encoder = nn.ModuleList()  # for each group, from fine to coarse, the layers up to it
        stage = [Cell(widths[0], widths[0])]
        for level, count in enumerate(groups, start=1):
            stage.append(Cell(widths[level - 1], widths[level], "down"))
            for _ in range(count):
                stage.append(Cell(widths[level], widths[level]))
                self.encoder.append(nn.Sequential(*stage))
                stage = []  # of the next group
        H, W = (side // 2 ** len(groups) for side in shape[1:])
        self.start = nn.Parameter(torch.randn(1, widths[-1], H, W))
        self.groups = nn.ModuleList()  # from coarse to fine
        alpha = []  # for kl_loss, of each group: pixels at its level / number of groups there
        stage = []  # the cells before the next group; after the last group, those of the tail
        for level in range(len(groups), 0, -1):
            c = widths[level]
            for _ in range(groups[level - 1]):
                if len(self.groups) > 0:  # before the first group, h is a constant
                    stage.append(Cell(c, c, None, 6 * depthwise))
                self.groups.append(Group(stage, c))
                alpha.append(math.prod(shape[1:]) / 4**level / groups[level - 1])
                stage = []
            stage.append(Cell(c, widths[level - 1], "up", 6 * depthwise))
        stage.append(Cell(widths[0], widths[0], None, 6 * depthwise))
        self.tail = nn.Sequential(*stage, nn.SiLU())
        size = 1 + 2 * shape[0] + shape[0] * (shape[0] - 1) // 2  # see DMOL
        self.head = nn.Conv2d(widths[0], MIXTURES * size, 3, padding=1)
        self.register_buffer("alpha", torch.tensor(alpha))
        self.to(memory_format=torch.channels_last)  # faster convolutions

    def encode(self, x):
        """x (B, C, H, W) in [-1, 1] -> a feature for each group, from coarse to fine."""
        features = []
        h = self.stem(x)
        for stage in self.encoder:
            h = stage(h)
            features.append(h)
        return features[::-1]  # from the coarsest, for group 1, to the finest

    def decode(self, features):
        """z from q, given the features of images -> p(x|z), and (z, q, p) of each group."""
        draws = []
        h = self.start.expand(len(features[0]), -1, -1, -1)
        for group, feature in zip(self.groups, features, strict=True):
            h, draw = group(h, feature)
            draws.append(draw)
        return DMOL(self.head(self.tail(h)).float(), self.stem.in_channels), draws

    @torch.no_grad()
    def generate(self, count, temperature=1.0, shared=0):
        """z from p -> p(x|z) of `count` images, which have z_1 ... z_shared in common."""
        h = self.start
        for i, group in enumerate(self.groups):
            h = group.generate(h.expand(1 if i < shared else count, -1, -1, -1), temperature)
        return DMOL(self.head(self.tail(h)).float(), self.stem.in_channels)


def bits_per_dim(nats, images):
    """Nats per image -> bits per dimension, for images (N, C, H, W) of C H W dimensions."""
    return nats / (images[0].numel() * math.log(2))


def elbo_terms(net, x):
    """(B, 1 + G) in nats: -log p(x|z), then the KL of each group. Their sum estimates -ELBO."""
    likelihood, draws = net.decode(net.encode(x))
    # KL(q || p) = log(sigma_p / sigma_q) + (sigma_q^2 + (mu_q - mu_p)^2) / (2 sigma_p^2) - 1/2
    kl = [kl_divergence(q, p).sum((1, 2, 3)) for _, q, p in draws]
    return torch.stack([-likelihood.log_prob(x), *kl], dim=1)


@torch.no_grad()
def iw_bound(net, x, K):
    """Importance-weighted bound of log p(x), (B,) in nats (Burda et al. 2016, arXiv:1509.00519).

    log p(x) >= E[log(sum_k w_k / K)], w_k = p(x|z) p(z) / q(z|x) for the k-th of K draws z from q.
    K = 1 estimates the ELBO; with K the bound rises, towards log p(x). evaluate() prints minus it.
    """
    features = net.encode(x)
    log_w = []
    for _ in range(K):
        likelihood, draws = net.decode(features)
        log_ratio = sum((q.log_prob(z) - p.log_prob(z)).sum((1, 2, 3)) for z, q, p in draws)
        log_w.append(likelihood.log_prob(x) - log_ratio)
    return torch.stack(log_w).logsumexp(0) - math.log(K)


def kl_loss(kl, beta, alpha):
    """beta sum_i gamma_i KL_i, with KL_i the mean over images of kl (B, G).

    In posterior collapse groups end with q = p. Against it KL annealing starts with a small beta,
    and KL balancing (appendix A) weighs groups of little KL least. Both end when beta is 1.
        gamma_i = r_i / mean(r),  r_i = KL_i / alpha_i,  alpha_i = pixels / groups of the level
    """
    beta = torch.as_tensor(beta, device=kl.device)
    gamma = (kl.detach().mean(0) + 0.01) / alpha  # r; 0.01, as a KL may be 0
    gamma = torch.where(beta < 1, gamma / gamma.mean(), 1.0)
    return beta * (gamma * kl.mean(0)).sum()


class Spectral(nn.Module):
    """lambda sum_l s_l, s_l = u^T W v: the largest singular value of convolution l (section 3.2).

    s_l bounds how much layer l amplifies a change of a patch; if all amplify, the KL of an outlier
    explodes. W is a convolution as a matrix (C_out, C_in k k). As W changes little in a step, one
    power iteration from the last u, a buffer, is enough: v = W^T u, u = W v, both normalised.
    """

    def __init__(self, net, weight=1e-2):
        super().__init__()
        self.weight = weight  # lambda
        self.stacks = {}  # {shape: convolutions}; those of a shape are computed together
        for layer in [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]:
            shape = f"{layer.out_channels}x{layer.weight[0].numel()}"
            self.stacks.setdefault(shape, []).append(layer)
        for shape, layers in self.stacks.items():
            u = torch.randn(len(layers), layers[0].out_channels, 1)
            self.register_buffer(shape, u.to(layers[0].weight.device))
        self(iterations=40)

    def forward(self, iterations=1):
        total = 0.0
        for shape, layers in self.stacks.items():
            W = torch.stack([layer.weight.flatten(1) for layer in layers])  # (L, rows, columns)
            u = getattr(self, shape)  # (L, rows, 1)
            with torch.no_grad():
                for _ in range(iterations):
                    v = F.normalize(W.mT @ u, dim=1)
                    u.copy_(F.normalize(W @ v + 1e-9 * u, dim=1))  # while W is 0, u stays
            total = total + (u.clone() * (W @ v)).sum()  # a copy, as the next call changes u
        return self.weight * total


# ----------------------------------------------------------------------------------------- training


def training_step(net, spectral, optimizers, images, lr, beta=1.0, amp=False):
    """One step on uint8 images (B, C, H, W) -> (3,) in bits/dim: -log p(x|z), KL, spectral term."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):  # losses stay float32
        terms = elbo_terms(net, scaled(images))
    nll = terms[:, 0].mean()
    kl = terms[:, 1:]
    regulariser = spectral()
    net.zero_grad()
    (nll + kl_loss(kl, beta, net.alpha) + regulariser).backward()
    # Usual norms are 10 to 40 per dimension; a rare 500 would dominate Muon's momentum for long.
    nn.utils.clip_grad_norm_(net.parameters(), 30 * images[0].numel())
    # Muon's steps do not shrink near a minimum: without decay weights grew, and the KL exploded.
    torch._foreach_mul_([w.data for w in optimizers[0].param_groups[0]["params"]], 1 - 0.01 * lr)
    for optimizer, factor in zip(optimizers, (1, 0.1), strict=True):
        optimizer.param_groups[0]["lr"] = factor * lr
        optimizer.step()
    return bits_per_dim(torch.stack([nll, kl.sum(1).mean(), regulariser]).detach(), images)


def orthogonalise(x, iterations=5):
    """U V^T, nearly, of matrices x = U S V^T (N, rows, columns): singular values become about 1.

    Newton-Schulz: x <- P x, P = a I + b x x^T + c (x x^T)^2 keeps U and V and maps a singular value
    s to a s + b s^3 + c s^5. Five iterations bring all of [0.01, 1] into [0.68, 1.14].
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT, iterations).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # now no singular value is above 1
    xxt = x @ x.mT
    product = identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        p = 3.4445 * identity - 4.7750 * xxt + 2.0315 * xxt @ xxt
        product = p @ product
        xxt = p @ xxt @ p  # of the next x, which is p @ x
    return product @ x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for the weight matrices inside a network.

    Few singular values of a gradient are large; those of its update are all about 1 (K. Jordan et
    al. 2024, kellerjordan.github.io/posts/muon). A convolution is a matrix (C_out, C_in k k) here.
    """

    def __init__(self, weights, lr, momentum=0.9):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        by_shape = {}  # weights of one shape go together: fewer, larger products
        for w in group["params"]:
            by_shape.setdefault(w.shape, []).append(w)
        for weights in by_shape.values():
            gradients = torch.stack([w.grad.flatten(1) for w in weights])
            average = self.state[weights[0]].setdefault("average", torch.zeros_like(gradients))
            average.lerp_(gradients, 1 - group["momentum"])
            updates = orthogonalise(gradients.lerp(average, group["momentum"]))  # Nesterov
            # The rows of a tall matrix come out shorter than 1; this makes up for it.
            updates *= group["lr"] * max(1, updates.shape[1] / updates.shape[2]) ** 0.5
            for w, update in zip(weights, updates, strict=True):
                w.sub_(update.view_as(w))


def make_optimizers(net, lr=0.02):
    """Muon for dense convolutions between stem and head, Adam at lr / 10 for all other weights."""
    inside = nn.ModuleList([net.encoder, net.groups, net.tail]).modules()
    hidden = [x.weight for x in inside if isinstance(x, nn.Conv2d) and x.groups == 1]
    rest = [weight for weight in net.parameters() if all(weight is not w for w in hidden)]
    return Muon(hidden, lr, momentum=0.95), torch.optim.Adam(rest, lr / 10, fused=True)


def warmup_cosine(step, total):
    """Share of the peak learning rate: warm-up over 5 % of the steps (at most 500), cosine to 0."""
    warmup = min(500, max(1, total // 20))
    return min((step + 1) / warmup, (1 + math.cos(math.pi * step / total)) / 2)


@torch.no_grad()
def update_ema(ema, net, step):
    """Exponential moving average of the weights; its half-life is 5 % of the steps so far."""
    decay = 0.5 ** (1 / (0.05 * (step + 1)))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def can_compile(device):
    """Whether torch.compile works here: it needs a C compiler and, on CUDA, Triton."""
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
        return True
    except Exception as error:
        print(f"torch.compile does not work here, going on without it: {type(error).__name__}")
        return False


class RecordedStep:
    """step(batch, *numbers) on CUDA: the fourth call is captured as a CUDA graph, then replayed.

    A replay launches a step's thousand kernels at once. It overwrites the results of the last call.
    """

    def __init__(self, step):
        self.step = step
        self.calls = 0
        self.stream = torch.cuda.Stream()  # calls before recording must run on a side stream

    def __call__(self, *arguments):
        arguments = [torch.as_tensor(given) for given in arguments]
        if self.calls == 0:
            self.inputs = [given.to(arguments[0].device, copy=True) for given in arguments]
        for ours, given in zip(self.inputs, arguments, strict=True):
            ours.copy_(given)
        self.calls += 1
        if self.calls < 4:  # compilation and other first-time work cannot be recorded
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.step(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.calls == 4:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.step(*self.inputs)
        self.graph.replay()
        return self.outputs


def train(args):
    """Train from scratch or, with --resume, from the last save on; args as from parse().

    checkpoint.pt is saved every ten minutes and epoch; Ctrl-C, a kill or NaN leave the last save.
    Each step is seeded by (seed, step), batches by (seed, epoch): on a CPU runs resume bit for bit.
    """
    from tqdm import tqdm
    from common import batches, load

    if args.device == "cpu" and not args.small:
        print("no GPU: the default network is for one; --small is for a CPU")
    images, test = (split.to(args.device) for split in load(args.data, args.subset))
    flip = args.data == "cifar10" if args.flip is None else args.flip
    Path(args.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    new = {"step": 0, "seconds": 0.0, "losses": [], "rows": []}
    new["network"] = {"shape": list(images.shape[1:]), **{f: getattr(args, f) for f in SIZE}}
    state = args.checkpoint or new
    net = NVAE(**state["network"]).to(args.device)
    ema = copy.deepcopy(net).requires_grad_(False)
    spectral = Spectral(net)
    muon, adam = make_optimizers(net)
    parts = {"net": net, "ema": ema, "spectral": spectral, "muon": muon, "adam": adam}
    for name in parts if args.resume else ():
        parts[name].load_state_dict(state[name])
    step = functools.partial(training_step, net, spectral, (muon, adam), amp=args.amp)
    if args.compile and can_compile(args.device):
        torch._dynamo.config.recompile_limit = 64  # more kinds of cells than the default
        for cell in [layer for layer in net.modules() if isinstance(layer, Cell)]:
            cell.compile()  # one by one: the whole network would take long
    recorded = args.compile and args.device.startswith("cuda")
    adam.param_groups[0]["capturable"] = recorded  # else Adam cannot be recorded
    step = RecordedStep(step) if recorded else step
    steps = len(images) // args.batch_size  # per epoch
    total = args.epochs * steps
    start = time.time() - state["seconds"]
    end = state["seconds"] + 60 * args.time_limit
    save_at = min(end, state["seconds"] + 600)
    for epoch in range(len(state["rows"]), args.epochs):
        done = state["step"] - epoch * steps
        data = batches(images, args.batch_size, args.seed, epoch, done, flip)
        for batch in tqdm(data, f"epoch {epoch + 1}", steps, initial=done, disable=None):
            torch.manual_seed(1_000_003 * args.seed + state["step"] + 1)
            lr = args.lr * warmup_cosine(state["step"], total)
            beta = min(1.0, (state["step"] + 1) / max(1, 0.05 * total))
            state["losses"].append(step(batch, lr, beta).clone())  # the next step overwrites it
            update_ema(ema, net, state["step"])
            state["step"] += 1
            state["seconds"] = time.time() - start
            if state["seconds"] > save_at:
                save(args, state, parts)
                save_at = min(end, state["seconds"] + 600)
                if state["seconds"] > end:
                    print(f"time limit: step {state['step']} of {total} is saved, --resume goes on")
                    return
        save(args, state, parts)  # if the next line is interrupted, --resume repeats it
        finish_epoch(args, state, ema, test)


def save(args, state, parts):
    """Write checkpoint.tmp, then rename it: a kill leaves checkpoint.pt whole. NaN ends the run."""
    if not nn.utils.get_total_norm([*parts["net"].parameters(), *state["losses"]]).isfinite():
        sys.exit(f"step {state['step']} is not finite: lower --lr and --resume, or start anew")
    flags = {f: value for f, value in vars(args).items() if f not in [*NOT_SAVED, "checkpoint"]}
    path = Path(args.out, "checkpoint.pt")
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, **states, "args": flags}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


@torch.no_grad()
def finish_epoch(args, state, ema, test):
    """Test the EMA of the weights, write log.csv and curves.png, draw samples now and then."""
    from matplotlib.figure import Figure
    from common import save_grid

    torch.manual_seed(0)  # the same noise each time, so that epochs compare
    parts = [elbo_terms(ema, scaled(x)).sum(1) for x in test[:1000].split(args.batch_size)]
    test_loss = bits_per_dim(torch.cat(parts), test).mean().item()
    nll, kl, regulariser = torch.stack(state["losses"]).mean(0).tolist()
    row = {"epoch": len(state["rows"]) + 1, "seconds": state["seconds"], "train loss": nll + kl}
    row |= {"test loss": test_loss, "reconstruction": nll, "kl": kl, "regulariser": regulariser}
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    rows = [*state["rows"], row]
    state.update(rows=rows, losses=[])
    with open(Path(args.out, "log.csv"), "w", newline="") as file:
        csv.writer(file).writerows([list(row), *(each.values() for each in rows)])
    axes = Figure().add_subplot(xlabel="epoch")
    for name in "train loss", "test loss":
        axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=name)
    axes.legend()
    axes.figure.savefig(Path(args.out, "curves.png"))
    if len(rows) % args.sample_every == 0 or len(rows) == args.epochs:
        save_grid(sample(args, ema, 64), Path(args.out, f"samples_{len(rows):04d}.png"))


def sample(args, net, count, shared=0):
    """`count` uint8 images, of the model if both temperatures are 1; z_1 ... z_shared in common."""
    torch.manual_seed(args.seed)
    size = min(count, max(8, args.batch_size))
    draws = (net.generate(size, args.temperature, shared) for _ in range(0, count, size))
    return torch.cat([p.sample(args.pixel_temperature) for p in draws])[:count]


@torch.no_grad()
def evaluate(args, net):
    """--evaluate: minus ELBO, minus IW bound (both >= -log p(x)) in bits/dim; two pictures."""
    from common import load, save_grid

    torch.backends.cudnn.allow_tf32 = False  # too coarse for a likelihood
    torch.manual_seed(args.seed)
    test = load(args.data)[1].to(args.device)
    parts = [elbo_terms(net, scaled(x)) for x in test.split(args.batch_size)]
    terms = bits_per_dim(torch.cat(parts), test)
    print("bits/dim: -log p(x|z), KL of each group:", *(f"{bits:.4f}" for bits in terms.mean(0)))
    chosen = torch.randperm(len(test))[:1000]
    few = test[chosen]
    iw = [iw_bound(net, scaled(x), args.iw_samples) for x in few.split(args.batch_size)]
    bounds = {"minus ELBO": terms.sum(1), "minus ELBO, fewer images": terms[chosen].sum(1)}
    bounds[f"minus IW bound, K = {args.iw_samples}"] = -bits_per_dim(torch.cat(iw), few)
    for name, bits in bounds.items():
        error = bits.std() / len(bits) ** 0.5
        print(f"{name}: {bits.mean():.4f} bits/dim, standard error {error:.4f}, {len(bits)} images")
    likelihood, _ = net.decode(net.encode(scaled(few[:32])))  # z from q
    pairs = torch.stack([few[:32], likelihood.sample(args.pixel_temperature)], dim=1)
    save_grid(pairs.flatten(0, 1), Path(args.out, "reconstructions.png"))
    rows = [sample(args, net, 8, shared=k) for k in range(len(net.groups))]  # share z_1 ... z_k
    save_grid(torch.cat(rows), Path(args.out, "hierarchy.png"))


# ------------------------------------------------------------------------------------- command line

SIZE = ["width", "mults", "groups", "depthwise"]  # arguments of NVAE
FIXED = [*SIZE, "data", "batch_size", "subset", "flip", "seed"]  # --resume must not change these
NOT_SAVED = ["device", "amp", "compile", "out", "resume", "time_limit", "generate", "evaluate"]
SMALL = {"width": 24, "groups": [3, 2, 1], "batch_size": 8, "epochs": 8, "subset": 15000}


def make_parser():
    """All flags."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("--data", default="cifar10", help="cifar10, shapes, a folder of images or an .npz file")
    add("--subset", type=int, default=0, help="train on at most this many images, 0 for all")
    add("--flip", action=switch, help="mirror half of the images; if not given, cifar10's only")
    add("--epochs", type=int, default=50, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images per step, also in sampling")
    add("--lr", type=float, default=0.02, help="peak learning rate of Muon; Adam has a tenth")
    add("--width", type=int, default=64, help="channels at full resolution")
    add("--mults", type=int, nargs="+", default=[1, 2, 2], help="of width, at 1, 1/2, 1/4 ...")
    add("--groups", type=int, nargs="+", default=[12, 8], help="of latents, at 1/2, 1/4 ...")
    add("--depthwise", action="store_true", help="decoder cells as in the paper")
    add("--small", action="store_true", help="defaults for a CPU: a small network, a short run")
    add("--seed", type=int, default=0, help="of weights, order of images and noise")
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda or mps")
    add("--amp", action=switch, default=bf16, help="bfloat16 inside the network")
    add("--compile", action=switch, default=cuda, help="torch.compile each cell")
    add("--out", default="runs/nvae", type=os.path.expanduser, help="folder of the run")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--time-limit", type=float, default=math.inf, metavar="MINUTES", help="save and end then")
    add("--sample-every", type=int, default=5, metavar="EPOCHS", help="draw samples that often")
    add("--generate", type=int, metavar="N", help="draw N samples as PNG files, do not train")
    add("--evaluate", action="store_true", help="measure bits/dim, do not train")
    add("--temperature", type=float, default=1.0, help="of p(z); with both at 1 exact draws")
    add("--pixel-temperature", type=float, default=0.5, help="of p(x|z); below 1 smoother")
    add("--iw-samples", type=int, default=20, metavar="K", help="of the importance-weighted bound")
    parser.set_defaults(checkpoint=None)
    return parser


def parse(argv=None):
    """The flags; those not given are as in the checkpoint in --out, or as --small wants."""
    parser = make_parser()
    args = parser.parse_args(argv)  # for --out and --small, which decide the defaults
    numbers = [args.epochs, args.batch_size, args.lr, args.sample_every, args.generate]
    if any(number is not None and number <= 0 for number in numbers):
        sys.exit("--epochs, --batch-size, --lr, --sample-every and --generate must be above 0")
    parser.set_defaults(**(SMALL if args.small else {}))
    path = Path(args.out, "checkpoint.pt")
    if args.resume or args.generate or args.evaluate:
        if not path.exists():
            sys.exit(f"no {path}: train first, or name the folder of a run with --out")
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        assert checkpoint["args"].keys() <= vars(args).keys(), f"{path}: another script or version"
        parser.set_defaults(checkpoint=checkpoint, **checkpoint["args"])
    elif path.exists():
        sys.exit(f"{path} exists: go on with --resume, or name another folder with --out")
    args = parser.parse_args(argv)
    for flag in FIXED if args.resume else ():
        if getattr(args, flag) != checkpoint["args"][flag]:
            sys.exit(f"{path} is of a run with another --{flag.replace('_', '-')}: leave that out")
    return args


def main(argv=None):
    """Train, or use a trained model, as the command line says."""
    args = parse(argv)
    if not (args.generate or args.evaluate):
        train(args)
        return
    net = NVAE(**args.checkpoint["network"]).to(args.device)
    net.load_state_dict(args.checkpoint["ema"])
    if args.generate:
        from common import export, save_grid

        images = sample(args, net, args.generate)
        export(images, Path(args.out, "generated"))
        save_grid(images[:64], Path(args.out, "generated.png"))
    if args.evaluate:
        evaluate(args, net)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on with training from the last save, if any")
    except (AssertionError, ImportError, OSError, RuntimeError) as error:  # such as a full disk
        sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])
