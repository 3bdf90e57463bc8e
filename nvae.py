"""NVAE: a hierarchical variational autoencoder on 32x32 images, in one file (data from common.py).

A VAE explains an image x by latent variables z: draw z ~ p(z), then x ~ p(x|z). A second network
q(z|x) guesses the z behind an x; both learn by raising a lower bound of ln p(x). Vahdat & Kautz
(2020, arXiv:2007.03898) cut z into groups z_1 ... z_G, maps at several scales from coarse to fine:
    p(z) = prod_i p(z_i | z_<i)                     q(z|x) = prod_i q(z_i | z_<i, x)
An encoder goes bottom-up over x and keeps a feature map for each group. One top-down path serves
training and sampling: from a learned tensor h on, group i puts h through cells (if i > 1), reads
p(z_i | z_<i) = N(mu, sigma^2) off h, takes z_i, from q where there is an image and else from p, and
adds it to h, which after the last group gives p(x|z). q is relative to p (section 3.2): the encoder
adds to mu and ln sigma of p; then mu <- 5 tanh(mu / 5), sigma <- exp(5 tanh(ln sigma / 5)) + .01.
The loss, in nats an image, is minus the bound and a price on steep functions of x and z:
    loss = -ln p(x|z) + beta sum_i gamma_i KL(q(z_i | z_<i, x) || p(z_i | z_<i)) + lambda R,  z ~ q
beta rises to 1 in the first --kl-warmup epochs; meanwhile gamma_i, growing with KL_i, shares
the burden among groups (appendix A), afterwards gamma = 1. R sums the largest singular values of
all convolutions and the largest BatchNorm factors. A pixel has sum_k w_k prod_colours P_k(v), over
M discretised logistics (arXiv:1701.05517), mean m, scale s; for byte v, x = v / 127.5 - 1,
    P(v) = S((x - m + 1/255) / s) - S((x - m - 1/255) / s),     S(a) = 1 / (1 + exp(-a))
where m is linear in the colours before; bytes 0 and 255 take the tails. K draws of z bound tighter:
    ln p(x) >= E ln mean_k p(x|z_k) p(z_k) / q(z_k|x)          (Burda et al. 2016, arXiv:1509.00519)
    python nvae.py --epochs 50                                train on CIFAR-10, files in runs/nvae
    python nvae.py --generate 1000 --temperature 0.7          PNG files, from the trained weights
    python nvae.py --evaluate --iw 100 --interpolate          bits/dim, KL by group, pictures
Not as in the paper: P(v) exact, EMA; README has more. B batch, C channels, H W pixels, n latents"""
import argparse, copy, io, math, os, signal, sys, time
from itertools import accumulate, pairwise, product
from pathlib import Path
import torch
from torch import nn
from torch.nn.functional import conv2d, elu, logsigmoid, normalize
NAME = "nvae"
NATS = 3072 * math.log(2)  # of an image, to one bit per dimension
# ---------------------------------------------------------------------------------------- network
norm = nn.BatchNorm2d  # its statistics come from calibrated(), as the EMA has none
class Cell(nn.Module):
    """Residual cell, (B, cin, H, W) -> (B, cout, H', W'), gated by squeeze and excitation: each
    channel is multiplied by a number in (0, 1) that depends on the means of all channels."""
    scale = 0.1  # of what it adds
    def __init__(self, cout, skip, *body):
        super().__init__()
        self.skip, self.body, hidden = skip, nn.Sequential(*body), max(cout // 16, 4)
        self.gate = nn.Sequential(
            nn.Linear(cout, hidden), nn.ReLU(), nn.Linear(hidden, cout), nn.Sigmoid())
    def forward(self, x):
        h = self.body(x)
        return self.skip(x) + self.scale * h * self.gate(h.mean((2, 3)))[:, :, None, None]
def encoder_cell(cin, cout, down=False):
    """Figure 3b; down: to half of H and W."""
    halve = nn.Sequential(nn.SiLU(), nn.Conv2d(cin, cout, 2, stride=2))
    return Cell(cout, halve if down else nn.Identity(),
                norm(cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, 2 if down else 1, padding=1),
                norm(cout), nn.SiLU(), nn.Conv2d(cout, cout, 3, padding=1))
def decoder_cell(cin, cout, expand=6, up=False):
    """Figure 3a; up: to twice H and W. Depthwise, 5x5 pixels cost little, so there can be `expand`
    times the channels. 1x1 convolutions come before the growth: the same result for less."""
    wide, grow = expand * cin, nn.Upsample(scale_factor=2) if up else nn.Identity()
    skip = nn.Sequential(nn.Conv2d(cin, cout, 1), nn.Upsample(scale_factor=2, mode="bilinear"))
    return Cell(cout, skip if up else nn.Identity(),
                norm(cin), nn.Conv2d(cin, wide, 1, bias=False), norm(wide), nn.SiLU(), grow,
                nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False), norm(wide), nn.SiLU(),
                nn.Conv2d(wide, cout, 1, bias=False), norm(cout))
