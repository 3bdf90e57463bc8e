"""Runs of the three scripts: files, resuming, time limits, kills, the command line, CUDA graphs."""

import contextlib
import copy
import csv
import importlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import common
import numpy as np
import nvae
import pytest
import torch
from conftest import ROOT
from PIL import Image

STEPS = 3  # an epoch: 52 images, 16 a step, 4 left out
TINY = {
    "ncsn": "--width 8 --mults 1 2 --blocks 1",
    "nvae": "--width 4 --mults 1 2 2 --groups 1 2",
    "ebm": "--width 4 --mults 1 2 --blocks 1 --cd-share 0.4",
}
PICTURES = {
    "ncsn": ["denoised.png"],
    "nvae": ["hierarchy.png", "reconstructions.png"],
    "ebm": ["chains.png"],
}


def write_npz(path, train, test):
    np.savez(path, train=common.shapes(train, 0)[0], test=common.shapes(test, 1)[0])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    write_npz(path, 52, 12)
    return path


class Run:
    """run("--flags") calls a script in this process; train() does on tiny data, and small."""

    def __init__(self, name, data):
        self.name = name
        self.module = importlib.import_module(name)
        self.tiny = f"--data {data} --batch-size 16 {TINY[name]}"

    def __call__(self, flags):
        self.module.main(shlex.split(f"--device cpu {flags}"))

    def train(self, flags):
        self(f"{self.tiny} {flags}")

    def one_line(self, flags):
        """The line with which a call ends."""
        with pytest.raises(SystemExit) as caught:
            self(flags)
        line = caught.value.code
        assert isinstance(line, str) and len(line.splitlines()) == 1, line
        return line


@pytest.fixture(params=TINY)
def run(request, data):
    return Run(request.param, data)


finished = {}


@pytest.fixture
def whole(run, tmp_path_factory):
    """The folder of a run of two epochs without interruption."""
    if run.name not in finished:
        folder = tmp_path_factory.mktemp(run.name) / "run"
        run.train(f"--epochs 2 --out {folder}")
        finished[run.name] = folder
    return finished[run.name]


@pytest.fixture
def trained(whole):
    """That run, copied into the folder r."""
    return Path(shutil.copytree(whole, "r"))


