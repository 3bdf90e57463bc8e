"""EBM: an energy-based model of 32x32 images, in one file (data from common.py).

A network gives each image x an energy E(x), low if the image is likely and high if it is not:
    p(x) = exp(-E(x) / T) / Z                  Z = integral of exp(-E(x) / T) over all images
Nobody knows Z, but neither learning nor sampling needs it. Langevin dynamics samples p by K noisy
steps downhill (Du & Mordatch 2019, arXiv:1903.08689, algorithm 1), g cut to +-clamp, x to [0, 1]:
    x = x - a g + s z,      g = grad E(x),      z ~ N(0, I)                     T = s^2 / (2 a)
T times the gradient of -ln p(data) is that of E(x+) - E(x-), x+ from the data and x- from p. For
x- contrastive divergence takes the ends of short chains, here of persistent ones (Tieleman 2008): a
buffer keeps the ends, where the next K steps go on, but for a few that start anew in uniform noise.
The loss has two terms (2019, section 3.3), of which the second keeps energies near 0:
    gap = mean(E(x+) - E(x-))            penalty = alpha mean(E(x+)^2 + E(x-)^2)
While the gap is near 0, chains keep up with the network; if not, the guards below step in.
    python ebm.py --epochs 50                                 train on CIFAR-10, files in runs/ebm
    python ebm.py --generate 1000 --chain 2000                PNG files, from fresh noise
    python ebm.py --evaluate --inpaint --denoise              AUROC, histograms, pictures, PSNR
Not as in the papers: SiLU, singular values cut to 1 (Gouk et al. 2018, arXiv:1804.04368), larger s,
noise on the data, EMA, guards; no KL term, augmentation or scales (2021, arXiv:2012.01316).
Notation: B batch, C channels, H W pixels; images are float (B, 3, 32, 32) in [0, 1]; E is (B,)."""
import argparse, copy, io, math, os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, normalize, silu
NAME = "ebm"
# ---------------------------------------------------------------------------------------- network
class Block(nn.Module):
    """Residual block, (B, cin, H, W) -> (B, cout, H, W)."""
    def __init__(self, cin, cout):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
    def forward(self, x):
        return self.skip(x) + self.conv2(silu(self.conv1(silu(x))))

class EnergyNet(nn.Module):
    """E: (B, 3, H, W) in [0, 1] -> (B,), each of its image alone. width * mults channels at
    1 / stride of H and W, at half of that, ..., `blocks` blocks at each."""
    def __init__(self, amp=False, width=64, mults=(1, 2, 4, 4), blocks=2, stride=1):
        super().__init__()
        self.amp, widths = amp, [width * m for m in mults]
        self.stem = nn.Conv2d(3, widths[0], 2 + stride, stride, padding=1)
        self.levels = nn.ModuleList(nn.Sequential(*(
            Block(c if i else above, c) for i in range(blocks)))
            for above, c in zip(widths[:1] + widths[:-1], widths, strict=True))
        self.head = nn.Linear(widths[-1], 1)
        self.convolutions = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]
        for layer in self.convolutions:
            layer.register_buffer("u", torch.randn(len(layer.weight)))
        self.project(30)
    @torch.no_grad()
    def project(self, iterations=1):
        """Cut singular values of convolutions (C_out, rest) to 1, by power iterations on u."""
        for layer in self.convolutions:
            w, u = layer.weight.flatten(1), layer.u
            for _ in range(iterations):
                v = normalize(u @ w, dim=0)
                u.copy_(normalize(w @ v, dim=0))
            layer.weight.div_((u @ w @ v).clamp(min=1))
    def forward(self, x):
        h = self.stem(x)  # fp32: bf16 has steps of .004 below 1, as large as the noise of a chain
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            for level, blocks in enumerate(self.levels):
                h = blocks(avg_pool2d(h, 2) if level else h)
        return self.head(silu(h.to(x.dtype)).mean((2, 3)))[:, 0]
