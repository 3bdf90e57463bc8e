"""Training runs of the three scripts: files, stopping, going on, and what goes wrong on the way."""

import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    STEPS,
    files,
    interrupt,
    load,
    log,
    nothing,
    terminate,
    write_npz,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

TIMES = {"seconds", "images/s"}
PICTURES = {  # at the end of training
    "ncsn": {"stages.png", "nearest.png"},
    "nvae": {"reconstructions.png", "temperatures.png", "scales.png"},
    "ebm": {"chains.png", "chains_before.png"},
}
ALL_USES = {
    "ncsn": "--generate 1 --inpaint --interpolate --evaluate --bits-images 3",
    "nvae": "--generate 1 --interpolate --evaluate --iw 2",
    "ebm": "--generate 1 --inpaint --denoise --evaluate",
}


def only(*names):
    return pytest.mark.parametrize("whole", names, indirect=True)


def differences(a, b, path=""):
    """Where two checkpoints or logs differ, in whatever does not measure time."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in {**a, **b}:
            if key not in TIMES:
                found += differences(a.get(key), b.get(key), f"{path}/{key}")
        return found
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


# ---- files ----


def test_training_writes_its_files(run, trained):
    expected = {"checkpoint.pt", "log.csv", "curves.png", "samples_0002.png"}
    assert set(files(trained)) == expected | PICTURES[run.name]
    for path in trained.glob("*.png"):
        assert len(np.unique(Image.open(path).convert("L"))) > 9, path  # a picture, not a blank
    rows = log(trained)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert set(rows[0]) > TIMES
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values())
    state = load(trained)
    assert (state["model"], state["step"]) == (run.name, 2 * STEPS)
    assert state["args"]["epochs"] == 2
    assert state["args"]["batch_size"] == 16


def test_the_log_has_means_over_an_epochs_steps(run, monkeypatch):
    losses = []
    training_step = run.module.training_step

    def watched_step(*rest):
        terms = training_step(*rest)
        loss = terms["train loss"] if isinstance(terms, dict) else terms
        losses.append(loss.item())
        return terms

    monkeypatch.setattr(run.module, "training_step", watched_step)
    assert run.train("--epochs 2 --out r") == 0
    for epoch, row in enumerate(log("r")):
        due = sum(losses[epoch * STEPS : (epoch + 1) * STEPS]) / STEPS
        assert float(row["train loss"]) == pytest.approx(due, rel=1e-5)


def test_few_and_degenerate_images_are_enough(run, capfd):
    black = np.zeros((4, 32, 32, 3), np.uint8)
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    labels = np.zeros(4, np.uint8)
    for name, train, test in ("one", black, grey), ("same", grey, grey), ("black", black, black):
        count = 1 if name == "one" else 4
        np.savez(
            f"{name}.npz",
            train=train[:count],
            train_labels=labels[:count],
            test=test[:1],
            test_labels=labels[:1],
        )
        size = min(2, count)
        assert run.train(f"--data {name}.npz --batch-size {size} --epochs 1 --out {name}") == 0
        assert run(f"{ALL_USES[run.name]} --out {name}") == 0
        text, errors = capfd.readouterr()
        assert "nan" not in text + errors


# ---- going on ----


@pytest.mark.parametrize("limit, stops", [(1, [2]), (0, range(5))], ids=["an epoch", "each step"])
def test_resuming_is_exact(run, whole, limit, stops):
    run.at[2 if limit else 0] = run.an_hour
    flags = f"{run.tiny} --epochs 2"
    for step in stops:
        assert run(f"{flags} --time-limit {limit} --out r") == 0
        assert load("r")["step"] == run.steps == step + 1
        flags = "--resume"
    assert run("--resume --out r") == 0
    assert run.steps == 2 * STEPS
    assert differences(load(whole[1]), load("r")) == []
    assert differences(log(whole[1]), log("r")) == []
    assert len(log("r")) == 2
    assert files(whole[1])["samples_0002.png"] == files("r")["samples_0002.png"]


def test_another_kind_of_device_can_go_on(run, trained):
    """Its generator has a state of another length, so that noise starts anew."""
    state = load("r")
    torch.save({**state, "random": state["random"][:16]}, "r/checkpoint.pt")
    assert run("--resume --epochs 3 --out r") == 0
    assert load("r")["step"] == 3 * STEPS
    assert len(load("r")["random"]) == len(state["random"])


def test_flags_not_given_come_from_the_checkpoint(run):
    flags = "--epochs 2 --lr 0.002 --seed 5 --time-limit 0 --sample-every 1"
    run.at[0] = run.an_hour
    assert run.train(f"{flags} --out r") == 0
    assert run("--resume --out r") == 0
    args = load("r")["args"]
    assert (args["lr"], args["seed"], args["epochs"]) == (0.002, 5, 2)
    assert max(run.rates) == pytest.approx(0.002)
    assert Path("r/samples_0001.png").exists()
    assert run("--resume --epochs 3 --lr 0.001 --sample-every 9 --out r") == 0  # flags given win
    assert load("r")["step"] == 3 * STEPS
    assert len(log("r")) == 3
    assert max(run.rates[2 * STEPS :]) <= 0.001
    assert load("r")["args"] == {**args, "epochs": 3, "lr": 0.001, "sample_every": 9}


def without_chains(run):
    """Flags with which ebm.py has one schedule, and no pictures before the end of an epoch."""
    return "--warm-up 1" if run.name == "ebm" else ""


EARLY_CASES = [("ncsn", ""), ("ebm", "--warm-up 1"), ("ebm", "--warm-up 0")]  # one stage each


@pytest.mark.parametrize("whole, flags", EARLY_CASES, indirect=["whole"])
def test_early_weights_are_the_averaged_ones_after_a_tenth_of_the_run(run, monkeypatch, flags):
    averages = []
    update_ema = run.module.update_ema

    def watched(ema, *rest):
        update_ema(ema, *rest)
        averages.append({name: value.clone() for name, value in ema.state_dict().items()})

    monkeypatch.setattr(run.module, "update_ema", watched)
    assert run.train(f"--epochs 7 --out r {flags}") == 0  # 21 steps
    assert differences(averages[2], load("r")["early"]) == []
    assert differences(averages[3], load("r")["early"]) != []


def test_the_learning_rate_warms_up_and_falls(run):
    assert run.train(f"--epochs 7 --lr 0.01 --out r {without_chains(run)}") == 0
    expected = [0.01 * (1 + math.cos(math.pi * k / 21)) / 2 for k in range(21)]
    assert run.rates == pytest.approx(expected)


def test_data_that_changed_is_named_and_data_that_moved_is_not(run, trained, data, dies):
    before = files(trained)
    shutil.copy(data, "moved.npz")
    for name, train, test in ("fewer.npz", 40, 12), ("more.npz", 64, 12):
        write_npz(name, train, test)
        line = dies(run.main, f"--resume --epochs 3 --data {name} --out r")
        assert "52 images" in line
        assert f"{train} images" in line
    arrays = dict(np.load(data))
    arrays["train"][0] = arrays["test"][0]  # as many images, another split
    np.savez("split.npz", **arrays)
    line = dies(run.main, "--resume --epochs 3 --data split.npz --out r")
    assert len(set(re.findall("52 images [0-9a-f]+", line))) == 2
    assert files(trained) == before
    assert run("--resume --epochs 3 --data moved.npz --out r") == 0
    assert [row["epoch"] for row in log("r")] == ["1", "2", "3"]


# ---- stopping ----


@pytest.mark.parametrize(
    "why, action, status",
    [("time limit", None, 0), ("interrupted", interrupt, 130), ("terminated", terminate, 143)],
)
def test_a_stopped_run_is_saved_and_says_how_to_go_on(run, capfd, why, action, status):
    run.at[1] = action or run.an_hour
    out = "some 'where'/else"
    assert run.train(f"--epochs 1 --time-limit 59.9 --out {shlex.quote(out)}") == status
    text, errors = capfd.readouterr()
    assert load(out)["step"] == run.steps == 2  # it was finished, and no other begun
    assert why in text
    assert errors == ""
    advice = re.search("go on with (--resume .*)", text)[1]  # can be pasted
    run.at.clear()
    assert run(advice) == 0
    assert load(out)["step"] == STEPS


def test_a_second_interruption_does_not_wait(run, trained, capfd):
    before = files(trained)

    def twice():
        interrupt()
        interrupt()
        pytest.fail("went on")

    run.at[1] = twice
    assert run("--resume --epochs 3 --out r") == 130
    assert files(trained) == before
    assert f"step {2 * STEPS}" in capfd.readouterr().out


def test_an_interruption_that_loses_nothing_does_not_wait(run, trained):
    def once():
        interrupt()
        pytest.fail("went on")

    run.at[0] = once
    before = files(trained)
    assert run("--resume --epochs 3 --out r") == 130
    assert files(trained) == before


def test_nothing_to_resume_is_not_advised(run, capfd):
    if run.name == "ebm":
        pytest.skip("it saves before its first step")

    def twice():
        interrupt()
        interrupt()

    run.at[0] = twice
    assert run.train("--epochs 1 --out r") == 130
    assert "--resume" not in capfd.readouterr().out


@pytest.mark.parametrize("when", ["the last step", "pictures"])
def test_an_interruption_at_the_end_ends_it(run, monkeypatch, when):
    import common

    if when == "pictures":
        monkeypatch.setattr(common, "save_grid", lambda *_, **__: interrupt())
    else:
        run.at[STEPS - 1] = interrupt
        monkeypatch.setattr(common, "save_grid", lambda *_, **__: pytest.fail("went on"))
    assert run.train(f"--epochs 1 --out r {without_chains(run)}") == 130
    assert load("r")["step"] == STEPS
    assert len(log("r")) == 1
    monkeypatch.undo()


def test_a_long_epoch_is_saved_every_ten_minutes(run):
    run.at[1] = run.an_hour

    def look():
        assert load("r")["step"] == 2
        os.remove("r/checkpoint.pt")

    run.at[2] = look
    assert run.train("--epochs 1 --out r") == 0
    assert load("r")["step"] == STEPS


def test_signals_are_as_before_when_training_has_ended(run):
    signals = signal.SIGTERM, signal.SIGINT  # in the background SIGINT may be ignored
    before = [signal.getsignal(number) for number in signals]
    run.at[0] = run.an_hour
    assert run.train("--epochs 1 --time-limit 0 --out r") == 0
    assert [signal.getsignal(number) for number in signals] == before


# ---- what goes wrong ----


def limit_file_size(size):
    """No file may grow longer: the error is that of a full disk, but for its text."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def test_full_disk_keeps_the_last_checkpoint(run, trained, dies):
    before = files(trained)
    unlimited, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_file_size(len(before["checkpoint.pt"]) // 2)
    try:
        line = dies(run.main, "--resume --epochs 3 --out r")
    finally:
        limit_file_size(unlimited)
    assert "r " in line
    assert files(trained) == before  # and nothing is left over


def test_a_log_that_cannot_be_written_is_kept(run, trained, dies, monkeypatch):
    before = (trained / "log.csv").read_bytes()
    replace = os.replace

    def fail(source, target):
        if str(target).endswith("log.csv"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    assert "No space left" in dies(run.main, "--resume --epochs 3 --out r")
    assert (trained / "log.csv").read_bytes() == before
    monkeypatch.setattr(os, "replace", replace)
    assert run("--resume --epochs 4 --out r") == 0
    assert [row["epoch"] for row in log("r")] == ["1", "2", "3", "4"]


def test_kill_while_saving_keeps_the_last_checkpoint(run, trained):
    """By the system, without a word, when the file has half its length."""
    before = (trained / "checkpoint.pt").read_bytes()
    half = len(before) // 2
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import {run.name}
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, ({half}, {half}))
{run.name}.main("--device cpu --resume --epochs 3 --time-limit 0 --out r".split())
"""
    killed = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True)
    assert killed.returncode == -signal.SIGXFSZ
    assert [path for path in trained.iterdir() if path.stat().st_size == half]
    assert (trained / "checkpoint.pt").read_bytes() == before
    assert run("--resume --epochs 3 --out r") == 0
    assert load("r")["step"] == 3 * STEPS


@only("ncsn", "nvae")
@pytest.mark.parametrize("step, then", [(0, nothing), (2, nothing), (0, interrupt)])
def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(run, trained, dies, step, then):
    before = files(trained)
    run.after[step] = run.break_weights
    run.at[step + 1] = then
    line = dies(run.main, "--resume --epochs 3 --out r")
    assert re.search(r"not finite at step [6-9]\b", line)
    assert "--lr" in line
    assert "--resume" in line
    assert files(trained) == before


@only("ncsn", "nvae")
def test_a_first_step_that_is_not_finite_advises_no_resume(run, dies):
    run.after[0] = run.break_weights
    line = dies(run.main, f"{run.tiny} --epochs 1 --out r")
    assert "not finite" in line
    assert "--lr" in line
    assert "--resume" not in line
    assert not Path("r/checkpoint.pt").exists()


def prefixed(state, prefix):
    """As DataParallel and torch.compile name weights."""
    changed = dict(state)
    for part in "net", "ema":
        changed[part] = {prefix + name: value for name, value in state[part].items()}
    return changed


DAMAGES = ["cut", "empty", "garbage", "list", "another", "old", "module.", "_orig_mod.", "shapes"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_be_used(run, trained, dies, damage):
    path = trained / "checkpoint.pt"
    state = load("r")
    content = {"cut": path.read_bytes()[:9999], "empty": b"", "garbage": b"garbage" * 99}
    if damage in content:
        path.write_bytes(content[damage])
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "another":
        torch.save({**state, "model": "another"}, path)
    elif damage == "old":
        torch.save({key: state[key] for key in ("model", "args", "net", "ema", "step")}, path)
    elif damage == "shapes":
        halved = {name: value[:1] for name, value in state["ema"].items() if value.dim()}
        torch.save({**state, "ema": {**state["ema"], **halved}}, path)
    else:
        torch.save(prefixed(state, damage), path)
    before = files(trained)
    for use in "--resume", "--generate 1", "--evaluate":
        line = dies(run.main, f"{use} --out r")
        assert "checkpoint" in line
        assert len(line) < 500
        assert damage != "another" or damage in line
    assert files(trained) == before


def test_a_run_is_not_overwritten(run, trained, dies):
    before = files(trained)
    line = dies(run.main, f"{run.tiny} --out r")
    assert "--resume" in line
    assert "--out" in line
    assert files(trained) == before


# ---- speed and output ----


class ReadsOfTheDevice(TorchDispatchMode):
    """Counts, while `counts` is set, what would wait for the device: item, bool, nonzero, masks."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
    INDEXING = ("index", "index_put_", "_index_put_impl_")

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = False
        self.found = []
        for name in "tolist", "cpu", "numpy":
            monkeypatch.setattr(torch.Tensor, name, self.counted(name))

    def counted(self, name):
        method = getattr(torch.Tensor, name)

        def counting(*arguments, **options):
            self.count(name)
            return method(*arguments, **options)

        return counting

    def count(self, name):
        """But not the optimiser's own counts, which are on the CPU."""
        if self.counts and "torch/optim" not in str(traceback.extract_stack()):
            self.found.append(name)

    def __torch_dispatch__(self, operation, kinds, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        if name in self.READS:
            self.count(name)
        if name in self.INDEXING:
            for index in arguments[1]:
                if index is not None and index.dtype == torch.bool:
                    self.count(name)
        return operation(*arguments, **options or {})


def test_training_steps_read_nothing_back(run, monkeypatch):
    """Looks at steps inside an epoch, not at its end, and at what follows each of them."""
    reads = ReadsOfTheDevice(monkeypatch)

    def begin():
        reads.counts = True

    def end():
        reads.counts = False

    for k in range(2 * STEPS):
        run.at[k] = begin
        if k % STEPS == STEPS - 1:
            run.after[k] = end
    chains = "--warm-up 0" if run.name == "ebm" else ""  # drawn before they begin
    with reads:
        assert run.train(f"--epochs 2 --out r {chains}") == 0
    assert run.steps == 2 * STEPS
    assert not reads.found
    reads.counts = True
    with reads:
        torch.ones(1).item()
    assert reads.found  # it does see them


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(run, monkeypatch, terminal):
    import pty

    run.at[0] = run.an_hour
    ours, theirs = pty.openpty()
    with open(theirs, "w") as screen, open("errors", "w") as file:
        monkeypatch.setattr(sys, "stderr", screen if terminal else file)
        assert run.train("--epochs 1 --time-limit 0 --out r") == 0
        print("end", file=sys.stderr, flush=True)
        text = os.read(ours, 9999) if terminal else Path("errors").read_bytes()
    assert text.startswith(b"end") != terminal, text


def test_lines_reach_a_file_at_once_and_any_terminal(run, data):
    """The program ends without a chance to write what it holds back, in a terminal of ASCII."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import {run.name} as script
end_epoch = script.Run.end_epoch
def end(run, measured):
    end_epoch(run, measured)
    os._exit(9)
script.Run.end_epoch = end
script.main()
"""
    flags = shlex.split(f"--device cpu {run.tiny} --epochs 2")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with open("output", "w") as output:
        command = [sys.executable, "-c", code, *flags, "--out", "läuft"]
        killed = subprocess.run(command, stdout=output, env=environment)
    assert killed.returncode == 9
    assert "epoch 1" in Path("output").read_text()
    code = code.replace("os._exit(9)", "os.kill(os.getpid(), 15)")
    command = [sys.executable, "-c", code, "--resume", "--epochs", "3", "--out", "läuft"]
    stopped = subprocess.run(command, capture_output=True, env=environment, text=True)
    assert stopped.returncode == 143, stopped.stderr
    assert "--resume --out 'l\\xe4uft'" in stopped.stdout


# ---- ebm.py's guards ----


def saved(name):
    return {key: load("r")[name][key] for key in load("r")[name]}


@only("ebm")
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e9])
def test_a_bad_step_is_skipped_and_its_chains_are_not_kept(run, trained, monkeypatch, value):
    contrastive_divergence = run.module.contrastive_divergence
    before = load("r")
    run.at[0] = run.an_hour

    def spoiled(*rest):
        gap, *others = contrastive_divergence(*rest)
        return gap * 0 + value, *others

    monkeypatch.setattr(run.module, "contrastive_divergence", spoiled)
    assert run("--resume --epochs 3 --time-limit 0 --out r") == 0
    after = load("r")
    assert differences(before["net"], after["net"]) == []
    assert differences(before["buffer"]["chains"], after["buffer"]["chains"]) == []
    assert after["sums"]["skipped"][0] == 1
    assert after["failures"] == 0
    monkeypatch.setattr(run.module, "contrastive_divergence", contrastive_divergence)
    assert run("--resume --time-limit 0 --out r") == 0
    assert differences(after["net"], load("r")["net"]) != []
    assert differences(after["buffer"]["chains"], load("r")["buffer"]["chains"]) != []


