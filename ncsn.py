"""NCSN: a noise conditional score network on 32x32 images, in one file (data from common.py).

The score of a density p is grad_x log p(x), the direction in which an image becomes more likely.
Real images fill so little of pixel space that their own score is undefined nearly everywhere. Song
& Ermon (2019, arXiv:1907.05600; 2020, arXiv:2006.09011) add Gaussian noise of many sizes sigma,
which blurs the density to p_sigma, and learn the scores of all p_sigma with one network. Sampling
starts in pure noise and follows the scores while sigma falls from level to level of a ladder.

Training is denoising score matching: for y = x + sigma z, z ~ N(0, I), the best denoiser D in
squared error is the posterior mean E[x | y], and it gives the score (Tweedie's formula):
    loss = mean w(sigma) (D(y, sigma) - x)^2         score(y, sigma) = (D(y, sigma) - y) / sigma^2
NCSN's network F gives the score as F(y) / sigma, so D = y + sigma F(y): its error is sigma times
that of F, and at large sigma a small error of F drowns the image. Karras et al. (2022,
arXiv:2206.00364) keep input and target of F at unit mean square, which makes short runs work. With
sigma_data the root mean square of the images and r^2 = sigma^2 + sigma_data^2,
    D(y, sigma) = c_skip y + c_out F(c_in y, ln sigma)        w = 1 / c_out^2
    c_skip = sigma_data^2 / r^2       c_out = sigma sigma_data / r       c_in = 1 / r
NCSN is the case c_skip = 1, c_out = sigma, c_in = 1. F = 0 has an expected loss of 1 at any sigma.

Sampling over levels sigma_1 > ... > sigma_L, last of all x + sigma_L^2 score(x, sigma_L) = D:
    langevin    T steps a level of x += a score(x, sigma_i) + sqrt(2 a) z,  a = step sigma_i^2
    consistent  one step a level; freshness 0 adds no noise, freshness 1 is ancestral sampling
    heun        the ODE dx/dsigma = -sigma score(x, sigma) (probability flow) over 18 levels
    python ncsn.py --epochs 50                                train on CIFAR-10, files in runs/ncsn
    python ncsn.py --generate 1000                            PNG files, from the trained weights
    python ncsn.py --evaluate --inpaint --interpolate         loss by sigma, bits/dim, pictures
Not as in NCSN's papers: D, U-Net, continuous sigma, averaged weights (EMA) over a share of a run.
Notation: B batch, C channels, H W pixels, L levels; images are float (B, 3, 32, 32) in [-1, 1]."""
import argparse, copy, io, math, os, signal, sys, time
from itertools import pairwise
from pathlib import Path
import torch
from torch import nn
NAME = "ncsn"
# ---------------------------------------------------------------------------------------- network
def norm(channels):  # in groups of 16 or more: a CPU takes many times as long with smaller ones
    return nn.GroupNorm(math.gcd(max(1, channels // 16), channels), channels, eps=1e-6)

class Block(nn.Module):
    """Residual block told the noise level: (B, cin, H, W), (B, E) -> (B, cout, H, W)."""
    def __init__(self, cin, cout, embedding, attention=False):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * cout)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        if attention:
            self.norm3, heads = norm(cout), math.gcd(max(1, cout // 64), cout)
            self.attend = nn.MultiheadAttention(cout, heads, batch_first=True)
    def forward(self, x, embedding):
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        gain, bias = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(nn.functional.silu(self.norm2(h) * (1 + gain) + bias))
        x = (self.skip(x) + h) / math.sqrt(2)  # the sum keeps its variance
        if hasattr(self, "attend"):  # every pixel looks at all others
            h = self.norm3(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
            h = self.attend(h, h, h, need_weights=False)[0].transpose(1, 2)
            x = (x + h.reshape(x.shape)) / math.sqrt(2)
        return x

class ScoreNet(nn.Module):
    """The denoiser D(x, sigma) and its score, both shaped like x; sigma is a tensor () or (B,).
    F is a U-Net: width * mults channels at 32x32, 16x16, ..., `blocks` blocks each way at each."""
    def __init__(self, sigma_data=0.5, sigma_max=100.0, amp=False,
                 width=128, mults=(1, 2, 2), blocks=3):
        super().__init__()
        self.sigma_data, self.sigma_max, self.amp = sigma_data, sigma_max, amp
        widths, emb, end, at = [width * m for m in mults], 4 * width, blocks - 1, (1, 2)
        self.register_buffer("frequencies", torch.logspace(-1.5, 0.5, width // 2))
        self.embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(  # with attention at 16x16 and 8x8
            Block(c if i else above, c, emb, attention=level in at) for i in range(blocks))
            for level, (above, c) in enumerate(zip(widths[:1] + widths[:-1], widths, strict=True)))
        self.middle = Block(widths[-1], widths[-1], emb, attention=True)
        self.up = nn.ModuleList(nn.ModuleList(  # attention is dear: here only last blocks have it
            Block(c + (c if i else below), c, emb, i == end and level in at) for i in range(blocks))
            for level, (c, below) in enumerate(zip(widths, widths[1:] + widths[-1:], strict=True)))
        self.out = nn.Sequential(norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 3, 3, padding=1))
        for name, parameter in self.named_parameters():  # F starts as zero, blocks do nothing new
            if any(end in name for end in ("out.2.", "conv2.", "out_proj.")):
                nn.init.zeros_(parameter)
    def F(self, x, ln_sigma):
        angles, skips = ln_sigma[:, None] * self.frequencies, []
        emb = self.embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        h = self.stem(x)
        for level, blocks in enumerate(self.down):
            h = nn.functional.avg_pool2d(h, 2) if level else h
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
        h = self.middle(h, emb)
        for level, blocks in reversed(list(enumerate(self.up))):
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            h = nn.functional.interpolate(h, scale_factor=2.0) if level else h
        return self.out(h)
    def forward(self, x, sigma):
        s = sigma.float().reshape(-1, 1, 1, 1)
        r = (s**2 + self.sigma_data**2).sqrt()
        # bf16 for F only: the score divides by sigma^2, which magnifies rounding.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            f = self.F(x / r, s.log().flatten().expand(len(x))).float()
        return (self.sigma_data / r) ** 2 * x + s * self.sigma_data / r * f  # c_skip x + c_out f
    def score(self, x, sigma):
        return (self(x, sigma) - x) / sigma.float().reshape(-1, 1, 1, 1) ** 2
# ----------------------------------------------------------------------------------- noise levels
SIGMA_MIN = 2 / 256 / math.sqrt(12)  # std within one of the 256 bins: finer noise is lost
def measure(images):
    """(sigma_data, sigma_max) of uint8 images (N, C, H, W), in units of pixels in [-1, 1].
    sigma_max is the largest distance of two images, so that chains can walk from any to any (2020,
    technique 1). To spare time only the 500 images farthest from the mean are tried with all."""
    x = images.flatten(1) / 127.5 - 1
    far = x[(x - x.mean(0)).norm(dim=1).topk(min(500, len(x))).indices]
    return x.square().mean().sqrt().item(), torch.cdist(far, x).max().item()

def make_ladder(sigma_max, dim, sigma_min=SIGMA_MIN, overlap=0.5):
    """Levels (L,) from sigma_max down to sigma_min, Langevin step and T, for images of dim numbers.
    |sigma z| is nearly N(sqrt(dim) sigma, sigma^2 / 2): of each level `overlap` lies within 3 std
    of the one above (2020, technique 2), whose sigma is at most 3 times as large. With Phi the
    normal CDF, 1 - Phi(d - 3 gamma) = overlap for d = sqrt(2 dim) (gamma - 1)."""
    root, q = math.sqrt(2 * dim), torch.special.ndtri(torch.tensor(overlap)).item()
    gamma = (root - q) / max(root - 3, (root - q) / 3)
    count = math.ceil(math.log(sigma_max / sigma_min) / math.log(gamma)) + 1
    levels = torch.logspace(math.log10(sigma_max), math.log10(sigma_min), count)
    return levels, *langevin_settings(gamma)
def langevin_settings(gamma, excess=0.06):
    """(step, T), the fewest steps T that bring variance within `excess` of 1, in sigma_i^2.
    If all images were 0, a step would be x = (1 - step) x + sqrt(2 step) sigma_i z; T turn variance
    gamma^2 into (1 - step)^(2 T) (gamma^2 - b) + b, b = 2 / (2 - step) (2020, technique 4)."""
    step = torch.logspace(-4, -0.01, 20000, dtype=torch.float64)
    b, steps, error = 2 / (2 - step), 0, torch.ones(1)
    while error.min() > excess:
        steps += 1
        error = ((1 - step) ** (2 * steps) * (gamma**2 - b) + b - 1).abs()
    return step[error.argmin()].item(), steps

def sample_sigma(count, sigma_data, sigma_max, focus=0.6, generator=None, device=None):
    """One sigma an image, (count,), each from its own 1/count of the distribution (stratified):
    ln sigma is logistic, of scale 0.7 about ln(focus sigma_data), and its tails cover the ladder.
    Near it photos' shapes are decided: less noise hides texture only, more leaves mean colours."""
    u = torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)
    return (focus * sigma_data * (u / (count - u)) ** 0.7).clamp(SIGMA_MIN, sigma_max)
# ------------------------------------------------------------------------------------------- loss
def dequantise(images, generator=None):
    """uint8 -> float in [-1, 1), evenly over the bin of each value, which is 2/256 wide."""
    return (images + torch.rand(images.shape, generator=generator, device=images.device)) / 128 - 1
def quantise(x):  # float -> uint8, the bin that x lies in
    return ((x + 1) * 128).clamp(0, 255).to(torch.uint8)
def denoising_loss(denoise, x, sigma, sigma_data, generator=None):
    """Loss of each image, (B, C, H, W), (B,) -> (B,): NCSN's times 1 + sigma^2 / sigma_data^2."""
    z = torch.randn(x.shape, generator=generator, device=x.device)
    error = denoise(x + sigma[:, None, None, None] * z, sigma) - x
    return (1 / sigma**2 + 1 / sigma_data**2) * error.square().flatten(1).mean(1)
# --------------------------------------------------------------------------------------- samplers
# Each takes any score(x, sigma), starts at x = sigma_1 z (B, ...), walks along the levels (L,) and
# ends with the denoising step x + sigma_L^2 score = D(x, sigma_L). After every step x becomes
# hook(x, sigma), through which inpainting sets known pixels and pictures watch the chain.
@torch.no_grad()
def langevin(score, x, levels, step, steps, generator=None, hook=lambda x, sigma: x):
    """Annealed Langevin dynamics (2019, algorithm 1, with a for its alpha / 2)."""
    for sigma in levels:
        a = step * sigma**2
        for _ in range(steps):
            z = torch.randn(x.shape, generator=generator, device=x.device)
            x = hook(x + a * score(x, sigma) + (2 * a).sqrt() * z, sigma)
    return hook(x + sigma**2 * score(x, sigma), 0 * sigma)

@torch.no_grad()
def consistent(score, x, levels, freshness=1.0, generator=None, hook=lambda x, sigma: x):
    """Consistent annealed sampling (Jolicoeur-Martineau et al. 2020, arXiv:2009.05475).
    A step shrinks the noise to ratio^freshness of the next level and fills up with fresh noise:
    none at freshness 0 (Euler on the probability flow), ancestral sampling at 1."""
    for sigma, following in pairwise(levels):
        ratio, z = following / sigma, torch.randn(x.shape, generator=generator, device=x.device)
        x = x + (1 - ratio ** (1 + freshness)) * sigma**2 * score(x, sigma)
        x = hook(x + (1 - ratio ** (2 * freshness)).sqrt() * following * z, following)
    return hook(x + following**2 * score(x, following), 0 * following)

def heun_levels(sigma_max, count=18, sigma_min=SIGMA_MIN, rho=7):
    """(count,), fp64, denser towards sigma_min (Karras et al. 2022, equation 5)."""
    return torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), count, dtype=float) ** rho

@torch.no_grad()
def heun(score, x, levels, hook=lambda x, sigma: x, denoise=True):
    """The probability flow (Karras et al. 2022, algorithm 1); x is fp64 between the levels."""
    x = x.double()
    for sigma, following in pairwise(levels):
        first = -sigma * score(x.float(), sigma)
        euler = x + (following - sigma) * first
        second = -following * score(euler.float(), following)
        x = hook(x + (following - sigma) * (first + second) / 2, following)
    x = x + following**2 * score(x.float(), following) if denoise else x
    return hook(x, 0 * following).float()

def bits_per_dim(score, x, levels, generator=None):
    """Bits a code needs per dequantised number of x, (B,), under the probability flow.
    The flow carries x up from sigma_L to sigma_1, where its density is N(0, sigma_1^2 I). On the
    way log p falls by the integral of the divergence of dx/dsigma (Song et al. 2021,
    arXiv:2011.13456, equation 39), estimated as v . J v for one vector v of random signs."""
    v = torch.randint(0, 2, x.shape, generator=generator, device=x.device) * 2.0 - 1
    levels, divergences = levels.flip(0), []  # two for each step of heun()
    @torch.enable_grad()
    def watched(x, sigma):
        s = score(x.requires_grad_(), sigma)
        (vj,) = torch.autograd.grad((s * v).sum(), x)
        divergences.append(-sigma * (vj * v).flatten(1).sum(1))
        return s.detach()
    end = heun(watched, x, levels, denoise=False)
    gain = (levels.diff().repeat_interleave(2)[:, None] / 2 * torch.stack(divergences)).sum(0)
    log_p = gain + torch.distributions.Normal(0, levels[-1]).log_prob(end).flatten(1).sum(1)
    return 7 - log_p / (x[0].numel() * math.log(2))  # 7, because the bins are 2^-7 wide
# ----------------------------------------------------------------------------------- bookkeeping
def die(message):
    """Bad input: one line on stderr, exit status 2."""
    print("error:", *str(message).splitlines(), file=sys.stderr)
    raise SystemExit(2)
def learning_rate(step, total, peak):
    """Half a cosine from peak to 0 under a linear warm-up of 5 % of the run, at most 500 steps."""
    warmup = min(500, max(1, total // 20))
    return peak * min((step + 1) / warmup, (1 + math.cos(math.pi * step / total)) / 2)
@torch.no_grad()
def update_ema(ema, net, step, half_life):
    """Average the weights, half-life in steps; in a young run, of 8 % of the steps so far."""
    decay = min(0.5 ** (1 / half_life), (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)

def save_checkpoint(path, state):
    """A dict of tensors and plain values, written whole or not at all; OSError if it cannot be."""
    partial, whole = path.with_suffix(".tmp"), io.BytesIO()
    torch.save({"model": NAME, **state}, whole)  # to a full disk it would raise a RuntimeError
    try:
        partial.write_bytes(whole.getbuffer())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
def load_checkpoint(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["model"] != NAME:
            raise ValueError(f"{state['model']}.py wrote it")
        return state
    except Exception as error:  # missing, damaged or another model's: of many types
        die(f"no {NAME} checkpoint in {path} ({type(error).__name__}: {str(error)[:80]!r}): train "
            "first, or name the folder of a run with --out")

def plot(path, x, lines, **axis):
    """lines {name: values} over x as a PNG file."""
    from matplotlib.figure import Figure
    axes = Figure(layout="constrained").add_subplot(**axis)
    axes.plot(x, torch.tensor(list(lines.values())).T, marker=".", label=list(lines))
    axes.legend()
    axes.figure.savefig(path)
def write_log(rows, folder):
    """log.csv, a row an epoch, and its losses and energies as curves.png."""
    lines = [rows[0], *(row.values() for row in rows)]
    (folder / "log.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    lines = {k: [row[k] for row in rows] for k in rows[0] if "loss" in k or k.startswith("E ")}
    plot(folder / "curves.png", [row["epoch"] for row in rows], lines, xlabel="epoch")
# ------------------------------------------------------------------------------------------ train
def build(args, sigmas, device):
    torch.manual_seed(args.seed)
    net = ScoreNet(*sigmas, args.amp, width=args.width, mults=args.mults, blocks=args.blocks)
    return net.to(device, memory_format=torch.channels_last)
def test_loss(net, images, sigma=None):
    """Mean loss of uint8 images, noise fixed, at sigmas of focus .6 or at the one given."""
    g, total = torch.Generator(images.device).manual_seed(0), 0.0
    for x in images.split(250):
        s = sample_sigma(len(x), net.sigma_data, net.sigma_max, generator=g, device=x.device)
        s = torch.full_like(s, sigma) if sigma else s
        total += denoising_loss(net, dequantise(x, g), s, net.sigma_data, g).sum().item()
    return total / len(images)

def train(args, state, device, out):
    """Start, or go on from the checkpoint `state`."""
    from tqdm import tqdm
    from common import batches, load, save_grid
    images, test = (split.to(device) for split in load(args.data, args.subset))
    size, steps = args.batch_size, len(images) // args.batch_size  # steps an epoch
    if not steps:
        die(f"{len(images)} training images do not fill a batch: lower --batch-size")
    total, losses = args.epochs * steps, torch.zeros(steps, device=device)  # losses of an epoch
    step, seconds, rows, sigmas = 0, 0.0, [], state["sigmas"] if state else measure(images)
    net, g = build(args, sigmas, device), torch.Generator(device).manual_seed(args.seed)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, fused=True)
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    if state:
        step, seconds, rows = state["step"], state["seconds"], state["rows"]
        for key, part in parts.items():
            part.load_state_dict(state[key])
        len(g.get_state()) == len(state["random"]) and g.set_state(state["random"])  # same device
        losses[: len(state["losses"])] = state["losses"].to(device)
    if args.compile:
        net.F, ema.F = torch.compile(net.F), torch.compile(ema.F)
    levels, share, turns = make_ladder(sigmas[1], images[0].numel())
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {len(images)} images"
          f", step {step} of {total} on {device}{', bf16' * args.amp}; {len(levels)} levels, sigma "
          f"{sigmas[1]:.1f} to {SIGMA_MIN:.4f}, {turns} Langevin steps of {share:.4f} sigma^2 each")
    out.mkdir(parents=True, exist_ok=True)
    def save():
        save_checkpoint(out / "checkpoint.pt", {
            "args": {key: getattr(args, key) for key in KEPT}, "sigmas": sigmas, "rows": rows,
            "epoch": step // steps, "step": step, "seconds": seconds, "random": g.get_state(),
            "losses": losses, **{key: part.state_dict() for key, part in parts.items()}})
    stop = []  # why, once there is a reason; a second Ctrl-C does not wait for the end of the step
    signal.signal(signal.SIGINT, lambda *signal_and_frame: (
        signal.default_int_handler(*signal_and_frame) if stop else stop.append("interrupted")))
    bar = tqdm(total=total * size, initial=step * size, unit="img", disable=None)
    begin, shown = time.time(), 0
    while step < total and not stop:
        tick, first = time.time(), step
        for x in batches(images, size, args.seed, epoch=step // steps, skip=step % steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, total, args.lr)
            sigma = sample_sigma(size, *sigmas, args.focus, g, device)
            loss = denoising_loss(net, dequantise(x, g), sigma, sigmas[0], g).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            update_ema(ema, net, step, args.ema * total)
            losses[step % steps] = loss.detach()
            step, now = step + 1, time.time()
            bar.update(size)
            if args.time_limit is not None and now - begin > 60 * args.time_limit:
                stop.append("time limit")
            if now - shown > 1 or stop or step % steps == 0:  # the only wait for the device
                losses[(step - 1) % steps] += 0 * sum(p.sum() for p in ema.parameters())  # or nan
                bad = (~losses[: (step - 1) % steps + 1].isfinite()).nonzero().flatten().tolist()
                if bad:
                    raise FloatingPointError(
                        f"loss not finite at step {(step - 1) // steps * steps + bad[0]}; {out} is "
                        f"as before: --resume or, elsewhere, start with --lr {args.lr / 3:.1g}")
                bar.set_postfix(loss=f"{loss.item():.3f}", epoch=f"{step / steps:.1f}")
                shown = now
            if stop:
                break
        seconds += time.time() - tick
        if step % steps == 0:
            rate = (step - first) * size / (time.time() - tick)
            rows.append({"epoch": step // steps, "images/s": rate, "seconds": seconds, "train loss":
                         losses.mean().item(), "test loss": test_loss(ema, test[:1000])})
            save()
            write_log(rows, out)
            bar.write("  ".join(f"{key} {value:.5g}" for key, value in rows[-1].items()))
        if step == total or step % (steps * args.sample_every) == 0:
            z = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(args.seed))
            x = quantise(sample(args, ema, z.to(device), sampler="heun"))
            save_grid(x, out / f"samples_{step // steps:04d}.png")
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if step < total:
        save()
        print(f"{stop[0]}: saved step {step} of {total}, go on with --resume --out {out}")
        raise SystemExit(130 if stop[0] == "interrupted" else 0)
    draw_stages_and_nearest(args, ema, images, out)
# ------------------------------------------------------------------------------------------- uses
def sample(args, net, z, g=None, sampler=None, **hook):
    """Images in [-1, 1] from standard normal z (B, 3, 32, 32), by args.sampler or the one named."""
    from tqdm import tqdm
    ladder, *settings = make_ladder(net.sigma_max, z[0].numel())
    run, levels, *rest = {"langevin": (langevin, ladder, *settings, g),
                          "consistent": (consistent, ladder, args.freshness, g),
                          "heun": (heun, heun_levels(net.sigma_max))}[sampler or args.sampler]
    bar = tqdm(levels.to(z.device), desc=run.__name__, unit="level", leave=False, disable=None)
    return run(net.score, net.sigma_max * z, bar, *rest, **hook)
def draw_stages_and_nearest(args, net, images, out):
    """Eight chains, a row a stage; their ends, each beside its seven nearest images (by L2)."""
    from common import save_grid
    g, chain = torch.Generator(images.device).manual_seed(args.seed), []
    z = torch.randn(8, 3, 32, 32, generator=g, device=images.device)
    x = quantise(sample(args, net, z, g, "consistent", hook=lambda x, s: chain.append(x) or x))
    stages = torch.cat(chain[:: -len(chain) // 9][:8][::-1])  # of the ladder's lower part
    save_grid(quantise(stages), out / "stages.png")
    far = torch.cdist(x.flatten(1).float(), images.flatten(1).float())
    near = images[far.topk(min(7, len(images)), largest=False).indices]  # (8, 7, 3, 32, 32)
    rows = torch.cat([x[:, None], near], dim=1)
    save_grid(rows.flatten(0, 1), out / "nearest.png", columns=rows.shape[1])
def restore(truth, known, g=None):
    """A hook that sets the known pixels to the truth with the noise of the level (2019, B.3)."""
    return lambda x, sigma: torch.where(
        known, truth + sigma * torch.randn(x.shape, generator=g, device=x.device), x)

def apply(args, state, device, out):
    """What --generate, --interpolate, --inpaint and --evaluate do with the trained weights."""
    from common import export, load, save_grid
    net = build(args, state["sigmas"], device).requires_grad_(False)
    net.load_state_dict(state["ema"])
    g = torch.Generator(device).manual_seed(args.seed)
    test = load(args.data)[1].to(device) if args.inpaint or args.evaluate else None
    for start in range(0, args.generate or 0, 256):
        z = torch.randn(min(256, args.generate - start), 3, 32, 32, generator=g, device=device)
        x = quantise(sample(args, net, z, g))
        export(x, out / "generated", start)
        if start == 0:
            save_grid(x[:64], out / "generated.png")
        print(f"{start + len(x)} of {args.generate} images in {out / 'generated'}")
    if args.interpolate:  # each row along the sphere between two draws of noise
        ends = torch.randn(2, 8, 1, 3, 32, 32, generator=g, device=device)
        angle = torch.linspace(0, math.pi / 2, 8, device=device)[:, None, None, None]
        z = (angle.cos() * ends[0] + angle.sin() * ends[1]).flatten(0, 1)
        save_grid(quantise(sample(args, net, z, sampler="heun")), out / "interpolate.png")
    if args.inpaint:  # rows of a test image, the same without its centre, and six completions
        known = nn.functional.pad(torch.zeros(16, 16, device=device), [8] * 4, value=1).bool()
        truth = dequantise(test[:6, None], g)
        many = truth.expand(-1, 6, -1, -1, -1).flatten(0, 1)
        z = torch.randn(many.shape, generator=g, device=device)
        x = sample(args, net, z, g, hook=restore(many, known, g)).unflatten(0, (-1, 6))
        rows = torch.cat([truth, torch.where(known, truth, 0), x], dim=1)
        save_grid(quantise(rows.flatten(0, 1)), out / "inpaint.png")
    if args.evaluate:
        sigmas = torch.logspace(math.log10(SIGMA_MIN), math.log10(net.sigma_max), 17).tolist()
        losses = [test_loss(net, test[:1000], sigma) for sigma in sigmas]
        plot(out / "loss_by_sigma.png", sigmas, {"test loss": losses}, xlabel="sigma", xscale="log")
        print(*map("sigma {:9.4f}  loss {:.4f}".format, sigmas, losses), sep="\n")
        net.amp, levels = False, heun_levels(net.sigma_max, 128).to(device)  # exact, not bf16
        bits = torch.cat([bits_per_dim(net.score, dequantise(x, g), levels, g)
                          for x in test[: args.bits_images].split(100)])
        print(f"bits/dim {bits.mean():.3f}, standard error {bits.std() / len(bits) ** 0.5:.3f}, "
              f"of {len(bits)} test images")
# -------------------------------------------------------------------------------------------- CLI
KEPT = ["width", "mults", "blocks", "data", "subset", "batch_size", "seed",  # fixed by a
        "epochs", "lr", "ema", "focus", "sample_every"]  # checkpoint; remembered by it
def parse(argv=None):
    """(args, checkpoint or None, use); what a checkpoint knows stands in for flags not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: die(f"{message} (see --help)")
    tick, switch = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
    def flag(name, default, text, **options):
        kind = {} if "action" in options else {"type": type(default)}
        text += f" (default: {default})" if default else ""
        group.add_argument(name, default=default, help=text, **{**kind, **options})
    group = parser.add_argument_group("the same in nvae.py, ncsn.py and ebm.py")
    flag("--data", "cifar10", "cifar10, shapes, a folder of images or a .npz file")
    flag("--subset", 0, "train on that many images only; 0, the default, is all")
    flag("--epochs", 50, "passes over the training images")
    flag("--batch-size", 128, "images a step")
    flag("--lr", 5e-4, "highest learning rate")
    flag("--ema", 0.05, "half-life of the average of weights, as a share of the run")
    flag("--seed", 0, "of weights, order of images and noise; 0 by default")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = [*["cuda"][: len(gpus)], *gpus, "cpu"]
    flag("--device", here[0], "where to compute", choices=here)
    flag("--amp", None, "bf16 in the network; by default on cuda and cpus that have it", **switch)
    flag("--compile", None, "torch.compile; by default on cuda", **switch)
    flag("--out", f"runs/{NAME}", "folder of the run")
    flag("--resume", False, "go on from the checkpoint in --out", **tick)
    flag("--time-limit", None, "then save and stop", type=float, metavar="MINUTES")
    flag("--sample-every", 5, "epochs from one grid of samples to the next")
    flag("--generate", None, "only write that many samples as PNG files", type=int, metavar="N")
    flag("--evaluate", False, "only measure on the test images", **tick)
    group = parser.add_argument_group(NAME)
    flag("--width", 128, "channels at 32x32, a multiple of 4")
    flag("--mults", [1, 2, 2], "channels at 32x32, 16x16, ..., in units of the width",
         type=lambda text: [int(m) for m in text.split(",")], metavar="M,M,...")
    flag("--blocks", 3, "residual blocks each way at a resolution")
    flag("--focus", 0.6, "median sigma of training, in units of the images' root mean square")
    flag("--sampler", "langevin", "how to draw images", choices=["langevin", "consistent", "heun"])
    flag("--freshness", 1.0, "noise renewed by consistent: 0 none (flow), 1 ancestral")
    flag("--inpaint", False, "only complete test images whose centre is hidden", **tick)
    flag("--interpolate", False, "only draw the ways between samples", **tick)
    flag("--bits-images", 100, "test images whose bits/dim --evaluate measures")
    args, state = parser.parse_args(argv), None
    path = Path(args.out) / "checkpoint.pt"
    use = args.generate or args.evaluate or args.inpaint or args.interpolate
    if use or args.resume:
        state = load_checkpoint(path)
        parser.set_defaults(**state["args"])
        args = parser.parse_args(argv)
        for key in KEPT[: 3 if use else 7]:
            if getattr(args, key) != state["args"][key]:
                name = key.replace("_", "-")
                die(f"{path} was trained with --{name} {state['args'][key]}: leave that flag out")
    elif path.exists():
        die(f"{path} is there already: go on with --resume, or name another folder with --out")
    for key, value in vars(args).items():
        low = 0 if key in ("subset", "lr", "seed", "time_limit", "freshness") else 1e-9  # above 0
        if type(value) in (int, float) and not low <= value < 2**31:
            die(f"--{key.replace('_', '-')} {value} is out of range")
    if args.width % 4 or min(args.mults) < 1 or len(args.mults) > 6:
        die("--width takes a multiple of 4, --mults takes up to 6 numbers above 0")
    return args, state, use
def main(argv=None):
    args, state, use = parse(argv)
    device, gpu = torch.device(args.device), args.device != "cpu"
    args.compile = gpu if args.compile is None else args.compile
    bf16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)  # bool() is False
    args.amp = gpu or bf16() if args.amp is None else args.amp
    try:
        (apply if use else train)(args, state, device, Path(args.out))
    except OSError as error:
        die(f"{error}; what was there before is kept: mend that, then --resume")
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        die(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None

if __name__ == "__main__":
    main()
