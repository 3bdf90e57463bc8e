"""What the three scripts do with trained weights, and what they say to a wrong command line."""

import argparse
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, files, load

OTHER_SIZE = {
    "ncsn": ["--width 12", "--mults 1", "--blocks 2"],
    "nvae": [
        "--width 8",
        "--mults 1",
        "--groups 2,1",
        "--cells 2",
        "--outer 2",
        "--expand 2",
        "--flows 1",
        "--residual 1",
        "--mixtures 2",
    ],
    "ebm": ["--width 12", "--mults 1", "--blocks 2"],
}
SAMPLERS = {  # the first is the default
    "ncsn": ["--sampler heun", "--sampler consistent", "--sampler langevin"],
    "nvae": ["--temperature 1.1", "--temperature 0.7", "--pixels 0.2"],
    "ebm": ["--chain 0", "--chain 4", "--step-size 0.2"],
}
MEASURES = {  # flags, and the lines that they print how often
    "ncsn": (
        "--bits-images 3",
        [
            (r"^sigma +[\d.]+ +loss [\d.]+$", 17),
            (r"^bits/dim \d+\.\d+, standard error .* 3 test images", 1),
        ],
    ),
    "nvae": (
        "--iw 2 --iw-images 3",
        [
            (r"^group +\d +KL -?\d+\.\d+ bits/dim +active units \d+ of 20$", 3),
            (r"^ELBO \d+\.\d+ bits/dim: .* 12 test images$", 1),
            (r"^IW bound, K = 2: \d+\.\d+ bits/dim, of 3 test images", 1),
        ],
    ),
    "ebm": (
        "",
        [
            (r"^AUROC [01]\.\d+, .* against (uniform|constant|shuffled)$", 3),
            (r"^AUROC [01]\.\d+, .* against (interpolated|upside-down|shapes)$", 3),
        ],
    ),
}
ERRORS = {  # flags: what the line must name
    "--epochs x": "--epochs",
    "--epochs 0": "--epochs",
    "--batch-size -1": "--batch-size",
    "--batch-size 53": "--batch-size",
    "--lr nan": "--lr",
    "--lr -1": "--lr",
    "--ema 0": "--ema",
    "--time-limit -1": "--time-limit",
    "--sample-every 0": "--sample-every",
    "--nonsense": "--nonsense",
    "--data missing": "missing",
    "--data empty": "empty",
    "--subset 53": "53",
    "--device nonsense": "--device",
    "--device meta": "--device",
    "--out file/below": "file",
    "--resume": "train first",
    "--generate 1": "train first",
    "--evaluate": "train first",
    "--generate 0": "--generate",
    "--seed 99999999999999999999": "--seed",
}
if not torch.cuda.is_available():
    ERRORS["--device cuda"] = "--device"
OWN_ERRORS = {
    "ncsn": {
        "--sampler nonsense": "--sampler",
        "--freshness -1": "--freshness",
        "--blocks 0": "--blocks",
        "--width 0": "--width",
        "--mults x": "--mults",
        "--mults 0": "--mults",
        "--mults 1,1,1,1,1,1,1": "--mults",
        "--focus 0": "--focus",
        "--bits-images 0": "--bits-images",
        "--inpaint": "train first",
        "--interpolate": "train first",
    },
    "nvae": {
        "--width 0": "--width",
        "--groups x": "--groups",
        "--groups 0": "--groups",
        "--groups -1,2": "--groups",
        "--groups 1,1,1,1,1": "--groups",
        "--mults x": "--mults",
        "--mults 2,0": "--mults",
        "--mixtures 0": "--mixtures",
        "--cells 0": "--cells",
        "--outer 0": "--outer",
        "--expand -1": "--expand",
        "--flows -1": "--flows",
        "--kl-warmup -1": "--kl-warmup",
        "--spectral -1": "--spectral",
        "--temperature 0": "--temperature",
        "--iw 0": "--iw",
        "--iw-images 0": "--iw-images",
        "--interpolate": "train first",
    },
    "ebm": {
        "--width 0": "--width",
        "--mults x": "--mults",
        "--mults 0": "--mults",
        "--mults 1,1,1,1,1,1,1": "--mults",
        "--blocks 0": "--blocks",
        "--steps 0": "--steps",
        "--step-size 0": "--step-size",
        "--step-size 1": "--step-size",
        "--chain -1": "--chain",
        "--focus 0": "--focus",
        "--sigma-max 0": "--sigma-max",
        "--buffer 0": "--buffer",
        "--warm-up -1": "--warm-up",
        "--fresh -1": "--fresh",
        "--decoys 2": "--decoys",
        "--weight -1": "--weight",
        "--smooth 0": "--smooth",
        "--inpaint": "train first",
        "--denoise": "train first",
    },
}
ERROR_CASES = []
for name in SCRIPTS:
    for flags, named in {**ERRORS, **OWN_ERRORS[name]}.items():
        ERROR_CASES.append((name, flags, named))