class Flow(nn.Module):
    """Inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934): z (B, n, H, W), context
    (B, C, H, W) -> exp(a) z + b, and a, the log-determinant elementwise. a and b depend on the
    context, on pixels before in raster order (turned: behind) and, at a pixel, latents before."""
    def __init__(self, latents, channels, turned):
        super().__init__()
        self.axes, hidden = (1, 2, 3) if turned else (), 4 * latents
        self.first = nn.Conv2d(latents, hidden, 3, padding=1)
        self.context = nn.Conv2d(channels, hidden, 1)
        self.last = nn.Conv2d(hidden, 2 * latents, 1, groups=latents)  # each latent has its own
        mask = torch.zeros(hidden, latents, 3, 3)
        mask[:, :, 0], mask[:, :, 1, 0] = 1, 1
        mask[:, :, 1, 1] = torch.ones(latents, latents).tril(-1).repeat_interleave(4, dim=0)
        self.register_buffer("mask", mask)
    def forward(self, z, context):
        h = conv2d(z.flip(self.axes), self.first.weight * self.mask, self.first.bias, padding=1)
        h = self.last(elu(h + self.context(context).flip(self.axes[1:]))).to(z.dtype)
        a, b = (part.flip(self.axes) for part in h.unflatten(1, (-1, 2)).unbind(2))
        a = 2 * torch.tanh(a / 2)
        return a.exp() * z + b, a
class Group(nn.Module):
    """What the top-down path has for one z_i: cells, and the layers that read p and q and add z."""
    def __init__(self, cells, channels, latents, flows):
        super().__init__()
        self.cells = nn.Sequential(*cells)
        self.prior = nn.Sequential(nn.ELU(), nn.Conv2d(channels, 2 * latents, 1))
        self.mix = nn.Conv2d(channels, channels, 1)
        self.posterior = nn.Conv2d(channels, 2 * latents, 3, padding=1)
        self.flows = nn.ModuleList(Flow(latents, channels, k % 2 == 1) for k in range(flows))
        self.merge = nn.Conv2d(latents, channels, 1)
        for layer in self.prior[1], self.posterior, *(flow.last for flow in self.flows):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)  # q = p, flows change nothing
def normal(parameters, temperature=1.0):
    """(mu, sigma) of (B, n, H, W) each from (B, 2 n, H, W), clamped smoothly."""
    mu, log_sigma = (5 * torch.tanh(part / 5) for part in parameters.chunk(2, dim=1))
    return mu, temperature * (log_sigma.exp() + 0.01)
