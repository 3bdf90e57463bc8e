"""EBM, an energy-based model of images: denoising score matching, then contrastive divergence.

    python ebm.py --epochs 50                          train on CIFAR-10, results in runs/ebm
    python ebm.py --small --data shapes --out shapes   the same on a CPU, in minutes
    python ebm.py --generate 1000                      draw samples with the trained weights
    python ebm.py --evaluate                           outliers and long chains, before and after CD

A network gives each image y one number, its energy E(y). Low energy means likely, by definition:
    p(y) = exp(-E(y) / T) / Z,    Z = integral of exp(-E(y) / T) over all y,    T = SIGMA_MIN^2
Z is never computed: the score, grad log p(y) = -grad E(y) / T, does not contain it and is enough to
draw samples by Langevin dynamics, y <- y - h grad E(y) + sqrt(2 h T) z with a small h.
Picture E(y) as half the squared distance from y to the nearest image. Then grad E(y) is the noise
in y, p is normal with variance T, the temperature, about each image, and E / (T C H W) about 1/2.

    x      images, (B, C, H, W), pixels in [-1, 1];  z: standard normal noise of that shape
    sigma  noise level, the standard deviation of the noise, (B,), from SIGMA_MIN to SIGMA_MAX
    y      noisy images, y = x + sigma z; their density is p_sigma
    E      the energy, (B,), of images with any noise; grad E is shaped like y
    D      the denoiser, D(y) = y - grad E(y), an estimate of x

1. Denoising score matching (Vincent 2011) is most of training. Let grad E(y) predict sigma z:
       dsm = mean over pixels of (grad E(y) / sigma - z)^2, times a weight; near 1 before training
The best grad E(y) is the mean of sigma z given y: -sigma^2 grad log p_sigma(y), by Tweedie's
formula. E serves all levels as far as sigma can be read from y (Li et al. 2019, arXiv:1910.07762):
forward() estimates it. At SIGMA_MIN, where sigma^2 = T, p and p_sigma have the same score. Matching
leaves E free where y is no image with white noise, and hardly decides how p weighs its modes.

2. Contrastive divergence, CD (Hinton 2002), joins in the last part of the run, because E may be low
where no noisy images are: long Langevin chains end there. With weights w and data y, likelihood has
       -T grad_w log p(y) = grad_w E(y) - mean of grad_w E(y') over samples y' of p
So descend cd = E(data) - E(samples). Samples are chains in a replay buffer, which persist (Tieleman
2008; Du & Mordatch 2019, arXiv:1903.08689; Balcerak et al. 2025, arXiv:2504.10612).

In another project copy this file alone. In it set SIGMA_DATA to the root mean square of pixels in
[-1, 1], SIGMA_MAX to 1.25 times the side, 80 for 64x64. For uint8 images (N, C, H, W):
    net = EnergyNet((C, H, W)).to(device)  # H and W multiples of 8
    ema, optimizers = copy.deepcopy(net), make_optimizers(net)
    training_step(net, optimizers, batch, lr=0.02 * warmup_cosine(step, total))
    update_ema(ema, net, step)  # after each training_step, step = 0, 1 ... total - 1
    samples = quantise(dpm_solver(ema.grad_E, z))
For CD then count step and total anew, take lr / 5 and pass training_step() chains, made once:
    chains = dequantise(images[torch.randperm(len(images))[: 8 * len(batch)]].to(device))
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

SIGMA_DATA = 0.5  # root mean square of the pixels, about
SIGMA_MIN = 0.03  # four of 256 grey levels, hardly visible
SIGMA_MAX = 40.0  # hides even mean colours: noise averaged over 32x32 pixels has a std of 40 / 32
T = SIGMA_MIN**2  # so that chains have as much noise as data with SIGMA_MIN

# ------------------------------------------------------------------------------ losses and samplers


def dequantise(images):
    """uint8 -> floats in [-1, 1): a byte becomes a uniform draw from its bin, 2/256 wide."""
    if images.dtype != torch.uint8:  # floats in [0, 1] would pass for almost black images
        raise ValueError(f"images must be uint8, 0 to 255, not {images.dtype}")
    u = torch.rand(images.shape, device=images.device) * (1 - 2**-16)  # 255 + u must not round up
    return (images + u) / 128 - 1


def quantise(x):
    """floats -> uint8, the inverse of dequantise(); values outside [-1, 1] are clipped."""
    return ((x + 1) * 128).clamp(0, 255).to(torch.uint8)


def sample_sigma(x):
    """Random noise levels (B,) for x (B, ...): ln sigma is logistic (EDM: normal), stratified."""
    u = (torch.randperm(len(x), device=x.device) + torch.rand(len(x), device=x.device)) / len(x)
    return (SIGMA_DATA * torch.exp(0.8 * torch.logit(u))).clamp(SIGMA_MIN, SIGMA_MAX)


def dsm_loss(net, x, sigma):
    """Denoising score matching: weighted mean of (grad E(y) / sigma - z)^2, (B,); x (B, C, H, W).

    It is |D - x|^2 (1 / sigma^2 + 1 / SIGMA_DATA^2), EDM's (Karras et al. 2022, arXiv:2206.00364).
    """
    s = sigma.view(-1, 1, 1, 1)
    z = torch.randn_like(x)
    weight = 1 + (s / SIGMA_DATA) ** 2
    return (weight * (net.grad_E(x + s * z) / s - z).square()).mean((1, 2, 3))


def cd_loss(net, x, chains, steps=10, h=0.3, restart=0.01, margin=0.3):
    """Persistent CD on x (B, C, H, W): a scalar, in nats per dimension.

    The buffer of chains (N, C, H, W), N = 8 B, starts as training images. A call picks B at random,
    restarts a fraction `restart` from noise, moves all B by Langevin steps, with a large h to find
    where E is wrongly low, and stores them. By the hinge, chains of energy a margin above data's do
    not count. Hinge, large h and dsm depart from maximum likelihood.
    """
    slots = torch.randperm(len(chains), device=x.device)[: len(x)]
    anew = torch.rand(len(slots), 1, 1, 1, device=x.device) < restart
    start = torch.where(anew, SIGMA_MAX * torch.randn_like(chains[slots]), chains[slots])
    chains[slots] = langevin(net.grad_E, start, steps, h)  # into the buffer, without a gradient
    E_data = nats_per_dim(net, x + SIGMA_MIN * torch.randn_like(x))  # positive phase, noise as in p
    E_samples = nats_per_dim(net, chains[slots])  # negative phase
    return F.relu(margin + E_data.mean() - E_samples).mean()  # cd + margin, where above 0


def nats_per_dim(net, y, batch_size=256):
    """E / (T C H W), (B,): -log p per dimension, up to a constant: only differences count."""
    return torch.cat([net(part) for part in y.split(batch_size)]) / (T * y[0].numel())


@torch.no_grad()
def langevin(grad_E, y, steps, h=0.1, temperature=T):
    """Langevin dynamics for p, from y (B, C, H, W).

    Noise of variance 2 h T suits small h. Near an image a, where E is |y - a|^2 / 2, a step turns
    variance v into (1 - h)^2 v + h (2 - h) T: v = T stays. Where E curves less, v ends h / 2 low.
    """
    for _ in range(steps):
        y = y - h * grad_E(y) + math.sqrt(h * (2 - h) * temperature) * torch.randn_like(y)
    return y


@torch.no_grad()
def dpm_solver(grad_E, z, count=12, rho=7, langevin_steps=10):
    """Images from noise z (B, C, H, W): DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095).

    It solves the probability flow ODE dy/dsigma = (y - D(y)) / sigma, along which y has density
    p_sigma (Song et al. 2021, arXiv:2011.13456). Were D constant from s down to t, the step
    y <- (t/s) y + (1 - t/s) D would be exact. As it changes, extrapolate, in ln sigma, to mid-step:
        D_mid = D + (D - D_before) / (2 r),      r = ln(s_before / s) / ln(s / t)
    The ODE reaches each mode about as often as data lie in it; p may weigh modes otherwise. The
    Langevin steps give y the noise that p has within a mode. D(y), which is returned, has none.
    """
    ends = SIGMA_MAX ** (1 / rho), SIGMA_MIN ** (1 / rho)  # EDM, equation 5: dense at the small end
    levels = (torch.linspace(*ends, count, dtype=torch.float64) ** rho).tolist()
    y = D_before = SIGMA_MAX * z
    for s_before, s, t in zip([math.inf, *levels], levels, levels[1:], strict=False):
        D = y - grad_E(y)
        r = math.log(s_before / s) / math.log(s / t)  # infinite at first: D_mid = D
        y = (t / s) * y + (1 - t / s) * (D + (D - D_before) / (2 * r))
        D_before = D
    y = langevin(grad_E, y, langevin_steps)
    return y - grad_E(y)


# ----------------------------------------------------------------------------------------- network


def noise_variance(y):
    """An estimate of sigma^2, (B, 1, 1, 1), from noisy images y (B, C, H, W).

    Differences along both axes, d = y[i,j] - y[i,j+1] - y[i+1,j] + y[i+1,j+1], cancel most of an
    image. Noise leaves 4 sigma^2. CIFAR-10's texture counts as 0.07: less only the U-Net can see.
    """
    d = y.diff(dim=2).diff(dim=3)
    return d.square().mean((1, 2, 3), keepdim=True) / 4 + 1e-4  # above 0: its root has a gradient


class Block(nn.Module):
    """Residual block (B, in_channels, H, W) -> (B, out_channels, H, W), conditioned on sigma."""

    def __init__(self, in_channels, out_channels, embedding_size):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(embedding_size, 2 * out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)  # at first the residual branch adds nothing
        changes = in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x, embedding):
        h = self.conv1(F.silu(x))
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(h * (1 + scale) + shift))  # adaptive group norm, without the norm
        return (self.skip(x) + h) / math.sqrt(2)  # else it would grow with depth


class EnergyNet(nn.Module):
    """E(y) = |r(y)|^2 / 2, with r(y) shaped like y, an estimate of its noise (Salimans & Ho 2021).

    So E is never below 0. Were r the noise, the bracket would be the denoised image, and with EDM's
    preconditioning the U-Net has inputs and targets of mean square about 1:
        r = y - (c_skip y + c_out unet(c_in y, ln sigma))
    y has mean square sigma^2 + SIGMA_DATA^2, with sigma estimated from y: hence c_in. c_skip y is
    the multiple of y nearest to x; its error has mean square c_out^2. There are `blocks` blocks of
    width * mults[i] channels at resolution i, down and up; H, W: multiples of 2^(len(mults) - 1).
    """

    def __init__(self, shape=(3, 32, 32), width=64, mults=(1, 2, 3, 4), blocks=2, amp=False):
        super().__init__()
        self.shape = shape  # (C, H, W) of images
        self.blocks = blocks
        self.amp = amp  # bfloat16 in the blocks
        size = 4 * width  # of the embedding of sigma
        self.embed = nn.Sequential(nn.Linear(1, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU())
        widths = [width * mult for mult in mults for _ in range(blocks)]  # of the blocks
        c = width * mults[0]  # channels of h in unet()
        self.stem = nn.Conv2d(shape[0], c, 3, padding=1)
        self.down = nn.ModuleList()
        for block_width in widths:
            self.down.append(Block(c, block_width, size))
            c = block_width
        self.middle = Block(c, c, size)
        self.up = nn.ModuleList()
        for block_width in reversed(widths):  # each also sees the output of its counterpart
            self.up.append(Block(c + block_width, block_width, size))
            c = block_width
        self.out = nn.Conv2d(c, shape[0], 3, padding=1, bias=False)
        nn.init.zeros_(self.out.weight)  # so unet() starts at 0
        self.to(memory_format=torch.channels_last)

    def unet(self, x, ln_sigma):
        """The network: x (B, C, H, W) and ln sigma (B, 1) -> like x."""
        embedding = self.embed(ln_sigma)
        h = self.stem(x)  # in float32: bfloat16 is coarse beside noise of SIGMA_MIN
        skips = []
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
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
        return self.out(F.silu(h.to(x.dtype)))

    def forward(self, y):
        """The energies (B,) of images y (B, C, H, W) with any noise."""
        variance = noise_variance(y)
        mean_square = variance + SIGMA_DATA**2
        c_skip = SIGMA_DATA**2 / mean_square
        c_out = SIGMA_DATA * (variance / mean_square).sqrt()
        c_in = 1 / mean_square.sqrt()
        r = (1 - c_skip) * y - c_out * self.unet(c_in * y, variance.view(-1, 1).log() / 2)
        return r.square().sum((1, 2, 3)) / 2

    def grad_E(self, y):
        """grad E, shaped like y, also in no_grad or compiled; dsm_loss differentiates it again."""
        return torch.func.grad(lambda y: self(y).sum())(y)


# ---------------------------------------------------------------------------------------- training


def training_step(net, optimizers, images, lr, chains=None, cd_weight=0.1):
    """One step on uint8 images (B, C, H, W), with CD if there are chains. Returns dsm, a scalar."""
    x = dequantise(images)
    loss = dsm_loss(net, x, sample_sigma(x)).mean()
    net.zero_grad()
    loss.backward()
    if chains is not None:
        (cd_weight * cd_loss(net, x, chains)).backward()  # adds its gradients
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
    """Muon for matrices inside the blocks, Adam without momentum at lr / 10 for other weights."""
    blocks = nn.ModuleList([net.down, net.middle, net.up])
    hidden = [weight for weight in blocks.parameters() if weight.dim() > 1]
    rest = [weight for weight in net.parameters() if all(weight is not w for w in hidden)]
    return Muon(hidden, lr), torch.optim.Adam(rest, lr / 10, betas=(0.0, 0.98), fused=True)


def warmup_cosine(step, total):
    """Share of the peak learning rate: warm-up over 5 % of the steps (at most 500), cosine to 0."""
    warmup = min(500, max(1, total // 20))
    return min((step + 1) / warmup, (1 + math.cos(math.pi * step / total)) / 2)


@torch.no_grad()
def update_ema(ema, net, step):
    """Exponential moving average of the weights; its half-life is 5 % of the steps so far."""
    decay = 0.5 ** (1 / (0.05 * (step + 1)))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def enter_phase(args, state, total, ema, images):
    """(step within its phase, learning rate, chains); phase 2, CD, is the last --cd-share."""
    step = state["step"]
    cd_start = total - int(args.cd_share * total)
    if step < cd_start:
        state["cd"] = None  # also after --resume with more --epochs
        return step, args.lr * warmup_cosine(step, cd_start), None
    if not state["cd"]:
        chains = dequantise(images[torch.randperm(len(images))[: 8 * args.batch_size]])
        state["cd"] = {"chains": chains, "before": copy.deepcopy(ema.state_dict())}
    lr = 0.2 * args.lr * warmup_cosine(step - cd_start, total - cd_start)  # CD only corrects
    return step - cd_start, lr, state["cd"]["chains"]


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
    new = {"step": 0, "seconds": 0.0, "losses": [], "rows": [], "cd": None}
    new["network"] = {"shape": list(images.shape[1:]), **{f: getattr(args, f) for f in SIZE}}
    state = args.checkpoint or new
    net = EnergyNet(**state["network"], amp=args.amp).to(args.device)
    ema = copy.deepcopy(net).requires_grad_(False)
    muon, adam = make_optimizers(net)
    parts = {"net": net, "ema": ema, "muon": muon, "adam": adam}
    for name in parts if args.resume else ():
        parts[name].load_state_dict(state[name])
    if args.compile and can_compile(args.device):
        net.grad_E = torch.compile(net.grad_E, mode="reduce-overhead")  # on CUDA a CUDA graph
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
            step, lr, chains = enter_phase(args, state, total, ema, images)
            state["losses"].append(training_step(net, (muon, adam), batch, lr, chains))
            update_ema(ema, net, step)  # at the first step of a phase ema is set to net
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
    x = dequantise(test[:1000])
    losses = [dsm_loss(ema, part, sample_sigma(part)) for part in x.split(args.batch_size)]
    row = {"epoch": len(state["rows"]) + 1, "seconds": state["seconds"]}
    row["train loss"] = torch.stack(state["losses"]).median().item()  # a rare one is huge
    row["test loss"] = torch.cat(losses).mean().item()
    # CD's chains should have the energy of test images with p's noise, here about 0.8, not 1/2.
    row["E data"] = nats_per_dim(ema, x + SIGMA_MIN * torch.randn_like(x)).mean().item()
    cd = state["cd"]  # median, as restarts from noise have huge energies
    row["E samples"] = nats_per_dim(ema, cd["chains"]).median().item() if cd else None
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items() if value is not None))
    rows = [*state["rows"], row]
    state.update(rows=rows, losses=[])
    with open(Path(args.out, "log.csv"), "w", newline="") as file:
        csv.writer(file).writerows([list(row), *(each.values() for each in rows)])
    axes = Figure().add_subplot(xlabel="epoch")
    for name in "train loss", "test loss", "E data", "E samples":
        axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=name)
    axes.legend()
    axes.figure.savefig(Path(args.out, "curves.png"))
    if len(rows) % args.sample_every == 0 or len(rows) == args.epochs:
        save_grid(sample(args, ema, 64), Path(args.out, f"samples_{len(rows):04d}.png"))


def sample(args, net, count):
    """`count` uint8 images, the same ones at each call."""
    torch.manual_seed(args.seed)
    noise = torch.randn(count, *net.shape).to(args.device).split(args.batch_size)
    return torch.cat([quantise(dpm_solver(net.grad_E, z)) for z in noise])


def auroc(E_in, E_out):
    """Share of pairs in which the outlier (M,) has more energy than the inlier (N,), ties half."""
    return (1 + (E_out[:, None] - E_in).sign().mean().item()) / 2


@torch.no_grad()
def evaluate(args, nets):
    """--evaluate: AUROC of test images against others, chains.png: 0 to 300 more Langevin steps."""
    from common import load, save_grid

    torch.manual_seed(args.seed)
    test = load(args.data)[1][:2000]
    kinds = test, test[:, :, :1, :1].expand_as(test), load(args.ood)[1][:2000]
    x = dequantise(torch.cat(kinds).to(args.device))
    x = x + SIGMA_MIN * torch.randn_like(x)  # the noise of p
    for when, net in zip(("before", "after"), nets, strict=True):
        E, E_colours, E_ood = nats_per_dim(net, x).split([len(kind) for kind in kinds])
        areas = f"constant colours {auroc(E, E_colours):.3f}, {args.ood} {auroc(E, E_ood):.3f}"
        print(f"AUROC {when} CD: {areas}")
    z = torch.randn_like(x[:4])
    chains = [torch.cat([dpm_solver(net.grad_E, z), x[:4]]) for net in nets]
    rows = []
    for steps in 0, 1, 2, 7, 20, 70, 200:  # added, 300 in all
        for i, net in enumerate(nets):
            chains[i] = langevin(net.grad_E, chains[i], steps)
            rows.append(quantise(chains[i] - net.grad_E(chains[i])))
    save_grid(torch.cat(rows), Path(args.out, "chains.png"), columns=8 * len(nets))


# ------------------------------------------------------------------------------------- command line

SIZE = ["width", "mults", "blocks"]  # arguments of EnergyNet
FIXED = [*SIZE, "data", "batch_size", "subset", "flip", "seed"]  # --resume must not change these
NOT_SAVED = ["device", "amp", "compile", "out", "resume", "time_limit", "generate", "evaluate"]
SMALL = {"width": 16, "mults": [1, 2, 4, 6], "blocks": 1, "batch_size": 16, "subset": 10000}
SMALL["epochs"] = 16


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
    add("--mults", type=int, nargs="+", default=[1, 2, 3, 4], help="of width, at 1, 1/2, 1/4 ...")
    add("--blocks", type=int, default=2, help="residual blocks at each resolution, each way")
    add("--cd-share", type=float, default=0.05, help="share of the steps, the last, that use CD")
    add("--small", action="store_true", help="defaults for a CPU: a small network, a short run")
    add("--seed", type=int, default=0, help="of weights, order of images and noise")
    add("--device", default="cuda" if cuda else "cpu", help="also cuda:1, mps, ...")
    add("--amp", action=switch, default=bf16, help="bfloat16 inside the network")
    add("--compile", action=switch, default=cuda, help="torch.compile grad E")
    add("--out", default="runs/ebm", type=os.path.expanduser, help="folder of the run")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--time-limit", type=float, default=math.inf, metavar="MINUTES", help="save and end then")
    add("--sample-every", type=int, default=5, metavar="EPOCHS", help="draw samples that often")
    add("--generate", type=int, metavar="N", help="draw N samples as PNG files, do not train")
    add("--evaluate", action="store_true", help="AUROC and chains.png, do not train")
    add("--ood", default="shapes", help="other images for --evaluate, not those of --data")
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
    net = EnergyNet(**args.checkpoint["network"], amp=args.amp).to(args.device)
    net.load_state_dict(args.checkpoint["ema"])
    if args.generate:
        from common import export, save_grid

        images = sample(args, net, args.generate)
        export(images, Path(args.out, "generated"))
        save_grid(images[:64], Path(args.out, "generated.png"))
    if args.evaluate:
        before = copy.deepcopy(net)
        before.load_state_dict((args.checkpoint["cd"] or {}).get("before", net.state_dict()))
        evaluate(args, [before, net])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on with training from the last save, if any")
    except (AssertionError, ImportError, OSError, RuntimeError) as error:  # such as a full disk
        sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])