@only("ebm")
def test_divergence_brings_back_the_last_state_and_half_the_rate(run, trained, capfd):
    before = load("r")
    run.after[1] = run.break_weights
    run.at[2] = run.an_hour
    assert run("--resume --epochs 4 --time-limit 1 --out r") == 0
    assert "weights not finite; back to the last checkpoint" in capfd.readouterr().out
    after = load("r")
    for part in "net", "ema", "early", "buffer":
        assert differences(before[part], after[part]) == []
    for part in "muon", "adam":
        assert differences(before[part]["state"], after[part]["state"]) == []
    assert (after["step"], after["failures"]) == (9, 1)
    assert log("r")[-1]["failures"] == "1"
    run.at.clear()
    run.after.clear()
    assert run("--resume --out r") == 0
    assert load("r")["failures"] == 1
    due = 0.5 * 0.2 * after["args"]["lr"] * run.module.warmup_cosine(9 - 2, 12 - 2)  # chains
    assert run.rates[3] == pytest.approx(due)
    assert differences(before["net"], load("r")["net"]) != []  # and it goes on learning


@only("ebm")
def test_an_interruption_amid_trouble_saves_the_healthy_state(run, trained):
    before = load("r")
    run.after[0] = run.break_weights
    run.at[1] = interrupt
    assert run("--resume --epochs 3 --out r") == 130
    assert differences(before["net"], load("r")["net"]) == []
    assert load("r")["failures"] == 1