class NVAE(nn.Module):
    """width times mults: channels at 32x32, 16x16, ..., the last for the rest; groups: of n latents
    at 16x16, 8x8, ...; cells each way a group; outer: cells at 32x32; residual: Cell.scale."""
    def __init__(self, width=64, mults=(1, 2), groups=(12, 8), cells=1, outer=2, expand=6, flows=0,
                 residual=0.1, mixtures=10, amp=False, latents=20):
        super().__init__()
        self.amp, self.scales, less = amp, groups, max(1, expand // 2)
        w = [width * mults[min(i, len(mults) - 1)] for i in range(len(groups) + 1)]
        places = [scale for scale, count in enumerate(groups, 1) for _ in range(count)]
        more = [encoder_cell(width, width) for _ in range(outer - 1)]
        self.before = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), *more, encoder_cell(width, w[1], down=True))
        self.start = nn.Parameter(torch.randn(1, w[-1], 32 >> len(groups), 32 >> len(groups)))
        self.encoder, self.groups = nn.ModuleList(), nn.ModuleList()
        for above, scale in pairwise([1, *places]):  # from fine to coarse
            more, c = [encoder_cell(*w[i:i + 2], down=True) for i in range(above, scale)], w[scale]
            self.encoder.append(nn.Sequential(*more, *(encoder_cell(c, c) for _ in range(cells))))
        def up(below, scale):
            return [decoder_cell(w[i], w[i - 1], expand, up=True) for i in range(below, scale, -1)]
        for below, scale in pairwise([len(groups), *places[::-1]]):  # from coarse to fine
            more, c = up(below, scale), w[scale]
            more += [decoder_cell(c, c, expand) for _ in range(cells if self.groups else 0)]
            self.groups.append(Group(more, c, latents, flows))
        self.register_buffer("alpha", torch.tensor([4.0**-s / groups[s - 1] for s in places[::-1]]))
        above, more = up(places[0], 1), [decoder_cell(width, width, less) for _ in range(outer - 1)]
        self.after = nn.Sequential(*above, decoder_cell(w[1], width, less, True), *more, nn.ELU(),
                                   nn.Conv2d(width, 10 * mixtures, 3, padding=1))
        for cell in (part for part in self.modules() if isinstance(part, Cell)):
            cell.scale = residual
    def bottom_up(self, x):
        """x (B, 3, 32, 32) in [-1, 1] -> what each group may know of it, a list (B, C, H, W)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            return list(accumulate(self.encoder, lambda h, f: f(h), initial=self.before(x)))[:0:-1]
    def top_down(self, draw, count, features=None, z=(), temperature=1.0):
        """The generative path for `count` images: logits of p(x|z) (B, 10 M, 32, 32) and groups.
        z_i is given or, past those given, of q if there are features, else of p, whose sigma the
        temperature multiplies. draw(shape) gives normal noise. A group is a dict: z; p and, with
        features, q, (mu, sigma) each; z0, from which flows made z; log_det, their ln |dz/dz0|."""
        groups = []
        with torch.autocast(self.start.device.type, torch.bfloat16, enabled=self.amp):
            h = self.start.expand(count, -1, -1, -1).contiguous(memory_format=torch.channels_last)
            for i, group in enumerate(self.groups):
                h = group.cells(h)
                parameters = group.prior(h).float()  # distributions are fp32
                this = {"p": normal(parameters, temperature), "log_det": 0.0}
                if features:
                    context = features[i] + group.mix(h)
                    this["q"] = normal(parameters + group.posterior(context).float())
                mu, sigma = this.get("q", this["p"])
                this["z0"] = this["z"] = z[i] if i < len(z) else mu + sigma * draw(mu.shape)
                for flow in group.flows if features and i >= len(z) else ():
                    this["z"], a = flow(this["z"], context)
                    this["log_det"] = this["log_det"] + a
                h = h + group.merge(this["z"])
                groups.append(this)
            return self.after(h).float().contiguous(), groups
# ------------------------------------------------------------------------------------------- loss
def scaled(images):  # uint8 -> float, bytes 0 ... 255 evenly over [-1, 1]: a bin is 2/255 wide
    return images / 127.5 - 1
def quantise(x):  # float -> uint8, the nearest byte
    return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
def mixture(logits):
    """(B, 10 M, H, W) -> weights (B, M, H, W); means, ln s, coefficients (B, 3, M, H, W) each."""
    weights, rest = logits.unflatten(1, (10, -1)).split([1, 9], dim=1)
    means, log_s, c = rest.unflatten(1, (3, 3)).unbind(1)
    return weights[:, 0], means, log_s.clamp(min=-7), torch.tanh(c)
def dmol_log_prob(logits, x):
    """ln p(x|z) (B,) of x (B, 3, H, W) in [-1, 1], one of the 256 values of scaled().
    S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)), a, b = (x - m +- 1/255) / s, is exact far from m too.
    Byte 0 has no lower edge, which leaves S(a), and 255 no upper edge, which leaves S(-b)."""
    weights, means, log_s, c = mixture(logits)
    x, inverse = x[:, :, None], torch.exp(-log_s)  # (B, 3, 1, H, W)
    shift = [torch.zeros_like(c[:, 0]), c[:, 0] * x[:, 0], c[:, 1] * x[:, 0] + c[:, 2] * x[:, 1]]
    away = x - means - torch.stack(shift, dim=1)  # (B, 3, M, H, W)
    low, high = x < -0.999, x > 0.999  # of 0 and 255 alone: byte 254 is at 0.992
    log_p = torch.log(-torch.expm1(-2 / 255 * inverse)).masked_fill(low | high, 0)
    log_p = log_p + logsigmoid((away + 1 / 255) * inverse).masked_fill(high, 0)
    log_p = log_p + logsigmoid((1 / 255 - away) * inverse).masked_fill(low, 0)
    return (weights.log_softmax(1) + log_p.sum(1)).logsumexp(1).sum((1, 2))
def kl_normal(q, p):
    """KL(q || p), elementwise, of normal distributions (mu, sigma)."""
    (mu, sigma), (mu_p, sigma_p) = q, p
    return (sigma_p / sigma).log() + (sigma**2 + (mu - mu_p) ** 2) / (2 * sigma_p**2) - 0.5
def log_ratio(group):
    """ln q(z_i | z_<i, x) - ln p(z_i | z_<i), elementwise, at the z_i of a group of top_down."""
    (mu, sigma), (mu_p, sigma_p) = group["q"], group["p"]
    log_q = -0.5 * ((group["z0"] - mu) / sigma) ** 2 - sigma.log() - group["log_det"]
    return log_q + 0.5 * ((group["z"] - mu_p) / sigma_p) ** 2 + sigma_p.log()
def elbo(net, x, generator=None):
    """-ln p(x|z) (B,) and KL_i (B, G, n) in nats, analytic or, with flows, estimated from one z."""
    logits, groups = net.top_down(noise(generator, x.device), len(x), net.bottom_up(x))
    kl = [log_ratio(z) if net.groups[0].flows else kl_normal(z["q"], z["p"]) for z in groups]
    return -dmol_log_prob(logits, x), torch.stack([term.sum((2, 3)) for term in kl], dim=1)
def kl_loss(kl, beta, alpha):
    """beta sum_i gamma_i mean KL_i of kl (B, G). While beta < 1, gamma_i grows with KL_i / alpha_i,
    alpha_i ~ pixels / groups of its scale, mean gamma 1: a nat is cheap where few are used yet."""
    gamma = (kl.detach().abs().mean(0) + 0.01) / alpha
    gamma = gamma / gamma.mean() if beta < 1 else torch.ones_like(gamma)
    return beta * (gamma * kl.mean(0)).sum()
class Spectral(nn.Module):
    """R = sum s(W) + sum max |g| over convolutions W, as matrices (C_out, rest), stacked by shape,
    and BatchNorms' factors g. Power iteration, v ~ W'u, u ~ W v, gives s = u . W v; u is kept."""
    def __init__(self, net, iterations=40):
        super().__init__()
        self.stacks, layers = {}, list(net.modules())
        self.factors = [layer.weight for layer in layers if isinstance(layer, norm)]
        for w in (layer.weight for layer in layers if isinstance(layer, nn.Conv2d)):
            self.stacks.setdefault(f"{len(w)}x{w[0].numel()}", []).append(w)
        for shape, stack in self.stacks.items():
            self.register_buffer(shape, stack[0].new_empty(len(stack), len(stack[0]), 1).normal_())
        self(iterations)
    def forward(self, iterations=1):
        total = sum(g.abs().max() for g in self.factors)
        for shape, stack in self.stacks.items():
            u, w = getattr(self, shape), torch.stack([w.flatten(1) for w in stack])
            with torch.no_grad():
                for _ in range(iterations):
                    v = normalize(w.mT @ u, dim=1)
                    u.copy_(normalize(w @ v + 1e-9 * u, dim=1))  # W = 0 keeps u
            total = total + (u.clone() * (w @ v)).sum()
        return total
def iw_bound(net, x, k, generator=None):
    """ln mean_k p(x|z_k) p(z_k) / q(z_k|x), (B,) in nats, over k draws of z; x is encoded once."""
    features, total = net.bottom_up(x), x.new_full((len(x),), -math.inf)
    for _ in range(k):
        logits, groups = net.top_down(noise(generator, x.device), len(x), features)
        log_w = dmol_log_prob(logits, x) - sum(log_ratio(z).sum((1, 2, 3)) for z in groups)
        total = torch.logaddexp(total, log_w)
    return total - math.log(k)
# --------------------------------------------------------------------------------------- samplers
def noise(generator=None, device=None):  # draw(shape) for top_down
    return lambda shape: torch.randn(shape, generator=generator, device=device)
def dmol_sample(logits, temperature=1.0, generator=None):
    """x (B, 3, H, W) ~ p(x|z) of (B, 10 M, H, W), on the 256 values of scaled(). The temperature
    multiplies s and divides the mixture's logits. Colours follow the rounded ones before."""
    weights, *parts = mixture(logits)
    u = torch.rand(weights.shape, generator=generator, device=logits.device).clamp(1e-20, 1 - 1e-7)
    k = (weights / temperature - (-u.log()).log()).argmax(1)[:, None, None]  # Gumbel-max
    means, log_s, c = (part.gather(2, k.expand(-1, 3, -1, -1, -1))[:, :, 0] for part in parts)
    u = torch.rand(means.shape, generator=generator, device=logits.device).clamp(1e-5, 1 - 1e-5)
    x = means + temperature * log_s.exp() * torch.logit(u)  # (B, 3, H, W)
    return in_turn(x, c, lambda x: scaled(quantise(x)))