# ------------------------------------------------------------------------------------------- loss
def dequantise(images, generator=None, smooth=0.0):
    """uint8 -> float in [0, 1], evenly over the bin of each value, 1/256 wide, + N(0, smooth^2)."""
    kind = {"generator": generator, "device": images.device}
    x = (images + torch.rand(images.shape, **kind)) / 256
    return (x + smooth * torch.randn(x.shape, **kind)).clamp(0, 1) if smooth else x
def quantise(x):  # float -> uint8, the bin that x lies in
    return (x * 256).clamp(0, 255).to(torch.uint8)
def contrastive_divergence(energy, data, chains, alpha=1.0):
    """(gap, penalty, E(data), E(chains)); data and chains (B, 3, H, W) share one forward."""
    plus, minus = energy(torch.cat([data, chains.detach()])).split([len(data), len(chains)])
    penalty = alpha * (plus.square().mean() + minus.square().mean())
    return plus.mean() - minus.mean(), penalty, plus, minus
# --------------------------------------------------------------------------------------- samplers
def langevin(energy, x, steps, step, noise, clamp=math.inf, generator=None,
             hook=lambda x, e, g: x):
    """Langevin dynamics in any energy(x) -> (B,), from x (B, ...) in [0, 1], of that many steps.
    Samples exp(-E / T), T = noise^2 / (2 step), but for finite steps (E = c x^2 / 2 gets variance
    T / c / (1 - c step / 2)), the cut where E is steep and walls that gather what would leave.
    hook(x, e, g) is the x to go on from, e (B,) and g are energy and uncut gradient before it."""
    for _ in range(steps):
        z = torch.randn(x.shape, generator=generator, device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            e = energy(x)
            (g,) = torch.autograd.grad(e.sum(), x)  # of x alone: weights get no gradient
        x = (x.detach() - step * g.clamp(-clamp, clamp) + noise * z).clamp(0, 1)
        x = hook(x, e.detach(), g)
    return x.detach()

class Buffer(nn.Module):
    """The ends of `size` persistent chains, as bytes (size, ...); they start as noise."""
    def __init__(self, size, shape=(3, 32, 32), generator=None, device=None):
        super().__init__()
        self.register_buffer("chains", torch.randint(
            256, (size, *shape), dtype=torch.uint8, generator=generator, device=device))
    def draw(self, count, fresh, generator=None):
        """(slots, x): `count` different chains, each with probability `fresh` uniform noise."""
        kind = {"generator": generator, "device": self.chains.device}
        slots = torch.randperm(len(self.chains), **kind)[:count]
        x = dequantise(self.chains[slots], generator)
        anew = torch.rand(count, *[1] * (x.dim() - 1), **kind) < fresh
        return slots, torch.where(anew, torch.rand(x.shape, **kind), x)
    def write(self, slots, x, good):  # to where the chains came from, unless good () is False
        self.chains[slots] = torch.where(good, quantise(x), self.chains[slots])
# ----------------------------------------------------------------------------------------- guards
# A bad step changes neither weights nor buffer. Lasting trouble brings back the last healthy state
# and halves the learning rate; the third time ends the run.
def step_is_good(gap, norm, recent):
    """Flag () on the device: gap and norm are finite, the gap within 1 or 5 medians of `recent`."""
    limit = (5 * recent.abs().nanmedian()).nan_to_num(0).clamp(min=1)
    return gap.isfinite() & norm.isfinite() & (gap.abs() <= limit)
def trouble(net, skipped, last):
    """Why the last healthy state is due, or ""; `last` has the latest of TERMS by name."""
    reasons = {
        "weights not finite": not all(p.isfinite().all() for p in net.parameters()),
        f"{skipped:.0f} steps skipped": skipped >= 50,
        "energies above 10": max(abs(last[key]) for key in TERMS[:2]) > 10,
        "chains black and white": last["saturated"] > max(0.5, 3 * last["data saturated"])}
    return ", ".join(reason for reason, true in reasons.items() if true)
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
    """Average the weights, half-life in steps; in a young run, of a tenth of the steps so far."""
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
    """log.csv, a row an epoch, and its losses as curves.png."""
    lines = [rows[0], *(row.values() for row in rows)]
    (folder / "log.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    losses = {key: [row[key] for row in rows] for key in rows[0] if "loss" in key}
    plot(folder / "curves.png", [row["epoch"] for row in rows], losses, xlabel="epoch")
# ------------------------------------------------------------------------------------------ train
TERMS = ["E data", "E chains", "gap", "penalty", "saturated", "data saturated", "skipped"]
def build(args, device):
    torch.manual_seed(args.seed)
    net = EnergyNet(args.amp, args.width, args.mults, args.blocks, args.stride)
    return net.to(device, memory_format=torch.channels_last)

def train(args, state, device, out):
    """Start, or go on from the checkpoint `state`."""
    from tqdm import tqdm
    from common import batches, load, save_grid
    images, test = (split.to(device) for split in load(args.data, args.subset))
    size, steps = args.batch_size, len(images) // args.batch_size  # steps an epoch
    if not steps:
        die(f"{len(images)} training images do not fill a batch: lower --batch-size")
    total, step, seconds, rows, failures = args.epochs * steps, 0, 0.0, [], 0
    net, g = build(args, device), torch.Generator(device).manual_seed(args.seed)
    ema = copy.deepcopy(net).requires_grad_(False)
    buffer = Buffer(max(args.buffer, size), images.shape[1:], g, device)
    log = torch.zeros(steps, len(TERMS), device=device)  # means of the steps of an epoch
    optimizer = torch.optim.Adam(net.parameters(), args.lr, betas=(0.0, 0.999), fused=True)
    parts = dict(net=net, ema=ema, optimizer=optimizer, buffer=buffer)
    def states():
        return {key: part.state_dict() for key, part in parts.items()}
    def go_to(states):
        for key, part in parts.items():  # copies, for an optimiser works in those that it is given
            part.load_state_dict(copy.deepcopy(states[key]))
    if state:
        step, seconds, rows, failures = (state[k] for k in ("step", "seconds", "rows", "failures"))
        go_to(state)
        g.set_state(state["random"])
        log[: len(state["log"])] = state["log"].to(device)
    healthy, since = copy.deepcopy(states()), step  # since then steps have been skipped
    for part in (net, ema) if args.compile else ():
        part.compile()
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {len(images)} images"
          f", step {step} of {total} on {device}{', bf16' * args.amp}")
    out.mkdir(parents=True, exist_ok=True)
    def save():
        save_checkpoint(out / "checkpoint.pt", {
            "args": {key: getattr(args, key) for key in KEPT}, "rows": rows,
            "epoch": step // steps, "step": step, "seconds": seconds, "random": g.get_state(),
            "log": log, "failures": failures, **states()})
    stop = []  # why, once there is a reason; a second Ctrl-C does not wait for the end of the step
    signal.signal(signal.SIGINT, lambda *signal_and_frame: (
        signal.default_int_handler(*signal_and_frame) if stop else stop.append("interrupted")))
    bar = tqdm(total=total * size, initial=step * size, unit="img", disable=None)
    begin, shown = time.time(), 0
    while step < total and not stop:
        tick, first = time.time(), step
        for x in batches(images, size, args.seed, epoch=step // steps, skip=step % steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, total, args.lr) / 2**failures
            slots, start = buffer.draw(size, args.fresh, g)
            chains = sample(args, net.requires_grad_(False), start, g, args.steps)
            net.requires_grad_(True)  # off above, or compiled steps work out gradients of weights
            data = dequantise(x, g, args.smooth)
            gap, penalty, plus, minus = contrastive_divergence(net, data, chains, args.penalty)
            optimizer.zero_grad()
            (gap + penalty).backward()
            norm, i = nn.utils.clip_grad_norm_(net.parameters(), 0.5), step % steps
            good = step_is_good(gap.detach(), norm, log[max(0, i - 100) : i, 2])
            for p in net.parameters():  # as beta_1 is 0, Adam moves nothing without a gradient
                p.grad = torch.where(good, p.grad, 0)
            optimizer.step()
            net.project()
            update_ema(ema, net, step, args.ema * total)
            buffer.write(slots, chains, good)
            log[i] = torch.stack([term.detach().float().mean() for term in (  # walls are 0 and 1
                plus, minus, gap, penalty, chains % 1 == 0, data % 1 == 0, ~good)])
            step, now = step + 1, time.time()
            bar.update(size)
            if args.time_limit is not None and now - begin > 60 * args.time_limit:
                stop.append("time limit")
            if now - shown > 1 or stop or step % steps == 0:  # the only wait for the device
                last = dict(zip(TERMS, log[i].tolist(), strict=True))
                if why := trouble(net, log[since % steps : i + 1, -1].sum().item(), last):
                    failures, since = failures + 1, step
                    if failures == 3:
                        raise FloatingPointError(
                            f"diverged three times, at last at step {step} ({why}); {out} is as "
                            f"before: --resume or start anew with --lr {args.lr / 10:.1g}")
                    go_to(healthy)
                    bar.write(f"step {step}: {why}; back to the last healthy state, half the rate")
                bar.set_postfix(gap=f"{last['gap']:.4f}", epoch=f"{step / steps:.1f}")
                shown = now
            if stop:
                break
        seconds += time.time() - tick
        if step % steps == 0:
            rate = (step - first) * size / (time.time() - tick)
            kept = log[log[:, -1] == 0].mean(0).nan_to_num(0).tolist()
            rows.append({"epoch": step // steps, "images/s": rate, "seconds": seconds,
                         "train loss": kept[2] + kept[3], **dict(zip(TERMS, kept, strict=True)),
                         "skipped": log[:, -1].sum().item(), "failures": failures})
            save()
            healthy, since = copy.deepcopy(states()), step
            write_log(rows, out)
            lines = {key: [row[key] for row in rows] for key in rows[0] if "E " in key}
            plot(out / "energies.png", [row["epoch"] for row in rows], lines, xlabel="epoch")
            bar.write("  ".join(f"{key} {value:.5g}" for key, value in rows[-1].items()))
        if step == total or step % (steps * args.sample_every) == 0:
            fixed = torch.Generator(device).manual_seed(args.seed)
            save_grid(generate(args, ema, 64, fixed), out / f"samples_{step // steps:04d}.png")
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if step < total:
        save()
        print(f"{stop[0]}: saved step {step} of {total}, go on with --resume --out {out}")
        raise SystemExit(130 if stop[0] == "interrupted" else 0)
    draw_chains(args, ema, test, out)
# ------------------------------------------------------------------------------------------- uses
def sample(args, net, x, g, steps, hook=lambda x, e, g: x):
    return langevin(net, x, steps, args.step_size, args.noise, args.clamp, g, hook)
def generate(args, net, count, g):
    """uint8 images (count, 3, 32, 32) from uniform noise, never from the buffer; the last step,
    smooth^2 / T and without noise, takes the noise of the data off (Tweedie's formula)."""
    x = torch.rand(count, 3, 32, 32, generator=g, device=g.device)
    x = sample(args, net, x, g, args.chain)
    return quantise(langevin(net, x, 1, 2 * args.step_size * (args.smooth / args.noise) ** 2, 0))
def draw_chains(args, net, test, out):
    """Columns of chains, each row later: from noise; twice as long, from test images and noise.
    If long chains from images leave them, the energy is no density but serves short chains."""
    from common import save_grid
    g = torch.Generator(test.device).manual_seed(args.seed)
    noise = torch.rand(8, 3, 32, 32, generator=g, device=test.device)
    x = torch.cat([dequantise(test[:8], g), noise])
    rows = [quantise(x)]
    sample(args, net, x, g, 2 * args.chain, lambda x, e, g: rows.append(quantise(x)) or x)
    for name, count, last in ("chains", 8, args.chain), ("long_run", len(x), 2 * args.chain):
        chosen = [rows[int(last ** (i / 7)) if i else 0][-count:] for i in range(8)]
        save_grid(torch.cat(chosen), out / f"{name}.png", columns=count)
def restore(truth, known):  # a hook that sets the known pixels to the truth
    return lambda x, e, g: torch.where(known, truth, x)
def outliers(test, g):
    """{name: uint8 images} like no image of the test set: as many, of the same shape."""
    kind = {"generator": g, "device": test.device, "dtype": torch.uint8}
    return {
        "uniform": torch.randint(256, test.shape, **kind),
        "constant": torch.randint(256, (len(test), 3, 1, 1), **kind).expand_as(test),
        "interpolated": ((test.int() + test.roll(1, 0)) // 2).to(torch.uint8),
        "upside-down": test.flip(2)}
def auroc(inside, outside):
    """Share of pairs where `outside` (M,) has more energy than `inside` (N,), ties 1/2."""
    low, high = (torch.searchsorted(inside.sort().values, outside, right=r) for r in (False, True))
    return (low + high).double().mean().item() / 2 / len(inside)

def apply(args, state, device, out):
    """What --generate, --inpaint, --denoise and --evaluate do with the trained weights."""
    from common import export, load, save_grid
    net = build(args, device).requires_grad_(False)
    net.load_state_dict(state["ema"])
    g = torch.Generator(device).manual_seed(args.seed)
    test = load(args.data)[1].to(device) if args.inpaint or args.denoise or args.evaluate else None
    for start in range(0, args.generate or 0, 256):
        x = generate(args, net, min(256, args.generate - start), g)
        export(x, out / "generated", start)
        if start == 0:
            save_grid(x[:64], out / "generated.png")
        print(f"{start + len(x)} of {args.generate} images in {out / 'generated'}")
    if args.inpaint:  # rows of a test image, the same without its centre, and six completions
        known = nn.functional.pad(torch.zeros(16, 16, device=device), [8] * 4, value=1).bool()
        truth = dequantise(test[:6, None], g)
        many = truth.expand(-1, 6, -1, -1, -1).flatten(0, 1)
        x = torch.rand(many.shape, generator=g, device=device)
        x = sample(args, net, x, g, args.chain, restore(many, known)).unflatten(0, (-1, 6))
        rows = torch.cat([truth, torch.where(known, truth, 0), x], dim=1)
        save_grid(quantise(rows.flatten(0, 1)), out / "inpaint.png")
    if args.denoise:  # salt and pepper on a tenth of the pixels; rows of truth, before, after
        truth = dequantise(test[:16], g)
        u = torch.rand(len(truth), 1, 32, 32, generator=g, device=device)
        before = torch.where(u < 0.1, (u < 0.05).float(), truth)
        rows = torch.stack([truth, before, sample(args, net, before, g, args.steps)], dim=1)
        noisy, clean = -10 * (rows[:, 1:] - rows[:, :1]).square().mean((2, 3, 4)).log10().mean(0)
        print(f"PSNR {noisy:.2f} dB before, {clean:.2f} dB after, of {len(truth)} test images")
        save_grid(quantise(rows.flatten(0, 1)), out / "denoise.png", columns=12)
    if args.evaluate:
        others = {**outliers(test, g), args.ood: torch.cat(load(args.ood)).to(device)}
        train = load(args.data, args.subset)[0][: len(test)].to(device)
        sets = {"train": train, "test": test, "samples": generate(args, net, 100, g)}
        e = {name: torch.cat([net(dequantise(part, g)) for part in x.split(250)]).cpu()
             for name, x in {**sets, **others}.items()}
        for name in others:
            print(f"AUROC {auroc(e['test'], e[name]):.3f}  of test images, of mean energy "
                  f"{e['test'].mean():.4f}, against {name}, of {e[name].mean():.4f}")
        low, high = (end.item() for end in torch.cat([e[name] for name in sets]).aminmax())
        lines = {name: (e[name].histc(50, low, high) / len(e[name])).tolist() for name in sets}
        plot(out / "histogram.png", torch.linspace(low, high, 101)[1::2], lines, xlabel="energy")
# -------------------------------------------------------------------------------------------- CLI
KEPT = ["width", "mults", "blocks", "stride", "data", "subset", "batch_size", "buffer", "epochs",
        "lr", "ema", "seed", "sample_every", "steps", "step_size", "noise", "clamp", "chain",
        "fresh", "penalty", "smooth"]  # the first are fixed by a checkpoint, the others remembered
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
    flag("--lr", 3e-4, "highest learning rate")
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
    flag("--width", 64, "channels at the highest resolution")
    flag("--mults", [1, 2, 4, 4], "channels at each resolution, in units of the width",
         type=lambda text: [int(m) for m in text.split(",")], metavar="M,M,...")
    flag("--blocks", 2, "residual blocks at a resolution")
    flag("--stride", 1, "pixels to a place of the highest resolution", choices=[1, 2, 4])
    flag("--steps", 40, "Langevin steps an update, K, and of --denoise", metavar="K")
    flag("--step-size", 20.0, "a: what a step takes of the gradient")
    flag("--noise", 0.02, "s: std of the noise of a step; images are in [0, 1]")
    flag("--clamp", 0.01, "largest gradient of a pixel")
    flag("--chain", 500, "Langevin steps from noise to a sample")
    flag("--buffer", 10_000, "persistent chains")
    flag("--fresh", 0.05, "share of the drawn chains that start anew")
    flag("--penalty", 1.0, "alpha: weight of the squared energies")
    flag("--smooth", 0.03, "std of the noise on training images")
    flag("--inpaint", False, "only complete test images whose centre is hidden", **tick)
    flag("--denoise", False, "only clean test images of salt and pepper", **tick)
    flag("--ood", "shapes", "other images for --evaluate, like --data")
    args, state = parser.parse_args(argv), None
    path = Path(args.out) / "checkpoint.pt"
    use = args.generate or args.evaluate or args.inpaint or args.denoise
    if use or args.resume:
        state = load_checkpoint(path)
        parser.set_defaults(**state["args"])
        args = parser.parse_args(argv)
        for key in KEPT[: 4 if use else 8]:
            if getattr(args, key) != state["args"][key]:
                name = key.replace("_", "-")
                die(f"{path} was trained with --{name} {state['args'][key]}: leave that flag out")
    elif path.exists():
        die(f"{path} is there already: go on with --resume, or name another folder with --out")
    for key, value in vars(args).items():
        low = 1e-9 * (key not in "subset lr seed time_limit fresh penalty smooth".split())
        if type(value) in (int, float) and not low <= value <= (1 if key == "fresh" else 2**31 - 1):
            die(f"--{key.replace('_', '-')} {value} is out of range")
    if len(args.mults) > 7 - args.stride.bit_length() or min(args.mults) < 1:
        die("--mults takes numbers above 0, up to 6, or 5 with --stride 2, 4 with --stride 4")
    return args, state, use

def main(argv=None):
    args, state, use = parse(argv)
    device, gpu = torch.device(args.device), args.device != "cpu"
    args.compile = gpu if args.compile is None else args.compile
    args.amp = gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported() if args.amp is None else args.amp
    try:
        (apply if use else train)(args, state, device, Path(args.out))
    except OSError as error:
        die(f"{error}; what was there before is kept: make room, then --resume")
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        die(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None

if __name__ == "__main__":
    main()
