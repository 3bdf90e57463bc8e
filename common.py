"""Data and image grids, shared by nvae.py, ncsn.py and ebm.py. `python common.py --data cifar10`
shows the data: counts by class, mean and std by channel, a histogram, ten images of each class.
--data is one of
    cifar10   data/cifar10.npz, downloaded (170 MB) and written there at the first use
    shapes    six kinds of coloured shapes, made on the fly, for work without a network
    FOLDER    the images in it and its subfolders, cropped and shrunk; every tenth is for testing
    FILE.npz  train, test: uint8 [N,32,32,3]; train_labels, test_labels: uint8 [N]
"""
import os, sys
from argparse import ArgumentParser, RawTextHelpFormatter
from pathlib import Path
import numpy as np
import torch

CACHE = Path("data/cifar10.npz")
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
SHAPES = dict(  # corners, degrees from a corner to its side and of turn, half an arm, hole
    triangle=(3, 60, 0, 9, -9), square=(4, 45, 45, 9, -9), star=(5, 67.6, 0, 9, -9),
    circle=(360, 0, 0, 9, -9), ring=(360, 0, 0, 9, 0.5), cross=(4, 0, 0, 0.3, -9))

def die(message):
    print("error:", *str(message).splitlines(), file=sys.stderr)
    raise SystemExit(2)

def load(data="cifar10", subset=0):
    """(train, test), uint8 [N,3,32,32] on the CPU; a subset is the same whenever it is taken."""
    train, _, test, _, _ = read(data)
    if not 0 <= subset <= len(train):
        die(f"cannot take a subset of {subset}: {data} has {len(train)} training images")
    if subset:
        train = train[np.random.default_rng(0).permutation(len(train))[:subset]]
    return tuple(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in (train, test))

def read(data):
    """(train, train_labels, test, test_labels, names of the classes), arrays as in an .npz file."""
    if data == "shapes":
        *train, test = (shapes(2_000, seed) for seed in range(6))  # by parts, to stay in the cache
        return *map(np.concatenate, zip(*train, strict=True)), *test, list(SHAPES)
    if data == "cifar10":
        CACHE.exists() or download()
        return *read_npz(CACHE, "; delete it to download it again")[:4], CLASSES
    if Path(data).is_dir():
        return read_folder(Path(data))
    if str(data).endswith(".npz"):
        return read_npz(data)
    die(f"--data {data} is neither cifar10, shapes, a folder nor an .npz file")

def download():
    partial = CACHE.with_name("partial.npz")  # renamed when whole: the cache is never half-written
    try:
        from torchvision.datasets import CIFAR10
        train, test = (CIFAR10(root="data", train=flag, download=True) for flag in (True, False))
        CACHE.parent.mkdir(exist_ok=True)
        np.savez(partial, train=train.data, train_labels=np.uint8(train.targets),
                 test=test.data, test_labels=np.uint8(test.targets))
        os.replace(partial, CACHE)
    except Exception as error:  # no network, a torchvision that does not fit torch, a bad archive
        die(f"no CIFAR-10 ({error}): use --data shapes, or provide {CACHE} with train, test: "
            "uint8 [N,32,32,3] and train_labels, test_labels: uint8 [N]")
    finally:
        partial.unlink(missing_ok=True)

def read_npz(path, advice=""):
    try:
        with np.load(path) as file:
            arrays = [file[key] for key in ("train", "train_labels", "test", "test_labels")]
        for x, y in (arrays[:2], arrays[2:]):
            if x.dtype != np.uint8 or y.dtype != np.uint8 or x.shape != (y.size or 1, 32, 32, 3):
                raise ValueError(f"images {x.dtype} {x.shape} with labels {y.dtype} {y.shape}")
    except Exception as error:  # a damaged file raises any of a dozen types
        die(f"cannot use {path} ({type(error).__name__}: {error}){advice}")
    return *arrays, [str(k) for k in range(1 + max(arrays[1].max(), arrays[3].max()))]

def read_folder(folder):
    from PIL import Image, ImageOps
    images, known = [], Image.registered_extensions()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in known):
        try:
            images.append(np.asarray(ImageOps.fit(Image.open(path).convert("RGB"), (32, 32))))
        except Exception as error:  # of as many types as there are formats
            print("skipped", path, *str(error).splitlines(), file=sys.stderr)
    if len(images) < 2:
        die(f"{folder}: {len(images)} readable images; training and testing take one each")
    test, train = np.stack(images[::10]), np.stack([x for i, x in enumerate(images) if i % 10])
    return train, np.zeros(len(train), np.uint8), test, np.zeros(len(test), np.uint8), ["any"]

