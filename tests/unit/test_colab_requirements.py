"""requirements-colab.txt beside Colab's own torch: the checker's judgements, and (long, needs a registry) the resolution."""

import shutil
import subprocess
import sys
from pathlib import Path

import check_colab
import pytest

ROOT = Path(__file__).parents[2]

GOOD = {"transformers": "5.17.0", "trl": "1.15.0"}


@pytest.mark.parametrize("name", ["torch", "triton", "torchvision", "nvidia-cublas-cu12"])
def test_a_replaced_torch_is_a_problem(name):
    assert check_colab.check_torch(GOOD) == []
    assert name in check_colab.check_torch(GOOD | {name: "1"})[0]


def test_what_a_package_without_its_dependencies_lacks_is_a_problem():
    def check(*needs):
        return check_colab.check_needs("x", list(needs), GOOD, without=frozenset({"xformers"}))

    assert check("transformers>=5.10,<5.18", "torch>=2.8", "numpy", "xformers>=0.0.27") == []
    assert check("numba; extra == 'audio'", "pywin32; sys_platform == 'win32'") == []
    assert "5.17.0 would be there" in check("transformers<5.17")[0]
    assert "2.11.0" in check("torch>=2.12")[0]
    assert "does not bring" in check("peft")[0]


def test_fastft_itself_allows_colabs_torch():
    needs = {
        check_colab.split(line)[0]: check_colab.split(line)[1]
        for line in check_colab.fastft_needs()
    }
    assert check_colab.within(check_colab.TORCH, needs["torch"])


def test_no_cpu_pin_and_no_torch_in_the_ranges():
    lines = [
        line.split("#")[0].strip()
        for line in (ROOT / "requirements-colab.txt").read_text().splitlines()
    ]
    names = [check_colab.split(line)[0] for line in lines if line]
    assert "torch" not in names
    assert not [line for line in lines if "==" in line]


@pytest.mark.long
def test_pip_finds_a_set_beside_torch_2_11():
    python = shutil.which("python3.12") or next(
        iter(Path.home().glob(".pyenv/versions/3.12.*/bin/python3.12")), None
    )
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip("no Python 3.12 here")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_colab.py", "--python", python],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "what was not checked" in done.stdout