def dmol_mean(logits):
    """About the mean of p(x|z), (B, 10 M, H, W) -> (B, 3, H, W), from means cut to [-1, 1]."""
    weights, means, _, c = mixture(logits)
    means = in_turn(means, c, lambda m: m.clamp(-1, 1))
    return (weights.softmax(1)[:, None] * means).sum(2)
def in_turn(x, c, settle):
    red = settle(x[:, 0])
    green = settle(x[:, 1] + c[:, 0] * red)
    return torch.stack([red, green, settle(x[:, 2] + c[:, 1] * red + c[:, 2] * green)], dim=1)
def calibrated(net, images=None, temperature=1.0, calls=40):
    """A copy of net for evaluation. Its BatchNorm has the mean statistics of a thousand training
    images (uint8) or, without any, of `calls` times 64 samples at the temperature."""
    net, g = copy.deepcopy(net).train(), torch.Generator(net.start.device).manual_seed(0)
    for layer in (layer for layer in net.modules() if isinstance(layer, norm)):
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean of all calls
    if images is None:
        for _ in range(calls):
            net.top_down(noise(g, net.start.device), 64, temperature=temperature)
    else:
        some = torch.randperm(len(images), generator=g, device=g.device)[:1000]  # may be sorted
        for x in images[some].split(100):
            elbo(net, scaled(x), g)
    return net.eval()
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
TERMS = "train loss", "reconstruction", "kl", "regulariser"  # the first: sum of the next two
def build(args, device):
    torch.manual_seed(args.seed)
    net = NVAE(*(getattr(args, key) for key in KEPT[:9]), args.amp)  # in its order
    return net.to(device, memory_format=torch.channels_last)
