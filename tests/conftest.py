"""What the tests of the scripts share."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so relative paths (data/cifar10.npz) lie in it.
    One thread: on a busy machine many of them spend seconds waiting for each other."""
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
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return check
