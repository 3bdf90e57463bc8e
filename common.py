"""Data and image grids, shared by nvae.py, ncsn.py and ebm.py.

`python common.py --data cifar10` shows the data: how many images each class has, mean and standard
deviation of each channel, a histogram of the values, ten images of each class. --data is one of
    cifar10   data/cifar10.npz, downloaded (170 MB) and written there at the first use
    shapes    12,000 coloured shapes of six kinds, drawn on the fly: needs no network
    FOLDER    the pictures in it and its subfolders, each cropped to the middle square and
              reduced to 32x32; every tenth is for testing
    FILE.npz  train, test: images [N,32,32,3] (bytes 0..255 or floats 0..1) and
              train_labels, test_labels: whole numbers [N]. Labels may be missing. Without
              test, every tenth image is for testing. Also x_train, y_train, train_images ...
"""

import colorsys
import functools
import hashlib
import math
import os
import sys
import tempfile
import warnings
from argparse import ArgumentParser, RawTextHelpFormatter
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch

# PIL, matplotlib and torchvision are imported where they are used: importing this file is quick,
# and a torchvision that does not fit the installed torch stops the download of CIFAR-10 alone.

SIZE = 32  # pixels on each side of an image
PAPER = 235  # the light grey around the images of a grid
CACHE = Path("data/cifar10.npz")
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SHAPES = ["triangle", "square", "star", "circle", "ring", "cross"]
LAYOUT = (
    "train, test: images [N,32,32,3] (bytes 0..255 or floats 0..1) "
    "and train_labels, test_labels: whole numbers [N]"
)
# Formats that Pillow knows but cannot read, or only by starting another program.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}


class Data(NamedTuple):
    """Images as uint8 arrays [N,32,32,3]. Labels, whole numbers [N], say which of the classes."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    classes: list = ["any"]  # if there are no labels: all are 0 then


def say(message):
    """Prints a message on stderr, as one line whatever line breaks are in it."""
    print(*str(message).splitlines(), file=sys.stderr)


def die(message) -> NoReturn:
    """Ends the program with one line on stderr and exit status 2."""
    say(f"error: {message}")
    raise SystemExit(2)


def load(data="cifar10", subset=0):
    """(train, test): images as uint8 tensors [N,3,32,32] on the CPU.

    `subset` takes the first images of a fixed shuffle of train: the same ones at every call.
    """
    found = read(data)
    train = found.train
    if not 0 <= subset <= len(train):
        die(f"cannot take a subset of {subset}: {data} has {len(train)} training images")
    if subset:
        train = train[np.random.default_rng(0).permutation(len(train))[:subset]]
    return channels_first(train), channels_first(found.test)


def channels_first(images):
    """An array [N,H,W,C] as a contiguous tensor [N,C,H,W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def fingerprint(images):
    """12 hex digits that depend on every byte of a uint8 tensor, on its shape and its order."""
    array = images.cpu().contiguous().numpy()
    digest = hashlib.blake2b(str(array.shape).encode(), digest_size=6)
    digest.update(array)
    return digest.hexdigest()


def batches(images, batch_size, seed=0, epoch=None, skip=0):
    """Yields uint8 [batch_size,3,32,32], from the batch with number `skip` on.

    Without an epoch: all images in order; the last batch may be smaller. With one, for training:
    shuffled, and about half of the images mirrored. Both depend on (seed, epoch) alone, so that a
    resumed run sees the same batches. Images that do not fill a last batch are left out.
    """
    if epoch is None:
        yield from images.split(batch_size)[skip:]
        return
    count = len(images)
    generator = torch.Generator(images.device).manual_seed(100_003 * seed + epoch)
    order = torch.randperm(count, generator=generator, device=images.device)
    mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=images.device) < 0.5
    for start in range(skip * batch_size, count - batch_size + 1, batch_size):
        part = slice(start, start + batch_size)
        batch = images[order[part]]
        yield torch.where(mirrored[part], batch.flip(3), batch)


# ---- what --data names ----


def read(data):
    """The Data that --data names (see the top of this file)."""
    if data == "shapes":
        train, train_labels = shapes(10_000, seed=0)
        test, test_labels = shapes(2_000, seed=1)
        return Data(train, train_labels, test, test_labels, SHAPES)
    if data == "cifar10":
        if not CACHE.exists():
            download()
        found = read_npz(CACHE, advice="; delete it to download it again")
        return found._replace(classes=CLASSES)
    if Path(data).is_dir():
        return read_folder(Path(data))
    if str(data).lower().endswith(".npz"):
        return read_npz(data)
    die(f"--data {data} is neither cifar10, shapes, a folder nor an .npz file")


