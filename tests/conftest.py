"""What the tests share: a folder of their own, one thread, and the one line of an error."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so relative paths (data/cifar10.npz) lie in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def dies():
    """dies(function, *arguments): it must end the program with one line, which is returned."""

    def check(function, *arguments, **options):
        with pytest.raises(SystemExit) as caught:
            function(*arguments, **options)
        line = caught.value.code  # Python prints a text on stderr and exits with status 1
        assert isinstance(line, str) and len(line.splitlines()) == 1, line
        return line

    return check
