"""Data loading and image grids; no network, and no CIFAR-10 on the disk."""

import os
import pickle
import runpy
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

import common


def arrays(train=20, test=5):
    """What an .npz file holds, with random images."""
    rng = np.random.default_rng(0)
    return {
        "train": rng.integers(256, size=(train, 32, 32, 3), dtype=np.uint8),
        "train_labels": (np.arange(train) % 10).astype(np.uint8),
        "test": rng.integers(256, size=(test, 32, 32, 3), dtype=np.uint8),
    }


def nchw(images):
    """The tensor that load must give for images [N,32,32,3]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def picture(path, colour=(10, 20, 30), size=(40, 40)):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def colours(images):
    """The red value of each image."""
    return images[:, 0, 16, 16].tolist()


@pytest.fixture
def folder():
    """images/, with one picture that sorts first: it is the one for testing."""
    picture("images/0.png")
    return Path("images")


def read_all(folder):
    """Images by the name of their file, without 0.png: all of them must have been read."""
    train, test = common.load(folder)
    names = sorted(path.name for path in folder.iterdir())
    names_in_order = [name for i, name in enumerate(names) if i % 10] + names[::10]
    images = dict(zip(names_in_order, [*train, *test], strict=True))
    del images["0.png"]
    return images


def show_page(monkeypatch, data):
    """Runs common.py as a program, in this process, to save importing torch."""
    monkeypatch.setattr(sys, "argv", ["common.py", "--data", data, "--out", "some/where"])
    runpy.run_path(common.__file__, run_name="__main__")


def write_batches(without=None):
    """data/cifar-10-batches-py with 15 + 5 images, and no batches.meta."""
    content = arrays(train=15)
    base = Path("data/cifar-10-batches-py")
    base.mkdir(parents=True, exist_ok=True)
    images = [*content["train"].reshape(5, 3, 32, 32, 3), content["test"]]
    labels = [*content["train_labels"].reshape(5, 3), np.zeros(5, int)]
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name, x, y in zip(names, images, labels, strict=True):
        batch = {b"data": nchw(x).reshape(-1, 3072).numpy(), b"labels": y.tolist()}
        if name != without:
            (base / name).write_bytes(pickle.dumps(batch))
    return content


def fake_torchvision(monkeypatch, download):
    """download takes the place of torchvision's CIFAR10."""
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    module = types.SimpleNamespace(CIFAR10=download)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def test_cifar10_of_torchvision_is_used_without_fetching_unless_there_is_an_npz(monkeypatch, dies):
    content = write_batches()
    monkeypatch.setitem(sys.modules, "torchvision", None)  # it is not even needed
    train, test = common.load("cifar10")
    assert torch.equal(train, nchw(content["train"])) and torch.equal(test, nchw(content["test"]))
    assert common.read("cifar10")[2].tolist() == content["train_labels"].tolist()
    assert os.listdir("data") == ["cifar-10-batches-py"]  # nothing is copied
    os.truncate("data/cifar-10-batches-py/data_batch_5", 5000)
    assert "delete data/cifar-10-batches-py" in dies(common.load)
    np.savez("data/cifar10.npz", **arrays(train=30))
    assert len(common.load()[0]) == 30


@pytest.mark.parametrize("without", ["test_batch", "data_batch_3"])
def test_incomplete_cifar10_is_downloaded_into_data(monkeypatch, without):
    def download(root, download):
        assert root == "data" and download
        write_batches()

    content = write_batches(without)
    fake_torchvision(monkeypatch, download)
    assert torch.equal(common.load()[0], nchw(content["train"]))


def test_failed_download_names_ways_out(monkeypatch, dies):
    def fails(*_, **__):
        raise RuntimeError("File not found\nor corrupted.")

    fake_torchvision(monkeypatch, fails)
    line = dies(common.load)
    assert "corrupted" in line and "--data shapes" in line and "data/cifar10.npz with" in line
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert "ModuleNotFoundError" in dies(common.load)


