"""Runs of nvae.py, ncsn.py and ebm.py: files, checkpoints, stopping, errors, command line. What
differs between them is in the tables; networks are tiny, samplers short, and their clock stands."""
import csv, importlib, inspect, math, os, pty, re, resource, shlex, shutil, signal, subprocess, sys
import traceback, types
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
import common

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["ncsn", "nvae", "ebm"]
STEPS = 3  # an epoch: 52 images, 16 a step, 4 left out
TIMES = {"seconds", "images/s"}
FLAGS = """data subset epochs batch-size lr ema seed device amp compile out resume time-limit
    sample-every generate evaluate"""  # of all scripts; the functions below are the same in all
BOOKS = "die learning_rate update_ema save_checkpoint load_checkpoint plot write_log"
TINY = {"ncsn": "--width 8 --mults 1,2 --blocks 1",
        "nvae": "--width 4 --groups 1,2 --outer 1 --expand 1",
        "ebm": "--width 4 --mults 1,2 --blocks 1 --steps 2 --chain 3 --buffer 40 --warm-up 0.2"}
OTHER_SIZE = {"ncsn": ["--width 12", "--mults 1", "--blocks 2"], "nvae": [
    "--width 8", "--groups 2,1", "--cells 2", "--outer 2", "--expand 2", "--flows 1",
    "--residual 1", "--mults 1", "--mixtures 2"],
    "ebm": ["--width 12", "--mults 1", "--blocks 2"]}
PICTURES = {"ncsn": {"stages.png", "nearest.png"},  # at the end of training
            "nvae": {"reconstructions.png", "temperatures.png", "scales.png"},
            "ebm": {"chains.png"}}
SAMPLERS = {"ncsn": ["--sampler langevin", "--sampler consistent", "--sampler heun"],
            "nvae": ["--temperature 0.7", "--temperature 1.0", "--pixels 0.2"],
            "ebm": ["--chain 3", "--chain 4", "--noise 0.1", "--step-size 100"]}
MEASURES = {  # flags, and what is printed how often
    "ncsn": ("--bits-images 3", [
        (r"^sigma +[\d.]+ +loss [\d.]+$", 17), (r"^bits/dim \d+\.\d+, .* 3 test images", 1)]),
    "nvae": ("--iw 2 --iw-images 3", [
        (r"^group +\d +KL -?\d+\.\d+ bits/dim +active units \d+ of 20$", 3),
        (r"^ELBO \d+\.\d+ bits/dim: .* 12 test images$", 1),
        (r"^IW bound, K = 2: \d+\.\d+ bits/dim, of 3 test images", 1)]),
    "ebm": ("", [(r"^AUROC [01]\.\d+ .* against (uniform|constant|shuffled|"
                  r"interpolated|upside-down|shapes)$", 6)])}
ALL_USES = {"ncsn": "--generate 1 --inpaint --interpolate --evaluate --bits-images 3",
            "nvae": "--generate 1 --interpolate --evaluate --iw 2",
            "ebm": "--generate 1 --inpaint --denoise --evaluate"}
ERRORS = {  # flags: what the line must name
    "--epochs x": "--epochs", "--epochs 0": "--epochs", "--batch-size -1": "--batch-size",
    "--lr nan": "--lr", "--time-limit -1": "--time-limit", "--nonsense": "--nonsense",
    "--data missing": "missing", "--data empty": "empty", "--batch-size 53": "--batch-size",
    "--subset 53": "53", "--device nonsense": "--device", "--out file/below": "file",
    "--resume": "train first", "--generate 1": "train first", "--evaluate": "train first",
    "--generate 0": "--generate", "--seed 99999999999999999999": "--seed",
    **({} if torch.cuda.is_available() else {"--device cuda": "--device"})}
OWN_ERRORS = {"ncsn": {
    "--sampler nonsense": "--sampler", "--freshness -1": "--freshness", "--blocks 0": "--blocks",
    "--width 5": "--width", "--width 0": "--width", "--mults x": "--mults", "--mults 0": "--mults",
    "--mults 1,1,1,1,1,1,1": "--mults", "--inpaint": "train first",
    "--interpolate": "train first"},
    "nvae": {
    "--width 0": "--width", "--groups x": "--groups", "--mults x": "--mults", "--mults 2,0":
    "--mults", "--mixtures 0": "--mixtures", "--groups 0": "--groups", "--groups -1,2": "--groups",
    "--groups 1,1,1,1,1": "--groups", "--cells 0": "--cells", "--outer 0": "--outer",
    "--expand 0": "--expand", "--flows -1": "--flows", "--kl-warmup -1": "--kl-warmup",
    "--spectral -1": "--spectral", "--temperature 0": "--temperature", "--iw 0": "--iw",
    "--iw-images 0": "--iw-images", "--interpolate": "train first"},
    "ebm": {
    "--width 0": "--width", "--mults x": "--mults", "--mults 0": "--mults", "--blocks 0":
    "--blocks", "--mults 1,1,1,1,1,1,1": "--mults", "--steps 0": "--steps", "--step-size 0":
    "--step-size", "--noise 0": "--noise", "--clamp 0": "--clamp", "--chain 0": "--chain",
    "--buffer 0": "--buffer", "--warm-up -1": "--warm-up", "--fresh -1": "--fresh",
    "--penalty -1": "--penalty", "--smooth 0": "--smooth",
    "--inpaint": "train first", "--denoise": "train first"}}
