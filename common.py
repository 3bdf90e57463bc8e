"""Data and image grids for the scripts in this folder.

`python common.py --data cifar10` shows the data: how many images there are and of which class, mean
and standard deviation of each channel, a picture of ten images of each class. --data is one of
    cifar10   data/cifar10.npz or else data/cifar-10-batches-py; torchvision downloads it (170 MB)
    shapes    2,400 + 600 coloured shapes of six kinds, drawn on the fly: needs no network
    FOLDER    pictures, cropped to the middle square and reduced to 32x32; subfolders train
              and test (or val, valid) are the split, else every tenth is for testing
    FILE.npz  arrays train, test [N,32,32,3], bytes or floats 0..1 (also x_train, train_images ...)
"""

import contextlib
import io
import os
import pickle
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

SIZE = 32  # pixels on each side of an image
TRAIN_SHAPES = 2400
SHAPES = {  # number of equal sectors; in each of them angles (1: a sector) and radii of corners
    "triangle": (3, [0], [1]),
    "square": (4, [0.5], [1]),
    "star": (5, [0, 0.5], [1, 0.447]),
    "circle": (48, [0], [1]),
    "ring": (48, [0], [1]),
    "cross": (4, [-0.186, 0.186, 0.5], [1.044, 1.044, 0.424]),
}
ENDINGS = ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .ppm .pgm .jp2 .avif .ico .tga"
ARRAYS = "arrays train and test: images [N,32,32,3], bytes 0..255 or floats 0..1"
UNPACK = {  # what to do with a file of this ending or name
    ".zip": "unpack it (python -m zipfile -e FILE FOLDER), then use --data FOLDER",
    ".gz": "unpack it (tar -xf FILE; that of CIFAR-10 in data/, then use --data cifar10)",
    ".parquet": "write pandas.read_parquet(FILE)['img'][N]['bytes'] to FOLDER/N.png for each N",
    "test_batch": "CIFAR-10 itself is --data cifar10: move it to data/cifar-10-batches-py",
}


def load(data="cifar10", subset=0):
    """(train, test): images as uint8 tensors [N,3,32,32] on the CPU. Unusable data end the program.

    `subset` takes at most that many training images, the first of a fixed shuffle; 0 takes all.
    """
    train, test, _ = read(data)
    if subset < 0 or len(train) == 0:
        sys.exit(f"no images to train on: {data} has {len(train)}, --subset takes {subset}")
    if (train == train[:, :1]).all():
        print("grey images: red, green and blue are equal, and bits/dim count a pixel three times")
    if subset:
        train = train[np.random.default_rng(0).permutation(len(train))[:subset]]
    return torch.from_numpy(train).contiguous(), torch.from_numpy(test).contiguous()


def batches(images, batch_size, seed, epoch, skip=0, flip=False):
    """Yields the batches of an epoch, uint8 [batch_size,C,H,W], from batch number `skip` on.

    The order, and with `flip` which half of the images is mirrored, depend on (seed, epoch) alone:
    a resumed run sees the same batches. An incomplete last batch is left out.
    """
    count = len(images)
    if count < batch_size:
        sys.exit(f"{count} training images do not fill a batch of {batch_size}: lower --batch-size")
    generator = torch.Generator(images.device).manual_seed(100_003 * seed + epoch)
    order = torch.randperm(count, generator=generator, device=images.device)
    mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=images.device) < 0.5
    for start in range(skip * batch_size, count - batch_size + 1, batch_size):
        chosen = slice(start, start + batch_size)
        batch = images[order[chosen]]
        if flip:
            batch = torch.where(mirrored[chosen], batch.flip(3), batch)
        yield batch


def read(data):
    """(train, test, labels): uint8 arrays [N,3,32,32], and labels of train as stored, or None."""
    path = Path("data/cifar10.npz" if data == "cifar10" else data).expanduser()
    if data == "shapes":
        images, labels = shapes(TRAIN_SHAPES + 600)
        return images[:TRAIN_SHAPES], images[TRAIN_SHAPES:], labels[:TRAIN_SHAPES]
    if data == "cifar10" and not path.exists():
        return read_cifar10()
    if path.is_dir():
        train, test, labels = read_folder(path)
    elif path.suffix.lower() == ".npz":
        train, test, labels = read_npz(path)
    else:
        known = "it is neither cifar10 nor shapes, and no folder or .npz file of that name is there"
        sys.exit(f"cannot use --data {data}: {UNPACK.get(path.suffix.lower(), known)}")
    if test is not None:
        return train, test, labels
    if len(train) < 2:
        sys.exit(f"one picture is too few, for training and testing: {data}")
    testing = np.arange(len(train)) % 10 == 0
    print(f"{sum(~testing)} images for training; every tenth, {sum(testing)}, for testing")
    return train[~testing], train[testing], None


