"""Data loading and image grids; no network, and no CIFAR-10 on the disk."""

import functools
import hashlib
import http.server
import io
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

import common

ROOT = Path(common.__file__).parent


def arrays(train=20, test=5):
    """What an .npz file holds, with random images."""
    rng = np.random.default_rng(0)
    return {
        "train": rng.integers(256, size=(train, 32, 32, 3), dtype=np.uint8),
        "train_labels": (np.arange(train) % 10).astype(np.uint8),
        "test": rng.integers(256, size=(test, 32, 32, 3), dtype=np.uint8),
        "test_labels": (np.arange(test) % 10).astype(np.uint8),
    }


def nchw(images):
    """The tensor that load must give for images [N,32,32,3]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


@pytest.fixture
def cli(monkeypatch):
    """cli(*arguments) runs common.py as a program, in this process, to save importing torch."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["common.py", *arguments])
        runpy.run_path(str(ROOT / "common.py"), run_name="__main__")

    return run


# ---- importing and dying ----


def test_import_is_cheap():
    names = ("matplotlib", "PIL", "torchvision")
    code = f"import sys, common; print([name for name in {names} if name in sys.modules])"
    found = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert found == "[]\n"


def test_die_prints_one_line_whatever_the_message(dies):
    assert dies(common.die, "one\ntwo\r\nthree") == "error: one two three"


# ---- CIFAR-10 ----


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and writes no log on stderr."""

    def log_message(self, *_):
        pass


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's own format, on a server of this machine's own.

    torchvision is told its address and sums. Yields its path and what data/cifar10.npz must hold.
    """
    from torchvision.datasets import CIFAR10

    content = arrays(train=15)
    base = tmp_path / "source" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    md5 = {}

    def write(name, values):
        text = pickle.dumps(values, protocol=2)
        (base / name).write_bytes(text)
        md5[name] = hashlib.md5(text).hexdigest()

    def batch(images, labels):
        return {"data": images.transpose(0, 3, 1, 2).reshape(-1, 3072), "labels": labels.tolist()}

    for i in range(5):
        part = slice(3 * i, 3 * i + 3)
        write(f"data_batch_{i + 1}", batch(content["train"][part], content["train_labels"][part]))
    write("test_batch", batch(content["test"], content["test_labels"]))
    write("batches.meta", {"label_names": common.CLASSES})
    path = tmp_path / "source" / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(base, arcname=base.name)
    names = [f"data_batch_{i + 1}" for i in range(5)]
    handler = functools.partial(QuietHandler, directory=path.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{path.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    yield path, content
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_once_and_cached(archive):
    path, content = archive
    train, test = common.load("cifar10")
    assert torch.equal(train, nchw(content["train"]))
    assert torch.equal(test, nchw(content["test"]))
    assert train.dtype == torch.uint8 and train.is_contiguous() and test.is_contiguous()
    assert os.listdir("data") == ["cifar10.npz"]  # neither the archive nor what was in it
    with np.load("data/cifar10.npz") as cache:
        assert sorted(cache) == sorted(content)
        for key, array in content.items():
            assert cache[key].dtype == np.uint8 and np.array_equal(cache[key], array)
    path.unlink()
    again = common.load()
    assert torch.equal(again[0], train) and torch.equal(again[1], test)
    found = common.read("cifar10")
    assert found.classes[3] == "cat" and np.array_equal(found.train_labels, content["train_labels"])


@pytest.mark.parametrize("damage", ["absent", "other bytes", "not an archive"])
def test_failed_download_leaves_nothing_and_names_ways_out(archive, monkeypatch, capfd, damage):
    from torchvision.datasets import CIFAR10

    path, _ = archive
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(b"half of it")
    if damage == "not an archive":  # though torchvision's sum is right
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(b"half of it").hexdigest())
    with pytest.raises(SystemExit) as caught:
        common.load()
    assert caught.value.code == 2
    text = capfd.readouterr().err
    line = text.splitlines()[-1]  # before it come torchvision's progress bars
    assert line.startswith("error: ") and "Traceback" not in text
    assert "--data shapes" in line and "data/cifar10.npz" in line and "[N,32,32,3]" in line
    assert os.listdir("data") == []


def test_torchvision_that_is_missing(monkeypatch, dies):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert "--data shapes" in dies(common.load)
    common.save_grid(torch.zeros(1, 3, 32, 32), "grid.png")  # pictures need none
    common.export(torch.zeros(1, 3, 32, 32), "images")


def test_torchvision_that_does_not_fit_torch(monkeypatch, dies):
    Path("torchvision").mkdir()
    Path("torchvision/__init__.py").write_text("raise RuntimeError('operator nms\\nis not there')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(os.getcwd())
    line = dies(common.load)
    assert "operator nms is not there" in line and "--data shapes" in line


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_cache_is_whole_or_absent(archive, monkeypatch, capfd, error):
    def savez(file, **_):
        Path(file).write_bytes(b"half")
        assert not common.CACHE.exists()
        raise error

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(SystemExit if isinstance(error, OSError) else KeyboardInterrupt):
        common.load()
    assert isinstance(error, KeyboardInterrupt) or "No space left" in capfd.readouterr().err
    assert os.listdir("data") == []


def test_corrupt_cache_advises_to_delete_it(dies):
    Path("data").mkdir()
    Path("data/cifar10.npz").write_bytes(b"PK\x03\x04 not really")
    line = dies(common.load)
    assert "data/cifar10.npz" in line and "delete it" in line


# ---- .npz files ----


def test_npz_is_what_it_holds():
    content = arrays()
    np.savez("with.npz", **content)
    train, test = common.load("with.npz")
    assert torch.equal(train, nchw(content["train"])) and torch.equal(test, nchw(content["test"]))
    assert train.dtype == torch.uint8 and train.is_contiguous() and test.is_contiguous()
    found = common.read("with.npz")
    assert np.array_equal(found.train_labels, content["train_labels"])
    assert np.array_equal(found.test_labels, content["test_labels"])
    assert found.classes == [str(number) for number in range(10)]
    os.rename("with.npz", "WITH.NPZ")
    assert torch.equal(common.load(Path("WITH.NPZ"))[0], train)


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images.astype(np.float32) / 255,
        lambda images: images.astype(np.float64) / 255,
        lambda images: images.astype(np.float16) / 255,
        lambda images: np.clip(images / 255 - 0.001, 0, 1),  # the nearest byte, not the one below
        lambda images: images.astype(np.float32),
        lambda images: images.astype(np.int64),
        lambda images: images.transpose(0, 3, 1, 2),
        lambda images: images.transpose(0, 3, 1, 2).astype(np.float32) / 255,
    ],
)
def test_npz_with_images_of_another_type_or_layout(change):
    content = arrays()
    changed = {"train": change(content["train"]), "test": change(content["test"])}
    np.savez("other.npz", **content | changed)
    train, test = common.load("other.npz")
    assert torch.equal(train, nchw(content["train"])) and torch.equal(test, nchw(content["test"]))
    assert train.dtype == torch.uint8 and train.is_contiguous()