def test_grey_images_are_said_to_count_three_times(capsys):
    colour = arrays()
    for name, channels in ("colour", [0, 1, 2]), ("grey", [1]):
        np.savez(f"{name}.npz", train=colour["train"][..., channels], test=colour["test"])
        common.load(f"{name}.npz")
        assert ("count a pixel three times" in capsys.readouterr().out) == (name == "grey")


@pytest.mark.parametrize("kind", [np.float16, np.float64])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_npz_with_floats_in_any_layout_gives_the_nearest_bytes(kind, axes):
    images = arrays()["train"]
    floats = (images / 255 * 1.0009).astype(kind)  # as resizing may leave them
    np.savez("other.npz", train=floats.transpose(axes), test=images[:2].transpose(axes))
    train, test = common.load("other.npz")
    assert torch.equal(train, nchw(images)) and torch.equal(test, nchw(images[:2]))


@pytest.mark.parametrize("names", ["train test", "X_train X_test", "train_images test_images"])
def test_npz_is_what_it_holds_under_any_usual_names(names):
    content = arrays()
    found = dict(zip(names.split(), (content["train"], content["test"]), strict=True))
    np.savez("x.npz", val_images=np.zeros(3), notes=np.array([None]), **found)  # others are ignored
    os.rename("x.npz", "X.NPZ")
    train, test = common.load(Path("X.NPZ"))
    assert torch.equal(train, nchw(content["train"])) and torch.equal(test, nchw(content["test"]))
    assert train.dtype == torch.uint8 and train.is_contiguous() and test.is_contiguous()
    np.savez("one.npz", train=content["train"])
    assert torch.equal(common.load("one.npz")[1], train[::10])


@pytest.mark.parametrize(
    "labels", [np.eye(20), np.full(20, np.nan), np.array([None]), -np.ones(3, int)]
)
def test_labels_are_no_reason_to_refuse_a_file(labels, monkeypatch, capsys):
    content = arrays()
    del content["train_labels"]
    np.savez("odd.npz", y_train=labels, **content)
    assert torch.equal(common.load("odd.npz")[0], nchw(content["train"]))
    show_page(monkeypatch, "odd.npz")
    assert "class      0      20" in capsys.readouterr().out


RAMP = np.linspace(0, 1, 20 * 3072).reshape(20, 32, 32, 3)
WRONG = {
    "nan": np.where(RAMP == 1, np.nan, RAMP),
    "from -0.5": RAMP - 0.5,
    "to 1.5": 1.5 * RAMP,
    "int64": np.full((20, 32, 32, 3), 256),
    "from 0 to 1": np.uint8(RAMP > 0.5),
    "(20, 28, 28)": np.zeros((20, 28, 28), np.uint8),
    "(20, 32, 32, 4)": np.zeros((20, 32, 32, 4), np.uint8),
    "zero-size": np.zeros((0, 32, 32, 3), np.uint8),
    "pickle": np.array([None]),
}


@pytest.mark.parametrize("complaint", WRONG)
@pytest.mark.parametrize("name", ["train", "test"])
def test_npz_that_is_refused(dies, complaint, name):
    np.savez("odd.npz", **arrays() | {name: WRONG[complaint]})
    line = dies(common.load, "odd.npz")
    assert "odd.npz" in line and complaint in line and "[N,32,32,3]" in line


def test_damaged_and_missing_files_and_unknown_data(dies):
    for size in (0, 10, 1000, 70_000):
        np.savez("bad.npz", **arrays())
        os.truncate("bad.npz", size)
        assert "bad.npz" in dies(common.load, "bad.npz")
    np.savez("empty.npz", other=np.zeros(3))
    assert "train" in dies(common.load, "empty.npz")
    assert "absent.npz" in dies(common.load, "absent.npz")
    line = dies(common.load, "cifar11")
    assert all(word in line for word in ("cifar11", "cifar10", "shapes", "folder", ".npz"))


CONTAINERS = {"x.zip": "zipfile", "x.parquet": "read_parquet", "x.tar.gz": "tar -xf"}