@only("ebm")
def test_the_third_divergence_ends_with_one_clear_error(run, trained, dies):
    for k in 0, 3, 6:
        run.after[k] = run.break_weights
    line = dies(run.main, "--resume --epochs 6 --out r")
    assert "three times" in line
    assert "step 15" in line
    assert "not finite" in line
    assert "--lr" in line
    assert (load("r")["step"], load("r")["failures"]) == (12, 2)  # the last healthy one
    assert all(value.isfinite().all() for value in load("r")["net"].values())
    assert run("--generate 1 --out r") == 0


@only("ebm")
def test_stages_follow_each_other_and_the_rate_starts_anew_with_the_chains(run, monkeypatch):
    stages = []
    training_step = run.module.training_step

    def watched_step(net, optimizers, batch, settings, stage, *rest):
        stages.append(stage)
        return training_step(net, optimizers, batch, settings, stage, *rest)

    monkeypatch.setattr(run.module, "training_step", watched_step)
    assert run.train("--epochs 3 --warm-up 0.6 --lr 0.5 --out r") == 0
    assert stages == 5 * ["matching"] + 4 * ["chains"]
    factor = run.module.warmup_cosine
    due = [0.5 * factor(step, 5) for step in range(5)]
    due += [0.1 * factor(step, 4) for step in range(4)]
    assert run.rates == pytest.approx(due)
    rows = log("r")
    assert [row["gap"] != "" for row in rows] == [False, True, True]
    stages.clear()
    assert run.train("--epochs 1 --warm-up 0 --out s") == 0
    assert run.train("--epochs 1 --warm-up 1 --out t") == 0
    assert stages == 3 * ["chains"] + 3 * ["matching"]