def only(*names):
    return pytest.mark.parametrize("whole", names, indirect=True)


# ---- flags ----


@pytest.mark.parametrize("whole, flags, named", ERROR_CASES, indirect=["whole"])
def test_errors_take_one_line(run, dies, flags, named):
    Path("empty").mkdir()
    Path("file").write_text("in the way")
    assert named in dies(run.main, f"{run.tiny} --epochs 1 --out r {flags}")


def test_a_run_keeps_its_size(run, trained, dies):
    before = files(trained)
    cases = []
    for flags in OTHER_SIZE[run.name]:
        cases += [("--resume", flags), ("--generate 1", flags)]
    for flags in "--batch-size 8", "--seed 1", "--subset 40":
        cases.append(("--resume", flags))
    for use, flags in cases:
        assert flags.split()[0] in dies(run.main, f"{use} --out r {flags}")
    assert files(trained) == before


@pytest.mark.parametrize("capability, native", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_is_for_gpus_that_are_made_for_it(run, monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
    assert run.module.bf16_is_native(torch.device("cuda")) == native
    assert not run.module.bf16_is_native(torch.device("mps"))


@pytest.mark.parametrize("place, due", [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_streams_and_graphs_go_to_the_gpu_that_is_named(run, monkeypatch, place, due):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    args = argparse.Namespace(device=torch.device(place), amp=None, compile=None)
    run.module.choose_speed(args)
    assert chosen == due
    assert args.compile == (place != "cpu")


@pytest.mark.parametrize("has", ["avx512_bf16", "amx_bf16", "avx512_f", None])
def test_bf16_is_for_cpus_that_are_made_for_it(run, monkeypatch, has):
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("a torch that does not tell")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    native = run.module.bf16_is_native(torch.device("cpu"))
    assert native == (has is not None and "bf16" in has)


def test_an_old_python_is_told_so(run, dies, monkeypatch):
    monkeypatch.setattr(run.module.sys, "version_info", (3, 9, 18))
    assert "3.10" in dies(run.main, "--epochs 1")


# ---- samples and measures ----


def test_samples_come_from_the_averaged_weights(run, trained):
    state = load("r")

    def samples_with(part, added):
        changed = {name: value + added for name, value in state[part].items()}
        torch.save({**state, part: changed}, trained / "checkpoint.pt")
        assert run("--generate 2 --out r") == 0
        return files("r/generated")

    as_trained = samples_with("net", 0)
    assert samples_with("net", math.nan) == as_trained
    assert samples_with("ema", 0.1) != as_trained


@only("ncsn", "ebm")
def test_early_weights_matter_to_samples_unless_guidance_is_one(run, trained):
    """And never to Langevin dynamics of ncsn.py, which would be in balance with something else."""
    state = load("r")
    changed = {name: value + 0.1 for name, value in state["early"].items()}
    for guidance, sampler in itertools.product(["1.8", "1"], SAMPLERS[run.name]):
        found = []
        for early in state["early"], changed:
            torch.save({**state, "early": early}, trained / "checkpoint.pt")
            assert run(f"--generate 2 {sampler} --guidance {guidance} --out r") == 0
            found.append(files("r/generated"))
        same = guidance == "1" or sampler == "--sampler langevin"
        assert (found[0] == found[1]) == same, (guidance, sampler)


def test_trained_weights_can_be_loaded_as_readme_says(run, trained):
    network = {"ncsn": "ScoreNet", "nvae": "NVAE", "ebm": "EnergyNet"}[run.name]
    checkpoint = torch.load("r/checkpoint.pt")
    net = getattr(run.module, network)(**checkpoint["network"])
    net.load_state_dict(checkpoint["ema"])


def test_generating_writes_as_many_files_as_asked(run, trained):
    before = files(trained)
    found = {}
    for flags in "", "--seed 0", "--seed 1", *SAMPLERS[run.name]:
        assert run(f"--generate 5 --out r {flags}") == 0
        images = files("r/generated")
        assert sorted(images) == [f"{i:05d}.png" for i in range(5)]
        assert len(set(images.values())) == 5
        found[flags] = tuple(images[name] for name in sorted(images))
    assert found[""] == found["--seed 0"] == found[SAMPLERS[run.name][0]]
    assert not set(found[""]) & set(found["--seed 1"])
    assert len(set(found.values())) == 2 + len(SAMPLERS[run.name]) - 1
    assert run(f"--generate 259 --out r {SAMPLERS[run.name][0]}") == 0  # more than a batch
    assert sorted(files("r/generated")) == [f"{i:05d}.png" for i in range(259)]
    assert len(set(files("r/generated").values())) == 259
    assert run("--generate 2 --out r") == 0
    assert sorted(files("r/generated")) == ["00000.png", "00001.png"]  # no old ones are left
    assert files(trained) == {**before, "generated.png": files(trained)["generated.png"]}


def test_evaluation_prints_its_measures(run, trained, capfd):
    before = (trained / "checkpoint.pt").read_bytes()
    flags, lines = MEASURES[run.name]
    assert run(f"--evaluate --out r {flags}") == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    assert (trained / "checkpoint.pt").read_bytes() == before
    for pattern, count in lines:
        assert len(re.findall(pattern, text, re.M)) == count, (pattern, text)


def hidden_middle():
    hidden = torch.zeros(32, 32, dtype=torch.bool)
    hidden[8:24, 8:24] = True
    return hidden


def test_images(data):
    return torch.from_numpy(np.load(data)["test"]).permute(0, 3, 1, 2)


test_images.__test__ = False


@only("ncsn")
def test_ncsn_inpaints_and_interpolates(run, trained, data, grids):
    assert run("--inpaint --interpolate --out r") == 0
    assert {"inpaint.png", "interpolate.png", "checkpoint.pt"} < set(files(trained))
    assert grids["interpolate.png"].shape == (64, 3, 32, 32)
    assert len(grids["interpolate.png"].unique(dim=0)) == 64
    rows = grids["inpaint.png"].unflatten(0, (6, 8))
    truth = test_images(data)[:6, None]
    hidden = hidden_middle()
    assert torch.equal(rows[:, :1], truth)
    known = (rows - truth)[:, :, :, ~hidden]
    assert not known.any()
    for row in rows:
        assert len(row[2:, :, hidden].unique(dim=0)) == 6  # six ways to complete it


@only("ncsn")
def test_ncsns_stages_end_in_the_images_that_stand_beside_their_nearest(run, trained, data, grids):
    assert run("--resume --epochs 3 --out r") == 0
    images = torch.from_numpy(np.load(data)["train"]).permute(0, 3, 1, 2)
    rows = grids["nearest.png"].unflatten(0, (8, 8))
    assert torch.equal(grids["stages.png"].unflatten(0, (8, 8))[-1], rows[:, 0])
    for row in rows:
        distances = (images.float() - row[0].float()).flatten(1).norm(dim=1)
        due = images[distances.argsort()[:7]]
        assert torch.equal(row[1:], due)


@only("nvae")
def test_nvaes_pictures(run, trained, data, grids, monkeypatch):
    given_counts = []
    generate = run.module.NVAE.generate

    def watched_generate(net, eps, temperature=1.0, given=()):
        if len(eps[0]) == 7:
            given_counts.append(len(given))
        return generate(net, eps, temperature, given)

    monkeypatch.setattr(run.module.NVAE, "generate", watched_generate)
    assert run("--resume --epochs 3 --out r") == 0
    assert run("--interpolate --evaluate --out r") == 0
    assert given_counts == [0] * 4 + [2] * 4  # groups: none, and those of the coarser scale
    assert {"interpolate.png", "kl_by_group.png"} < set(files(trained))
    assert torch.equal(grids["reconstructions.png"][::2], test_images(data))
    assert len(grids["temperatures.png"]) == 5 * 8
    rows = grids["scales.png"].unflatten(0, (4, 2, 8))  # images, scales, itself and seven draws
    truth = test_images(data)[:4, None].expand(-1, 2, -1, -1, -1)
    assert torch.equal(rows[:, :, 0], truth)
    for row in rows[:, :, 1:].flatten(0, 1):
        assert len(row.unique(dim=0)) == 7
    assert len(grids["interpolate.png"].unique(dim=0)) > 32


@only("ebm")
def test_ebms_pictures(run, trained, data, grids, capfd):
    assert run("--resume --epochs 3 --out r") == 0
    assert run(f"--inpaint --denoise --evaluate --ood {data} --out r") == 0
    assert {"inpaint.png", "denoise.png", "histogram.png"} < set(files(trained))
    test = test_images(data)
    text = capfd.readouterr().out
    assert len(re.findall("^AUROC", text, re.M)) == 6
    assert f"against {data}" in text
    hidden = hidden_middle()
    truth, before, after = grids["inpaint.png"].unflatten(0, (12, 3)).unbind(1)
    assert torch.equal(truth, test)
    assert not before[..., hidden].any()
    for x in before, after:
        assert torch.equal(x[..., ~hidden], test[..., ~hidden])
    assert (after[..., hidden] != test[..., hidden]).float().mean() > 0.8
    rows = grids["denoise.png"].unflatten(0, (12, 3))
    assert torch.equal(rows[:, 0], test)
    found = re.search(r"PSNR ([\d.]+) dB before, ([\d.]+) dB after, of 12 test", text)
    assert float(found[1]) == pytest.approx(20, abs=0.2)  # of noise of a tenth of the range
    error = (rows[:, 0] / 255 - rows[:, 2] / 255).square().mean((1, 2, 3))
    assert float(found[2]) == pytest.approx(-10 * error.log10().mean().item(), abs=0.5)
    rows = grids["chains.png"].unflatten(0, (3, 16)).float()
    moved = (rows[1:] - rows[0]).abs().mean((1, 2, 3, 4))
    assert moved[-1] > moved[0] > 0  # the later the farther


@only("ebm")
def test_energies_are_of_images_with_the_noise_of_training(run, trained, monkeypatch):
    """E has learned from noisy images; that of clean ones is another number."""
    inputs = []
    forward = run.module.EnergyNet.forward

    def watched_forward(net, x):
        inputs.append(x)
        return forward(net, x)

    monkeypatch.setattr(run.module.EnergyNet, "forward", watched_forward)
    flat = np.full((4, 32, 32, 3), 128, np.uint8)
    np.savez("flat.npz", train=flat, train_labels=flat[:, 0, 0, 0], test=flat, test_labels=[0] * 4)
    assert run("--evaluate --data flat.npz --out r") == 0
    noise = inputs[0].std().item()
    assert noise == pytest.approx(load("r")["args"]["smooth"], rel=0.1)
