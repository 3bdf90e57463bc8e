"""The repository as a whole: each script alone, its docstring, README, and what they share."""

import ast
import importlib
import inspect
import re
import resource
import shlex
import shutil
import subprocess
import sys

import common
import pytest
from conftest import ROOT, SCRIPTS

SHARED_FLAGS = """data subset epochs batch-size lr ema seed device amp compile out resume time-limit
    sample-every generate evaluate"""
every_script = pytest.mark.parametrize("name", SCRIPTS)


def own_project_lines(name):
    """The six or seven lines that the docstring of a script gives to copy."""
    doc = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()), clean=False)
    after = doc.split("In your own project")[1].split("\n\n")[0]
    lines = [line[4:] for line in after.splitlines() if line.startswith("    ")]
    assert 5 <= len(lines) <= 7
    return "\n".join(lines)


@every_script
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 64)])
def test_a_script_works_alone_in_an_empty_folder(name, channels, size):
    """As its docstring says: imports, trains, samples; also on other images than those there."""
    shutil.copy(ROOT / f"{name}.py", ".")
    lines = own_project_lines(name)
    lines = lines.replace("1, 28, 28", f"{channels}, {size}, {size}")
    lines = lines.replace("channels=1", f"channels={channels}").replace("=28", f"={size}")
    code = f"""
import sys
sys.path.insert(0, "")
import torch
import {name}
{lines}
assert samples.shape == (4, {channels}, {size}, {size}) and samples.dtype == torch.uint8
assert len(samples.unique(dim=0)) == 4
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@every_script
def test_the_docstring_is_a_page(name):
    """Not more than a screen, in the order in which it is read."""
    source = (ROOT / f"{name}.py").read_text()
    doc = ast.get_docstring(ast.parse(source), clean=False)
    assert len(doc.splitlines()) <= 40
    banners = re.findall(r"^# -{20,} ?(.*)$", source, re.M)
    due = ["training step", "bookkeeping", "training", "uses", "command line"]
    assert banners[-5:] == due
    assert banners[0] == "network"


@every_script
def test_help_is_quick_and_whole(name):
    def seconds():  # of the processor, for the machine may be busy
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    script = str(ROOT / f"{name}.py")
    before = seconds()
    command = [sys.executable, "-X", "importtime", script, "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert seconds() - before < 6
    imported = set(re.findall(r"\| +([\w.]+)$", result.stderr, re.M))
    assert "torch" in imported
    assert not imported & {"matplotlib", "PIL", "torchvision", "common"}
    # A module can import tqdm unseen, as torch itself does where it finds it.
    assert not re.search("^(import|from) tqdm", (ROOT / f"{name}.py").read_text(), re.M)
    args, _ = importlib.import_module(name).parse([])
    flags = {flag.replace("_", "-") for flag in vars(args)}
    assert set(SHARED_FLAGS.split()) <= flags
    for flag in flags:
        assert re.search(rf"^  --{flag}\b.*(  |\n {{9,}})\w+", result.stdout, re.M), flag


def definitions(name):
    """{name: source} of the functions, classes and constants of a script."""
    source = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(source, node)
    return found


def test_the_scripts_keep_their_books_alike():
    sources = [definitions(name) for name in SCRIPTS]
    books = (
        "orthogonal Muon set_rate die warmup_cosine update_ema write_whole load_checkpoint "
        "load_states plot write_log Run"
    )
    command_line = (
        "Parser HelpFormatter number numbers device shared_parser parse choose_speed main"
    )
    for name in [*books.split(), *command_line.split(), "bf16_is_native", "choose_speed"]:
        assert len({source[name] for source in sources}) == 1, name
    assert definitions("nvae")["Recorded"] == definitions("ebm")["Recorded"]


def test_commands_of_the_readme_parse(monkeypatch):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.S | re.M)
    parts = re.split(r"&&|;|\||\n", "".join(blocks).replace("\\\n", " "))
    commands = []
    for part in parts:
        found = re.match(r"\s*(?:\w+=\S* )*python (nvae|ncsn|ebm|common)\.py\b(.*)", part)
        if found:
            commands.append((found[1], shlex.split(found[2], comments=True)))
    assert commands

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
            args = vars(module.parse([])[0])
            kept = {flag: value for flag, value in args.items() if flag not in module.HERE}
            monkeypatch.setattr(module, "load_checkpoint", lambda path, kept=kept: {"args": kept})
            module.parse(flags)


def test_requirements_are_five_without_upper_limits():
    text = (ROOT / "requirements.txt").read_text()
    names = re.findall(r"^[\w-]+", text, re.M)
    assert sorted(names) == ["matplotlib", "numpy", "torch", "torchvision", "tqdm"]
    assert "<" not in text
    assert "==" not in text


def test_pictures_and_links_of_the_readme_are_there_and_pictures_small():
    text = (ROOT / "README.md").read_text()
    names = re.findall(r'src="([^"]+)"', text)
    assert names
    sizes = {name: (ROOT / name).stat().st_size for name in names}
    assert max(sizes.values()) < 300_000, sizes
    assert sum(sizes.values()) < 2_500_000
    assert {f".github/{path.name}" for path in (ROOT / ".github").glob("*.png")} == set(names)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings(text)}
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def headings(text):
    return re.findall(r"^#+ (.*)$", text, re.M)


def test_the_own_project_of_the_readme_runs():
    shutil.copy(ROOT / "ncsn.py", ".")
    code = "".join(
        re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    )
    short = code.replace('total = "cpu", 100', 'total = "cpu", 3')
    assert short != code
    code = "import sys\nsys.path.insert(0, '')\n" + short
    code += "assert samples.shape == (16, 1, 28, 28) and samples.dtype == torch.uint8\n"
    # Off by one now and then: a byte and a draw just below 1 add up to the next byte in fp32.
    code += "change = (filled.int() - images[:4].int()).abs()\n"
    code += "assert change[:, :, :14].max() <= 1 < change[:, :, 14:].max()\n"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_public_names_have_docstrings():
    for name in SCRIPTS:
        module = importlib.import_module(name)
        for key in definitions(name):
            assert inspect.getdoc(getattr(module, key)), f"{name}.{key}"