@pytest.mark.parametrize("shape", [(-1, 32, 32), (-1, 32, 32, 1), (-1, 1, 32, 32)])
def test_npz_with_grey_images(shape):
    grey = arrays()["train"][..., 0]
    np.savez("grey.npz", train=grey.reshape(shape), test=grey[:3].reshape(shape))
    train, test = common.load("grey.npz")
    assert train.shape == (20, 3, 32, 32) and test.shape == (3, 3, 32, 32)
    assert all(np.array_equal(train[:, channel], grey) for channel in range(3))


def test_npz_with_black_and_white_images():
    white = arrays()["train"] > 127
    np.savez("bool.npz", train=white, test=white[:1])
    assert torch.equal(common.load("bool.npz")[0], nchw(255 * white.astype(np.uint8)))


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: labels.astype(np.int64),
        lambda labels: labels.astype(np.uint16),
        lambda labels: labels.reshape(-1, 1).astype(np.int32),
    ],
)
def test_npz_with_labels_of_another_type_or_layout(change):
    content = arrays()
    labels = {key: change(content[key]) for key in ("train_labels", "test_labels")}
    np.savez("other.npz", **content | labels)
    found = common.read("other.npz")
    assert found.train_labels.tolist() == content["train_labels"].tolist()
    assert found.test_labels.tolist() == content["test_labels"].tolist()


def test_npz_without_labels():
    content = arrays()
    np.savez("plain.npz", train=content["train"], test=content["test"])
    found = common.read("plain.npz")
    assert found.classes == ["any"]
    assert found.train_labels.tolist() == [0] * 20 and found.test_labels.tolist() == [0] * 5
    np.savez("more.npz", train=content["train"][:1], test=content["test"])
    assert common.load("more.npz")[0].shape == (1, 3, 32, 32)  # one image is enough


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("X_train", "y_train", "X_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_npz_with_the_names_of_other_tools(names):
    content = arrays()
    other = {"val_images": np.zeros(3), "notes": np.array([None, "pickled"])}  # not looked at
    np.savez("other.npz", **dict(zip(names, content.values(), strict=True)), **other)
    found = common.read("other.npz")
    for key, array in content.items():
        assert np.array_equal(getattr(found, key), array), key


def test_npz_without_test_images_holds_out_every_tenth():
    content = arrays(train=25)
    np.savez("one.npz", train=content["train"], train_labels=content["train_labels"])
    found = common.read("one.npz")
    rest = [i for i in range(25) if i % 10]
    assert np.array_equal(found.test, content["train"][[0, 10, 20]])
    assert np.array_equal(found.train, content["train"][rest])
    assert found.test_labels.tolist() == [0, 0, 0]
    assert found.train_labels.tolist() == [i % 10 for i in rest]
    assert len(found.classes) == 10


def with_value(value):
    """Float images from 0 to 1, but for one value."""
    images = np.linspace(0, 1, 20 * 32 * 32 * 3).reshape(20, 32, 32, 3)
    images[3, 4, 5, 1] = value
    return images


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"train": None}, "no train images"),
        ({"test": None}, "test_labels without test images"),
        ({"train_labels": None}, "labels for one of"),
        ({"test_labels": None}, "labels for one of"),
        ({"train": with_value(np.nan)}, "nan"),
        ({"train": with_value(-0.5)}, "from -0.5"),
        ({"train": with_value(1.5)}, "1.5"),
        ({"train": 127.3 * with_value(1)}, "127.3"),
        ({"test": with_value(np.inf)[:5]}, "inf"),
        ({"train": np.full((20, 32, 32, 3), 256)}, "256"),
        ({"train": np.full((20, 32, 32, 3), "a")}, "type <U1"),
        ({"train": np.zeros((20, 28, 28), np.uint8)}, "(20, 28, 28)"),
        ({"train": np.zeros((20, 64, 64, 3), np.uint8)}, "(20, 64, 64, 3)"),
        ({"train": np.zeros((20, 32, 32, 4), np.uint8)}, "(20, 32, 32, 4)"),
        ({"train": np.zeros((20, 3072), np.uint8)}, "(20, 3072)"),
        ({"train": np.zeros((0, 32, 32, 3), np.uint8), "train_labels": np.uint8([])}, "(0, 32, 3"),
        ({"test": np.zeros((0, 32, 32, 3), np.uint8), "test_labels": np.uint8([])}, "(0, 32, 3"),
        ({"train": np.uint8(3)}, "()"),
        ({"test_labels": np.zeros(4, np.uint8)}, "5 images with labels uint8 (4,)"),
        ({"test_labels": np.zeros((5, 2), np.uint8)}, "(5, 2)"),
        ({"test_labels": np.zeros(5)}, "float64"),
        ({"test_labels": np.array([0, 1, 2, -1, 3])}, "from -1"),
        ({"test_labels": np.array([0, 1, 2, 10**9, 3])}, "1000000000"),
        ({"test": np.array([None, "pickled"])}, "pickle"),
    ],
)
def test_npz_that_is_refused(dies, recwarn, change, complaint):
    content = arrays() | change
    np.savez("odd.npz", **{key: array for key, array in content.items() if array is not None})
    line = dies(common.load, "odd.npz")
    reason, wanted = line.split("; wanted are ")
    assert "odd.npz" in reason and complaint in reason and "delete" not in line
    assert "train, test" in wanted and "[N,32,32,3]" in wanted and "train_labels" in wanted
    assert not recwarn.list  # a warning would be a second line