def measure(net, images):
    """-ln p(x|z) () and KL (G, n) of uint8 images, on average, in bits/dim, with fixed noise."""
    g = torch.Generator(images.device).manual_seed(0)
    parts = zip(*(elbo(net, scaled(x), g) for x in images.split(100)), strict=True)
    return [torch.cat(part).double().mean(0).cpu() / NATS for part in parts]
def train(args, state, device, out):
    """Start, or go on from the checkpoint `state`."""
    from tqdm import tqdm
    from common import batches, load, save_grid
    images, test = (split.to(device) for split in load(args.data, args.subset))
    size, steps = args.batch_size, len(images) // args.batch_size  # steps an epoch
    if not steps:
        die(f"{len(images)} training images do not fill a batch: lower --batch-size")
    total, step, seconds, rows = args.epochs * steps, 0, 0.0, []
    net, g = build(args, device), torch.Generator(device).manual_seed(args.seed)
    ema, spectral = copy.deepcopy(net).requires_grad_(False), Spectral(net)
    losses = torch.zeros(steps, len(TERMS), device=device)  # of the current epoch, in bits/dim
    optimizer = torch.optim.Adamax(net.parameters(), args.lr, foreach=True)
    parts = {"net": net, "ema": ema, "optimizer": optimizer, "spectral": spectral}
    if state:
        step, seconds, rows = state["step"], state["seconds"], state["rows"]
        for key, part in parts.items():
            part.load_state_dict(state[key])
        len(g.get_state()) == len(state["random"]) and g.set_state(state["random"])  # same device
        losses[: len(state["losses"])] = state["losses"].to(device)
    for cell in (part for part in net.modules() if args.compile and isinstance(part, Cell)):
        cell.compile()  # for all at once would be a very long program
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {len(images)} images"
          f", step {step} of {total} on {device}{', bf16' * args.amp}")
    out.mkdir(parents=True, exist_ok=True)
    def save():
        save_checkpoint(out / "checkpoint.pt", {
            "args": {key: getattr(args, key) for key in KEPT}, "rows": rows,
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
            beta = min(1.0, max(1e-4, (step + 1e-9) / (args.kl_warmup * steps + 1e-9)))
            reconstruction, kl = elbo(net, scaled(x), g)
            regulariser = args.spectral * spectral()
            loss = reconstruction.mean() + kl_loss(kl.sum(2), beta, net.alpha) + regulariser
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update_ema(ema, net, step, args.ema * total)
            terms = reconstruction.mean(), kl.sum((1, 2)).mean(), regulariser
            losses[step % steps] = torch.stack([terms[0] + terms[1], *terms]).detach() / NATS
            step, now = step + 1, time.time()
            bar.update(size)
            if args.time_limit is not None and now - begin > 60 * args.time_limit:
                stop.append("time limit")
            if now - shown > 1 or stop or step % steps == 0:  # the only wait for the device
                losses[(step - 1) % steps] += 0 * sum(p.sum() for p in ema.parameters())  # or nan
                done = losses[: (step - 1) % steps + 1]
                bad = (~done.isfinite().all(1)).nonzero().flatten().tolist()
                if bad:
                    raise FloatingPointError(
                        f"loss not finite at step {(step - 1) // steps * steps + bad[0]} ("
                        f"{', '.join(TERMS[1:])}: {done[bad[0], 1:].tolist()} bits/dim); {out} is "
                        f"as before: --resume or, elsewhere, start with --lr {args.lr / 3:.1g}")
                bar.set_postfix(loss=f"{done[-1, 0]:.3f}", epoch=f"{step / steps:.1f}")
                shown = now
            if stop:
                break
        seconds += time.time() - tick
        if step % steps == 0:
            rate = (step - first) * size / (time.time() - tick)
            bound = sum(part.sum().item() for part in measure(calibrated(ema, images), test[:1000]))
            rows.append({"epoch": step // steps, "images/s": rate, "seconds": seconds, "test loss":
                         bound, **dict(zip(TERMS, losses.mean(0).tolist(), strict=True))})
            save()
            write_log(rows, out)
            bar.write("  ".join(f"{key} {value:.5g}" for key, value in rows[-1].items()))
        if step == total or step % (steps * args.sample_every) == 0:
            fixed, t = torch.Generator(device).manual_seed(args.seed), args.temperature
            x = sample(calibrated(ema, None, t), 64, t, args.pixels, fixed)
            save_grid(x, out / f"samples_{step // steps:04d}.png")
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if step < total:
        save()
        print(f"{stop[0]}: saved step {step} of {total}, go on with --resume --out {out}")
        raise SystemExit(130 if stop[0] == "interrupted" else 0)
    draw_pictures(args, ema, images, test, out)
# ------------------------------------------------------------------------------------------- uses
def sample(net, count, temperature, pixels=1.0, g=None):
    """uint8 images (count, 3, 32, 32) from a network calibrated for this temperature of z."""
    logits, _ = net.top_down(noise(g, net.start.device), count, temperature=temperature)
    return quantise(dmol_sample(logits, pixels, g))
def draw_pictures(args, net, images, test, out):
    """Reconstructions, samples by temperature, and what each scale of latents holds."""
    from common import save_grid
    g, x, seen = torch.Generator(images.device), test[:32], calibrated(net, images)
    draw, rows = noise(g.manual_seed(args.seed), x.device), []
    logits, groups = seen.top_down(draw, len(x), seen.bottom_up(scaled(x)))
    pairs = torch.stack([x, quantise(dmol_mean(logits))], dim=1)  # originals left of their copies
    save_grid(pairs.flatten(0, 1), out / "reconstructions.png")
    # A row for each scale of four images: the image, and seven draws of all groups from there on.
    for i, known in product(range(min(4, len(x))), sorted({0, *accumulate(net.scales[::-1])})[:-1]):
        z = [group["z"][i:i + 1].expand(7, -1, -1, -1) for group in groups[:known]]
        logits, _ = seen.top_down(draw, 7, z=z)
        rows += [x[i:i + 1], quantise(dmol_mean(logits))]
    save_grid(torch.cat(rows), out / "scales.png")
    rows = [sample(calibrated(net, None, t / 10), 8, t / 10, args.pixels, g.manual_seed(args.seed))
            for t in (6, 7, 8, 9, 10)]
    save_grid(torch.cat(rows), out / "temperatures.png")
def apply(args, state, device, out):
    """What --generate, --interpolate and --evaluate do with the trained weights."""
    from matplotlib.figure import Figure
    from common import export, load, save_grid
    net = build(args, device).requires_grad_(False)
    net.load_state_dict(state["ema"])
    g, t = torch.Generator(device).manual_seed(args.seed), args.temperature
    sampler = calibrated(net, None, t) if args.generate or args.interpolate else None
    for start in range(0, args.generate or 0, 256):
        x = sample(sampler, min(256, args.generate - start), t, args.pixels, g)
        export(x, out / "generated", start)
        if start == 0:
            save_grid(x[:64], out / "generated.png")
        print(f"{start + len(x)} of {args.generate} images in {out / 'generated'}")
    if args.interpolate:  # each row along the sphere between two draws of noise, group by group
        angle = torch.linspace(0, math.pi / 2, 8, device=device)[:, None, None, None]
        def between(shape):
            a, b = torch.randn(2, 8, 1, *shape[1:], generator=g, device=device)
            return (angle.cos() * a + angle.sin() * b).flatten(0, 1)
        logits, _ = sampler.top_down(between, 64, temperature=t)
        save_grid(quantise(dmol_mean(logits)), out / "interpolate.png")
    if args.evaluate:
        images, test = (split.to(device) for split in load(args.data, args.subset))
        seen, few = calibrated(net, images), test[: args.iw_images]
        reconstruction, kl = measure(seen, test)
        axes = Figure().add_subplot(xlabel="group, from coarse to fine", ylabel="KL, bits/dim")
        for i, units in enumerate(kl, 1):  # a unit, channel of z_i, is active from 0.1 nats on
            axes.bar(i, units.sum().item(), color="C0")
            print(f"group {i:3}  KL {units.sum():.4f} bits/dim  active units "
                  f"{(units * NATS > 0.1).sum()} of {len(units)}")
        axes.figure.savefig(out / "kl_by_group.png")
        print(f"ELBO {reconstruction + kl.sum():.4f} bits/dim: reconstruction {reconstruction:.4f},"
              f" KL {kl.sum():.4f}, of {len(test)} test images")
        bits = torch.cat([iw_bound(seen, scaled(x), args.iw, g) for x in few.split(100)]) / -NATS
        print(f"IW bound, K = {args.iw}: {bits.mean():.4f} bits/dim, of {len(few)} test images "
              f"whose ELBO is {sum(part.sum() for part in measure(seen, few)):.4f}")
# -------------------------------------------------------------------------------------------- CLI
KEPT = """width mults groups cells outer expand flows residual mixtures data subset batch_size seed
    epochs lr ema sample_every kl_warmup spectral temperature pixels""".split()
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
    flag("--lr", 1e-2, "highest learning rate")
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
    numbers = {"type": lambda text: [int(n) for n in text.split(",")], "metavar": "N,N,..."}
    flag("--width", 64, "channels at 32x32")
    flag("--mults", [1, 2], "channels at 32x32, 16x16, ..., in widths; the last repeats", **numbers)
    flag("--groups", [12, 8], "of latents, at 16x16, 8x8, ..., 0 for none", **numbers)
    flag("--cells", 1, "residual cells each way a group")
    flag("--outer", 2, "residual cells each way at 32x32")
    flag("--expand", 6, "channels of depthwise convolutions, in units of the others'")
    flag("--flows", 0, "inverse autoregressive flows a group; 0 by default")
    flag("--residual", 0.1, "scale of what a cell adds; more for a shallow network")
    flag("--mixtures", 10, "logistics a pixel: fewer leave more to the latents")
    flag("--kl-warmup", 2.0, "epochs in which the weight of the KL rises to 1")
    flag("--spectral", 1e-2, "weight lambda of the regulariser")
    flag("--temperature", 0.7, "of latents: 1 is the model's own, less is safer and duller")
    flag("--pixels", 0.7, "temperature of pixels given the latents: less is smoother")
    flag("--interpolate", False, "only draw the ways between samples", **tick)
    flag("--iw", 20, "draws of z for the importance-weighted bound of --evaluate", metavar="K")
    flag("--iw-images", 1000, "test images of that bound")
    args, state = parser.parse_args(argv), None
    path = Path(args.out) / "checkpoint.pt"
    use = args.generate or args.evaluate or args.interpolate
    if use or args.resume:
        state = load_checkpoint(path)
        parser.set_defaults(**state["args"])
        args = parser.parse_args(argv)
        for key in KEPT[: 9 if use else 13]:
            if getattr(args, key) != state["args"][key]:
                name = key.replace("_", "-")
                die(f"{path} was trained with --{name} {state['args'][key]}: leave that flag out")
    elif path.exists():
        die(f"{path} is there already: go on with --resume, or name another folder with --out")
    for key, value in vars(args).items():
        low = 1e-9 * (key not in "subset lr seed time_limit flows kl_warmup spectral".split())
        if type(value) in (int, float) and not low <= value < 2**31:
            die(f"--{key.replace('_', '-')} {value} is out of range")
    if min(args.mults) < 1 or min(args.groups) < 0 or not any(args.groups) or len(args.groups) > 4:
        die("--groups takes one to four numbers, 0 for none, not all 0; --mults numbers above 0")
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