def hold_out(images, labels):
    """Data with every tenth image, from the first on, for testing."""
    testing = np.arange(len(images)) % 10 == 0
    return Data(images[~testing], labels[~testing], images[testing], labels[testing])


def download():
    """Writes CACHE, by way of a folder beside it that is removed whatever happens."""
    try:
        from torchvision.datasets import CIFAR10

        CACHE.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
            train = CIFAR10(folder, train=True, download=True)
            test = CIFAR10(folder, train=False, download=True)
            whole = Path(folder, "whole.npz")
            np.savez(
                whole,
                train=train.data,
                train_labels=np.uint8(train.targets),
                test=test.data,
                test_labels=np.uint8(test.targets),
            )
            os.replace(whole, CACHE)  # CACHE is never half-written
    except Exception as error:  # no network, a torchvision that does not fit torch, a full disk
        reason = f"{type(error).__name__}: {error}"
        die(f"no CIFAR-10 ({reason}); use --data shapes, or provide {CACHE} with {LAYOUT}")


def read_npz(path, advice=""):
    """Data from an .npz file; dies if it is damaged or does not hold what LAYOUT says."""
    try:
        with np.load(path) as file:
            train = find(file, "train", "x_train", "train_images")
            train_labels = find(file, "train_labels", "y_train")
            test = find(file, "test", "x_test", "test_images")
            test_labels = find(file, "test_labels", "y_test")
        return check_arrays(train, train_labels, test, test_labels)
    except Exception as error:  # a damaged file raises any of a dozen types
        reason = f"{type(error).__name__}: {error}"
        die(f"cannot use {path} ({reason}){advice}; wanted are {LAYOUT}")


def find(file, *names):
    """The array of an .npz file that has one of these names, in any case, or None."""
    for key in file:
        if key.lower() in names:
            return file[key]
    return None


def check_arrays(train, train_labels, test, test_labels):
    """Data from the arrays of a file, None for what it lacks; ValueError if they do not do."""
    if train is None:
        raise ValueError("no train images")
    if test is None and test_labels is not None:
        raise ValueError("test_labels without test images")
    if test is not None and (train_labels is None) != (test_labels is None):
        raise ValueError("labels for one of train and test alone")
    images = check_images(train)
    labels = check_labels(train_labels, len(images))
    if test is not None:
        test_images = check_images(test)
        found = Data(images, labels, test_images, check_labels(test_labels, len(test_images)))
    elif len(images) > 1:
        found = hold_out(images, labels)
    else:
        raise ValueError("one train image and none to test with")
    if train_labels is None:
        return found
    highest = max(found.train_labels.max(), found.test_labels.max())
    return found._replace(classes=[str(number) for number in range(highest + 1)])


def check_images(images):
    """Images of a usual layout and type -> uint8 [N,32,32,3]; ValueError for all others."""
    shape = images.shape
    if shape[1:] == (SIZE, SIZE):
        images = images[..., None]  # grey: [N,32,32,1]
    elif shape[1:] in ((1, SIZE, SIZE), (3, SIZE, SIZE)):
        images = np.moveaxis(images, 1, 3)  # channels last
    fits = images.shape[1:] in ((SIZE, SIZE, 1), (SIZE, SIZE, 3)) and images.size > 0
    if not fits or images.dtype.kind not in "buif":  # boolean, unsigned, integer, float
        raise ValueError(f"images of type {images.dtype} and shape {shape}")
    if images.dtype != np.uint8:
        images = whole_bytes(images)
    if images.shape[3] == 1:
        images = images.repeat(3, axis=3)  # grey to red, green and blue
    return images


def whole_bytes(values):
    """Whole numbers 0..255, or floats 0..1 times 255 -> uint8; ValueError for all others."""
    lowest = values.min()
    highest = values.max()
    if not 0 <= lowest <= highest <= 255:  # nor is this true of NaN
        raise ValueError(f"images with values from {lowest} to {highest}")
    if values.dtype.kind in "bf" and highest <= 1:
        values = np.rint(255.0 * values)
    whole = values.astype(np.uint8)
    if not np.array_equal(whole, values):
        raise ValueError(f"images with values from {lowest} to {highest} and fractions between")
    return whole