@pytest.mark.parametrize("name", [*CONTAINERS, "test_batch", "test_batch.bin"])
def test_other_containers_are_refused_with_what_to_do(dies, name):
    advice = CONTAINERS.get(name, "--data cifar10")
    Path("in/deep").mkdir(parents=True)
    Path("in/deep", name).write_bytes(b"PK")
    line = dies(common.load, "in")
    assert advice in line and "no usable pictures in in" in line and ".jpg" in line
    if name in CONTAINERS:
        assert advice in dies(common.load, f"in/deep/{name}")
    picture("in/1.png")
    picture("in/2.png")
    assert len(common.load("in")[0]) == 1  # what lies beside pictures does not matter


def test_folder_is_sorted_and_every_tenth_picture_is_held_out(capsys):
    for i in reversed(range(25)):
        picture(f"images/{i // 10}/{i:02d}.png", (i, 2 * i, 200))
    train, test = common.load("images")
    assert colours(test) == [0, 10, 20] and train.is_contiguous()
    assert colours(train) == [i for i in range(25) if i % 10]
    assert train[4, :, 9, 9].tolist() == [5, 10, 200]
    assert capsys.readouterr().out == "22 images for training; every tenth, 3, for testing\n"


@pytest.mark.parametrize(
    "names", ["train test", "Train VAL", "training validation", "train test val"]
)
def test_subfolders_are_the_split(capsys, names):
    train_name, test_name, *_ = names.split()
    for value, name in enumerate(names.split()):
        for i in range(3):
            picture(f"images/{name}/class/{i}.png", (100 * value + i, 0, 0))
    train, test = common.load("images")
    assert colours(train) == [0, 1, 2] and colours(test) == [100, 101, 102]
    line = capsys.readouterr().out
    assert line == f"3 images of train for training, 3 of {test_name.lower()} for testing\n"
    os.rename(f"images/{train_name}", "images/other")
    assert len(common.load("images")[1]) == 1  # no split: every tenth


@pytest.mark.parametrize("wide", [True, False])
def test_picture_is_cropped_to_the_middle_and_reduced_without_aliasing(folder, wide):
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, :32] = (255, 0, 0)  # red | middle | blue: the ends must go
    image[:, 96:] = (0, 0, 255)
    image[:, 32:96:2] = 200  # stripes of one pixel: 200, 0, 200, 0 average to 100
    Image.fromarray(image if wide else image.transpose(1, 0, 2)).save(folder / "1.png")
    found = read_all(folder)["1.png"].float()
    assert (found - 100).abs()[:, 3:-3, 3:-3].max() < 5
    assert (found[0] - found[2]).abs().max() < 30  # neither red nor blue


def reference():
    """Left half red, right half blue, a green stripe at the top."""
    image = np.zeros((48, 48, 3), np.uint8)
    image[:, :24] = (220, 0, 0)
    image[:, 24:] = (0, 0, 220)
    image[:8] = (0, 220, 0)
    return Image.fromarray(image)


def is_reference(image, tolerance=20):
    """Whether the image [3,32,32] that was read shows the reference, upright."""
    found = torch.stack([image[:, 2, 8], image[:, 2, 24], image[:, 20, 5], image[:, 20, 26]])
    wanted = torch.tensor([[0, 220, 0], [0, 220, 0], [220, 0, 0], [0, 0, 220]])
    return (found.int() - wanted).abs().max() <= tolerance