ALONE = {"ncsn": """
levels, z = torch.logspace(1, -2, 5), torch.randn(2, 3, 32, 32)
net = ncsn.ScoreNet(width=8, mults=(1, 2), blocks=1)
before, optimizer = net(z, levels[0]), torch.optim.Adam(net.parameters())
loss = ncsn.denoising_loss(net, ncsn.dequantise(torch.randint(256, (4, 3, 32, 32))),
                           ncsn.sample_sigma(4, 0.5, 10), 0.5).mean()
loss.backward()
optimizer.step()
assert loss.isfinite() and (net(z, levels[0]) != before).any()
for x in (ncsn.langevin(net.score, 10 * z, levels, 0.1, 1),
          ncsn.consistent(net.score, 10 * z, levels), ncsn.heun(net.score, 10 * z, levels)):
    assert x.shape == z.shape and x.isfinite().all()
""", "nvae": """
net, x = nvae.NVAE(width=4, groups=(1, 1), flows=1), torch.randint(256, (4, 3, 32, 32))
optimizer, spectral = torch.optim.Adamax(net.parameters()), nvae.Spectral(net)
before = net.top_down(torch.zeros, 2)[0]
reconstruction, kl = nvae.elbo(net, nvae.scaled(x))
loss = reconstruction.mean() + nvae.kl_loss(kl.sum(2), 0.5, net.alpha) + spectral()
loss.backward()
optimizer.step()
logits = net.top_down(nvae.noise(), 2)[0]
assert loss.isfinite() and (net.top_down(torch.zeros, 2)[0] != before).any()
for x in nvae.dmol_sample(logits, 0.7), nvae.dmol_mean(logits):
    assert x.shape == (2, 3, 32, 32) and x.isfinite().all() and x.abs().max() <= 1
""", "ebm": """
net, buffer = ebm.EnergyNet(width=4, mults=(1, 2), blocks=1), ebm.Buffer(8)
optimizer = torch.optim.Adam(net.parameters())
slots, start = buffer.draw(4, 0.05)
x = ebm.langevin(net, start, 3, 10.0, 0.005, 0.01)
before, data = net(x), ebm.dequantise(torch.randint(256, (4, 3, 32, 32)))
gap, penalty, *_ = ebm.contrastive_divergence(net, data, x)
score = ebm.denoising_score_matching(net, data, torch.full((4, 1, 1, 1), 0.1), 90.0)
(gap + penalty + score).backward()
optimizer.step()
net.project()
buffer.chains[slots] = ebm.quantise(x)
assert gap.isfinite() and penalty.isfinite() and (net(x) != before).any()
assert x.shape == (4, 3, 32, 32) and x.min() >= 0 and x.max() <= 1 and (x != start).any()
"""}