def check_labels(labels, count):
    """Labels [count] or [count,1] -> int64 [count], zeros for None; ValueError for all others."""
    if labels is None:
        return np.zeros(count, np.int64)
    if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind not in "ui":
        raise ValueError(f"{count} images with labels {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() > 9_999:  # each number up to the highest is a class
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, not within 0..9999")
    return labels.reshape(count).astype(np.int64)


# ---- folders of pictures ----


def read_folder(folder):
    """Data from the pictures in a folder, sorted by path; dies if there are fewer than two."""
    from PIL import Image, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; image generators write long texts into a PNG
    known = Image.registered_extensions()  # {".jpg": "JPEG", ...}
    endings = {ending for ending, name in known.items() if name not in NO_PICTURES}
    formats = [name for name in Image.OPEN if name not in NO_PICTURES]
    paths = list(files_below(folder, seen=set()))
    images = []
    for path in paths:
        if path.suffix.lower() in endings:
            try:
                images.append(read_picture(path, formats))
            except Exception as error:  # of a different type in each format
                say(f"skipped {str(path)!r}: {type(error).__name__}: {error}")
    if len(images) < 2:
        counts = Counter(path.suffix.lower() or "without an ending" for path in paths)
        found = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(8))
        die(
            f"{folder}: {len(images)} images could be read, 2 are needed; found "
            f"{found or 'no files'}; it takes .png .jpg .webp .gif .bmp .tif and others"
        )
    return hold_out(np.stack(images), np.zeros(len(images), np.int64))


def files_below(folder, seen):
    """Yields the files in a folder and its subfolders, sorted, without hidden ones.

    `seen` holds the folders entered before: a link may lead back to one of them.
    """
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        say(f"skipped {str(folder)!r}: {error}")
        return
    for path in paths:
        if path.name.startswith(".") or path.name == "__MACOSX":
            continue
        if os.path.isdir(path):
            yield from files_below(path, seen)
        else:
            yield path


def read_picture(path, formats):
    """The middle square of a picture, uint8 [32,32,3]. Raises whatever Pillow does."""
    from PIL import Image, ImageOps

    if not path.is_file():  # a named pipe, for one, would be waited for without end
        raise OSError("neither a file nor a link to one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of very large pictures, odd EXIF data and the like
        with Image.open(path, formats=formats) as image:
            image.draft("RGB", (4 * SIZE, 4 * SIZE))  # lets a JPEG be decoded at a reduced size
            upright = ImageOps.exif_transpose(image)
        return np.asarray(ImageOps.fit(to_rgb(upright), (SIZE, SIZE)))


def to_rgb(image):
    """A Pillow image of any mode -> mode RGB, on white where it is transparent.

    Grey of 16 bits (modes I;16 and I) goes from 0 to 65535, that of floats (mode F) from 0 to 1.
    """
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image)
        top = 1 if image.mode == "F" else 65_535
        if not 0 <= grey.min() <= grey.max() <= top:  # nor is this true of NaN
            raise ValueError(f"grey from {grey.min()} to {grey.max()}, not within 0..{top}")
        grey = np.rint(255 * grey) if image.mode == "F" else grey >> 8  # the higher byte
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# ---- shapes ----


