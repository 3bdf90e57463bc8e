"""EBM: an energy-based model of 32x32 images, in one file (data from common.py).

A network gives each image x an energy E(x), low if the image is likely and high if it is not:
    p(x) = exp(-E(x) / T) / Z                  Z = integral of exp(-E(x) / T) over all images
Langevin dynamics samples p without Z, by K noisy steps down E (Du & Mordatch, arXiv:1903.08689):
    x = x - a g + s z,      g = grad E(x),      z ~ N(0, I)                     T = s^2 / (2 a)
Learning needs no Z: the gradient in the weights of -T ln p(x+) is on average that of E(x+) - E(x-),
x- from p. Persistent contrastive divergence (Tieleman 2008) lets chains of a buffer go on K steps:
    gap = mean(E(x+) - E(x-))            penalty = alpha mean(E(x+)^2 + E(x-)^2), so E stays near 0
Data get noise of std --smooth, as chains have some: p is the density of y = x + std z, for which
    mean(x | y) = y + std^2 grad ln p(y) = y - d grad E(y),      d = std^2 / T           (Tweedie)
E learns this, and with the same d for louder sigma: away from data it grows as noise squared.
    score = mean((d grad E(x + sigma z) / sigma - z)^2),         ln sigma even, --smooth to 1
Loss: gap + penalty + 0.1 score; in the first --warm-up of the run score alone, as chains cost most.
    python ebm.py --epochs 50                                 train on CIFAR-10, files in runs/ebm
    python ebm.py --generate 1000 --chain 200                 PNG files, from fresh noise
    python ebm.py --evaluate --inpaint --denoise              AUROC, histograms, pictures, PSNR
Not as in the papers: score, singular values cut to 1 (arXiv:1804.04368), larger s, EMA, guards.
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
    """E: (B, 3, H, W) -> (B,), linear in the means over H W of silu(h) and of h^2, for E to grow as
    the square of noise does; h are width * mults channels at full, half, ... resolution."""
    def __init__(self, amp=False, width=64, mults=(1, 2, 4, 4), blocks=2):
        super().__init__()
        self.amp, widths = amp, [width * m for m in mults]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(nn.Sequential(*(
            Block(c if i else above, c) for i in range(blocks)))
            for above, c in zip(widths[:1] + widths[:-1], widths, strict=True))
        self.head = nn.Linear(2 * sum(widths), 1)
        nn.init.zeros_(self.head.weight)  # E is flat at the start
        self.convolutions = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]
        for layer in self.convolutions:
            layer.register_buffer("u", torch.randn(len(layer.weight)))
        self.project(30)
    @torch.no_grad()
    def project(self, iterations=1):
        """Keep E smooth: divide W (C_out, rest) by its largest singular value u.Wv, if above 1."""
        for layer in self.convolutions:
            w, u = layer.weight.flatten(1), layer.u
            for _ in range(iterations):
                v = normalize(u @ w, dim=0)
                u.copy_(normalize(w @ v, dim=0))
            layer.weight.div_((u @ w @ v).clamp(min=1))
    def forward(self, x):
        h, means = self.stem(10 * x - 5), []  # fp32: bf16 would round x to 0.003
        for level, blocks in enumerate(self.levels):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
                h = blocks(avg_pool2d(h, 2) if level else h)
            means += [f(h.to(x.dtype)).mean((2, 3)) for f in (silu, torch.square)]
        return self.head(torch.cat(means, dim=1))[:, 0]
# ------------------------------------------------------------------------------------------- loss
def dequantise(images, generator=None):  # uint8 -> float in [0, 1], evenly over a bin of 1/256
    return (images + torch.rand(images.shape, generator=generator, device=images.device)) / 256
def quantise(x):  # float -> uint8, the bin that x lies in
    return (x * 256).clamp(0, 255).to(torch.uint8)
def contrastive_divergence(energy, data, chains, alpha=1.0):
    """(gap, penalty, E(data), E(chains)); data and chains (B, 3, H, W) share one forward."""
    plus, minus = energy(torch.cat([data, chains.detach()])).split([len(data), len(chains)])
    penalty = alpha * (plus.square().mean() + minus.square().mean())
    return plus.mean() - minus.mean(), penalty, plus, minus
def denoising_score_matching(energy, x, sigma, scale, generator=None):
    """Mean |scale grad E(y) / sigma - z|^2, y = x + sigma z, sigma (B, 1, 1, 1); 1 if E is flat,
    least if y - scale grad E(y) = E[x | y] (Vincent 2011; Li et al. 2019, arXiv:1910.07762)."""
    z = torch.randn(x.shape, generator=generator, device=x.device)
    y = (x + sigma * z).requires_grad_()
    (g,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
    return (scale / sigma * g - z).square().mean()
# --------------------------------------------------------------------------------------- samplers
def langevin(energy, x, steps, step, noise, clamp=math.inf, generator=None, hook=None):
    """Langevin dynamics in any energy(x) -> (B,), from x (B, ...) in [0, 1], of that many steps.
    Samples exp(-E / T), T = noise^2 / (2 step), but for finite steps (E = c x^2 / 2 gets variance
    T / c / (1 - c step / 2)), the clamp of steep gradients and pixels piling up at 0 and 1.
    hook(x, e, g) returns the next x; e (B,), g: energy and unclamped gradient before the step."""
    for _ in range(steps):
        z = torch.randn(x.shape, generator=generator, device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            e = energy(x)
            (g,) = torch.autograd.grad(e.sum(), x)  # of x alone: weights get no gradient
        x = (x.detach() - step * g.clamp(-clamp, clamp) + noise * z).clamp(0, 1)
        x = hook(x, e.detach(), g) if hook else x
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
# ----------------------------------------------------------------------------------------- guards
def step_is_good(gap, norm, recent):
    """0-dim bool, on the device: gap, norm are finite, |gap| <= max(1, 5 medians of |recent|)."""
    limit = (5 * recent.abs().nanmedian()).nan_to_num(0).clamp(min=1)
    return gap.isfinite() & norm.isfinite() & (gap.abs() <= limit)
def trouble(net, skipped, steps, last):
    """Why the last saved state should come back with half the learning rate, or ""."""
    reasons = {
        "weights not finite": not all(p.isfinite().all() for p in net.parameters()),
        f"{skipped:.0f} steps skipped": skipped >= min(50, steps),
        "energies above 10": max(abs(last[key]) for key in TERMS[:2]) > 10,
        "chains black and white": last["saturated"] > (1 + last["data saturated"]) / 2}
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
TERMS = ("E data", "E chains", "E start", "gap", "penalty", "gradient", "clamped", "saturated",
         "score", "data saturated", "skipped")  # E start: before the K steps; saturated: at 0 or 1
def build(args, device):
    torch.manual_seed(args.seed)
    net = EnergyNet(args.amp, args.width, args.mults, args.blocks)
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
    warm = state["warm"] if state else int(args.warm_up * total)  # steps without chains
    net, g = build(args, device), torch.Generator(device).manual_seed(args.seed)
    ema = copy.deepcopy(net).requires_grad_(False)
    buffer = Buffer(max(args.buffer, size), images.shape[1:], g, device)
    log = torch.zeros(steps, len(TERMS), device=device)  # means of the steps of an epoch
    optimizer = torch.optim.Adam(net.parameters(), args.lr, betas=(0.0, 0.999), fused=True)
    parts = dict(net=net, ema=ema, optimizer=optimizer, buffer=buffer)
    def go_to(state):
        for key, part in parts.items():
            part.load_state_dict(state[key])
    if state:
        step, seconds, rows, failures = (state[k] for k in ("step", "seconds", "rows", "failures"))
        go_to(state)
        len(g.get_state()) == len(state["random"]) and g.set_state(state["random"])  # same device
        log[: len(state["log"])] = state["log"].to(device)
    for part in (net, ema) if args.compile else ():  # but not net.forward, differentiated twice
        part.compile()
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {len(images)} images"
          f", step {step} of {total} on {device}{', bf16' * args.amp}")
    out.mkdir(parents=True, exist_ok=True)
    def save():
        save_checkpoint(out / "checkpoint.pt", {
            "args": {key: getattr(args, key) for key in KEPT}, "rows": rows,
            "epoch": step // steps, "step": step, "seconds": seconds, "random": g.get_state(),
            "log": log, "failures": failures, "warm": warm, **{
                key: part.state_dict() for key, part in parts.items()}})
    state or save()  # that there is one to go back to
    stop = []  # why, once there is a reason; a second Ctrl-C does not wait for the end of the step
    signal.signal(signal.SIGINT, lambda *signal_and_frame: (
        signal.default_int_handler(*signal_and_frame) if stop else stop.append("interrupted")))
    bar = tqdm(total=total * size, initial=step * size, unit="img", disable=None)
    begin, shown, since = time.time(), 0, step  # since then steps have been skipped
    while step < total and not stop:
        tick, first = time.time(), step
        for x in batches(images, size, args.seed, epoch=step // steps, skip=step % steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, total, args.lr) / 2**failures
            x, i = dequantise(x, g), step % steps
            data = (x + args.smooth * torch.randn(x.shape, generator=g, device=device)).clamp(0, 1)
            gap = penalty = torch.zeros((), device=device)
            terms, seen = [gap + math.nan] * 8, []  # no terms without chains
            slots, chains = buffer.draw(size, args.fresh, g)
            if step <= warm and step % 50 == 0:  # the score leaves a constant open: E(data) = 0
                net.head.bias.data -= net(data).mean().detach()
            if step >= warm:
                chains = sample(args, net.requires_grad_(False), chains, g, args.steps,
                                lambda x, e, g, seen=seen: seen.append((e, g.abs())) or x)
                net.requires_grad_(True)  # off above: chains need no gradients of weights
                gap, penalty, plus, minus = contrastive_divergence(net, data, chains, args.penalty)
                e, slope = map(torch.stack, zip(*seen, strict=True))  # (K, B), (K, B, 3, H, W)
                terms = plus, minus, e[0], gap, penalty, slope, slope > args.clamp, chains % 1 == 0
            sigma = args.smooth ** (1 - torch.rand(size, 1, 1, 1, generator=g, device=device))
            score = denoising_score_matching(net.forward, x, sigma, tweedie(args), g)
            optimizer.zero_grad()
            (gap + penalty + 0.1 * score).backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            good = step_is_good(gap.detach(), norm, log[max(0, i - 100) : i, 3])
            for p in net.parameters():  # as beta_1 is 0, Adam moves nothing without a gradient
                p.grad = None if p.grad is None else torch.where(good, p.grad, 0)
            optimizer.step()
            net.project()
            update_ema(ema, net, step, args.ema * total)
            buffer.chains[slots] = torch.where(good, quantise(chains), buffer.chains[slots])
            terms = [t.float().mean() for t in (*terms, score, data % 1 == 0, ~good)]
            log[i] = torch.stack(terms).detach()
            step, now = step + 1, time.time()
            bar.update(size)
            if args.time_limit is not None and now - begin > 60 * args.time_limit:
                stop.append("time limit")
            if now - shown > 1 or stop or step % steps == 0:  # the only wait for the device
                last = dict(zip(TERMS, log[i].tolist(), strict=True))
                if why := trouble(net, log[since % steps : i + 1, -1].sum().item(), steps, last):
                    failures, since = failures + 1, step
                    if failures == 3:
                        raise FloatingPointError(f"diverged three times, at step {step} too ({why})"
                                                 f": start anew with --lr {args.lr / 10:.1g}")
                    go_to(load_checkpoint(out / "checkpoint.pt"))
                    bar.write(f"step {step}: {why}; back to the last healthy state, half the rate")
                bar.set_postfix(gap=f"{last['gap']:.4f}", score=f"{last['score']:.3f}")
                shown = now
            if stop:
                break
        seconds += time.time() - tick
        if step % steps == 0:
            rate = (step - first) * size / (time.time() - tick)
            kept = log[log[:, -1] == 0].nanmean(0).nan_to_num(0).tolist()
            row = dict(zip(TERMS, kept, strict=True), skipped=log[:, -1].sum().item())
            rows.append({"epoch": step // steps, "images/s": rate, "seconds": seconds, "train loss":
                row["gap"] + row["penalty"] + 0.1 * row["score"], **row, "failures": failures})
            since = step
            save()
            write_log(rows, out)
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
def sample(args, net, x, g, steps, *hook):
    return langevin(net, x, steps, args.step_size, args.noise, args.clamp, g, *hook)
def tweedie(args):  # d: such a step without noise takes the noise of the data off
    return 2 * args.step_size * (args.smooth / args.noise) ** 2
def generate(args, net, count, g):
    """uint8 images (count, 3, 32, 32) from uniform noise, never from the buffer."""
    x = torch.rand(count, 3, 32, 32, generator=g, device=g.device)
    return quantise(langevin(net, sample(args, net, x, g, args.chain), 1, tweedie(args), 0))
def draw_chains(args, net, test, out):
    """Eight chains from noise and eight from test images; rows are later and later, to 2 --chain.
    If the latter stop looking like images, the energy is no density but serves short chains."""
    from common import save_grid
    g = torch.Generator(test.device).manual_seed(args.seed)
    x = torch.cat([torch.rand(8, 3, 32, 32, generator=g, device=g.device), dequantise(test[:8], g)])
    rows, last = [quantise(x)], 2 * args.chain
    sample(args, net, x, g, last, lambda x, e, g: rows.append(quantise(x)) or x)
    rows = [rows[int(last ** (i / 7)) if i else 0] for i in range(8)]
    save_grid(torch.cat(rows), out / "chains.png", columns=len(x))
def outliers(test, g):
    """{name: uint8 images} like no image of the test set: as many, of the same shape."""
    kind = {"generator": g, "device": test.device, "dtype": torch.uint8}
    order = torch.rand(len(test), 1, 1024, generator=g, device=test.device).argsort(2)
    return {
        "uniform": torch.randint(256, test.shape, **kind),
        "constant": torch.randint(256, (len(test), 3, 1, 1), **kind).expand_as(test),
        "shuffled": test.flatten(2).gather(2, order.expand(-1, 3, -1)).view_as(test),
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
    truth = None if test is None else dequantise(test[:16], g)
    def save(before, after, name):  # truth, before, after; of the next image, ...
        rows = torch.stack([truth, before, after], dim=1)
        save_grid(quantise(rows.flatten(0, 1)), out / name, columns=12)
        return -10 * (rows[:, 1:] - rows[:, :1]).square().mean((2, 3, 4)).log10().mean(0)
    if args.inpaint:
        known = nn.functional.pad(torch.zeros(16, 16, device=device), [8] * 4, value=1).bool()
        x = sample(args, net, torch.rand(truth.shape, generator=g, device=device), g, args.chain,
                   lambda x, *_: torch.where(known, truth + args.smooth * torch.randn_like(x), x))
        x = torch.where(known, truth, langevin(net, x, 1, tweedie(args), 0))
        save(torch.where(known, truth, 0), x, "inpaint.png")
    if args.denoise:
        x = truth + 0.1 * torch.randn(truth.shape, generator=g, device=device)
        noisy, clean = save(x, langevin(net, x, 1, tweedie(args), 0), "denoise.png")
        print(f"PSNR {noisy:.2f} dB before, {clean:.2f} dB after, of {len(x)} test images")
    if args.evaluate:
        sets = {"test": test, "train": load(args.data, args.subset)[0][: len(test)].to(device),
                "samples": generate(args, net, 100, g), **outliers(test, g),
                args.ood: torch.cat(load(args.ood)).to(device)}
        e = {name: torch.cat([net(dequantise(part, g)) for part in x.split(250)]).cpu()
             for name, x in sets.items()}
        for name in [*sets][3:]:
            print(f"AUROC {auroc(e['test'], e[name]):.3f}  of test images against {name}")
        low, high = (end.item() for end in torch.cat([e[k] for k in [*sets][:3]]).aminmax())
        lines = {k: (e[k].histc(50, low, high) / len(e[k])).tolist() for k in [*sets][:3]}
        plot(out / "histogram.png", torch.linspace(low, high, 101)[1::2], lines, xlabel="energy")
# -------------------------------------------------------------------------------------------- CLI
KEPT = """width mults blocks data subset batch_size buffer seed epochs lr ema sample_every
    warm_up steps step_size noise clamp chain fresh penalty smooth""".split()
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
    flag("--warm-up", 0.7, "share of the run with score matching alone, without chains")
    flag("--steps", 40, "Langevin steps an update", metavar="K")
    flag("--step-size", 20.0, "a: what a step takes of the gradient")
    flag("--noise", 0.02, "s: std of the noise of a step; images are in [0, 1]")
    flag("--clamp", 0.01, "largest gradient of a pixel")
    flag("--chain", 500, "Langevin steps from noise to a sample")
    flag("--buffer", 10_000, "persistent chains")
    flag("--fresh", 0.05, "share of the drawn chains that start anew")
    flag("--penalty", 1.0, "alpha: weight of the squared energies")
    flag("--smooth", 0.03, "std of the noise on training images; the least of score matching")
    flag("--inpaint", False, "only complete test images whose centre is hidden", **tick)
    flag("--denoise", False, "only clean test images of Gaussian noise", **tick)
    flag("--ood", "shapes", "other images for --evaluate, like --data")
    args, state = parser.parse_args(argv), None
    path = Path(args.out) / "checkpoint.pt"
    use = args.generate or args.evaluate or args.inpaint or args.denoise
    if use or args.resume:
        state = load_checkpoint(path)
        parser.set_defaults(**state["args"])
        args = parser.parse_args(argv)
        for key in KEPT[: 3 if use else 8]:
            if getattr(args, key) != state["args"][key]:
                name = key.replace("_", "-")
                die(f"{path} was trained with --{name} {state['args'][key]}: leave that flag out")
    elif path.exists():
        die(f"{path} is there already: go on with --resume, or name another folder with --out")
    for key, value in vars(args).items():
        low = 1e-9 * (key not in "subset lr seed time_limit fresh penalty warm_up".split())
        if type(value) in (int, float) and not low <= value < 2**31:
            die(f"--{key.replace('_', '-')} {value} is out of range")
    if len(args.mults) > 6 or min(args.mults) < 1:
        die("--mults takes one to six numbers above 0")
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