def read_cifar10():
    """CIFAR-10 from the folder data/cifar-10-batches-py, downloaded if it is not there."""
    folder = Path("data/cifar-10-batches-py")
    files = [folder / f"data_batch_{number}" for number in range(1, 6)] + [folder / "test_batch"]
    try:
        if not all(file.exists() for file in files):
            from torchvision.datasets import CIFAR10

            CIFAR10("data", download=True)
        # torchvision's own reader refuses a copy without batches.meta or with other pickles.
        parts = [pickle.loads(file.read_bytes(), encoding="bytes") for file in files]
        *train, test = [part[b"data"].reshape(-1, 3, SIZE, SIZE) for part in parts]
        labels = np.concatenate([part[b"labels"] for part in parts[:-1]])
    except Exception as error:  # no network, a torchvision that does not fit torch, a damaged file
        advice = f"use --data shapes, or provide data/cifar10.npz with {ARRAYS}"
        sys.exit(f"no CIFAR-10 ({error!r}): delete {folder} if it is damaged, {advice}")
    return np.concatenate(train), test, labels


def read_npz(path):
    """The arrays of an .npz file; test and labels may be None. Nothing is asked of labels."""
    labels = None
    try:
        with np.load(path) as file:
            keys = {key.lower().removeprefix("x_").removesuffix("_images"): key for key in file}
            train = check_images(file[keys["train"]])
            test = check_images(file[keys["test"]]) if "test" in keys else None
            with contextlib.suppress(KeyError, ValueError):  # none, or Python objects
                labels = file[keys.get("train_labels", keys.get("y_train"))]
    except Exception as error:  # a damaged file raises any of a dozen types
        sys.exit(f"cannot use {path} ({error!r}): it must hold {ARRAYS}")
    return train, test, labels