def load(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def log(folder):
    return list(csv.DictReader(Path(folder, "log.csv").read_text().splitlines()))


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def differences(a, b, path=""):
    """Where two checkpoints or logs differ, in whatever does not measure time."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in {**a, **b}:
            if key not in ("seconds", "small"):
                found += differences(a.get(key), b.get(key), f"{path}/{key}")
        return found
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


# ------------------------------------------------------------------------------------ files, uses


def test_guidance_0_draws_from_the_weights_after_a_tenth_of_the_steps(data, monkeypatch):
    run, ncsn, weights = Run("ncsn", data), importlib.import_module("ncsn"), []

    def update_ema(ema, net, step, original=ncsn.update_ema):
        original(ema, net, step)
        weights.append(copy.deepcopy(ema.state_dict()))

    monkeypatch.setattr(ncsn, "update_ema", update_ema)
    run.train("--epochs 7 --time-limit 0 --out r")  # 21 steps, the first of them now
    assert differences(load("r")["guide"], weights[0]) == []
    run("--resume --time-limit inf --out r")
    run("--generate 3 --guidance 0 --out r")
    guided = files("r/generated")
    torch.save({**load("r"), "ema": weights[1]}, "r/checkpoint.pt")
    run("--generate 3 --out r")
    assert files("r/generated") == guided


def test_training_writes_its_files(run, trained):
    assert set(files(trained)) >= {"checkpoint.pt", "log.csv", "curves.png", "samples_0002.png"}
    assert not (trained / "checkpoint.tmp").exists()
    for path in trained.glob("*.png"):
        assert len(np.unique(Image.open(path).convert("L"))) > 9, path  # a picture, not a blank
    rows = log(trained)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"seconds", "train loss", "test loss"} <= set(rows[0])
    assert all(math.isfinite(float(value)) for value in rows[1].values())
    assert load(trained)["step"] == 2 * STEPS


def test_the_log_has_the_mean_over_an_epochs_steps(run, monkeypatch):
    losses = []
    seeds = set()
    steps = []
    training_step = run.module.training_step
    update_ema = run.module.update_ema

    def watched(*args, **options):
        seeds.add(torch.initial_seed())
        losses.append(training_step(*args, **options))
        return losses[-1]

    monkeypatch.setattr(run.module, "training_step", watched)
    monkeypatch.setattr(run.module, "update_ema", lambda *a: steps.append(a[2]) or update_ema(*a))
    run.train("--epochs 2 --out r")
    assert len(seeds) == 2 * STEPS  # each step has noise of its own
    assert steps[:3] == [0, 1, 2]
    for epoch, row in enumerate(log("r")):
        first = torch.stack([loss.flatten()[0] for loss in losses[epoch * STEPS :][:STEPS]])
        name = "reconstruction" if run.name == "nvae" else "train loss"
        middle = first.median() if run.name == "ebm" else first.mean()
        assert float(row[name]) == pytest.approx(middle.item(), rel=1e-5)


def test_generate_and_evaluate(run, trained, capsys):
    run("--generate 5 --batch-size 2 --out r")
    names = sorted(path.name for path in (trained / "generated").iterdir())
    assert names == [f"{i:05d}.png" for i in range(5)]
    assert (trained / "generated.png").exists()
    first = files("r/generated")
    run("--generate 5 --batch-size 2 --out r")
    assert files("r/generated") == first  # the seed decides
    run("--evaluate --out r")
    assert "nan" not in capsys.readouterr().out
    for name in PICTURES[run.name]:
        assert (trained / name).exists()


def test_the_averaged_weights_are_drawn_and_measured(run, trained, monkeypatch):
    state = load("r")
    for name, value in state["net"].items():
        state["net"][name] = torch.full_like(value, math.nan)
    torch.save(state, "r/checkpoint.pt")
    grids = []
    monkeypatch.setattr(common, "save_grid", lambda images, path, columns=8: grids.append(images))
    run("--generate 2 --out r")
    assert grids[0].float().std() > 0


# --------------------------------------------------------------------------- going on, and the end


class Clock:
    """In the place of the module time: each look is `tick` seconds later."""

    def __init__(self, tick):
        self.tick = tick
        self.now = 0.0

    def time(self):
        self.now += self.tick
        return self.now


def test_a_run_stopped_at_each_step_ends_like_a_whole_one(run, whole, capsys, monkeypatch):
    flags = f"{run.tiny} --epochs 2"
    for step in range(1, 2 * STEPS + 1):
        run(f"{flags} --time-limit 0 --out r")
        assert load("r")["step"] == step
        assert f"step {step} of {2 * STEPS} is saved" in capsys.readouterr().out
        flags = "--resume"
    run("--resume --out r --time-limit 99")
    assert differences(load(whole), load("r")) == []
    assert differences(log(whole), log("r")) == []
    assert files(whole)["samples_0002.png"] == files("r")["samples_0002.png"]


def test_a_run_is_saved_every_ten_minutes(run, monkeypatch):
    saved = []
    monkeypatch.setattr(run.module, "save", lambda args, state, parts: saved.append(state["step"]))
    monkeypatch.setattr(run.module, "time", Clock(1.0))
    run.train("--epochs 2 --out r")
    assert saved == [3, 6]  # after each epoch
    monkeypatch.setattr(run.module, "time", Clock(601.0))
    run.train("--epochs 1 --out s")
    assert saved == [3, 6, 1, 2, 3, 3]


@pytest.mark.parametrize("place", ["torch.save", "os.replace"])
def test_an_end_while_saving_leaves_the_last_checkpoint(run, whole, monkeypatch, place):
    run.train("--epochs 1 --out r")
    before = files("r")["checkpoint.pt"]
    real = torch.save if place == "torch.save" else os.replace

    def torn(*args):
        if place == "torch.save":
            Path(args[1]).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(place, torn)
    with pytest.raises(KeyboardInterrupt):
        run("--resume --epochs 2 --out r")
    assert files("r")["checkpoint.pt"] == before
    monkeypatch.setattr(place, real)
    run("--resume --epochs 2 --out r")
    assert load("r")["step"] == 2 * STEPS
    assert len(log("r")) == 2


def test_an_end_while_measuring_loses_nothing(run, whole, monkeypatch):
    finish_epoch = run.module.finish_epoch
    monkeypatch.setattr(run.module, "finish_epoch", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.train("--epochs 2 --out r")
    assert load("r")["step"] == STEPS
    monkeypatch.setattr(run.module, "finish_epoch", finish_epoch)
    run("--resume --out r")
    assert differences(load(whole), load("r")) == []
    assert differences(log(whole), log("r")) == []


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_what_is_not_finite_is_not_saved(run, trained, monkeypatch, what):
    before = load("r")
    training_step = run.module.training_step

    def broken(net, *args, **options):
        loss = training_step(net, *args, **options)
        if what == "loss":
            return loss * math.nan
        with torch.no_grad():
            next(net.parameters()).fill_(math.inf)
        return loss

    monkeypatch.setattr(run.module, "training_step", broken)
    assert "--lr" in run.one_line("--resume --epochs 3 --out r")
    after = load("r")
    for name in "net", "ema", "muon", "adam", "step":
        assert differences(before[name], after[name]) == []


def test_more_epochs_go_on_where_the_run_ended(run, trained):
    run("--resume --epochs 3 --lr 0.001 --out r")
    assert [row["epoch"] for row in log("r")] == ["1", "2", "3"]
    state = load("r")
    assert state["step"] == 3 * STEPS
    assert (state["args"]["epochs"], state["args"]["lr"]) == (3, 0.001)


def test_a_run_without_an_epoch_left_changes_nothing(run, whole, trained):
    run("--resume --out r")
    assert differences(load(whole), load("r")) == []


def heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore them


def test_ctrl_c_ends_in_one_line(run, data):
    command = [sys.executable, ROOT / f"{run.name}.py", *shlex.split(run.tiny)]
    command += ["--epochs", "9999", "--sample-every", "9999", "--device", "cpu"]
    options = {"stderr": subprocess.PIPE, "preexec_fn": heed_interrupts}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    while not Path("runs", run.name, "log.csv").exists():
        time.sleep(0.1)
    for _ in range(2):  # Python drops an interrupt that arrives in a weakref callback
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            error = process.communicate(timeout=30)[1].decode()
    ending = "interrupted: --resume goes on with training from the last save, if any\n"
    assert (process.returncode, error.split("KeyboardInterrupt: \n")[-1]) == (1, ending)


def test_a_device_that_is_not_there_ends_in_one_line(run):
    command = [sys.executable, ROOT / f"{run.name}.py", *shlex.split(run.tiny), "--device", "none"]
    error = subprocess.run(command, capture_output=True, text=True).stderr
    assert len(error.splitlines()) == 1 and "none" in error


# --------------------------------------------------------------------------------------- the rates


def test_the_learning_rate_warms_up_and_falls(run):
    warmup_cosine = run.module.warmup_cosine
    factors = [warmup_cosine(step, 1000) for step in range(1000)]
    assert factors[:50] == pytest.approx([(step + 1) / 50 for step in range(50)], rel=0.01)
    cosine = [(1 + math.cos(math.pi * step / 1000)) / 2 for step in range(50, 1000)]
    assert factors[50:] == pytest.approx(cosine)
    assert warmup_cosine(499, 10**6) == pytest.approx(1)  # 500 steps at most
    assert warmup_cosine(0, 3) == 1


def test_half_of_the_average_is_from_the_last_twentieth_of_the_steps(run):
    net = torch.nn.Linear(1, 1)
    ema = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(ema.weight)
    for step in range(2000):
        torch.nn.init.constant_(net.weight, float(step >= 1900))
        run.module.update_ema(ema, net, step)
    assert ema.weight.item() == pytest.approx(1 - 0.5 ** (math.log(2000 / 1900) / 0.05), abs=0.01)


# -------------------------------------------------------------------------------- the command line


def test_a_run_that_exists_is_not_overwritten_and_one_that_does_not_is_not_used(run, trained):
    before = files("r")
    assert "--resume" in run.one_line(f"{run.tiny} --out r")
    assert files("r") == before
    for use in "--resume", "--generate 3", "--evaluate":
        assert "train first" in run.one_line(f"{use} --out nowhere")
    assert not Path("nowhere").exists()


def test_flags_that_must_not_change_are_refused(run, trained):
    flags = "--width 12, --batch-size 8, --seed 3, --subset 20, --mults 1 3 3, --data x"
    for flag in flags.split(", "):
        assert flag.split()[0] in run.one_line(f"--resume {flag} --out r")


def test_values_that_would_do_nothing_are_refused(run):
    for flag in "epochs 0", "batch-size 0", "lr -1", "sample-every 0", "generate 0", "generate -1":
        assert "must be above 0" in run.one_line(f"{run.tiny} --{flag}")


def test_a_checkpoint_of_another_script_is_refused(run, trained):
    other = importlib.import_module({"ncsn": "nvae", "nvae": "ebm", "ebm": "ncsn"}[run.name])
    with pytest.raises(AssertionError, match="another script"):
        other.main(["--generate", "3", "--out", "r"])


def test_fewer_images_than_a_batch_are_refused(run):
    assert "--batch-size" in run.one_line(f"{run.tiny} --subset 9")


def test_small_is_a_preset_and_flags_given_win(run):
    args = run.module.parse(["--small", "--epochs", "77"])
    for flag, value in run.module.SMALL.items():
        assert getattr(args, flag) == (77 if flag == "epochs" else value)
    assert run.module.parse([]).batch_size == 128


def test_flags_of_a_command_are_not_kept_with_the_run(run, trained):
    args = run.module.parse(["--resume", "--out", "r"])
    assert args.epochs == 2 and not args.generate
    kept = load("r")["args"]
    assert not {"out", "device", "resume", "generate", "checkpoint", "time_limit"} & set(kept)


def test_without_a_gpu_a_line_points_to_small(run, capsys):
    run.train("--epochs 1 --out r")
    assert "--small" in capsys.readouterr().out
    run.train("--epochs 1 --small --out s")
    assert "no GPU" not in capsys.readouterr().out


def test_only_cifar10_is_mirrored_if_no_flag_says_so(run, data, monkeypatch):
    flips = []
    batches = common.batches

    def watched(images, batch_size, seed, epoch, skip=0, flip=False):
        flips.append(flip)
        return batches(images, batch_size, seed, epoch, skip, flip)

    load = common.load
    monkeypatch.setattr(common, "batches", watched)
    monkeypatch.setattr(common, "load", lambda name, subset=0: load(str(data), subset))
    for i, flags in enumerate(["", "--flip", "--data cifar10", "--data cifar10 --no-flip"]):
        run.train(f"{flags} --epochs 1 --out r{i}")
    assert flips == [False, True, True, False]


# ---------------------------------------------------------------------------------------- on CUDA


class StandInGraph:
    """On a CPU: what is called while it records runs again at each replay, into the same memory."""

    @contextlib.contextmanager
    def record(self):
        StandInGraph.recording = self
        yield
        StandInGraph.recording = None

    recording = None

    def replay(self):
        self.again()


def test_a_recorded_step_copies_its_arguments_and_is_replayed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", StandInGraph.record)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock)
    calls = []

    def step(batch, lr):
        calls.append((batch, lr))
        result = batch * lr
        if StandInGraph.recording:
            StandInGraph.recording.again = lambda: result.copy_(batch * lr)
            result.zero_()  # nothing runs while it is recorded
        return result

    recorded = nvae.RecordedStep(step)
    for i in range(1, 7):
        batch = torch.full((2,), float(i))
        assert recorded(batch, 10.0 * i).tolist() == [10.0 * i * i] * 2
    assert len(calls) == 4
    assert len({id(batch) for batch, _ in calls}) == 1
    assert torch.is_tensor(calls[0][1])


def test_a_script_gives_up_compiling_in_one_line(run, monkeypatch, capsys):
    def fails(*args, **options):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", fails)
    run.train("--epochs 1 --compile --out r")
    lines = [line for line in capsys.readouterr().out.splitlines() if "compile" in line]
    assert len(lines) == 1 and load("r")["step"] == STEPS