def test_npz_with_one_image_in_all(dies):
    np.savez("one.npz", train=arrays()["train"][:1])
    assert "none to test with" in dies(common.load, "one.npz")


def test_damaged_npz(dies):
    np.savez_compressed("good.npz", **arrays())
    good = Path("good.npz").read_bytes()
    rng = np.random.default_rng(0)
    damaged = [good[:n] for n in (0, 10, 1000, len(good) // 2, len(good) - 1)]
    damaged += [good[:i] + bytes(50) + good[i + 50 :] for i in rng.integers(60_000, size=10)]
    for data in damaged:
        Path("bad.npz").write_bytes(data)
        assert "bad.npz" in dies(common.load, "bad.npz")
    np.save("array.npy", arrays()["train"])
    os.rename("array.npy", "array.npz")
    assert "array.npz" in dies(common.load, "array.npz")


def test_missing_npz_and_unknown_data(dies):
    assert "absent.npz" in dies(common.load, "absent.npz")
    line = dies(common.load, "cifar11")
    for word in ("cifar11", "cifar10", "shapes", "folder", ".npz"):
        assert word in line


# ---- shapes ----


@pytest.fixture(scope="module")
def drawn():
    """The Data of shapes, and the seconds it took (of this process: others lengthen wall time)."""
    start = time.process_time()
    data = common.read("shapes")
    return data, time.process_time() - start


@pytest.fixture(scope="module")
def some_shapes(drawn):
    """1,200 images, their labels, backgrounds and which pixels belong to the shape."""
    images = drawn[0].train[:1200]
    background, _ = backgrounds(images)
    off = ((images - background) ** 2).sum(-1) ** 0.5
    return (
        images,
        drawn[0].train_labels[:1200],
        background,
        off > off.max((1, 2), keepdims=True) / 2,
    )


def backgrounds(images):
    """[n,32,32,3]: by channel the plane that fits the outermost pixels; and which those are."""
    edge = np.ones((32, 32), bool)
    edge[1:-1, 1:-1] = False
    y, x = np.mgrid[:32, :32] / 31
    plane = np.stack([np.ones_like(x), x, y], -1)
    values = images[:, edge].astype(float).swapaxes(0, 1).reshape(124, -1)
    fit = np.linalg.lstsq(plane[edge], values, rcond=None)[0]
    return (plane.reshape(-1, 3) @ fit).reshape(32, 32, -1, 3).transpose(2, 0, 1, 3), edge


def test_shapes_are_fast_complete_and_of_the_promised_layout(drawn):
    data, seconds = drawn
    assert seconds < 8  # 2.2 on a quiet core
    assert data.train.shape == (10_000, 32, 32, 3) and data.test.shape == (2_000, 32, 32, 3)
    assert data.train.dtype == data.test.dtype == np.uint8
    assert sorted(data.classes) == ["circle", "cross", "ring", "square", "star", "triangle"]
    for labels, n in ((data.train_labels, 10_000), (data.test_labels, 2_000)):
        counts = np.bincount(labels)
        assert labels.dtype == np.uint8 and counts.size == 6
        assert counts.max() - counts.min() <= 1 and counts.sum() == n
        assert 0.1 < (labels[:-1] == labels[1:]).mean() < 0.25  # a sixth: in no order
    every = np.concatenate([data.train, data.test])
    assert len(np.unique(every.reshape(12_000, -1), axis=0)) == 12_000


def test_shapes_can_be_loaded(monkeypatch):
    small, draw = (60, 12), common.shapes
    sizes = {10_000: small[0], 2_000: small[1]}
    monkeypatch.setattr(common, "shapes", lambda n, seed: draw(sizes[n], seed))
    train, test = common.load("shapes")
    assert train.shape == (60, 3, 32, 32) and test.shape == (12, 3, 32, 32)
    assert train.dtype == torch.uint8 and train.is_contiguous() and test.is_contiguous()


def test_shapes_depend_on_the_seed_alone():
    images, labels = common.shapes(50, 1)
    again, same_labels = common.shapes(50, 1)
    assert np.array_equal(images, again) and np.array_equal(labels, same_labels)
    assert not np.array_equal(images, common.shapes(50, 2)[0])


def test_background_is_a_gradient_and_the_shape_stands_out_inside_the_image(some_shapes):
    images, _, background, _ = some_shapes
    _, edge = backgrounds(images[:1])
    off = np.abs(images - background).max(-1)  # [1200,32,32]
    assert off[:, edge].max() < 2  # the outermost pixels are background, whatever the shape
    assert np.median(np.ptp(images[:, edge], axis=1).max(-1)) > 20  # which is not flat
    share = (off > 20).mean((1, 2))
    assert share.min() > 0.03 and share.max() < 0.6
    assert np.median(off.max((1, 2))) > 120 and off.max((1, 2)).min() > 60


def test_shapes_are_bright_on_a_dim_ground(some_shapes):
    images, labels, _, inside = some_shapes
    assert images[:, 0].max() <= 78  # the top row: 0.3 of 255, rounded
    for image, mask in zip(images[:100], inside[:100], strict=True):
        colours, counts = np.unique(image[mask], axis=0, return_counts=True)
        colour = colours[counts.argmax()]  # most pixels of a shape are of one colour
        assert colour.min() == 102 and colour.max() == 255  # 0.4 and 1
        assert counts.max() > 0.5 * mask.sum()
    hues = {tuple(image[16, 16] // 64) for image in images[labels == common.SHAPES.index("circle")]}
    assert len(hues) > 6


def test_edges_of_shapes_are_smooth():
    image = common.draw_shape("square", np.random.default_rng(0)).astype(int)
    ground, shape = image[0, 0], image[16, 16]
    channel = np.abs(shape - ground).argmax()
    cover = (image[..., channel] - ground[channel]) / (shape - ground)[channel]
    assert ((cover > 0.2) & (cover < 0.8)).sum() > 10  # between ground and shape


def test_shapes_are_what_their_labels_say(some_shapes):
    """Area over squared radius, from pixel counts alone; and the ring alone has a hole."""
    _, labels, _, inside = some_shapes
    area = {
        "circle": 3.14,
        "square": 2.0,
        "triangle": 1.3,
        "star": 1.32,
        "ring": 3.14 * 0.75,
        "cross": 1.92,
    }
    y, x = np.mgrid[:32, :32]
    for k, name in enumerate(common.SHAPES):
        found, holes, full, radii, places = [], [], [], [], []
        for mask in inside[labels == k]:
            cx, cy = x[mask].mean(), y[mask].mean()
            radius = np.hypot(x[mask] - cx, y[mask] - cy).max() + 0.3
            found.append(mask.sum() / radius**2)
            radii.append(radius)
            places.append([cx, cy])
            holes.append(not mask[round(cy), round(cx)])
            full.append(mask.any(1).sum() * mask.any(0).sum() / mask.sum())  # the box around it
        assert np.mean(holes) == (name == "ring"), name
        assert abs(np.median(found) - area[name]) < 0.3, (name, np.median(found))
        assert np.min(radii) > 10 and np.max(radii) < 14.5, name
        assert np.std(places, axis=0).min() > 0.5, name  # not always in the middle
        assert name != "square" or np.median(full) < 1.3  # upright, not on a corner
    top = np.stack([mask.any(1).argmax() for mask in inside])  # triangles and stars point upwards
    width = np.stack([mask[row].sum() for mask, row in zip(inside, top + 2, strict=True)])
    for name in ("triangle", "star"):
        assert np.median(width[labels == common.SHAPES.index(name)]) < 6


# ---- folders ----


def reference(size=48):
    """Left half red, right half blue, a green stripe at the top."""
    image = np.zeros((size, size, 3), np.uint8)
    image[:, : size // 2] = (220, 0, 0)
    image[:, size // 2 :] = (0, 0, 220)
    image[: size // 6] = (0, 220, 0)
    return Image.fromarray(image)


def is_reference(image, tolerance=12):
    """Whether the image [3,32,32] that was read shows the reference, upright."""
    found = torch.stack([image[:, 2, 8], image[:, 2, 24], image[:, 20, 5], image[:, 20, 26]])
    wanted = torch.tensor([[0, 220, 0], [0, 220, 0], [220, 0, 0], [0, 0, 220]])
    return (found.int() - wanted).abs().max() <= tolerance


def picture(path, colour=(10, 20, 30), size=(40, 40), mode="RGB"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture
def folder():
    """images/, with one picture that sorts first: it is the one held out."""
    picture("images/0.png")
    return Path("images")


def read_pictures(folder):
    """Images by the name of their file, without 0.png: all of them must have been read."""
    train, test = common.load(folder)
    names = sorted(path.name for path in folder.iterdir())
    names_in_order = [name for i, name in enumerate(names) if i % 10] + names[::10]
    images = dict(zip(names_in_order, [*train, *test], strict=True))
    del images["0.png"]
    return images


def test_folder_is_sorted_and_every_tenth_image_is_held_out():
    for i in reversed(range(25)):
        picture(f"images/{i:02d}.png", (i, 2 * i, 200))
    train, test = common.load("images")
    assert train.shape == (22, 3, 32, 32) and test.shape == (3, 3, 32, 32)
    assert test[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert train[:, 0, 0, 0].tolist() == [i for i in range(25) if i % 10]
    assert train[4, :, 9, 9].tolist() == [5, 10, 200] and train.is_contiguous()


@pytest.mark.parametrize("wide", [True, False])
def test_folder_crops_the_middle_and_shrinks_without_aliasing(wide):
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, :32] = (255, 0, 0)  # red | middle | blue: the ends must go
    image[:, 96:] = (0, 0, 255)
    image[:, 32:96:2] = 200  # stripes of one pixel: 200, 0, 200, 0 average to 100
    if not wide:
        image = image.transpose(1, 0, 2)
    Path("images").mkdir()
    for i in range(2):
        Image.fromarray(image).save(f"images/{i}.png")
    found = common.load("images")[0][0].float()
    assert (found - 100).abs()[:, 3:-3, 3:-3].max() < 5
    assert (found[0] - found[2]).abs().max() < 30  # neither red nor blue


def test_jpeg_is_shrunk_without_aliasing_or_blur(folder):
    image = np.zeros((1024, 1024), np.uint8)
    image[:, ::2] = 200
    Image.fromarray(image).save(folder / "1.jpg", quality=95)
    reference(1200).save(folder / "2.jpg")
    stripes = Image.fromarray(np.tile(np.uint8([0] * 8 + [200] * 8), (128, 8)))
    stripes.save(folder / "3.jpg", quality=95)
    stripes.save(folder / "4.png")
    found = read_pictures(folder)
    assert (found["1.jpg"].int() - 100).abs().max() < 8
    assert is_reference(found["2.jpg"])
    assert (found["3.jpg"].int() - found["4.png"].int()).abs().max() < 8


def test_folder_takes_all_formats_subfolders_and_names_what_it_skips(capfd):
    for name in ("b/x.PNG", "a/x.jpg", "a/deep/x.JpEg", "a/y.bmp", "b/z.webp", "b/w.gif"):
        picture(f"images/{name}")
    picture("images/folder.jpg/inner.png")
    Path("images/a/broken.png").write_bytes(b"no image")
    whole = Path("images/a/x.jpg").read_bytes()
    Path("images/b/cut.jpg").write_bytes(whole[: len(whole) // 2])
    for name in ("notes.txt", "doc.pdf", "movie.mpg", "data.h5", "x.svg", "noending", "x.emf"):
        Path("images/a", name).write_text("not an image, not meant to be one")
    found = common.read("images")
    assert len(found.train) + len(found.test) == 7 and found.classes == ["any"]
    assert [*found.train_labels, *found.test_labels] == [0] * 7
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "a/broken.png" in lines[0] and "b/cut.jpg" in lines[1]


def test_colours_are_right_in_every_format_and_mode(folder):
    image = reference()
    for name in ("a.bmp", "b.png", "c.tif", "d.ppm", "e.ico", "f.tga", "g.jp2", "h.gif"):
        image.save(folder / name)
    image.save(folder / "i.jpg", quality=95, subsampling=0)
    image.save(folder / "j.webp", lossless=True)
    image.convert("CMYK").save(folder / "k.jpg", quality=95)
    image.convert("CMYK").save(folder / "l.tif")
    image.convert("YCbCr").save(folder / "m.tif")
    image.quantize(8).save(folder / "n.png")
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(image, *profiles, outputMode="LAB").save(folder / "o.tif")
    image.convert("RGBA").save(folder / "p.png")
    image.save(folder / "q.jpg", "PNG")  # a wrong ending
    image.save(folder / "r.png", "JPEG", quality=95, subsampling=0)
    for name, found in read_pictures(folder).items():
        assert is_reference(found, tolerance=30 if name == "o.tif" else 12), name


def test_grey_and_black_and_white(folder):
    half = np.zeros((32, 32), np.uint8)
    half[:, 16:] = 255
    Image.fromarray(half).convert("1").save(folder / "1.png")
    Image.fromarray(half // 2).save(folder / "2.png")
    Image.fromarray(half // 2).convert("LA").save(folder / "3.png")
    found = read_pictures(folder)
    for name, high in (("1.png", 255), ("2.png", 127), ("3.png", 127)):
        assert np.array_equal(found[name].permute(1, 2, 0), np.stack([half // 255 * high] * 3, -1))


def test_deep_grey_becomes_its_higher_byte(folder, capfd):
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(folder / "1.png")
    Image.fromarray(ramp).save(folder / "2.tif")
    Image.fromarray(ramp.astype(np.int32)).save(folder / "3.tif")  # mode I
    Image.frombytes("I;16B", (32, 32), ramp.astype(">u2").tobytes()).save(folder / "4.tif")
    header = b"P5 32 32 65535\n"
    (folder / "5.pgm").write_bytes(header + ramp.astype(">u2").tobytes())
    found = read_pictures(folder)
    assert sorted(found) == ["1.png", "2.tif", "3.tif", "4.tif", "5.pgm"]
    for name, image in found.items():
        assert all(np.array_equal(channel, ramp >> 8) for channel in image), name
    floats = np.arange(1024).reshape(32, 32).astype(np.float32) % 256 / 255
    Image.fromarray(floats).save(folder / "6.tif")
    assert np.array_equal(read_pictures(folder)["6.tif"][0], np.arange(1024).reshape(32, 32) % 256)
    assert capfd.readouterr().err == ""


def test_deep_grey_out_of_range_is_named_and_skipped(folder, capfd):
    values = np.linspace(0, 1, 1024).reshape(32, 32)
    Image.fromarray((70_000 * values).astype(np.int32)).save(folder / "1.tif")
    Image.fromarray((70_000 * values - 1000).astype(np.int32)).save(folder / "2.tif")
    Image.fromarray((2 * values).astype(np.float32)).save(folder / "3.tif")
    Image.fromarray(np.where(values < 1, values, np.nan).astype(np.float32)).save(folder / "4.tif")
    picture("images/5.png")
    assert len(common.load(folder)[0]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("'")[1] for line in lines] == [f"images/{i}.tif" for i in range(1, 5)]
    assert "70000" in lines[0] and "0..65535" in lines[0] and "0..1" in lines[2]


@pytest.mark.parametrize(
    "orientation, stored",
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_orientation_is_applied(folder, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("1.jpg", "2.png", "3.webp", "4.tif"):
        reference(64).transpose(stored).save(folder / name, exif=exif, quality=95)
    for name, found in read_pictures(folder).items():
        assert is_reference(found, tolerance=20), name


def test_transparent_is_white_whatever_colour_is_hidden_there(folder):
    image = reference()
    clear = np.array(image.convert("RGBA"))
    clear[10:, :24, 3] = 0  # red, below the stripe
    Image.fromarray(clear).save(folder / "1.png")
    Image.fromarray(clear).save(folder / "2.webp", lossless=True, exact=True)
    palette = image.quantize(8)
    red = palette.getpixel((5, 30))
    palette.save(folder / "3.png", transparency=red)
    palette.save(folder / "4.gif", transparency=red)
    image.save(folder / "5.png", transparency=(220, 0, 0))
    for name, found in read_pictures(folder).items():
        assert (found[:, 12:, :12] == 255).all(), name
        assert found[:, 20, 26].tolist() == [0, 0, 220], name
        assert found[:, 2, 26].tolist() == [0, 220, 0], name


def test_transparent_grey_is_white_and_half_transparent_is_mixed_with_it(folder):
    grey = Image.new("LA", (32, 32), (50, 0))
    grey.save(folder / "1.png")
    Image.new("L", (32, 32), 50).save(folder / "2.png", transparency=50)
    Image.new("RGBA", (32, 32), (0, 100, 200, 51)).save(folder / "3.png")  # a fifth
    found = read_pictures(folder)
    assert (found["1.png"] == 255).all() and (found["2.png"] == 255).all()
    assert found["3.png"][:, 9, 9].tolist() == [204, 224, 244]


def test_first_frame_of_an_animation(folder):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(folder / "1.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "2.png", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "3.tif", save_all=True, append_images=frames[1:])
    for name, found in read_pictures(folder).items():
        assert found[:, 9, 9].tolist() == [255, 0, 0], name


def test_sizes_of_all_kinds(folder, recwarn, capfd):
    for i, size in enumerate([(1, 1), (1, 4000), (20_000, 2), (31, 33), (10_000, 9_500)]):
        Image.new("L", size, 100 + i).save(folder / f"{i + 1}.png")
    for i, found in enumerate(read_pictures(folder).values()):
        assert (found == 100 + i).all()
    assert not recwarn.list and capfd.readouterr().err == ""  # 95 megapixels warn, in Pillow


def test_png_with_a_long_text(folder, capfd):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    reference().save(folder / "1.png", pnginfo=text)
    assert is_reference(read_pictures(folder)["1.png"])
    assert capfd.readouterr().err == ""


def test_unreadable_files_are_named_in_a_line_each(folder, capfd, monkeypatch):
    noise = Image.fromarray(
        np.random.default_rng(0).integers(256, size=(300, 300, 3), dtype=np.uint8)
    )
    for ending in ("jpg", "png"):
        noise.save(folder / f"cut.{ending}")
        whole = (folder / f"cut.{ending}").read_bytes()
        (folder / f"cut.{ending}").write_bytes(whole[: len(whole) * 9 // 10])
        (folder / f"zero.{ending}").write_bytes(b"")
    (folder / "html.jpg").write_text("<html>404 Not Found</html>")
    (folder / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.new("1", (1000, 1000)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)  # an error beyond twice that
    os.symlink("nowhere.png", folder / "dangling.png")
    os.symlink("loop.png", folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    picture("images/good.png")
    bad = sorted({path.name for path in folder.iterdir()} - {"0.png", "good.png"})
    assert len(common.load(folder)[0]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(bad) == 10 and len(lines) == 10
    for name, line in zip(bad, lines, strict=True):
        assert line.startswith(f"skipped 'images/{name}': ") and len(line) > 30


def test_no_other_program_is_started(folder, monkeypatch):
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    page = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for name in ("1.eps", "2.png", "3.ps"):
        (folder / name).write_text(page)
    picture("images/4.png")
    common.load(folder)
    assert started == []


def test_file_names_of_all_kinds(folder, monkeypatch):
    """Also on a terminal that knows ASCII only, where Python writes the rest as backslashes."""
    good = (folder / "0.png").read_bytes()
    names = [
        b"with\nnewline",
        b'it\'s "quoted"',
        "ünï 图片 🐈".encode(),
        b"latin1_\xe9\xff",
        b"-dash",
    ]
    for name in names:
        Path(os.fsdecode(b"images/good " + name + b".png")).write_bytes(good)
        Path(os.fsdecode(b"images/bad " + name + b".png")).write_bytes(b"broken")
    stderr = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace")
    monkeypatch.setattr(sys, "stderr", stderr)
    train, test = common.load(folder)
    assert len(train) + len(test) == 1 + len(names)
    stderr.flush()
    lines = stderr.buffer.getvalue().decode("ascii").splitlines()
    assert len(lines) == len(names)
    assert all(line.startswith("skipped ") and "images/bad " in line for line in lines)


def test_hidden_files_are_ignored_silently(folder, capfd):
    mac = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60)
    picture("images/1.png")
    for name in ("._1.png", "__MACOSX/1.png", "__MACOSX/._1.png", ".trash/2.png", "a/.b.png"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mac)
    picture("images/.thumbnails/1.png")
    train, test = common.load(folder)
    assert len(train) == len(test) == 1 and capfd.readouterr().err == ""
    picture(".hidden/a/1.png")
    picture(".hidden/b/2.png")
    assert len(common.load(".hidden")[0]) == 1  # named on the command line, it is wanted


def test_links_to_folders_are_followed_once(folder, capfd):
    picture("elsewhere/1.png", (1, 0, 0))
    picture("elsewhere/deep/2.png", (2, 0, 0))
    os.symlink("../elsewhere", folder / "a")
    os.symlink("../elsewhere", folder / "b")  # the same again
    os.symlink(".", folder / "self")
    os.symlink("../..", Path("elsewhere/deep/up"))  # contains images itself
    os.symlink("0.png", folder / "file.png")
    train, test = common.load(folder)
    assert [int(x[0, 0, 0]) for x in (*test, *train)] == [10, 1, 2, 10]
    assert capfd.readouterr().err == ""


def test_folder_that_cannot_be_opened_is_named(folder, capfd, monkeypatch):
    picture("images/1.png")
    picture("images/shut/2.png")
    iterdir = Path.iterdir

    def guarded(path):
        if path.name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", guarded)
    train, test = common.load(folder)
    assert len(train) == len(test) == 1
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and "images/shut" in line and "Permission denied" in line


@pytest.mark.parametrize("number", [0, 1])
def test_folder_with_too_few_images_says_what_it_found(dies, number):
    Path("images/deep").mkdir(parents=True)
    for i in range(12):
        Path(f"images/deep/{i}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    for i in range(3):
        picture("x.png")
        os.rename("x.png", f"images/{i}")
    for i in range(number):
        picture(f"images/{i}.png")
    line = dies(common.load, "images")
    assert f"images: {number} images could be read" in line
    assert "12 .heic" in line and "3 without an ending" in line and ".jpg" in line
    assert (f"{number} .png" in line) == (number > 0)


def test_empty_folder(dies):
    Path("images").mkdir()
    assert "images: 0 images could be read, 2 are needed; found no files" in dies(
        common.load, "images"
    )


# ---- subset ----


def test_subset_is_fixed_and_a_prefix_of_a_larger_one(dies):
    np.savez("data.npz", **arrays(train=200))
    everything, test = common.load("data.npz")
    ten, _ = common.load("data.npz", 10)
    twenty, _ = common.load("data.npz", subset=20)
    assert torch.equal(ten, common.load("data.npz", 10)[0]) and ten.is_contiguous()
    assert len(ten) == 10 and len(twenty) == 20 and torch.equal(twenty[:10], ten)
    shuffle = np.random.default_rng(0).permutation(200)
    assert torch.equal(twenty, everything[shuffle[:20]])  # as in runs of earlier versions
    every = common.load("data.npz", 200)[0]
    assert {x.numpy().tobytes() for x in every} == {x.numpy().tobytes() for x in everything}
    assert torch.equal(common.load("data.npz", 10)[1], test)
    for wrong in (201, -1):
        line = dies(common.load, "data.npz", wrong)
        assert "200" in line and str(wrong) in line


# ---- fingerprint ----


def test_fingerprint_is_of_bytes_shape_and_order():
    images = nchw(arrays()["train"])
    first = common.fingerprint(images)
    assert len(first) == 12 and set(first) <= set("0123456789abcdef")
    assert common.fingerprint(images.clone()) == first
    assert common.fingerprint(images.contiguous(memory_format=torch.channels_last)) == first
    changed = images.clone()
    changed[19, 2, 31, 31] ^= 1
    others = [
        changed,
        images.flip(0),
        images[:-1],
        images.view(10, 6, 32, 32),
        images.view(20, 3, 16, 64),
        images[:1],
        torch.cat([images, images]),
    ]
    assert len({first, *map(common.fingerprint, others)}) == 8


def test_fingerprint_is_the_same_tomorrow():
    images = torch.arange(240, dtype=torch.uint8).view(5, 3, 4, 4)
    assert common.fingerprint(images) == "1f02647373c1"


def test_fingerprint_is_quick():
    images = torch.zeros(50_000, 3, 32, 32, dtype=torch.uint8)
    start = time.process_time()
    common.fingerprint(images)
    assert time.process_time() - start < 1.5  # 0.2 on a quiet core


# ---- batches ----


@pytest.fixture(scope="module")
def images():
    """1,003 images: the first pixel of each tells which it is and whether it is mirrored."""
    x = torch.zeros(1003, 3, 32, 32, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(1003) % 256
    x[:, 1, 0, 0] = torch.arange(1003) // 256
    x[:, 2, 0, 31] = 1
    return x


def decode(batches):
    """Which images these are, which of them are mirrored, and all of them the right way round."""
    x = torch.cat(batches)
    mirrored = x[:, 2, 0, 0] == 1
    upright = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return upright[:, 0, 0, 0].int() + 256 * upright[:, 1, 0, 0].int(), mirrored, upright


def test_evaluation_batches_are_the_data_in_order(images):
    found = list(common.batches(images, 100))
    assert [len(x) for x in found] == [100] * 10 + [3]
    assert torch.equal(torch.cat(found), images)
    assert torch.equal(torch.cat(list(common.batches(images, 100, skip=4))), images[400:])


def test_training_batches_are_a_permutation_half_of_it_mirrored(images):
    found = list(common.batches(images, 17, seed=3, epoch=5))
    assert len(found) == 59 and all(x.shape == (17, 3, 32, 32) for x in found)
    assert found[0].dtype == torch.uint8
    index, mirrored, upright = decode(found)
    assert len(index.unique()) == 1003
    assert torch.equal(upright, images[index])  # mirrored or not, nothing else is changed
    assert 400 < mirrored.sum() < 600
    assert (index != torch.arange(1003)).float().mean() > 0.9
    per_batch = mirrored.view(59, 17).float().mean(1)
    assert per_batch.std() < 0.3  # drawn image by image, not batch by batch


def test_training_batches_are_those_of_earlier_versions(images):
    """A run that was begun before must go on with the same batches."""
    generator = torch.Generator().manual_seed(100_003 * 3 + 5)
    order = torch.randperm(1003, generator=generator)
    mirrored = torch.rand(1003, 1, 1, 1, generator=generator) < 0.5
    index, found, _ = decode(list(common.batches(images, 17, seed=3, epoch=5)))
    assert torch.equal(index, order.int()) and torch.equal(found, mirrored.flatten())


def test_last_training_batch_is_dropped_if_it_is_not_full(images):
    assert [len(x) for x in common.batches(images, 100, epoch=0)] == [100] * 10
    assert list(common.batches(images[:5], 6, epoch=0)) == []


def test_training_batches_depend_on_seed_and_epoch_alone(images):
    def order(seed, epoch):
        return torch.stack(decode(list(common.batches(images, 17, seed, epoch)))[:2])

    first = order(0, 0)
    torch.manual_seed(9)
    assert torch.equal(order(0, 0), first)
    pairs = [(0, 1), (1, 0), (1, 1), (2, 0), (0, 1000), (1000, 0), (12345, 7), (7, 12345)]
    orders = [first] + [order(*pair) for pair in pairs]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a[0] == b[0]).float().mean() < 0.1
    state = torch.get_rng_state()
    order(0, 3)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's randomness is not touched


@pytest.mark.parametrize("epoch", [None, 4])
@pytest.mark.parametrize("skip", [0, 1, 7, 10, 11, 50])
def test_skip_resumes_exactly(images, epoch, skip):
    whole = list(common.batches(images, 100, seed=1, epoch=epoch))
    rest = list(common.batches(images, 100, seed=1, epoch=epoch, skip=skip))
    assert len(rest) == len(whole[skip:])
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[skip:], strict=True))


# ---- pictures ----


def test_grid_clamps_but_never_stretches():
    images = torch.stack([torch.full((3, 32, 32), v) for v in (0.4, 0.6, -3.0, 7.0, 0.5)])
    images[0, 0, 5, 6] = 1.0
    common.save_grid(images, "new/folder/grid.png", columns=3)
    assert os.listdir("new/folder") == ["grid.png"]
    grid = np.asarray(Image.open("new/folder/grid.png"))
    assert grid.shape == (2 * 66 - 2, 3 * 66 - 2, 3)
    tiles = [grid[66 * r : 64 + 66 * r, 66 * c : 64 + 66 * c] for r in (0, 1) for c in range(3)]
    assert [int(t[-1, -1, 0]) for t in tiles[:5]] == [102, 153, 0, 255, 128]
    assert all(t[-1, -1, 0] == t[20, 30, 1] for t in tiles[:5])
    rows, columns = np.nonzero(tiles[0][..., 0] == 255)  # enlarged by nearest neighbour
    assert sorted(zip(rows, columns, strict=True)) == [(10, 12), (10, 13), (11, 12), (11, 13)]
    assert (grid[64:66] > 200).all() and (grid[:, 64:66] > 200).all() and (tiles[5] > 200).all()


def test_grid_of_bytes_and_few_images():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    common.save_grid(images, "bytes.png")
    grid = np.asarray(Image.open("bytes.png"))
    assert grid.shape == (64, 4 * 66 - 2, 3)  # no wider than its images
    assert np.array_equal(grid[::2, 66:130:2], images[1].permute(1, 2, 0).numpy())


def test_grid_and_export_of_grey_images_of_any_size():
    images = torch.randint(256, (3, 1, 20, 9), dtype=torch.uint8)
    common.save_grid(images, "grey.png", columns=2)
    grid = np.asarray(Image.open("grey.png").convert("RGB"))
    assert grid.shape == (2 * 42 - 2, 2 * 20 - 2, 3)
    for channel in range(3):
        assert np.array_equal(grid[42::2, :18:2, channel], images[2, 0])
        assert np.array_equal(grid[:40:2, 20::2, channel], images[1, 0])
    common.export(images.float() / 255, "grey")
    assert np.array_equal(np.asarray(Image.open("grey/00002.png").convert("L")), images[2, 0])
    wide = torch.rand(2, 3, 5, 64)
    common.export(wide, "wide")
    assert Image.open("wide/00001.png").size == (64, 5)


def test_grid_of_64_images_stays_small():
    common.save_grid(torch.rand(64, 3, 32, 32), "noise.png")  # noise: the worst case
    assert os.path.getsize("noise.png") < 300_000


def test_export_round_trip_of_bytes_and_floats():
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    common.export(images, "samples/of/it")
    common.export(images.float() / 255, "samples/of/it", start=3)
    extremes = torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    common.export(extremes, Path("samples/of/it"), start=99_999)
    names = sorted(os.listdir("samples/of/it"))
    assert names == [f"0000{i}.png" for i in range(6)] + ["100000.png", "99999.png"]
    back = [np.asarray(Image.open(f"samples/of/it/{name}")) for name in names]
    assert np.array_equal(np.stack(back[:3]), images.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack(back[3:6]), np.stack(back[:3]))
    assert (back[6] == 255).all() and (back[7] == 0).all()


def test_export_from_zero_removes_earlier_exports_only():
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    keep = ["grid.png", "1234.png", "00001.txt", "00001a.png", "x00001.png"]
    common.export(images, "samples", start=0)
    common.export(images, "samples", start=99_998)  # five digits and six
    for name in keep:
        Path("samples", name).write_text("keep")
    common.export(images[:1], "samples", start=2)
    assert len(os.listdir("samples")) == 6 + len(keep)  # not from zero: nothing is removed
    common.export(images[:1], "samples")
    assert sorted(os.listdir("samples")) == sorted(["00000.png", *keep])


# ---- the command line ----


def test_exploring_shapes(drawn):
    command = [sys.executable, ROOT / "common.py", "--data", "shapes", "--out", "some/where"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert sorted(os.listdir("some/where")) == ["classes.png", "histogram.png"]
    width, height = Image.open("some/where/classes.png").size
    assert (width, height) == (10 * 66 - 2, 6 * 66 - 2)
    assert len(set(Image.open("some/where/histogram.png").convert("RGB").getcolors(10**6))) > 3
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    data, _ = drawn
    for label, name in enumerate(data.classes):
        counts = [np.sum(labels == label) for labels in (data.train_labels, data.test_labels)]
        assert table[name][::2] == [str(count) for count in counts]
    for channel, name in enumerate(["red", "green", "blue"]):
        mean, std = map(float, table[name][::2])
        values = data.train[..., channel] / 255
        assert abs(mean - values.mean()) < 1e-3 and abs(std - values.std()) < 1e-3


def test_exploring_a_class_of_few_images(cli):
    content = arrays(train=20)
    content["train_labels"][:] = 0
    content["train_labels"][7] = 2  # one image, and none of class 1
    np.savez("few.npz", **content)
    cli("--data", "few.npz", "--out", ".")
    grid = np.asarray(Image.open("classes.png"))
    assert np.array_equal(grid[:64:2, 66:130:2], content["train"][1])
    assert np.array_equal(grid[132:196:2, :64:2], content["train"][7])
    assert (grid[66:130] > 200).all() and (grid[132:, 66:] > 200).all()


def test_exploring_one_grey_image_into_a_folder_with_an_odd_name(cli, capfd):
    grey = np.zeros((1, 32, 32), np.uint8)
    np.savez("one.npz", train=grey, test=grey)
    cli("--data", "one.npz", "--out", os.fsdecode(b"caf\xe9\nnoir"))
    assert sorted(os.listdir(b"caf\xe9\nnoir")) == [b"classes.png", b"histogram.png"]
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["any", "1", "train", "1", "test"] and len(lines) == 5


def test_help(cli, capfd):
    with pytest.raises(SystemExit) as caught:
        cli("--help")
    assert caught.value.code == 0
    text = capfd.readouterr().out
    for word in ("cifar10", "shapes", "FOLDER", "FILE.npz", "--out", "runs/data"):
        assert word in text
    assert any(line.startswith("    shapes ") for line in text.splitlines())  # a table, not a heap


def test_errors_of_the_command_line(cli, dies, monkeypatch):
    assert "nonsense" in dies(cli, "--data", "nonsense")
    np.savez("few.npz", **arrays())
    Path("file").write_text("in the way")
    assert "file" in dies(cli, "--data", "few.npz", "--out", "file/below")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left" in dies(cli, "--data", "few.npz", "--out", "pictures")


def test_interruption_is_quiet(cli, capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "load", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli("--data", "some.npz")
    assert caught.value.code == 130
    assert capfd.readouterr() == ("", "")