def shorten(module, monkeypatch):
    """The samplers of a script, with few steps."""
    if module.NAME == "ncsn":
        levels = module.heun_levels
        monkeypatch.setattr(module, "heun_levels", lambda top, count=12: levels(top, count // 4))
        monkeypatch.setattr(module, "make_ladder", lambda top, dim: (
            torch.logspace(math.log10(top), math.log10(module.SIGMA_MIN), 14), 0.06, 1))
    if module.NAME == "nvae":
        real = module.calibrated
        monkeypatch.setattr(module, "calibrated", lambda net, images=None, t=1.0: real(
            net, images, t, calls=2))

class Run:
    """run("--flags") calls a script and returns its exit status. at[step] acts in a training step;
    the clock moves a microsecond a look, or by an_hour(). peaks are the learning rates in use."""
    def __init__(self, name, data, monkeypatch):
        self.name, self.module = name, importlib.import_module(name)
        self.tiny = f"--data {data} --batch-size 16 {TINY[name]} "
        self.at, self.clock, self.peaks, rate = {}, 0.0, [], self.module.learning_rate

        def learning_rate(step, total, peak):
            self.peaks.append(peak)
            changed = self.at.get(step, lambda: None)()
            return rate(step, total, peak) if changed is None else changed

        def now():
            self.clock += 1e-6
            return self.clock
        monkeypatch.setattr(self.module, "learning_rate", learning_rate)
        monkeypatch.setattr(self.module, "time", types.SimpleNamespace(time=now))
        shorten(self.module, monkeypatch)

    def main(self, flags):
        self.module.main(shlex.split("--device cpu " + flags))

    def __call__(self, flags):
        try:
            return self.main(flags) or 0
        except SystemExit as stop:
            return stop.code

    def train(self, flags):
        return self(self.tiny + flags)

    def an_hour(self):
        self.clock += 3600

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def load(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)

def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}

def differences(a, b, path=""):
    """Where two checkpoints differ, in whatever does not measure time."""
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return [found for key in {**a, **b} if key not in TIMES
                for found in differences(a.get(key), b.get(key), f"{path}/{key}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]

def log(folder):
    return list(csv.DictReader(Path(folder, "log.csv").read_text().splitlines()))

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    (train, kinds), (test, test_kinds) = common.shapes(52, 0), common.shapes(12, 1)
    np.savez(path, train=train, test=test, train_labels=kinds, test_labels=test_kinds)
    return path

@pytest.fixture(scope="session", params=SCRIPTS)
def whole(request, data, tmp_path_factory):
    """(script, folder) of a training run of two epochs without interruption."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert Run(request.param, data, monkeypatch).train(f"--epochs 2 --out {folder}") == 0
    return request.param, folder

@pytest.fixture
def run(whole, data, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    yield Run(whole[0], data, monkeypatch)
    signal.signal(signal.SIGINT, before)

@pytest.fixture
def trained(whole):
    """The run of two epochs, copied into the folder r of the test."""
    return Path(shutil.copytree(whole[1], "r"))

# ---- files, stopping and going on ----

def test_training_writes_its_files(run, trained):
    assert set(files(trained)) == {
        "checkpoint.pt", "log.csv", "curves.png", "samples_0002.png"} | PICTURES[run.name]
    for path in trained.glob("*.png"):
        assert len(np.unique(Image.open(path).convert("L"))) > 9, path  # a picture, not a blank
    head, *rows = csv.reader((trained / "log.csv").read_text().splitlines())
    assert head[0] == "epoch" and TIMES < set(head) and [row[0] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row)
    state = load(trained)
    assert {"model", "args", "net", "ema", "optimizer", "epoch", "step", "random"} <= set(state)
    assert (state["model"], state["epoch"], state["step"]) == (run.name, 2, 2 * STEPS)
    assert state["args"]["epochs"] == 2 and state["args"]["batch_size"] == 16

@pytest.mark.parametrize("limit, stops", [(1, [2]), (0, range(5))], ids=["an epoch", "each step"])
def test_resuming_is_exact(run, whole, limit, stops):
    for step in stops:
        run.at[step] = run.an_hour
        flags = "--resume" if step != stops[0] else f"{run.tiny} --epochs 2"
        assert run(f"{flags} --time-limit {limit} --out r") == 0
        assert load("r")["step"] == len(run.peaks) == step + 1
    assert run("--resume --out r") == 0 and len(run.peaks) == 2 * STEPS
    assert differences(load(whole[1]), load("r")) == []
    assert differences(log(whole[1]), log("r")) == [] and len(log("r")) == 2
    assert files(whole[1])["samples_0002.png"] == files("r")["samples_0002.png"]

def test_another_kind_of_device_can_go_on(run, trained):
    """Its generator has a state of another length, so that noise starts anew."""
    state = load("r")
    torch.save({**state, "random": state["random"][:16]}, "r/checkpoint.pt")
    assert run("--resume --epochs 3 --out r") == 0 and load("r")["step"] == 3 * STEPS
    assert len(load("r")["random"]) == len(state["random"])

@pytest.mark.parametrize("why, status", [("time limit", 0), ("interrupted", 130)])
def test_a_stopped_run_is_saved_and_says_how_to_go_on(run, capfd, why, status):
    run.at[1] = interrupt if status else run.an_hour
    assert run.train("--epochs 1 --time-limit 59.9 --out some/where") == status
    text, errors = capfd.readouterr()
    assert load("some/where")["step"] == len(run.peaks) == 2  # finished, not begun another
    assert why in text and errors == ""
    assert run(re.search("go on with (--resume .*)", text)[1]) == 0
    assert load("some/where")["step"] == STEPS

def test_a_second_interruption_does_not_wait(run, trained):
    before = files(trained)
    run.at[2 * STEPS] = lambda: (interrupt(), interrupt(), pytest.fail("went on"))
    assert run("--resume --epochs 3 --out r") == 130 and files(trained) == before

def test_full_disk_keeps_the_last_checkpoint(run, trained, dies):
    before, limit = files(trained), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["checkpoint.pt"]) // 2, limit[1]))
    try:  # no file may grow longer: the error is that of a full disk, but for its text
        line = dies(run.main, "--resume --epochs 3 --out r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "--resume" in line and files(trained) == before  # and nothing is left over

def test_full_disk_is_an_oserror_for_large_tensors_too(run):
    """torch.save alone reports it as one only while the tensors fit a buffer."""
    limit, path = resource.getrlimit(resource.RLIMIT_FSIZE), Path("checkpoint.pt")
    run.module.save_checkpoint(path, {"net": torch.zeros(1)})
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    try:
        with pytest.raises(OSError):
            run.module.save_checkpoint(path, {"net": torch.zeros(10, 100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and os.listdir() == ["checkpoint.pt"]

def test_kill_while_saving_keeps_the_last_checkpoint(run, trained):
    """By the system, without a word, when the file has half its length."""
    before = (trained / "checkpoint.pt").read_bytes()
    code = f"""import resource, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import {run.name}
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, {len(before) // 2}))
{run.name}.main("--device cpu --resume --epochs 3 --time-limit 0 --out r".split())"""
    killed = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True)
    assert killed.returncode == -signal.SIGXFSZ
    assert [path for path in trained.iterdir() if path.stat().st_size == len(before) // 2]
    assert (trained / "checkpoint.pt").read_bytes() == before
    assert run("--resume --epochs 3 --out r") == 0 and load("r")["epoch"] == 3

@pytest.mark.parametrize("whole", [name for name in SCRIPTS if name != "ebm"], indirect=True)
@pytest.mark.parametrize("then", [lambda: None, interrupt], ids=["epoch ends", "interrupted"])
def test_a_loss_that_is_not_finite_stops_and_is_not_saved(run, trained, dies, then):
    before = files(trained)
    run.at = {6: lambda: math.nan, 7: then}  # that rate makes all weights and the next loss nan
    line = dies(run.main, "--resume --epochs 3 --out r")
    assert re.search(r"loss\b.*not finite at step [67]\b", line) and "--lr" in line
    assert files(trained) == before

@pytest.mark.parametrize("whole", [name for name in SCRIPTS if name != "ebm"], indirect=True)
@pytest.mark.parametrize("step, flags", [(8, "--epochs 3"), (6, "--epochs 3 --time-limit 0")])
def test_weights_that_are_not_finite_are_not_saved(run, trained, dies, step, flags):
    """The loss is computed before its step, so that the last one before saving was finite."""
    before = files(trained)
    run.at = {step: lambda: math.nan}
    assert f"not finite at step {step}" in dies(run.main, f"--resume {flags} --out r")
    assert files(trained) == before

# ---- flags and errors ----

@pytest.mark.parametrize("whole, flags, named", indirect=["whole"], argvalues=[
    (name, *item) for name in SCRIPTS for item in {**ERRORS, **OWN_ERRORS[name]}.items()])
def test_errors_take_one_line(run, dies, flags, named):
    Path("empty").mkdir()
    Path("file").write_text("in the way")
    assert named in dies(run.main, f"{run.tiny} --epochs 1 --out r {flags}")

@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "list", "another"])
def test_a_checkpoint_that_cannot_be_used(run, trained, dies, damage):
    path, state = trained / "checkpoint.pt", load("r")
    content = {"cut": path.read_bytes()[:9999], "empty": b"", "garbage": b"garbage" * 99}
    if damage in content:
        path.write_bytes(content[damage])
    else:
        torch.save([1, 2] if damage == "list" else {**state, "model": "another"}, path)
    before = files(trained)
    for use in ("--resume", "--generate 1", "--evaluate"):
        line = dies(run.main, f"{use} --out r")
        assert "checkpoint.pt" in line and "train first" in line and "--out" in line
        assert damage != "another" or damage in line
    assert files(trained) == before

def test_a_run_is_not_overwritten_or_changed_in_size(run, trained, dies):
    before = files(trained)
    line = dies(run.main, f"{run.tiny} --out r")
    assert "--resume" in line and "--out" in line
    both = [(use, flags) for use in ("--resume", "--generate 1") for flags in OTHER_SIZE[run.name]]
    for use, flags in [*both, ("--resume", "--batch-size 8"), ("--resume", "--seed 1")]:
        assert flags.split()[0] in dies(run.main, f"{use} --out r {flags}")
    assert files(trained) == before

def test_a_build_without_onednn_computes_in_fp32(run, monkeypatch, capfd):
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    assert run.train("--epochs 1 --time-limit 0 --out r") == 0
    assert " on cpu" in (text := capfd.readouterr().out) and "bf16" not in text

def test_flags_not_given_come_from_the_checkpoint(run):
    flags = "--epochs 2 --lr 0.002 --seed 5 --time-limit 0 --sample-every 1"
    assert run.train(f"{flags} --out r") == 0 and run("--resume --out r") == 0
    args = load("r")["args"]
    assert run.peaks == [0.002] * 2 * STEPS and args["seed"] == 5 and args["epochs"] == 2
    assert Path("r/samples_0001.png").exists()
    assert run("--resume --epochs 3 --lr 0.001 --sample-every 9 --out r") == 0  # flags given win
    assert load("r")["epoch"] == len(log("r")) == 3 and run.peaks[2 * STEPS:] == [0.001] * STEPS
    assert load("r")["args"] == {**args, "epochs": 3, "lr": 0.001, "sample_every": 9}

# ---- samples and measures ----

def test_samples_come_from_the_averaged_weights(run, trained):
    def samples(**changed):
        torch.save({**state, **changed}, trained / "checkpoint.pt")
        assert run("--generate 2 --out r") == 0
        return files("r/generated")
    state = load("r")
    net, ema = ({k: v + c for k, v in state[key].items()}
                for key, c in (("net", math.nan), ("ema", 0.1)))
    assert samples() == samples(net=net) != samples(ema=ema)

def test_generating_writes_as_many_files_as_asked(run, trained):
    before, found = files(trained), {}
    for flags in ("", "--seed 0", "--seed 1", *SAMPLERS[run.name]):
        assert run(f"--generate 5 --out r {flags}") == 0
        names, found[flags] = zip(*sorted(files("r/generated").items()), strict=True)
        assert list(names) == [f"{i:05d}.png" for i in range(5)]
        assert len(set(found[flags])) == 5
    assert found[""] == found["--seed 0"] and not {*found[""]} & {*found["--seed 1"]}
    assert len({*found.values()}) == 2 + len(SAMPLERS[run.name]) - 1  # "" is one of them
    assert run(f"--generate 259 --out r {flags}") == 0  # more than a batch
    assert sorted(files("r/generated")) == [f"{i:05d}.png" for i in range(259)]
    assert len(set(files("r/generated").values())) == 259
    assert files(trained) == {**before, "generated.png": Path("r/generated.png").read_bytes()}

def test_evaluation_prints_its_measures(run, trained, capfd):
    before, (flags, lines) = (trained / "checkpoint.pt").read_bytes(), MEASURES[run.name]
    assert run(f"--evaluate --out r {flags}") == 0
    text, errors = capfd.readouterr()
    assert errors == "" and (trained / "checkpoint.pt").read_bytes() == before
    for pattern, count in lines:
        assert len(re.findall(pattern, text, re.M)) == count, (pattern, text)

@pytest.mark.parametrize("whole", ["ncsn"], indirect=True)
def test_ncsn_inpaints_and_interpolates(run, trained, data, monkeypatch):
    grids, save_grid = {}, common.save_grid
    monkeypatch.setattr(common, "save_grid", lambda images, path, *rest, **options: (
        grids.__setitem__(Path(path).name, images), save_grid(images, path, *rest, **options)))
    assert run("--inpaint --interpolate --out r") == 0
    assert {"inpaint.png", "interpolate.png", "checkpoint.pt"} < set(files(trained))
    assert grids["interpolate.png"].shape == (64, 3, 32, 32)
    assert len(grids["interpolate.png"].unique(dim=0)) == 64
    rows = torch.from_numpy(common.to_bytes(grids["inpaint.png"])).int().unflatten(0, (6, 8))
    away = (rows - torch.from_numpy(np.load(data)["test"][:6, None])).abs()
    hidden = torch.zeros(32, 32, dtype=torch.bool)
    hidden[8:24, 8:24] = True
    assert away[:, 0].max() <= 1 and away[:, :, ~hidden].max() <= 1  # the known pixels are kept
    assert all(len(row[2:, hidden].unique(dim=0)) == 6 for row in rows)  # six ways to complete it

@pytest.mark.parametrize("whole", ["nvae"], indirect=True)
def test_nvae_anneals_by_the_step_and_anew_after_a_longer_warm_up(run, trained, monkeypatch):
    betas, kl_loss = [], run.module.kl_loss
    monkeypatch.setattr(run.module, "kl_loss", lambda kl, beta, alpha: (
        betas.append(beta), kl_loss(kl, beta, alpha))[1])
    assert run.train("--epochs 3 --kl-warmup 2 --out s") == 0
    assert betas == pytest.approx([1e-4, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1])
    assert run("--resume --epochs 4 --kl-warmup 8 --out s") == 0
    assert betas[9:] == pytest.approx([9 / 24, 10 / 24, 11 / 24])
    assert run.train("--epochs 1 --kl-warmup 0 --out t") == 0 and betas[13:] == [1, 1]

@pytest.mark.parametrize("whole", ["nvae"], indirect=True)
def test_nvaes_pictures(run, trained, data, monkeypatch):
    grids, save_grid = {}, common.save_grid
    monkeypatch.setattr(common, "save_grid", lambda images, path, *rest, **options: (
        grids.__setitem__(Path(path).name, images), save_grid(images, path, *rest, **options)))
    fixed, top_down = [], run.module.NVAE.top_down
    monkeypatch.setattr(run.module.NVAE, "top_down", lambda *args, z=(), **options: (
        fixed.append(len(z)) if args[2] == 7 else None, top_down(*args, z=z, **options))[1])
    assert run("--resume --epochs 3 --out r") == 0 and run("--interpolate --evaluate --out r") == 0
    assert fixed == [0, 2] * 4  # groups: none, and those of the coarser scale
    assert {"interpolate.png", "kl_by_group.png"} < set(files(trained))
    test = torch.from_numpy(np.load(data)["test"]).permute(0, 3, 1, 2)
    assert torch.equal(grids["reconstructions.png"][::2], test)
    assert grids["temperatures.png"].shape[0] == 5 * 8
    rows = grids["scales.png"].unflatten(0, (4, 2, 8))  # images, scales, itself and seven draws
    assert torch.equal(rows[:, :, 0], test[:4, None].expand(-1, 2, -1, -1, -1))
    assert all(len(row.unique(dim=0)) == 7 for row in rows[:, :, 1:].flatten(0, 1))
    assert len(grids["interpolate.png"].unique(dim=0)) > 32

@pytest.mark.parametrize("whole", ["ebm"], indirect=True)
def test_ebms_pictures(run, trained, data, capfd, monkeypatch):
    grids, save_grid = {}, common.save_grid
    monkeypatch.setattr(common, "save_grid", lambda images, path, *rest, **options: (
        grids.__setitem__(Path(path).name, images), save_grid(images, path, *rest, **options)))
    assert run("--resume --epochs 3 --out r") == 0
    assert run(f"--inpaint --denoise --evaluate --ood {data} --out r") == 0
    assert {"inpaint.png", "denoise.png", "histogram.png"} < set(files(trained))
    test = torch.from_numpy(np.load(data)["test"]).permute(0, 3, 1, 2)
    text = capfd.readouterr().out
    assert len(re.findall("^AUROC", text, re.M)) == 6 and f"against {data}" in text
    known = torch.ones(32, 32, dtype=torch.bool)
    known[8:24, 8:24] = False
    truth, before, after = grids["inpaint.png"].unflatten(0, (12, 3)).unbind(1)
    assert torch.equal(truth, test) and not before[..., ~known].any()
    for x in before, after:
        assert torch.equal(x[..., known], test[..., known])
    assert (after[..., ~known] != test[..., ~known]).float().mean() > 0.8
    rows = grids["denoise.png"].unflatten(0, (12, 3))
    assert torch.equal(rows[:, 0], test)
    found = re.search(r"PSNR ([\d.]+) dB before, ([\d.]+) dB after, of 12 test", text)
    assert float(found[1]) == pytest.approx(20, abs=0.2)  # of noise of std .1
    error = (rows[:, 0] / 255 - rows[:, 2] / 255).square().mean((1, 2, 3))
    assert float(found[2]) == pytest.approx(-10 * error.log10().mean().item(), abs=0.5)
    rows = grids["chains.png"].unflatten(0, (8, 16))
    assert torch.equal(rows[0, 8:], test[:8]) and rows[0, :8].float().std() > 70  # uniform noise
    step = (rows[1:].int() - rows[0].int()).abs().float().mean((1, 2, 3, 4))
    assert step[-1] > step[0] > 0  # the later the farther

# ---- ebm's guards ----

def spoil(run, monkeypatch, steps, value):
    """The gap is that value in those steps (of a run() that begins now)."""
    real, count = run.module.contrastive_divergence, [0]
    def spoiled(*rest, **options):
        gap, *others = real(*rest, **options)
        count[0] += 1
        return (gap * value if count[0] in steps else gap), *others
    monkeypatch.setattr(run.module, "contrastive_divergence", spoiled)

ebm_only = pytest.mark.parametrize("whole", ["ebm"], indirect=True)

@ebm_only
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e9])
def test_a_bad_step_is_skipped_and_its_chains_are_not_kept(run, trained, monkeypatch, value):
    monkeypatch.setattr(run.module.EnergyNet, "project", lambda *_, **__: None)
    before = load("r")
    run.at[2 * STEPS] = run.at[2 * STEPS + 1] = run.an_hour
    for spoiled in True, False:
        spoil(run, monkeypatch, [1] if spoiled else [], value)
        assert run("--resume --epochs 3 --time-limit 0 --out r") == 0
        after = load("r")
        for key in "net", "buffer":
            assert (differences(before[key], after[key]) == []) == spoiled
        assert after["log"][:2, -1].tolist() == [1, 0] and after["failures"] == 0
        assert not differences(before["random"], after["random"]) == []

@ebm_only
def test_divergence_brings_back_the_last_healthy_state_and_half_the_rate(run, trained, capfd):
    before = load("r")
    run.at = {6: lambda: math.nan, 8: run.an_hour}  # that rate makes all weights nan
    assert run("--resume --epochs 4 --time-limit 1 --out r") == 0
    text, after = capfd.readouterr().out, load("r")
    assert "step 9: weights not finite; back to the last healthy state" in text
    for key in "net", "ema", "buffer":
        assert differences(before[key], after[key]) == []
    assert differences(before["optimizer"]["state"], after["optimizer"]["state"]) == []
    assert (after["step"], after["failures"]) == (9, 1) and log("r")[-1]["failures"] == "1"
    assert run("--resume --out r") == 0 and load("r")["failures"] == 1
    rate = run.module.learning_rate(11, 12, after["args"]["lr"]) / 2
    assert load("r")["optimizer"]["param_groups"][0]["lr"] == rate
    assert differences(before["net"], load("r")["net"]) != []  # and it goes on learning
    assert all(math.isfinite(float(value)) for row in log("r") for value in row.values())

@ebm_only
def test_an_interruption_amid_trouble_saves_the_healthy_state(run, trained):
    before = load("r")
    run.at = {6: lambda: math.nan, 7: interrupt}
    assert run("--resume --epochs 3 --out r") == 130
    assert differences(before["net"], load("r")["net"]) == [] and load("r")["failures"] == 1

@ebm_only
def test_fifty_bad_steps_are_trouble(run, monkeypatch, capfd):
    monkeypatch.setattr(common, "load", lambda *_: [torch.randint(256, (n, 3, 32, 32), generator=(
        torch.Generator().manual_seed(0)), dtype=torch.uint8) for n in (960, 9)])
    spoil(run, monkeypatch, range(9, 59), math.nan)
    assert run.train("--epochs 1 --warm-up 0 --out r") == 0 and load("r")["failures"] == 1
    assert "step 60: 50 steps skipped" in capfd.readouterr().out

@ebm_only
def test_the_third_divergence_ends_with_one_clear_error(run, trained, dies):
    run.at = dict.fromkeys((6, 9, 12), lambda: math.nan)
    line = dies(run.main, "--resume --epochs 6 --out r")
    assert "three times" in line and "step 15" in line and "not finite" in line and "--lr" in line
    assert load("r")["step"] == 12 and load("r")["failures"] == 2  # the last healthy one
    assert all(value.isfinite().all() for value in load("r")["net"].values())
    assert run("--generate 1 --out r") == 0

@ebm_only
def test_chains_begin_after_the_warm_up_and_energies_are_centred_in_it(run, monkeypatch):
    calls, real = [], run.module.contrastive_divergence
    monkeypatch.setattr(run.module, "contrastive_divergence", lambda *rest, **options: (
        calls.append(1), real(*rest, **options))[1])
    for share, due in (1, 0), (0.5, STEPS), (0, 2 * STEPS):
        calls.clear()
        assert run.train(f"--epochs 2 --warm-up {share} --out r{due}") == 0 and len(calls) == due
    assert load("r0")["net"]["head.bias"] == 0  # a flat E, and the score does not move its level
    assert all(float(row["gap"]) == 0 != float(row["score"]) for row in log("r0"))
    with_chains = load("r6")["log"][:, :8]  # of the last epoch
    assert with_chains.isfinite().all() and load("r3")["log"][:, :8].isfinite().all()
    assert load("r0")["log"][:, :8].isnan().all()  # no zeros that a mean would take for values

@ebm_only
def test_more_epochs_bring_no_second_warm_up(run):
    assert run.train("--epochs 2 --warm-up 0.5 --out r") == 0
    assert run("--resume --epochs 6 --out r") == 0 and load("r")["warm"] == STEPS
    assert all(float(row["gap"]) for row in log("r")[1:])

@ebm_only
def test_the_monitors_are_means_over_the_chains(run, monkeypatch):
    real, seen = run.module.langevin, []
    def langevin(net, x, steps, step, noise, clamp=math.inf, g=None, hook=None):
        before, grads = net(x).detach().mean().item(), []
        x = real(net, x, steps, step, noise, clamp, g, lambda x, e, g: (
            grads.append(g.abs()), hook(x, e, g))[1] if hook else x)
        if hook and steps == 3:
            grads = torch.stack(grads)
            seen.append([before, grads.mean().item(), (grads > clamp).float().mean().item(),
                         ((x == 0) | (x == 1)).float().mean().item()])
        return x
    monkeypatch.setattr(run.module, "langevin", langevin)
    flags = "--epochs 1 --warm-up 0 --steps 3 --clamp 1e-5 --noise 0.3 --lr 0.03"
    assert run.train(f"{flags} --out r") == 0
    row, names = log("r")[0], ["E start", "gradient", "clamped", "saturated"]
    due = torch.tensor(seen).mean(0).tolist()
    assert len(seen) == STEPS and all(due) and due[2] < 1
    assert [float(row[name]) for name in names] == pytest.approx(due, rel=1e-3)

def test_few_images_are_enough(run):
    np.savez("few.npz", train=common.shapes(6, 0)[0], train_labels=np.zeros(6, np.uint8),
             test=common.shapes(2, 1)[0], test_labels=np.zeros(2, np.uint8))
    assert run.train("--data few.npz --batch-size 3 --epochs 1 --out r") == 0
    assert run(f"{ALL_USES[run.name]} --out r") == 0

# ---- one script alone, its speed, and what it prints ----

def test_a_script_works_alone_in_an_empty_folder(run):
    shutil.copy(ROOT / f"{run.name}.py", ".")
    code = f"import sys, torch; sys.path.insert(0, ''); import {run.name}\n{ALONE[run.name]}"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")

def test_help_is_quick_and_whole(run):
    def seconds():  # of the processor, for the machine may be busy
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before, script = seconds(), str(ROOT / f"{run.name}.py")
    command = [sys.executable, "-X", "importtime", script, "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and seconds() - before < 4
    imported = set(re.findall(r"\| +([\w.]+)$", result.stderr, re.M))
    assert "torch" in imported and not imported & {"matplotlib", "PIL", "torchvision", "common"}
    # A module can import tqdm unseen, as torch itself does where it finds it.
    assert not re.search("^(import|from) tqdm", Path(script).read_text(), re.M)
    flags = {name.replace("_", "-") for name in vars(run.module.parse([])[0])}
    assert set(FLAGS.split()) <= flags
    for flag in flags:
        assert re.search(rf"^  --{flag}\b.*(  |\n {{9,}})\w+", result.stdout, re.M), flag

def test_training_steps_read_nothing_back(run, monkeypatch):
    """For each read waits for the device. Looks at steps inside an epoch, not at its end."""
    reads, step = [], [STEPS - 1]

    def count(name):  # but the optimiser's counts, which are on the CPU
        if step[0] % STEPS != STEPS - 1 and "torch/optim" not in str(traceback.extract_stack()):
            reads.append((step[0], name))

    class Watch(TorchDispatchMode):  # of item, bool, float, nonzero, masks
        def __torch_dispatch__(self, operation, kinds, arguments=(), options=None):
            name = operation.overloadpacket.__name__
            masks = arguments[1] if name in ("index", "index_put_", "_index_put_impl_") else []
            if any(m is not None and m.dtype == torch.bool for m in masks) or name in (
                    "_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"):
                count(name)
            return operation(*arguments, **options or {})
    for name in ("tolist", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *rest, name=name, method=method, **options: (
            count(name), method(*rest, **options))[1])
    for k in range(2 * STEPS):
        run.at[k] = lambda k=k: step.__setitem__(0, k)
    with Watch():
        assert run.train("--epochs 2 --out r") == 0
    assert len(run.peaks) == 2 * STEPS and not reads, reads

@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(run, monkeypatch, terminal):
    ours, theirs = pty.openpty()
    with open(theirs, "w") as screen, open("errors", "w") as file:
        monkeypatch.setattr(sys, "stderr", screen if terminal else file)
        assert run.train("--epochs 1 --time-limit 0 --out r") == 0
        print("end", file=sys.stderr, flush=True)
        text = os.read(ours, 9999) if terminal else Path("errors").read_bytes()
    assert text.startswith(b"end") != terminal, text

# ---- the repository ----

def test_commands_of_the_readme_parse(monkeypatch):
    text = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.S | re.M)
    if not blocks:
        pytest.skip("README.md has no code yet")
    parts = re.split(r"&&|;|\||\n", "".join(blocks).replace("\\\n", " "))
    found = [re.match(r"\s*(?:\w+=\S* )*python (nvae|ncsn|ebm|common)\.py\b(.*)", p) for p in parts]
    commands = [(m[1], shlex.split(m[2], comments=True)) for m in found if m]

    def parsed(*_):
        raise InterruptedError
    monkeypatch.setattr(common, "read", parsed)
    for name, flags in commands:
        module = importlib.import_module(name)
        if name == "common":
            monkeypatch.setattr(sys, "argv", ["common.py", *flags])
            with pytest.raises(InterruptedError):
                common.main()
        else:
            known = vars(module.parse([])[0])
            state = {"args": {key: known[key] for key in module.KEPT}}
            monkeypatch.setattr(module, "load_checkpoint", lambda path, state=state: state)
            module.parse(flags)
    assert commands

def test_requirements_are_five():
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert sorted(names) == ["matplotlib", "numpy", "torch", "torchvision", "tqdm"]

@pytest.mark.parametrize("name", BOOKS.split())
def test_the_scripts_keep_their_books_alike(name):
    """Passes trivially as long as there is one script."""
    modules = [importlib.import_module(script) for script in ("nvae", "ncsn", "ebm")
               if (ROOT / f"{script}.py").exists()]
    assert len({inspect.getsource(getattr(module, name)) for module in modules}) == 1

@pytest.mark.parametrize("name, most", dict(nvae=550, ncsn=500, ebm=450, common=170).items())
def test_a_script_is_short(name, most):
    path = ROOT / f"{name}.py"
    lines = path.read_text().splitlines() if path.exists() else [""]
    assert len(lines) <= most and max(map(len, lines)) <= 100