def shapes(n, seed):
    """n pictures of one shape each, uint8 [n,32,32,3], and which of SHAPES it is, uint8 [n]."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(SHAPES)).astype(np.uint8)
    images = [draw_shape(SHAPES[label], rng) for label in labels]
    return np.stack(images), labels


def draw_shape(kind, rng):
    """A bright shape on a dim ground that goes from one colour to another, uint8 [32,32,3]."""
    from PIL import Image, ImageDraw

    radius = rng.uniform(11, 13)
    centre = SIZE / 2 + rng.uniform(-1, 1, 2) * (14 - radius)  # no tip reaches the border
    turn = rng.uniform(-0.2, 0.2)
    rotation = [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
    corners = radius * outline(kind) @ np.array(rotation)  # [corners,2], seen from the centre
    large = Image.new("L", (4 * SIZE, 4 * SIZE))  # drawn large and reduced: edges are smooth
    pen = ImageDraw.Draw(large)
    pen.polygon((4 * (centre + corners)).flatten().tolist(), fill=255)
    if kind == "ring":
        pen.polygon((4 * (centre + corners / 2)).flatten().tolist(), fill=0)

    slope = rng.uniform(0, 2 * np.pi)
    place = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2  # 0 is the middle
    along = place * math.cos(slope) + place[:, None] * math.sin(slope)  # [32,32]
    along = 0.5 + along[:, :, None] / 44  # [32,32,1], within 0..1: the diagonal is 31 * 1.42 long
    first = colour(rng, saturation=1, value=0.3)
    second = colour(rng, saturation=1, value=0.3)
    ground = first + along * (second - first)  # [32,32,3]
    bright = colour(rng, saturation=0.6, value=1)
    cover = np.float32(large.reduce(4))[:, :, None] / 255  # [32,32,1]: 1 inside, 0 outside
    return (ground + cover * (bright - ground) + 0.5).astype(np.uint8)


@functools.cache
def outline(kind):
    """Corners of a shape of radius 1 around the origin, [corners,2]: x to the right, y down."""
    if kind == "cross":
        a = 0.3  # half the width of an arm
        x = [-a, a, a, 1, 1, a, a, -a, -a, -1, -1, -a]
        y = [-1, -1, -a, -a, a, a, 1, 1, a, a, -a, -a]
        return np.stack([x, y], axis=1)
    count = {"triangle": 3, "square": 4, "star": 10}.get(kind, 48)  # 48: circle and ring
    angle = 2 * np.pi * np.arange(count) / count  # clockwise from the top
    distance = np.ones(count)
    if kind == "square":
        angle += np.pi / 4  # on a side, not on a corner
    if kind == "star":
        distance[1::2] = 0.447  # of the corners between the tips
    return np.stack([distance * np.sin(angle), -distance * np.cos(angle)], axis=1)


def colour(rng, saturation, value):
    """Red, green and blue, from 0 to 255, of a random hue: float32 [3]."""
    return 255 * np.float32(colorsys.hsv_to_rgb(rng.uniform(), saturation, value))


# ---- images as files ----


def to_bytes(images):
    """uint8 or float tensor [N,1 or 3,H,W], floats clamped to 0..1 -> uint8 array [N,H,W,3]."""
    if images.dtype != torch.uint8:
        images = (255 * images.clamp(0, 1)).round().byte()
    count, _, height, width = images.shape
    return images.expand(count, 3, height, width).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(images, path, columns=8):
    """Writes one or more images (see to_bytes) as a PNG: a grid of them, each twice as large."""
    from PIL import Image

    tiles = to_bytes(images)
    gap = 2
    step_down = 2 * tiles.shape[1] + gap
    step_right = 2 * tiles.shape[2] + gap
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    size = (columns * step_right - gap, rows * step_down - gap)
    grid = Image.new("RGB", size, (PAPER, PAPER, PAPER))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        enlarged = Image.fromarray(tile.repeat(2, axis=0).repeat(2, axis=1))
        grid.paste(enlarged, (column * step_right, row * step_down))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid.save(path, "PNG")


def export(images, folder, start=0):
    """Writes images (see to_bytes) as folder/00000.png and so on, counted from `start`.

    At 0, files that an earlier export has left there are removed first.
    """
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if start == 0:
        for old in folder.glob("[0-9][0-9][0-9][0-9][0-9]*.png"):
            if old.stem.isdigit():
                old.unlink()
    for number, image in enumerate(to_bytes(images), start):
        Image.fromarray(image).save(folder / f"{number:05d}.png")


def main():
    """Shows what --data holds: numbers on the terminal, classes.png and histogram.png in --out."""
    from matplotlib.figure import Figure  # unlike pyplot it needs no display

    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="see above (default: %(default)s)")
    parser.add_argument("--out", default="runs/data", help="for pictures (default: %(default)s)")
    options = parser.parse_args()
    out = Path(options.out)
    data = read(options.data)

    examples = np.full((len(data.classes), 10, SIZE, SIZE, 3), PAPER, np.uint8)
    for label, name in enumerate(data.classes):
        members = data.train[data.train_labels == label]
        tests = np.sum(data.test_labels == label)
        print(f"{name:12}{len(members):8} train{tests:8} test")
        some = members[:10]
        examples[label, : len(some)] = some
    save_grid(channels_first(examples.reshape(-1, SIZE, SIZE, 3)), out / "classes.png", columns=10)

    axes = Figure().add_subplot(xlabel="value", ylabel="pixels")
    for channel, name in enumerate(["red", "green", "blue"]):
        values = data.train[..., channel].flatten()
        print(f"{name:12}{values.mean() / 255:8.4f} mean {values.std() / 255:8.4f} std")
        axes.stairs(np.bincount(values, minlength=256), np.arange(257) / 256, color=name)
    axes.figure.savefig(out / "histogram.png")
    print(f"wrote classes.png (a row for each class) and histogram.png in {options.out!a}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        die(error)