def shapes(n, seed):
    """n pictures of one shape each, uint8 [n,32,32,3], and which of SHAPES it is, uint8 [n]."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n, dtype=np.uint8) % len(SHAPES))
    corners, *angles, arm, hole = np.float32(list(SHAPES.values()))[labels].T[..., None, None]
    ranges = (11, -1, -1, -0.2, 0), (13, 1, 1, 0.2, 2 * np.pi)
    radius, left, up, turn, slope = np.float32(rng.uniform(*ranges, (n, 5))).T[..., None, None]
    hue = np.float32(rng.uniform(0, 6, (3, n, 1, 1, 1)) + [0, 4, 2]) % 6
    pure = np.clip(abs(hue - 3) - 1, 0, 1)
    start, end, bright = 0.3 * pure[0], 0.3 * pure[1], 0.4 + 0.6 * pure[2]  # [n,1,1,3] each
    y, x = np.mgrid[:32, :32].astype(np.float32) - 15.5
    u, v = x + left * (14 - radius), y + up * (14 - radius)  # wholly inside, tips and all
    (side, upright), rho = np.radians(angles), np.hypot(u, v) / radius
    angle = (np.arctan2(u, -v) + upright + turn + np.pi / corners) % (2 * np.pi / corners)
    angle = abs(angle - np.pi / corners)  # from the nearest corner, so one side is enough
    outside = np.maximum(rho * np.cos(angle - side) - np.cos(side), rho * np.sin(angle) - arm)
    cover = np.clip(0.5 - radius * np.maximum(outside, hole - rho), 0, 1)[..., None]  # smooth edges
    along = 0.5 + (x * np.cos(slope) + y * np.sin(slope))[..., None] / 44  # the gradient, 0 to 1
    images = start + along * (end - start)
    images = (255 * (images + cover * (bright - images)) + 0.5).astype(np.uint8)
    return images, labels

def batches(images, batch_size, seed=0, epoch=None, skip=0):
    """Yields uint8 [batch_size,3,32,32]: all in order or, for training, shuffled and mirrored by
    (seed, epoch) and without images that do not fill a batch. `skip` batches are left out."""
    if epoch is None:
        yield from images.split(batch_size)[skip:]
        return
    generator = torch.Generator(images.device).manual_seed(100_003 * seed + epoch)
    kind, n = dict(generator=generator, device=images.device), len(images)
    order, mirrored = torch.randperm(n, **kind), torch.rand(n, 1, 1, 1, **kind) < 0.5
    for i in range(skip * batch_size, n - batch_size + 1, batch_size):
        batch = images[order[i:i + batch_size]]
        yield torch.where(mirrored[i:i + batch_size], batch.flip(3), batch)

def to_bytes(images):  # uint8 or float [N,3,H,W] -> numpy uint8 [N,H,W,3]
    images = images if images.dtype == torch.uint8 else (255 * images.clamp(0, 1)).round().byte()
    return images.permute(0, 2, 3, 1).cpu().numpy()

def save_grid(images, path, columns=8):
    """Writes uint8 or float [N,3,H,W], twice as large, as a PNG; floats are clamped to 0..1."""
    from PIL import Image
    columns = min(columns, len(images))
    gaps = ((0, -len(images) % columns), (0, 2), (0, 2), (0, 0))
    tiles = np.pad(to_bytes(images).repeat(2, 1).repeat(2, 2), gaps, constant_values=235)
    rows = tiles.reshape(-1, columns, *tiles.shape[1:]).swapaxes(1, 2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.reshape(-1, columns * tiles.shape[2], 3)[:-2, :-2]).save(path, "PNG")

def export(images, folder, start=0):
    """Writes images as folder/00000.png and on, counted from start; 0 removes those of before."""
    from PIL import Image
    Path(folder).mkdir(parents=True, exist_ok=True)
    for old in Path(folder).glob("[0-9]" * 5 + ".png") if start == 0 else []:
        old.unlink()
    for i, image in enumerate(to_bytes(images), start):
        Image.fromarray(image).save(Path(folder, f"{i:05d}.png"))

def main():
    from matplotlib.figure import Figure  # unlike pyplot, draws by Agg and needs no display
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="see above (default: %(default)s)")
    parser.add_argument("--out", default="runs/data", help="for pictures (default: %(default)s)")
    options = parser.parse_args()
    train, labels, _, test_labels, names = read(options.data)
    examples = np.full((len(names), 10, 32, 32, 3), 235, np.uint8)
    for k, name in enumerate(names):
        examples[k, :np.sum(labels == k)] = train[labels == k][:10]
        print(f"{name:12}{np.sum(labels == k):8} train{np.sum(test_labels == k):8} test")
    axes = Figure().add_subplot(xlabel="value", ylabel="pixels")
    for values, name in zip(train.reshape(-1, 3).T, ["red", "green", "blue"], strict=True):
        print(f"{name:12}{values.mean() / 255:8.4f} mean {values.std() / 255:8.4f} std")
        axes.stairs(np.bincount(values, minlength=256), np.arange(257) / 256, color=name)
    examples = torch.from_numpy(examples).flatten(0, 1).permute(0, 3, 1, 2)
    save_grid(examples, Path(options.out, "classes.png"), columns=10)
    axes.figure.savefig(Path(options.out, "histogram.png"))
    print(f"wrote classes.png (a row for each class) and histogram.png in {options.out}")

if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        die(error)