def test_colours_are_right_in_every_format_and_mode(folder, capfd):
    image = reference()
    for ending in sorted(set(common.ENDINGS.split()) - {".avif", ".pgm"}):
        image.save(folder / f"1{ending.upper()}")
    for mode in ("CMYK", "YCbCr", "P", "RGBA"):
        image.convert(mode).save(folder / f"{mode}.tif")
    image.save(folder / "2.jpeg", "PNG")  # a wrong ending
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    image.save(folder / "3.png", pnginfo=text)
    for name, found in read_all(folder).items():
        assert is_reference(found, tolerance=60), name
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("orientation, stored", [(2, 0), (3, 3), (6, 2), (8, 4)])
def test_exif_orientation_is_applied(folder, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = reference().transpose(Image.Transpose(stored))
    turned.save(folder / "1.jpg", exif=exif, quality=95, subsampling=0)
    turned.save(folder / "2.png", exif=exif)
    assert all(is_reference(found) for found in read_all(folder).values())


def test_transparent_is_white_whatever_colour_is_hidden_there(folder):
    clear = np.array(reference().convert("RGBA"))
    clear[10:, :24, 3] = 0  # red, below the stripe
    Image.fromarray(clear).save(folder / "1.png")
    palette = reference().quantize(8)
    palette.save(folder / "2.png", transparency=palette.getpixel((5, 30)))
    reference().save(folder / "3.png", transparency=(220, 0, 0))
    Image.new("RGBA", (32, 32), (0, 100, 200, 51)).save(folder / "fifth.png")
    Image.new("LA", (32, 32), (50, 0)).save(folder / "grey.png")
    found = read_all(folder)
    assert found["fifth.png"][:, 9, 9].tolist() == [204, 224, 244]
    assert (found["grey.png"] == 255).all()
    for image in (found["1.png"], found["2.png"], found["3.png"]):
        assert (image[:, 12:, :12] == 255).all() and image[:, 20, 26].tolist() == [0, 0, 220]


def test_deep_grey_becomes_bytes(folder, capfd):
    bytes_ = np.arange(1024, dtype=np.uint16).reshape(32, 32) % 256
    deep = 257 * bytes_
    Image.fromarray(deep).save(folder / "1.png")
    Image.fromarray(deep.astype(np.int32)).save(folder / "2.tif")  # mode I
    Image.frombytes("I;16B", (32, 32), deep.astype(">u2").tobytes()).save(folder / "3.tif")
    Image.fromarray((bytes_ / 255).astype(np.float32)).save(folder / "4.tif")  # mode F
    Image.fromarray(257 * (bytes_ // 8)).save(folder / "5.png")  # dark, made from bytes
    Image.fromarray((bytes_ / 2000).astype(np.float32)).save(folder / "6.tif")
    Image.fromarray(np.full((32, 32), 20_200, np.uint16)).save(folder / "7.png")  # 78.6 of 255
    found = {name: image[0].numpy() for name, image in read_all(folder).items()}
    for name in ("1.png", "2.tif", "3.tif", "4.tif"):
        assert np.array_equal(found[name], bytes_), name
    assert np.array_equal(found["5.png"], bytes_ // 8)
    assert found["6.tif"].max() == 33 and found["7.png"].max() == 79
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14, 17])
def test_grey_of_other_than_16_bits_is_refused_by_name(folder, capfd, bits):
    ramp = np.linspace(0, 2**bits - 1, 1024).astype(np.int32).reshape(32, 32)
    Image.fromarray(ramp).save(folder / "1.tif")
    Image.fromarray((ramp % 2**14).astype(np.uint16)).save(folder / "2.png")
    Image.fromarray(np.where(ramp > 0, 60_000, -1).astype(np.int32)).save(folder / "3.tif")
    Image.fromarray(np.full((32, 32), 1.1, np.float32)).save(folder / "4.tif")
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(folder / "5.tif")
    picture(folder / "6.png")
    assert len(common.load(folder)[0]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("'")[1] for line in lines] == [str(x) for x in sorted(folder.iterdir())[1:6]]
    assert f"looks like {bits}-bit values" in lines[0]


def test_colours_of_12_bits_in_16_are_refused_and_of_16_are_taken(folder, capfd):
    header = b"\0\0\0\x20\0\0\0\x20\x10\2\0\0\0"  # 32x32, 16 bits, colours
    for name, top in ("1.png", 2**16), ("2.png", 2**12), ("3.png", 2**16):
        colours = np.linspace(0, top - 1, 32 * 96).astype(">u2").reshape(32, 96)
        rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in colours))
        png = b"\x89PNG\r\n\x1a\n"
        for part in b"IHDR" + header, b"IDAT" + rows, b"IEND":
            png += (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
        (folder / name).write_bytes(png)
    assert common.load(folder)[0].float().mean().item() == pytest.approx(127.5, abs=1)
    assert "2.png" in capfd.readouterr().err


def test_masks_of_0_and_1_are_refused_but_black_and_bilevel_pictures_are_not(folder, capfd):
    mask = np.arange(1024).reshape(32, 32) % 2
    for number, kind in enumerate([np.uint8, np.uint16, bool], start=1):
        Image.fromarray(mask.astype(kind)).save(folder / f"{number}.png")
    Image.new("L", (32, 32)).save(folder / "4.png")
    train, _ = common.load(folder)
    assert len(train) == 2 and np.array_equal(train[0][2], 255 * mask) and train[1].max() == 0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all("looks like" in line for line in lines)


def p3_profile():
    """sRGB's profile with the primaries of Display P3, adapted to D50 as profiles have them."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red = (0.51512, 0.24120, -0.00105)
    green = (0.29198, 0.69225, 0.04189)
    blue = (0.15710, 0.06657, 0.78407)
    for tag, values in ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue)):
        place = profile.index(tag)  # in the table of tags: name, offset, size
        start = int.from_bytes(profile[place + 4 : place + 8], "big") + 8
        profile[start : start + 12] = np.rint(np.array(values) * 2**16).astype(">i4").tobytes()
    return bytes(profile)


def test_display_p3_becomes_srgb(folder):
    image = Image.new("RGB", (32, 32), (200, 120, 80))
    image.save(folder / "1.png", icc_profile=p3_profile())
    image.save(folder / "2.jpg", icc_profile=p3_profile(), quality=100)
    image.convert("RGBA").save(folder / "3.png", icc_profile=p3_profile())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(folder / "4.png", icc_profile=srgb)
    found = {name: x[:, 9, 9].int() for name, x in read_all(folder).items()}
    for name in ("1.png", "2.jpg", "3.png"):  # from the matrices of both colour spaces
        assert (found[name] - torch.tensor([213, 117, 71])).abs().max() <= 3, (name, found[name])
    assert (found["4.png"] - torch.tensor([200, 120, 80])).abs().max() <= 1


def test_a_broken_or_unsuitable_profile_does_not_lose_the_picture(folder, capfd):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for number, profile in enumerate([b"broken", lab, p3_profile()[:200]]):
        reference().save(folder / f"1{number}.png", icc_profile=profile)
    assert all(is_reference(found) for found in read_all(folder).values())
    assert capfd.readouterr().err == ""


def test_unreadable_files_are_named_in_a_line_each(folder, capfd):
    for name in ("cut.jpg", "cut.png"):
        picture(folder / name, size=(300, 300))
        os.truncate(folder / name, os.path.getsize(folder / name) * 8 // 10)
    (folder / "html.jpg").write_text("<html>404 Not Found</html>")
    (folder / "two\nlines.png").touch()
    os.symlink("loop.png", folder / "loop.png")
    picture("images/z.png")
    (folder / "notes.txt").write_text("not meant to be a picture")
    assert len(common.load(folder)[0]) == 1
    lines = capfd.readouterr().err.splitlines()
    names = ["cut.jpg", "cut.png", "html.jpg", "loop.png", "two\\nlines.png"]
    assert [line.split("'")[1] for line in lines] == [f"images/{name}" for name in names]
    assert all(line.startswith("skipped ") and "Error" in line for line in lines)


def test_hidden_files_and_those_of_macos_are_left_out(folder):
    for name in (".hidden.png", "__MACOSX/1.png", ".trash/2.png", "a/.b.png"):
        picture(folder / name, (99, 0, 0))
    picture("images/z.png")
    train, test = common.load(folder)
    assert colours(train) == colours(test) == [10]
    picture(".hidden/a/1.png")
    picture(".hidden/b.jpg/2.png")
    assert len(common.load(".hidden")[0]) == 1  # named on the command line, it is wanted


def test_links_to_folders_are_followed_once(folder):
    picture("elsewhere/1.png", (1, 0, 0))
    picture("elsewhere/deep/2.png", (2, 0, 0))
    os.symlink("../elsewhere", folder / "a")
    os.symlink("../elsewhere", folder / "b")  # the same again
    os.symlink(".", folder / "self")
    train, test = common.load(folder)
    assert colours(test) == [10] and colours(train) == [1, 2]


def test_subset_is_fixed_and_takes_at_most_that_many(dies):
    np.savez("data.npz", **arrays(train=200))
    everything, test = common.load("data.npz")
    ten, _ = common.load("data.npz", 10)
    twenty, same_test = common.load("data.npz", subset=20)
    assert len(ten) == 10 and len(twenty) == 20 and torch.equal(twenty[:10], ten)
    assert not torch.equal(ten, everything[:10]) and torch.equal(same_test, test)
    many, _ = common.load("data.npz", 500)
    assert torch.equal(many.sum((1, 2, 3)).sort()[0], everything.sum((1, 2, 3)).sort()[0])
    assert "--subset takes -1" in dies(common.load, "data.npz", -1)
    picture("one/1.png")
    assert "one picture is too few" in dies(common.load, "one")


@pytest.fixture(scope="module")
def images():
    """1,003 images: the first pixel of each says which it is and whether it is mirrored."""
    x = torch.zeros(1003, 3, 4, 32, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(1003) % 256
    x[:, 1, 0, 0] = torch.arange(1003) // 256
    x[:, 2, 0, 31] = 1
    return x


def decode(found):
    """Which images these are, which of them are mirrored, and all of them the right way round."""
    x = torch.cat(list(found))
    mirrored = x[:, 2, 0, 0] == 1
    upright = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return upright[:, 0, 0, 0].int() + 256 * upright[:, 1, 0, 0].int(), mirrored, upright


@pytest.mark.parametrize("flip", [False, True])
def test_batches_hold_each_image_once_and_mirror_half_if_asked(images, flip):
    found = list(common.batches(images, 17, seed=3, epoch=5, flip=flip))
    assert len(found) == 59 and all(x.shape == (17, 3, 4, 32) for x in found)
    assert found[0].dtype == torch.uint8
    index, mirrored, upright = decode(found)
    assert len(index.unique()) == 1003 and torch.equal(upright, images[index])
    assert (index != torch.arange(1003)).float().mean() > 0.9
    assert 400 < mirrored.sum() < 600 if flip else mirrored.sum() == 0
    assert mirrored.view(59, 17).float().mean(1).std() < 0.3  # image by image, not by batch


def test_batches_depend_on_seed_and_epoch_alone(images):
    def order(seed, epoch):
        return torch.stack(decode(common.batches(images, 17, seed, epoch, flip=True))[:2])

    orders = [order(*pair) for pair in [(0, 0), (0, 1), (1, 0), (1, 1), (7, 12345)]]
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert torch.equal(order(0, 0), orders[0])
    assert torch.equal(torch.get_rng_state(), state)  # the caller's randomness is not touched
    for i, first in enumerate(orders):
        assert all((first[0] == other[0]).float().mean() < 0.1 for other in orders[:i])


@pytest.fixture(scope="module")
def drawn():
    """(train, test, labels) of --data shapes."""
    return common.read("shapes")


def test_shapes_are_2400_and_600_different_images_of_six_kinds(drawn):
    train, test, labels = drawn
    assert train.shape == (2400, 3, 32, 32) and test.shape == (600, 3, 32, 32)
    assert len(np.unique(np.concatenate([train, test]).reshape(3000, -1), axis=0)) == 3000
    assert train.dtype == np.uint8 and np.bincount(labels).min() > 350 and max(labels) == 5
    assert 0.1 < (labels[:-1] == labels[1:]).mean() < 0.25  # a sixth: in no order
    assert np.array_equal(common.load("shapes")[0], train)


AREAS = {"circle": 3.14, "square": 2, "triangle": 1.3, "star": 1.32, "ring": 2.36, "cross": 1.75}


@pytest.mark.parametrize("name", AREAS)
def test_shapes_are_what_their_labels_say(drawn, name):
    """Area over squared radius from pixel counts; the ring has a hole, two shapes point upwards."""
    y, x = np.mgrid[:32, :32]
    rows = []
    for image in drawn[0][drawn[2] == list(common.SHAPES).index(name)][:100]:
        mask = image.max(0) > 160
        middle_x = x[mask].mean()
        middle_y = y[mask].mean()
        radius = np.hypot(x[mask] - middle_x, y[mask] - middle_y).max() + 0.3
        hole = not mask[round(middle_y), round(middle_x)]
        rows.append([mask.sum() / radius**2, radius, hole, mask[mask.any(1).argmax() + 2].sum()])
    area, radius, hole, top = np.median(rows, axis=0)
    assert abs(area - AREAS[name]) < 0.3 and 10 < radius < 14.5
    assert hole == (name == "ring") and (top < 6) == (name in ("triangle", "star"))


def test_grid_is_of_tiles_twice_as_large_on_light_grey():
    images = torch.randint(200, (5, 3, 32, 32), dtype=torch.uint8)
    common.save_grid(images, "new/folder/grid.png", columns=3)
    grid = np.asarray(Image.open("new/folder/grid.png"))
    assert grid.shape == (2 * 66 - 2, 3 * 66 - 2, 3)
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        tile = grid[66 * row : 66 * row + 64, 66 * column : 66 * column + 64]
        assert np.array_equal(tile, image.permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1))
    assert all((empty == 235).all() for empty in (grid[64:66], grid[:, 64:66], grid[66:, 132:]))


def test_grids_and_files_take_grey_of_any_size_but_no_floats():
    images = torch.randint(256, (3, 1, 20, 9), dtype=torch.uint8)
    common.save_grid(images, "grey.png")
    grid = np.asarray(Image.open("grey.png"))
    assert grid.shape == (40, 3 * 20 - 2, 3)  # no wider than its images
    common.export(images, "grey")
    for write in (common.save_grid, common.export):
        with pytest.raises(ValueError, match="uint8"):
            write(images.float() / 255, "x")
    for channel in range(3):
        assert np.array_equal(grid[::2, 20:38:2, channel], images[1, 0])
        assert np.array_equal(np.asarray(Image.open("grey/00002.png"))[..., channel], images[2, 0])


def test_export_counts_and_clears_earlier_exports_only_from_zero():
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    keep = ["grid.png", "1234.png", "00001.txt", "00001a.png", "x00001.png"]
    common.export(images, "samples/of/it", start=99_998)  # five digits and six
    for name in keep:
        Path("samples/of/it", name).write_text("keep")
    common.export(images, Path("samples/of/it"), start=2)
    names = ["00002.png", "00003.png", "00004.png", "100000.png", "99998.png", "99999.png"]
    assert sorted(os.listdir("samples/of/it")) == sorted(names + keep)
    back = np.asarray(Image.open("samples/of/it/00003.png"))
    assert np.array_equal(back, images[1].permute(1, 2, 0))
    common.export(images[:1], "samples/of/it")
    assert sorted(os.listdir("samples/of/it")) == sorted(["00000.png", *keep])


def test_the_page_shows_classes_and_numbers(monkeypatch, capsys):
    content = arrays(train=30)
    content["train_labels"] = np.where(np.arange(30) == 7, 5, 3)  # a class of one image
    np.savez("few.npz", **content)
    show_page(monkeypatch, "few.npz")
    grid = np.asarray(Image.open("some/where/classes.png"))
    assert grid.shape == (2 * 66 - 2, 10 * 66 - 2, 3)
    assert np.array_equal(grid[:64:2, 66:130:2], content["train"][1])
    assert np.array_equal(grid[66::2, :64:2], content["train"][7])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["30", "training", "images,", "5", "test", "images"]
    assert lines[1:3] == [["class", "3", "29"], ["class", "5", "1"]]
    for channel, (_, mean, _, std, _) in enumerate(lines[3:]):
        values = content["train"][..., channel] / 255
        assert abs(float(mean) - values.mean()) + abs(float(std) - values.std()) < 2e-4
