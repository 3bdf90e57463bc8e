"""The repository as a whole: each script alone, what they share, their length, README."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

SCRIPTS = ["ncsn", "nvae", "ebm"]
every_script = pytest.mark.parametrize("name", SCRIPTS)

ALONE = {  # what a project that copied the file would do, with `images` of its own
    "ncsn": """
net = ncsn.Denoiser(**ncsn.measure(images), width=8, mults=(1, 2), blocks=1)
optimizers = ncsn.make_optimizers(net)
for batch in images.split(4):
    ncsn.training_step(net, optimizers, batch, lr=0.01)
z = torch.randn(4, *images.shape[1:])
samples = ncsn.quantise(ncsn.dpm_solver(net.score, z, net.sigma_max))
""",
    "nvae": """
net = nvae.NVAE(list(images.shape[1:]), width=8, groups=(2, 1))
spectral = nvae.Spectral(net)
optimizers = nvae.make_optimizers(net)
for batch in images.split(4):
    nvae.training_step(net, spectral, optimizers, batch, lr=0.01)
samples = net.generate(4).sample()
""",
    "ebm": """
net = ebm.EnergyNet(list(images.shape[1:]), width=8, mults=(1, 2), blocks=1)
optimizers = ebm.make_optimizers(net)
chains = ebm.dequantise(images)
for batch in images.split(4):
    ebm.training_step(net, optimizers, batch, lr=0.01)
    ebm.training_step(net, optimizers, batch, lr=0.01, chains=chains)
samples = ebm.quantise(ebm.dpm_solver(net.grad_E, torch.randn(4, *images.shape[1:])))
""",
}


@every_script
def test_the_lines_of_the_docstring_run(name):
    side = 64 if name == "nvae" else 16
    images = torch.randint(256, (2, 1, side, side), dtype=torch.uint8)
    inside = {"images": images, "batch": images, "z": torch.randn(images.shape), "device": "cpu"}
    inside |= {"step": 0, "total": 9, "C": 1, "H": side, "W": side}
    inside |= vars(importlib.import_module(name))
    lines = inside["__doc__"].split("In another project")[1].splitlines()
    exec("\n".join(line.strip() for line in lines if line.startswith("    ")), inside)
    assert inside["samples"].dtype == torch.uint8


@every_script
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 64)])
def test_a_script_works_alone_in_an_empty_folder(name, channels, size):
    """It imports, trains and samples without common.py, tqdm and matplotlib."""
    shutil.copy(ROOT / f"{name}.py", ".")
    code = f"""
import sys
sys.path.insert(0, "")
sys.modules.update(tqdm=None, matplotlib=None, torchvision=None)
import torch
import {name}
images = torch.randint(256, (8, {channels}, {size}, {size}), dtype=torch.uint8)
{ALONE[name]}
assert samples.shape == (4, {channels}, {size}, {size}) and samples.dtype == torch.uint8
assert len(samples.unique(dim=0)) == 4
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


LIMITS = {"ncsn": (600, 390), "nvae": (700, 480), "ebm": (580, 380), "common": (300, 300)}


def code_lines(source):
    """Lines that are neither blank nor comment nor docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        if documented and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(i not in docstrings and bool(re.match(r"\s*[^\s#]", line)) for i, line in lines)


@pytest.mark.parametrize("name, limits", LIMITS.items())
def test_files_stay_short(name, limits):
    source = (ROOT / f"{name}.py").read_text()
    assert len(source.splitlines()) <= limits[0]
    assert code_lines(source) <= limits[1]


def test_the_tests_stay_short():
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py")) <= 2800


@every_script
def test_help_imports_torch_alone_and_says_what_each_flag_is(name):
    command = [sys.executable, "-X", "importtime", str(ROOT / f"{name}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    imported = set(re.findall(r"\| +([\w.]+)$", result.stderr, re.M))
    assert "torch" in imported and not imported & {"matplotlib", "PIL", "torchvision", "common"}
    for flag in vars(importlib.import_module(name).parse([])):
        if flag != "checkpoint":
            pattern = rf"^  --{flag.replace('_', '-')}\b.*(  |\n {{9,}})\w+"
            assert re.search(pattern, result.stdout, re.M), flag


def definitions(name):
    """{name: source} of the functions and classes of a script."""
    source = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(source, node)
    return found


def test_what_three_scripts_need_is_the_same_text_in_each():
    ncsn, nvae, ebm = (definitions(name) for name in SCRIPTS)
    training = "orthogonalise", "Muon", "warmup_cosine", "update_ema", "can_compile"
    for name in *training, "save", "parse":
        assert ncsn[name] == nvae[name] == ebm[name], name
    for name in "dequantise", "quantise":
        assert ncsn[name] == ebm[name], name


@every_script
def test_a_script_does_not_name_its_sisters(name):
    source = (ROOT / f"{name}.py").read_text()
    for sister in set(SCRIPTS) - {name}:
        assert f"{sister}.py" not in source


# ------------------------------------------------------------------------------------------ README


README = (ROOT / "README.md").read_text()


def test_commands_of_the_readme_parse(monkeypatch):
    import common

    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", README, re.S | re.M)
    parts = re.split(r"&&|;|\||\n", "".join(blocks).replace("\\\n", " "))
    parts += re.findall(r"`(python \w+\.py [^`]*)`", README)
    commands = []
    for part in parts:
        found = re.match(r"\s*(?:\w+=\S* )*python (nvae|ncsn|ebm|common)\.py\b(.*)", part)
        if found:
            commands.append((found[1], shlex.split(found[2], comments=True)))
    assert len(commands) > 5
    for name, flags in commands:
        if name == "common":
            assert set(flags[::2]) <= {"--data", "--out"}
            assert callable(common.main)
        else:
            importlib.import_module(name).make_parser().parse_args(flags)


def test_requirements_are_five_without_upper_limits():
    text = (ROOT / "requirements.txt").read_text()
    names = re.findall(r"^[\w-]+", text, re.M)
    assert sorted(names) == ["matplotlib", "numpy", "torch", "torchvision", "tqdm"]
    assert "<" not in text and "==" not in text


def test_pictures_and_links_of_the_readme_are_there_and_pictures_small():
    names = re.findall(r'src="([^"]+)"', README)
    for name in names:
        assert (ROOT / name).stat().st_size < 300_000, name
    assert {f".github/{path.name}" for path in (ROOT / ".github").glob("*.png")} == set(names)
    titles = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_the_own_project_of_the_readme_runs():
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", ".")
    code = "".join(re.findall(r"^```python\n(.*?)^```", README, re.S | re.M))
    short = code.replace('"cpu", 1000', '"cpu", 3')
    assert short != code
    code = "import sys\nsys.path.insert(0, '')\n" + short
    code += "assert samples.shape == (16, 1, 28, 28) and samples.dtype == torch.uint8\n"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
