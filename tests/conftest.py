"""What the tests share: a folder of their own, one line of error, and tiny runs of the scripts."""

import contextlib
import copy
import csv
import importlib
import os
import shlex
import shutil
import signal
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SCRIPTS = ["ncsn", "nvae", "ebm"]
STEPS = 3  # an epoch: 52 images, 16 a step, 4 left out
TINY = {
    "ncsn": "--width 8 --mults 1,2 --blocks 1",
    "nvae": "--width 4 --groups 1,2 --outer 1 --expand 1",
    "ebm": "--width 4 --mults 1,2 --blocks 1 --steps 2 --step-size 0.5 --buffer 40 --warm-up 0.4",
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so relative paths (data/cifar10.npz) lie in it.

    One thread: on a busy machine many of them spend seconds waiting for each other.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def dies(capfd):
    """dies(function, *arguments): it must exit with 2 and one line on stderr, which is returned."""

    def check(function, *arguments, **options):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            function(*arguments, **options)
        lines = capfd.readouterr().err.splitlines()
        assert caught.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: "), lines
        return lines[0]

    return check


def gradients(net):
    return [parameter.grad for parameter in net.parameters()]


class StandInGraph:
    """On a CPU it does what a CUDA graph does: it runs again what was called while it recorded.

    While it records, nothing runs. It takes the arguments of then, and what comes out goes where it
    went then, whatever the gradients of a network (if the first argument is one) have become since.
    """

    recording = None  # the graph that does now
    last = None  # what the function put out at its last call

    @classmethod
    def wrap(cls, function):
        def spied(*arguments):
            if cls.recording is not None:
                return cls.recording.keep(function, arguments)
            cls.last = function(*arguments)
            return cls.last

        return spied

    def keep(self, function, arguments):
        self.function = function
        self.arguments = arguments
        self.outputs = copy.deepcopy(self.last)
        self.net = arguments[0] if isinstance(arguments[0], nn.Module) else nn.Module()
        for parameter in self.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.gradients = gradients(self.net)
        return self.outputs

    def register_generator_state(self, generator):
        pass

    @contextlib.contextmanager
    def record(self):
        StandInGraph.recording = self
        yield
        StandInGraph.recording = None

    def replay(self):
        now = gradients(self.net)
        outputs = self.function(*self.arguments)
        if isinstance(outputs, dict):
            for name, value in outputs.items():
                self.outputs[name].copy_(value)
        else:
            self.outputs.copy_(outputs)
        for recorded, gradient in zip(self.gradients, gradients(self.net), strict=True):
            recorded.copy_(gradient)
        for parameter, gradient in zip(self.net.parameters(), now, strict=True):
            parameter.grad = gradient


@pytest.fixture(params=["cpu", "cuda"])
def recording(request, monkeypatch):
    """(device, wrap): a script's Recorded(wrap(function), generator) works on that device."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("records a CUDA graph")
        return "cuda", lambda function: function
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", StandInGraph.record)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock)
    return "cpu", StandInGraph.wrap


def shorten_samplers(module, monkeypatch):
    """Few levels or calls, as the tests are not about the quality of samples."""
    if module.NAME == "ncsn":
        heun_levels = module.heun_levels

        def few_heun_levels(sigma_max, count=12):
            return heun_levels(sigma_max, count // 4)

        def few_levels(sigma_max, dim):
            return np.geomspace(sigma_max, module.SIGMA_MIN, 14).tolist()

        def one_step_a_level(levels):
            return 0.06, 1

        monkeypatch.setattr(module, "heun_levels", few_heun_levels)
        monkeypatch.setattr(module, "make_ladder", few_levels)
        monkeypatch.setattr(module, "langevin_settings", one_step_a_level)
    if module.NAME == "ebm":
        monkeypatch.setattr(module, "CHAIN_ROWS", [0, 1, 3])


class Runner:
    """run("--flags") calls a script in this process and returns its exit status.

    at[k] is called before, after[k] after the k-th training step of a call, k = 0, 1, ...; `steps`
    counts them over all calls, `rates` has the learning rates. The clock moves a microsecond a
    look, or by an_hour().
    """

    def __init__(self, name, data, monkeypatch):
        self.name = name
        self.module = importlib.import_module(name)
        self.tiny = f"--data {data} --batch-size 16 {TINY[name]}"
        self.at = {}
        self.after = {}
        self.steps = 0
        self.rates = []
        self.clock = 0.0
        self.net = None  # of the latest step
        training_step = self.module.training_step

        def watched_step(net, *rest):
            self.net = net
            optimizers = next(part for part in rest if isinstance(part, list))
            self.rates.append(optimizers[0].param_groups[0]["lr"])
            step = self.steps - self.steps_before
            self.at.get(step, nothing)()
            terms = training_step(net, *rest)
            self.after.get(step, nothing)()
            self.steps += 1
            return terms

        def now():
            self.clock += 1e-6
            return self.clock

        monkeypatch.setattr(self.module, "training_step", watched_step)
        monkeypatch.setattr(self.module, "time", types.SimpleNamespace(time=now))
        shorten_samplers(self.module, monkeypatch)

    def main(self, flags):
        self.steps_before = self.steps
        self.module.main(shlex.split("--device cpu " + flags))

    def __call__(self, flags):
        try:
            self.main(flags)
        except SystemExit as stop:
            return stop.code
        return 0

    def train(self, flags):
        """With a tiny network on tiny data, unless the flags say otherwise."""
        return self(f"{self.tiny} {flags}")

    def an_hour(self):
        self.clock += 3600

    def break_weights(self):
        """Make a weight infinite, as a much too high learning rate would."""
        with torch.no_grad():
            next(self.net.parameters()).fill_(float("inf"))


def nothing():
    pass


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def load(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def log(folder):
    return list(csv.DictReader(Path(folder, "log.csv").read_text().splitlines()))


def write_npz(path, train, test):
    """Coloured shapes, as many for training and for testing."""
    import common

    arrays = {}
    for split, count, seed in ("train", train, 0), ("test", test, 1):
        arrays[split], arrays[f"{split}_labels"] = common.shapes(count, seed)
    np.savez(path, **arrays)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """52 training images and 12 test images."""
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    write_npz(path, 52, 12)
    return path


@pytest.fixture(scope="session")
def finished_runs():
    """{script: folder}, filled when a test first needs one."""
    return {}


@pytest.fixture(params=SCRIPTS)
def whole(request, data, finished_runs, tmp_path_factory):
    """(script, folder) of a training run of two epochs without interruption."""
    name = request.param
    if name not in finished_runs:
        folder = tmp_path_factory.mktemp(name) / "run"
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert Runner(name, data, monkeypatch).train(f"--epochs 2 --out {folder}") == 0
        finished_runs[name] = folder
    return name, finished_runs[name]


@pytest.fixture
def run(whole, data, monkeypatch):
    """A Runner of each script in turn."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield Runner(whole[0], data, monkeypatch)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def trained(whole):
    """The run of two epochs, copied into the folder r of the test."""
    return Path(shutil.copytree(whole[1], "r"))


@pytest.fixture
def grids(monkeypatch):
    """{file name: images} of all grids that are written from now on."""
    import common

    seen = {}
    save_grid = common.save_grid

    def watched_save_grid(images, path, columns=8):
        seen[Path(path).name] = images
        save_grid(images, path, columns)

    monkeypatch.setattr(common, "save_grid", watched_save_grid)
    return seen