def check_images(images):
    """Images of a usual layout and type -> uint8 [N,3,32,32]; ValueError for all others."""
    if images.shape[1:] == (SIZE, SIZE):
        images = images[:, None]  # grey: [N,1,32,32]
    elif images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.dtype.kind in "bf" and -1e-3 < images.min() <= images.max() < 1.002:  # no NaN
        images = np.rint(255.0 * images).astype(np.uint8)
    fits = images.dtype == np.uint8 and images.shape[1:] in ((1, SIZE, SIZE), (3, SIZE, SIZE))
    if not fits or images.max() == 1:  # bytes 0 and 1 are a mask
        raise ValueError(f"{images.dtype} {images.shape} from {images.min()} to {images.max()}")
    return images.repeat(3 // images.shape[1], axis=1)  # grey to red, green and blue


def read_folder(folder):
    """(train, test, None): the pictures in subfolders of these names, or all of them and None."""
    places = [path for path in folder.iterdir() if path.is_dir()]
    subfolders = {path.name.strip().lower().removesuffix("ing"): path for path in places}
    for name in ("test", "val", "valid", "validation"):
        if "train" in subfolders and name in subfolders:
            train, test = (read_pictures(subfolders[part]) for part in ("train", name))
            print(f"{len(train)} images of train for training, {len(test)} of {name} for testing")
            return train, test, None
    return read_pictures(folder), None, None


def read_pictures(folder):
    """The pictures in a folder and its subfolders, uint8 [N,3,32,32], sorted by path."""
    from tqdm import tqdm

    files = []
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        new = os.path.realpath(place) not in entered  # a link may lead back to a folder
        entered.add(os.path.realpath(place))
        folders[:] = sorted(x for x in folders if new and not x.startswith((".", "__MACOSX")))
        files += [Path(place, name) for name in names if new and not name.startswith(".")]
    paths = sorted(path for path in files if path.suffix.lower() in ENDINGS.split())
    images = []
    for path in tqdm(paths, "reading", leave=False, disable=len(paths) < 500):
        try:
            images.append(read_picture(path))
        except Exception as error:  # of a different type in each format
            tqdm.write(f"skipped {str(path)!r}: {error!r}", file=sys.stderr)
    if not images:
        advice = [UNPACK[x] for path in files for x in (path.suffix, path.stem) if x in UNPACK]
        sys.exit(f"no usable pictures in {folder} ({ENDINGS}) {''.join(advice[:1])}")
    return np.stack(images)


def read_picture(path):
    """The middle square of a picture, uint8 [3,32,32]. Raises an exception for unusable files."""
    from PIL import Image, ImageCms, ImageOps, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; image generators write long texts into a PNG
    with Image.open(path) as image:
        image.draft("RGB", (4 * SIZE, 4 * SIZE))  # lets a JPEG be decoded at a reduced size
        profile = io.BytesIO(image.info.get("icc_profile", b""))
        deep = ";16" in str(image.tile)  # colours of 16 bits, of which Pillow takes the upper 8
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "L" and image.getextrema()[1] == 1:
        raise ValueError("looks like a mask of 0 and 1: multiply it by 255")
    if deep and image.mode == "RGB" and max(image.getextrema())[1] < 64:
        raise ValueError("looks like 10- to 14-bit colours in a 16-bit file: scale it to 0..65535")
    if image.mode == "F" or image.mode.startswith("I"):  # grey of floats 0..1 or of 16 bits
        grey = np.asarray(image) * (2**16 - 1 if image.mode == "F" else 1)
        bits = int(grey.max()).bit_length()
        # Cameras of 10 to 14 bits leave the upper bits empty, multiples of 257 are dark bytes.
        too_dark = image.mode != "F" and bits < 15 and np.any(grey % 257)
        if grey.min() < 0 or bits > 16 or too_dark:
            raise ValueError(f"looks like {bits}-bit values: scale it to 0..65535 (floats: to 1)")
        image = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
    image = ImageOps.fit(image.convert("RGB"), (SIZE, SIZE))
    with contextlib.suppress(ImportError, ImageCms.PyCMSError):  # no profile or a broken one
        image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"))
    return np.asarray(image).transpose(2, 0, 1)


def shapes(n, seed=0):
    """n images, uint8 [n,3,32,32], of a bright shape on a dim ground, and their kinds, int [n]."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(SHAPES))
    images = []
    for label in labels:
        bright = Image.new("RGB", (SIZE, SIZE), f"hsv({rng.integers(360)}, 60%, 100%)")
        first = Image.new("RGB", bright.size, f"hsv({rng.integers(360)}, 100%, 30%)")
        second = Image.new("RGB", bright.size, f"hsv({rng.integers(360)}, 100%, 30%)")
        slope = Image.linear_gradient("L").rotate(rng.uniform(0, 360))  # 256x256, corners empty
        ground = Image.composite(first, second, slope.crop((38, 38, 218, 218)).resize(bright.size))

        large = Image.new("L", (4 * SIZE, 4 * SIZE))  # drawn large and reduced: edges are smooth
        pen = ImageDraw.Draw(large)
        radius = 4 * rng.uniform(11, 13)
        x, y = 2 * SIZE + rng.uniform(-1, 1, 2) * (56 - radius)  # no tip reaches the border
        sectors, angles, radii = list(SHAPES.values())[label]
        angle = np.add.outer(np.arange(sectors), angles).flatten() * 2 * np.pi / sectors
        angle += rng.uniform(-0.2, 0.2)  # clockwise from the top
        distance = radius * np.tile(radii, sectors)
        corners = np.stack([x + distance * np.sin(angle), y - distance * np.cos(angle)], axis=1)
        pen.polygon(corners.flatten().tolist(), fill=255)
        if label == list(SHAPES).index("ring"):
            pen.polygon((corners / 2 + (x / 2, y / 2)).flatten().tolist(), fill=0)
        images.append(Image.composite(bright, ground, large.reduce(4)))
    return np.stack(images).transpose(0, 3, 1, 2), labels


def pictures(images):
    """uint8 tensor [N,1 or 3,H,W] -> Pillow images, a list [N]; ValueError for other types."""
    from PIL import Image

    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    arrays = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def save_grid(images, path, columns=8):
    """Writes images, uint8 [N,1 or 3,H,W], as a PNG: a grid of them, each twice as large."""
    columns = min(columns, len(images))
    tiles = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    # Two pixels of light grey to the right and below, and tiles of it to fill the last row.
    tiles = torch.nn.functional.pad(tiles, (0, 2, 0, 2, 0, 0, 0, -len(tiles) % columns), value=235)
    grid = torch.cat([torch.cat(list(row), dim=2) for row in tiles.split(columns)], dim=1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pictures(grid[None, :, :-2, :-2])[0].save(path, "PNG")


def export(images, folder, start=0):
    """Writes images, uint8 [N,1 or 3,H,W], as folder/00000.png ...; at 0 it clears older ones."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for old in Path(folder).glob("[0-9][0-9][0-9][0-9][0-9]*.png"):
        if start == 0 and old.stem.isdigit():
            old.unlink()
    for number, picture in enumerate(pictures(images), start):
        picture.save(Path(folder, f"{number:05d}.png"))


def main():
    """Shows what --data holds: numbers on the terminal, classes.png in --out."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="see above (default: %(default)s)")
    parser.add_argument("--out", default="runs/data", help="for pictures (default: %(default)s)")
    options = parser.parse_args()
    train, test, labels = read(options.data)
    labels = np.ravel(labels)
    if labels.dtype.kind not in "ui" or len(labels) != len(train):
        labels = np.zeros(len(train), int)  # no labels, or no plain ones: all are one class
    print(f"{len(train)} training images, {len(test)} test images")
    rows = []
    for label in np.unique(labels)[:100]:
        print(f"class {label:6}{sum(labels == label):8}")
        rows.append(np.resize(train[labels == label], (10, *train.shape[1:])))  # cyclic if fewer
    save_grid(torch.from_numpy(np.concatenate(rows)), Path(options.out, "classes.png"), columns=10)
    for channel, name in enumerate(["red", "green", "blue"]):
        values = train[:, channel].flatten()
        print(f"{name:12}{values.mean() / 255:8.4f} mean {values.std() / 255:8.4f} std")


if __name__ == "__main__":
    main()
