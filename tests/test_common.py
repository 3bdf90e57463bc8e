"""Data loading and image grids; no network, and no CIFAR-10 on the disk."""
import os
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common

ROOT = Path(common.__file__).parent


def arrays(train=20, test=5):
    rng = np.random.default_rng(0)
    return dict(train=rng.integers(256, size=(train, 32, 32, 3), dtype=np.uint8),
                train_labels=(np.arange(train) % 10).astype(np.uint8),
                test=rng.integers(256, size=(test, 32, 32, 3), dtype=np.uint8),
                test_labels=(np.arange(test) % 10).astype(np.uint8))


def nchw(images):
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
    code = ("import sys, common; "
            "print([m for m in ('matplotlib', 'PIL', 'torchvision') if m in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def test_die_prints_one_line_whatever_the_message(dies):
    assert dies(common.die, "one\ntwo\r\nthree") == "error: one two three"


# ---- CIFAR-10 ----

@pytest.fixture
def torchvision(monkeypatch):
    """Stands in for torchvision.datasets.CIFAR10; .calls counts, .error is raised if set."""
    fake = types.SimpleNamespace(calls=0, error=None, arrays=arrays())

    class CIFAR10:
        def __init__(self, root, train, download):
            assert (root, download) == ("data", True)
            fake.calls += 1
            if fake.error and not train:  # after the first half has come
                raise fake.error
            split = "train" if train else "test"
            self.data = fake.arrays[split]
            self.targets = fake.arrays[f"{split}_labels"].tolist()

    datasets = types.ModuleType("torchvision.datasets")
    datasets.CIFAR10 = CIFAR10
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    return fake


def test_cifar10_is_downloaded_once_and_cached(torchvision):
    train, test = common.load("cifar10")
    assert torch.equal(train, nchw(torchvision.arrays["train"]))
    assert torch.equal(test, nchw(torchvision.arrays["test"]))
    assert train.dtype == torch.uint8 and train.is_contiguous() and test.is_contiguous()
    assert os.listdir("data") == ["cifar10.npz"]
    with np.load("data/cifar10.npz") as cache:
        assert sorted(cache) == sorted(torchvision.arrays)
        for key, array in torchvision.arrays.items():
            assert cache[key].dtype == np.uint8 and np.array_equal(cache[key], array)
    again = common.load()
    assert torchvision.calls == 2  # train and test, and not again
    assert torch.equal(again[0], train) and torch.equal(again[1], test)
    assert common.read("cifar10")[4][3] == "cat"


@pytest.mark.parametrize("error", [
    OSError("<urlopen error no route to host>"), RuntimeError("corrupted\narchive"),
    EOFError("short"), ImportError("no torchvision")])
def test_failed_download_leaves_nothing(torchvision, dies, error):
    torchvision.error = error
    line = dies(common.load)
    assert "--data shapes" in line and "data/cifar10.npz" in line and "[N,32,32,3]" in line
    assert str(error).splitlines()[0] in line
    assert not any(Path().rglob("*.npz*"))


def test_torchvision_that_cannot_be_imported(monkeypatch, dies):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert "--data shapes" in dies(common.load)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_cache_is_whole_or_absent(torchvision, monkeypatch, dies, error):
    def savez(file, **_):
        Path(file).write_bytes(b"half")
        assert len(os.listdir("data")) == 1 and not common.CACHE.exists()
        raise error
    monkeypatch.setattr(np, "savez", savez)
    if isinstance(error, OSError):
        assert "No space left" in dies(common.load)
    else:
        with pytest.raises(KeyboardInterrupt):
            common.load()
    assert os.listdir("data") == []


def test_corrupt_cache_advises_to_delete_it(dies):
    Path("data").mkdir()
    Path("data/cifar10.npz").write_bytes(b"PK\x03\x04 not really")
    line = dies(common.load)
    assert "data/cifar10.npz" in line and "delete it" in line


# ---- .npz files ----

def test_npz_is_what_it_holds():
    a = arrays()
    np.savez("with.npz", **a)
    train, test = common.load("with.npz")
    assert torch.equal(train, nchw(a["train"])) and torch.equal(test, nchw(a["test"]))
    assert np.array_equal(common.read("with.npz")[1], a["train_labels"])
    assert len(common.read("with.npz")[4]) == 10


@pytest.mark.parametrize("change, complaint", [
    (dict(test=None), "test"),
    (dict(train=None), "train"),
    (dict(train=np.zeros((20, 32, 32, 3), np.float32)), "float32"),
    (dict(train=np.zeros((20, 3, 32, 32), np.uint8)), "(20, 3, 32, 32)"),
    (dict(train=np.zeros((0, 32, 32, 3), np.uint8), train_labels=np.uint8([])), "(0, 32, 32, 3)"),
    (dict(train_labels=None), "train_labels"),
    (dict(train=np.uint8(3)), "()"),
    (dict(test_labels=np.zeros(4, np.uint8)), "4"),
    (dict(test_labels=np.zeros((5, 2), np.uint8)), "(5, 2)"),
    (dict(test_labels=np.zeros(5, np.int64)), "int64"),
    (dict(test=np.array([None, "pickled"])), "pickle")])
def test_npz_of_another_layout(dies, change, complaint):
    np.savez("odd.npz", **{k: v for k, v in (arrays() | change).items() if v is not None})
    line = dies(common.load, "odd.npz")
    assert "odd.npz" in line and complaint in line and "delete" not in line


def test_damaged_npz(dies):
    np.savez_compressed("good.npz", **arrays())
    good = Path("good.npz").read_bytes()
    rng = np.random.default_rng(0)
    damaged = [good[:n] for n in (0, 10, 1000, len(good) // 2, len(good) - 1)]
    damaged += [good[:i] + bytes(50) + good[i + 50:] for i in rng.integers(60_000, size=10)]
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

def test_shapes_are_fast_complete_and_of_the_promised_layout():
    start = time.process_time()  # not wall time, which other programs lengthen
    train, test = common.load("shapes")
    assert time.process_time() - start < 3
    assert train.shape == (10_000, 3, 32, 32) and test.shape == (2_000, 3, 32, 32)
    assert train.dtype == test.dtype == torch.uint8 and train.is_contiguous()
    train, labels, test, test_labels, names = common.read("shapes")
    assert sorted(names) == sorted("circle square triangle ring cross star".split())
    for some, n in ((labels, 10_000), (test_labels, 2_000)):
        assert some.dtype == np.uint8 and np.bincount(some).min() > 0.9 * n / 6
        assert np.bincount(some).size == 6
    assert len(np.unique(np.concatenate([train, test]).reshape(12_000, -1), axis=0)) == 12_000


def test_shapes_depend_on_the_seed_alone():
    a, b, c = common.shapes(50, 1), common.shapes(50, 1), common.shapes(50, 2)
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0])


def backgrounds(images):
    """[n,32,32,3]: by channel the plane that fits the outermost pixels; and which those are."""
    edge = np.ones((32, 32), bool)
    edge[1:-1, 1:-1] = False
    y, x = np.mgrid[:32, :32] / 31
    plane = np.stack([np.ones_like(x), x, y], -1)
    values = images[:, edge].astype(float).swapaxes(0, 1).reshape(124, -1)
    fit = np.linalg.lstsq(plane[edge], values, rcond=None)[0]
    return (plane.reshape(-1, 3) @ fit).reshape(32, 32, -1, 3).transpose(2, 0, 1, 3), edge


def test_background_is_a_gradient_and_the_shape_stands_out_inside_the_image():
    images, _ = common.shapes(600, 0)
    background, edge = backgrounds(images)
    off = np.abs(images - background).max(-1)  # [600,32,32]
    assert off[:, edge].max() < 2  # the outermost pixels are background, whatever the shape
    assert np.median(np.ptp(images[:, edge], axis=1).max(-1)) > 20  # which is not flat
    share = (off > 20).mean((1, 2))
    assert share.min() > 0.03 and share.max() < 0.6
    assert np.median(off.max((1, 2))) > 120 and off.max((1, 2)).min() > 60


def test_shapes_are_what_their_labels_say():
    """Area over squared radius, from pixel counts alone; and the ring alone has a hole."""
    images, labels = common.shapes(1200, 0)
    off = ((images - backgrounds(images)[0]) ** 2).sum(-1) ** 0.5
    inside = off > off.max((1, 2), keepdims=True) / 2
    area = dict(circle=3.14, square=2.0, triangle=1.3, star=1.32, ring=3.14 * 0.75, cross=1.92)
    y, x = np.mgrid[:32, :32]
    for k, name in enumerate(common.SHAPES):
        found, holes, full = [], [], []
        for mask in inside[labels == k]:
            cx, cy = x[mask].mean(), y[mask].mean()
            found.append(mask.sum() / (np.hypot(x[mask] - cx, y[mask] - cy).max() + 0.3) ** 2)
            holes.append(not mask[round(cy), round(cx)])
            full.append(mask.any(1).sum() * mask.any(0).sum() / mask.sum())  # the box around it
        assert np.mean(holes) == (name == "ring"), name
        assert abs(np.median(found) - area[name]) < 0.3, (name, np.median(found))
        assert name != "square" or np.median(full) < 1.3  # upright, not on a corner
    top = np.stack([mask.any(1).argmax() for mask in inside])  # triangles and stars point upwards
    width = np.stack([mask[row].sum() for mask, row in zip(inside, top + 2, strict=True)])
    assert all(np.median(width[labels == k]) < 6 for k in (0, 2))


# ---- folders ----

def picture(path, colour=(10, 20, 30), size=(40, 40), mode="RGB"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


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
    a = np.zeros((64, 128, 3), np.uint8)
    a[:, :32], a[:, 96:] = (255, 0, 0), (0, 0, 255)  # red | middle | blue: the ends must go
    a[:, 32:96:2] = 200  # stripes of one pixel: 200, 0, 200, 0 average to 100
    a = a if wide else a.transpose(1, 0, 2)
    Path("images").mkdir()
    for i in range(2):
        Image.fromarray(a).save(f"images/{i}.png")
    image = common.load("images")[0][0].float()
    assert (image - 100).abs()[:, 3:-3, 3:-3].max() < 5
    assert (image[0] - image[2]).abs().max() < 30  # neither red nor blue


def test_folder_takes_all_formats_subfolders_and_names_what_it_skips(capfd):
    for name in ("b/x.PNG", "a/x.jpg", "a/deep/x.JpEg", "a/y.bmp", "b/z.webp", "b/w.gif"):
        picture(f"images/{name}")
    picture("images/a/alpha.png", mode="RGBA")
    picture("images/a/grey.png", mode="L")
    picture("images/a/palette.png", mode="P")
    Path("images/a/broken.png").write_bytes(b"no image")
    whole = Path("images/a/x.jpg").read_bytes()
    Path("images/b/cut.jpg").write_bytes(whole[:len(whole) // 2])
    Path("images/a/notes.txt").write_text("not an image, not meant to be one")
    train, labels, test, test_labels, names = common.read("images")
    assert len(train) + len(test) == 9 and names == ["any"]
    assert [*labels, *test_labels] == [0] * 9
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "a/broken.png" in lines[0] and "b/cut.jpg" in lines[1]


@pytest.mark.parametrize("number", [0, 1])
def test_folder_with_too_few_images(dies, number):
    Path("images").mkdir()
    for i in range(number):
        picture(f"images/{i}.png")
    assert f"images: {number} " in dies(common.load, "images")


# ---- subset ----

def test_subset_is_fixed_and_a_prefix_of_a_larger_one(dies):
    np.savez("data.npz", **arrays(train=200))
    everything, test = common.load("data.npz")
    ten, twenty = common.load("data.npz", 10)[0], common.load("data.npz", subset=20)[0]
    assert torch.equal(ten, common.load("data.npz", 10)[0]) and ten.is_contiguous()
    assert len(ten) == 10 and len(twenty) == 20 and torch.equal(twenty[:10], ten)
    assert not torch.equal(ten, everything[:10])  # shuffled
    every = common.load("data.npz", 200)[0]
    assert {x.numpy().tobytes() for x in every} == {x.numpy().tobytes() for x in everything}
    assert torch.equal(common.load("data.npz", 10)[1], test)
    for wrong in (201, -1):
        line = dies(common.load, "data.npz", wrong)
        assert "200" in line and str(wrong) in line


# ---- batches ----

@pytest.fixture(scope="module")
def images():
    """1,003 images: the first pixel of each tells which it is and whether it is mirrored."""
    x = torch.zeros(1003, 3, 32, 32, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 1, 0, 0], x[:, 2, 0, 31] = torch.arange(1003) % 256, torch.arange(
        1003) // 256, 1
    return x


def decode(batches):
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
    tiles = [grid[66 * r:64 + 66 * r, 66 * c:64 + 66 * c] for r in (0, 1) for c in range(3)]
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


def test_grid_of_64_images_stays_small():
    common.save_grid(torch.rand(64, 3, 32, 32), "noise.png")  # noise: the worst case
    assert os.path.getsize("noise.png") < 300_000


def test_export_round_trip_of_bytes_and_floats():
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    common.export(images, "samples/of/it")
    common.export(images.float() / 255, "samples/of/it", start=3)
    common.export(torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32),
                  Path("samples/of/it"), start=99_999)
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
    common.export(images, "samples", start=12_345)
    for name in keep:
        Path("samples", name).write_text("keep")
    common.export(images[:1], "samples", start=2)
    assert len(os.listdir("samples")) == 6 + len(keep)  # not from zero: nothing is removed
    common.export(images[:1], "samples")
    assert sorted(os.listdir("samples")) == sorted(["00000.png", *keep])


# ---- the command line ----

def test_exploring_shapes():
    result = subprocess.run([sys.executable, ROOT / "common.py", "--data", "shapes",
                             "--out", "some/where"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert sorted(os.listdir("some/where")) == ["classes.png", "histogram.png"]
    width, height = Image.open("some/where/classes.png").size
    assert (width, height) == (10 * 66 - 2, 6 * 66 - 2)
    assert len(set(Image.open("some/where/histogram.png").convert("RGB").getcolors(10**6))) > 3
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    train, labels, _, test_labels, names = common.read("shapes")
    for k, name in enumerate(names):
        assert table[name][::2] == [str((labels == k).sum()), str((test_labels == k).sum())]
    for c, name in enumerate(["red", "green", "blue"]):
        mean, std = map(float, table[name][::2])
        assert abs(mean - train[..., c].mean() / 255) < 1e-3
        assert abs(std - train[..., c].std() / 255) < 1e-3


def test_exploring_a_class_of_few_images(cli):
    a = arrays(train=20)
    a["train_labels"][:] = 0
    a["train_labels"][7] = 2  # one image, and none of class 1
    np.savez("few.npz", **a)
    cli("--data", "few.npz", "--out", ".")
    grid = np.asarray(Image.open("classes.png"))
    assert np.array_equal(grid[132:196:2, :64:2], a["train"][7])
    assert (grid[66:130] > 200).all() and (grid[132:, 66:] > 200).all()


def test_help(cli, capfd):
    with pytest.raises(SystemExit) as caught:
        cli("--help")
    assert caught.value.code == 0
    text = capfd.readouterr().out
    for word in ("cifar10", "shapes", "FOLDER", "FILE.npz", "--out", "runs/data"):
        assert word in text


def test_errors_of_the_command_line(cli, dies, monkeypatch):
    assert "nonsense" in dies(cli, "--data", "nonsense")
    np.savez("few.npz", **arrays())
    Path("file").write_text("in the way")
    assert "file" in dies(cli, "--data", "few.npz", "--out", "file/below")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left" in dies(cli, "--data", "few.npz", "--out", "pictures")