@only("ebm")
def test_more_epochs_bring_no_second_warm_up(run):
    assert run.train("--epochs 2 --warm-up 0.5 --out r") == 0
    assert run("--resume --epochs 6 --out r") == 0
    assert load("r")["chains_from"] == STEPS
    assert all(row["gap"] for row in log("r")[1:])


@only("ebm")
def test_noise_of_training_cannot_be_changed(run, trained, dies):
    assert "--smooth" in dies(run.main, "--resume --epochs 3 --out r --smooth 0.1")
    assert "--sigma-max" in dies(run.main, "--resume --epochs 3 --out r --sigma-max 9")


@only("ebm")
def test_the_least_noise_is_below_the_most(run, dies):
    line = dies(run.main, "--smooth 0.2 --sigma-max 0.1 --out r")
    assert "--smooth 0.2 must be below --sigma-max 0.1" in line
    assert not Path("r").exists()


# ---- nvae.py's warm-up ----


@only("nvae")
def test_the_kl_is_annealed_by_the_step_and_anew_after_a_longer_warm_up(run, monkeypatch):
    betas = []
    kl_loss = run.module.kl_loss

    def watched_kl_loss(kl, beta, alpha):
        betas.append(beta)
        return kl_loss(kl, beta, alpha)

    monkeypatch.setattr(run.module, "kl_loss", watched_kl_loss)
    assert run.train("--epochs 3 --kl-warmup 2 --out s") == 0
    assert betas == pytest.approx([1e-4, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1])
    assert run("--resume --epochs 4 --kl-warmup 8 --out s") == 0
    assert betas[9:] == pytest.approx([9 / 24, 10 / 24, 11 / 24])
    assert run.train("--epochs 1 --kl-warmup 0 --out t") == 0
    assert betas[12:] == [1, 1, 1]


def test_scripts_are_three():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted([*SCRIPTS, "common"])
