"""NCSN, a noise conditional score network (a diffusion model), for images.

    python ncsn.py --epochs 50                           train on CIFAR-10, results in runs/ncsn
    python ncsn.py --small --data shapes --out shapes    the same on a CPU, in minutes
    python ncsn.py --generate 1000 --guidance 1.8        draw samples with the trained weights
    python ncsn.py --evaluate                            loss by noise level, bits/dim

The score of a density p is grad_x log p(x), the direction in which p grows fastest. With it alone
one can draw samples: Langevin dynamics takes small steps along the score, with a little noise. But
most of pixel space has no images to learn the score from. Song & Ermon (2019, arXiv:1907.05600;
2020, arXiv:2006.09011) add Gaussian noise of many levels sigma, learn the scores of all the noisy
densities with one network, conditioned on sigma, and follow them while sigma falls to nearly 0.

    x      clean images, (B, C, H, W), pixels in [-1, 1];  z: standard normal noise of that shape
    sigma  noise level, the standard deviation of the noise: a number, or (B,)
    y      noisy images, y = x + sigma z; their density is p_sigma
    D      the denoiser, a network: D(y, sigma) estimates x

Denoising score matching (Vincent 2011) minimises the mean of |D(y, sigma) - x|^2, weighted, over
x, z and sigma. The best D is the posterior mean E[x | y]; by Tweedie's formula it gives the score:
    score(y, sigma) = grad_y log p_sigma(y) = (E[x | y] - y) / sigma^2
Proof: p_sigma(y) = E_x[N(y; x, sigma^2 I)], and grad_y N = N (x - y) / sigma^2. Divide by p_sigma:
by Bayes' rule N / p_sigma is the posterior weight of x, which leaves E[x - y | y] / sigma^2.

Preconditioning, continuous sigma and U-Net follow EDM (Karras et al. 2022, arXiv:2206.00364).
In another project copy this file alone. Other images, such as grey ones of 64x64, need no changes:
    net = Denoiser(**measure(images)).to(device)  # uint8 (N, C, H, W); H and W multiples of 4
    ema, optimizers = copy.deepcopy(net), make_optimizers(net)
    training_step(net, optimizers, batch, lr=0.02 * warmup_cosine(step, total))
    update_ema(ema, net, step)  # after each training_step, step = 0, 1 ... total - 1
    samples = quantise(dpm_solver(ema.score, z, net.sigma_max))
"""

import argparse
import copy
import csv
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

# --------------------------------------------------------------------------- denoiser and its loss


def dequantise(images):
    """uint8 -> floats in [-1, 1): a byte becomes a uniform draw from its bin, 2/256 wide."""
    if images.dtype != torch.uint8:  # floats in [0, 1] would pass for almost black images
        raise ValueError(f"images must be uint8, 0 to 255, not {images.dtype}")
    u = torch.rand(images.shape, device=images.device) * (1 - 2**-16)  # 255 + u must not round up
    return (images + u) / 128 - 1


def quantise(x):
    """floats -> uint8, the inverse of dequantise(); values outside [-1, 1] are clipped."""
    return ((x + 1) * 128).clamp(0, 255).to(torch.uint8)


SIGMA_MIN = 2 / 256 / math.sqrt(12)  # 0.0023, the std of dequantise()'s noise; NCSN: 0.02


def measure(images):
    """The arguments of Denoiser that depend on the uint8 images (N, C, H, W).

    sigma_data: root mean square of the pixels. sigma_max: the largest distance between two images
    or the largest norm, if larger. Such noise hides which image it was (2020, technique 1).
    """
    x = dequantise(images[:: max(1, len(images) // 5000)]).flatten(1)  # fewer than 10,000 of all
    sigma_data = x.square().mean().sqrt().item()
    sigma_max = max(torch.cdist(x, x).max(), x.norm(dim=1).max()).item()
    return {"shape": list(images.shape[1:]), "sigma_data": sigma_data, "sigma_max": sigma_max}


class Denoiser(nn.Module):
    """D(y, sigma), and the score that follows from it; **unet are arguments of UNet.

    EDM's preconditioning scales inputs and targets of a network, unet, to mean square 1:
        D(y, sigma) = c_skip y + c_out unet(c_in y, ln sigma)
    y has mean square sigma^2 + sigma_data^2, hence c_in. c_skip y is the multiple of y nearest to
    x. The rest, x - c_skip y, has mean square c_out^2, so that unet's target has mean square 1.
    """

    def __init__(self, shape, sigma_data, sigma_max, amp=False, **unet):
        super().__init__()
        self.shape = shape  # (C, H, W)
        self.sigma_data = sigma_data
        self.sigma_max = sigma_max
        self.amp = amp  # bfloat16 in unet alone, whose rounding errors c_out scales down
        self.unet = UNet(shape[0], **unet).to(memory_format=torch.channels_last)

    def forward(self, y, sigma):
        """y (B, C, H, W), sigma a number or (B,) -> estimate of x, shaped like y."""
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))
        s = sigma.view(-1, 1, 1, 1)
        mean_square = s**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / mean_square
        c_out = s * self.sigma_data / mean_square.sqrt()
        c_in = 1 / mean_square.sqrt()
        with torch.autocast(y.device.type, torch.bfloat16, enabled=self.amp):
            f = self.unet(c_in * y, sigma.log()).to(y.dtype)
        return c_skip * y + c_out * f

    def score(self, y, sigma):
        """grad_y log p_sigma(y) by Tweedie's formula, shaped like y; sigma is a number."""
        return (self(y, sigma) - y) / sigma**2


def sample_sigma(net, x):
    """Stratified noise levels (B,) for images x (B, ...): ln sigma is logistic (EDM: normal).

    Half are 0.28 to 1.3 sigma_data, where shapes form: less noise hides only texture, more hides
    all but colours. The ends are SIGMA_MIN (dequantise()'s noise) and sigma_max (see measure()).
    """
    u = (torch.randperm(len(x), device=x.device) + torch.rand(len(x), device=x.device)) / len(x)
    sigma = 0.6 * net.sigma_data * torch.exp(0.7 * torch.logit(u))
    return sigma.clamp(SIGMA_MIN, net.sigma_max)


def denoising_loss(net, x, sigma):
    """|D(x + sigma z, sigma) - x|^2 / c_out^2, the mean over pixels, (B,), for x (B, C, H, W).

    This is unet's squared error: 1 on average before training, as targets have mean square 1.
    """
    y = x + sigma.view(-1, 1, 1, 1) * torch.randn_like(x)
    weight = 1 / sigma**2 + 1 / net.sigma_data**2  # = 1 / c_out^2
    return weight * (net(y, sigma) - x).square().mean((1, 2, 3))


# ---------------------- samplers, from y = sigma_max z to D(y, SIGMA_MIN), by any score(y, number)


@torch.no_grad()
def dpm_solver(score, z, sigma_max, count=12, rho=7):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095) for the probability flow ODE.

    The ODE is dy/dsigma = -sigma score(y, sigma) = (y - D) / sigma. If y has density p_sigma at the
    start, its density is p_sigma at every smaller sigma, too (Song et al. 2021, arXiv:2011.13456).
    Were D constant from s down to t, y <- (t/s) y + (1 - t/s) D, a step of DDIM, would be exact. As
    it changes, take D at mid-step instead, by a line through the last two D over ln sigma:
        D_mid = D + (D - D_before) / (2 r),      r = ln(s_before / s) / ln(s / t)
    Errors fall as 1 / count^2. 12 calls, for speed, make the std of Gaussian data 10 to 14 % large.
    """
    ends = sigma_max ** (1 / rho), SIGMA_MIN ** (1 / rho)  # EDM, equation 5: dense at the small end
    levels = (torch.linspace(*ends, count, dtype=torch.float64) ** rho).tolist()
    y = D_before = sigma_max * z  # the first D_before does not matter
    for s_before, s, t in zip([math.inf, *levels], levels, levels[1:], strict=False):
        D = y + s**2 * score(y, s)
        r = math.log(s_before / s) / math.log(s / t)  # infinite at first: D_mid = D
        y = (t / s) * y + (1 - t / s) * (D + (D - D_before) / (2 * r))
        D_before = D
    return y + SIGMA_MIN**2 * score(y, SIGMA_MIN)


@torch.no_grad()
def langevin(score, z, sigma_max):
    """Annealed Langevin dynamics (NCSN), n steps at each of `count` levels.

        y <- y + h sigma^2 score(y, sigma) + sqrt(h (2 - h)) sigma z        (papers: sqrt(2 h))
    Noise: where y is mostly noise, score = -y / sigma^2, and the first two terms are (1 - h) y. The
    variance of y stays sigma^2, as (1 - h)^2 + h (2 - h) = 1.
    Levels (2020, technique 2): |sigma z| is nearly N(sqrt(dim) sigma, sigma^2 / 2), dim = C H W.
    Neighbours still overlap with means three standard deviations apart. So sigma falls by
        gamma = sqrt(dim) / (sqrt(dim) - 3 / sqrt(2))      (CIFAR-10: 1.04, 277 levels)
    Step size: as sigma falls, y lags: its variance is a fraction ln(gamma) / (n h) too large. Where
    images vary more than noise, h makes it h / 2 too small. h^2 = 2 ln(gamma) / n cancels both.
    """
    root = math.sqrt(2 * z[0].numel())
    ln_gamma = math.log(root / (root - 3) if root > 4.5 else 3)  # in few dimensions any gamma does
    count = max(2, math.ceil(math.log(sigma_max / SIGMA_MIN) / ln_gamma) + 1)
    n = max(1, round(50 * ln_gamma))  # so that h is about 0.2 (CIFAR-10: n = 2)
    h = math.sqrt(2 * ln_gamma / n)
    y = sigma_max * z
    for sigma in torch.logspace(math.log10(sigma_max), math.log10(SIGMA_MIN), count).tolist():
        for _ in range(n):
            noise = math.sqrt(h * (2 - h)) * sigma * torch.randn_like(y)
            y = y + h * sigma**2 * score(y, sigma) + noise
    return y + SIGMA_MIN**2 * score(y, SIGMA_MIN)


def autoguided(score, guide_score, guidance):
    """Autoguidance (Karras et al. 2024, arXiv:2406.02507): extrapolate away from a worse score."""
    return lambda y, sigma: torch.lerp(guide_score(y, sigma), score(y, sigma), guidance)


def ideal_score(images):
    """The score that minimises the loss on uint8 images (N, C, H, W), taken as middles of bins.

    E[x | y] is their mean with the weights softmax(-|y - x_i|^2 / (2 sigma^2)), and samples are
    copies of them: a network draws new images because it falls short of this minimum.
    """
    x = ((images + 0.5) / 128 - 1).flatten(1)

    def score(y, sigma):
        weights = ((y.flatten(1) @ x.T - x.square().sum(1) / 2) / sigma**2).softmax(1)  # (B, N)
        return ((weights @ x).view_as(y) - y) / sigma**2

    return score


# -------------------------------------------------------------------------------------------- U-Net


class Block(nn.Module):
    """Residual block (B, in_channels, H, W) -> (B, out_channels, H, W), conditioned on sigma."""

    def __init__(self, in_channels, out_channels, embedding_size):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(embedding_size, 2 * out_channels)
        self.norm2 = nn.GroupNorm(1, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)  # at first the residual branch adds nothing
        changes = in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))  # adaptive group norm
        return (self.skip(x) + h) / math.sqrt(2)  # else it would grow with depth


class UNet(nn.Module):
    """The network inside the denoiser, without attention: x (B, C, H, W), ln sigma (B,) -> like x.

    At resolution i (0 is full, 1 is half) are `blocks` blocks of width * mults[i] channels on the
    way down, and again on the way up. H and W must be multiples of 2^(len(mults) - 1), width even.
    """

    def __init__(self, channels=3, width=128, mults=(1, 2, 2), blocks=3):
        super().__init__()
        # Sines and cosines of ln sigma, which is in [-6, 5]: there the slowest is nearly linear.
        self.register_buffer("frequencies", torch.logspace(-1.5, 0.5, width // 2))
        E = 4 * width  # size of the embedding of sigma
        self.embed = nn.Sequential(nn.Linear(width, E), nn.SiLU(), nn.Linear(E, E), nn.SiLU())
        self.blocks = blocks
        widths = [width * mult for mult in mults for _ in range(blocks)]  # of the blocks
        c = width * mults[0]  # channels of h in forward()
        self.stem = nn.Conv2d(channels, c, 3, padding=1)
        self.down = nn.ModuleList()
        for w in widths:
            self.down.append(Block(c, w, E))
            c = w
        self.middle = Block(c, c, E)
        self.up = nn.ModuleList()
        for w in reversed(widths):  # each also sees the output of its counterpart in `down`
            self.up.append(Block(c + w, w, E))
            c = w
        self.norm = nn.GroupNorm(1, c)
        self.out = nn.Conv2d(c, channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.out.weight)  # so the output starts at 0

    def forward(self, x, ln_sigma):
        angles = ln_sigma[:, None] * self.frequencies
        embedding = self.embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        h = self.stem(x)
        skips = []
        for i, block in enumerate(self.down):
            if i > 0 and i % self.blocks == 0:
                h = F.avg_pool2d(h, 2)
            h = block(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for i, block in enumerate(self.up):
            if i > 0 and i % self.blocks == 0:
                h = F.interpolate(h, scale_factor=2.0)
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(F.silu(self.norm(h)))


# ----------------------------------------------------------------------------------------- training


def training_step(net, optimizers, images, lr):
    """One step on uint8 images (B, C, H, W) with learning rate lr. Returns the loss, ()."""
    x = dequantise(images)
    loss = denoising_loss(net, x, sample_sigma(net, x)).mean()
    net.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # or rare outliers dominate the momentum
    for optimizer, factor in zip(optimizers, (1, 0.1), strict=True):
        optimizer.param_groups[0]["lr"] = factor * lr
        optimizer.step()
    return loss.detach()


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
    """Muon for the weight matrices inside the blocks, Adam at lr / 10 for all other weights."""
    blocks = nn.ModuleList([net.unet.down, net.unet.middle, net.unet.up])
    hidden = [weight for weight in blocks.parameters() if weight.dim() > 1]
    rest = [weight for weight in net.parameters() if all(weight is not w for w in hidden)]
    return Muon(hidden, lr), torch.optim.Adam(rest, lr / 10, betas=(0.9, 0.98), fused=True)


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
    new["network"] = measure(images) | {flag: getattr(args, flag) for flag in SIZE}
    state = args.checkpoint or new
    net = Denoiser(**state["network"], amp=args.amp).to(args.device)
    ema = copy.deepcopy(net).requires_grad_(False)
    muon, adam = make_optimizers(net)
    parts = {"net": net, "ema": ema, "guide": copy.deepcopy(ema), "muon": muon, "adam": adam}
    for name in parts if args.resume else ():
        parts[name].load_state_dict(state[name])
    if args.compile and can_compile(args.device):
        net.unet.compile(mode="reduce-overhead")  # on CUDA a CUDA graph
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
            state["losses"].append(training_step(net, (muon, adam), batch, lr))
            update_ema(ema, net, state["step"])
            state["step"] += 1
            if state["step"] <= total // 10:  # the worse score of autoguided()
                parts["guide"].load_state_dict(ema.state_dict())
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
    parts = [dequantise(images) for images in test[:1000].split(args.batch_size)]
    losses = [denoising_loss(ema, x, sample_sigma(ema, x)) for x in parts]
    row = {"epoch": len(state["rows"]) + 1, "seconds": state["seconds"]}
    row["train loss"] = torch.stack(state["losses"]).mean().item()
    row["test loss"] = torch.cat(losses).mean().item()
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


def sample(args, net, count):
    """`count` uint8 images by --sampler, the same ones at each call."""
    sampler = langevin if args.sampler == "langevin" else dpm_solver
    torch.manual_seed(args.seed)
    noise = torch.randn(count, *net.shape).to(args.device).split(args.batch_size)
    return torch.cat([quantise(sampler(net.score, z, net.sigma_max)) for z in noise])


def bits_per_dim(x, sigmas, errors):
    """Upper bound of -log2 P(bytes), (N,) in bits per dimension, of dequantised x (N, C, H, W).

    errors (N, L) are mean((D - x)^2) at the noise levels sigmas (L,), from s up to S. The bound is
    -ELBO with noisy images as latent variables (Kingma et al. 2021, arXiv:2107.00630), in nats:
        reconstruction    ln(2 pi e s^2) / 2, mean of -ln N(x; x + s z, s^2), the entropy of s z
        prior             mean(x^2) / (2 S^2), KL of x + S z from S z
        diffusion         integral of mean((D - x)^2) / sigma^2 d ln sigma: infinitely many KLs
    """
    reconstruction = math.log(2 * math.pi * math.e * sigmas[0] ** 2) / 2
    prior = x.square().mean((1, 2, 3)) / (2 * sigmas[-1] ** 2)
    diffusion = torch.trapezoid(errors / sigmas**2, sigmas.log())
    return 7 + (reconstruction + prior + diffusion) / math.log(2)  # 7, as bins are 2^-7 wide


@torch.no_grad()
def evaluate(args, net):
    """--evaluate: loss by sigma and bits/dim, of 1,000 test images; denoised.png: y and D."""
    from common import load, save_grid

    net.amp = False  # bfloat16 is too coarse for a likelihood
    torch.manual_seed(args.seed)
    test = load(args.data)[1]
    x = dequantise(test[torch.randperm(len(test))[:1000]].to(args.device))
    sigmas = torch.logspace(math.log10(SIGMA_MIN), math.log10(net.sigma_max), 33).to(x)
    errors = []
    for sigma in sigmas:
        losses = [denoising_loss(net, b, sigma.expand(len(b))) for b in x.split(args.batch_size)]
        errors.append(torch.cat(losses) / (1 / sigma**2 + 1 / net.sigma_data**2))
        print(f"sigma {sigma:9.4f}  test loss {torch.cat(losses).mean():.4f}")
    bits = bits_per_dim(x, sigmas, torch.stack(errors, dim=1))
    error = bits.std() / len(x) ** 0.5
    print(f"bits/dim at most {bits.mean():.3f}, standard error {error:.3f}, {len(x)} test images")
    y = x[:4, None] + sigmas[::4, None, None, None] * torch.randn(len(x[:4]), 9, *net.shape).to(x)
    rows = [torch.cat([noisy, net(noisy, sigmas[::4])]) for noisy in y]
    save_grid(quantise(torch.cat(rows)), Path(args.out, "denoised.png"), columns=9)


# ------------------------------------------------------------------------------------- command line

SIZE = ["width", "mults", "blocks"]  # arguments of UNet
FIXED = [*SIZE, "data", "batch_size", "subset", "flip", "seed"]  # --resume must not change these
NOT_SAVED = ["device", "amp", "compile", "out", "resume", "time_limit", "generate", "evaluate"]
SMALL = {"width": 16, "mults": [1, 2, 4, 6], "blocks": 1, "batch_size": 24, "subset": 24000}
SMALL["epochs"] = 20


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
    add("--width", type=int, default=128, help="channels at full resolution")
    add("--mults", type=int, nargs="+", default=[1, 2, 2], help="of width, at 1, 1/2, 1/4 ...")
    add("--blocks", type=int, default=3, help="residual blocks at each resolution, each way")
    add("--small", action="store_true", help="defaults for a CPU: a small network, a short run")
    add("--seed", type=int, default=0, help="of weights, order of images and noise")
    add("--device", default="cuda" if cuda else "cpu", help="also cuda:1, mps, ...")
    add("--amp", action=switch, default=bf16, help="bfloat16 inside the network")
    add("--compile", action=switch, default=cuda, help="torch.compile the network")
    add("--out", default="runs/ncsn", type=os.path.expanduser, help="folder of the run")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--time-limit", type=float, default=math.inf, metavar="MINUTES", help="save and end then")
    add("--sample-every", type=int, default=5, metavar="EPOCHS", help="draw samples that often")
    add("--generate", type=int, metavar="N", help="draw N samples as PNG files, do not train")
    add("--evaluate", action="store_true", help="measure loss and bits/dim, do not train")
    add("--sampler", default="dpm", choices=["dpm", "langevin", "ideal"], help="ideal draws copies")
    add("--guidance", type=float, default=1.0, help="of --generate: 1 is none, 1.8 looks better")
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
    net = Denoiser(**args.checkpoint["network"], amp=args.amp).to(args.device)
    net.load_state_dict(args.checkpoint["ema"])
    if args.generate:
        from common import export, load, save_grid

        if args.sampler == "ideal":
            net.score = ideal_score(load(args.data, args.subset)[0].to(args.device))
        elif args.guidance != 1:
            guide = copy.deepcopy(net)
            guide.load_state_dict(args.checkpoint["guide"])
            net.score = autoguided(net.score, guide.score, args.guidance)
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
