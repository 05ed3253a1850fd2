"""The requirement files as pip resolves them, without installing anything: beside Colab's torch, and on plain Linux."""

import shutil
import subprocess
import sys
from pathlib import Path

import check_requirements
import pytest

ROOT = Path(__file__).parents[2]

GOOD = {"transformers": "5.17.0", "trl": "1.15.0"}


@pytest.mark.parametrize("name", ["torch", "triton", "torchvision", "nvidia-cublas-cu12"])
def test_a_replaced_torch_is_a_problem(name):
    assert check_requirements.check_torch(GOOD) == []
    assert name in check_requirements.check_torch(GOOD | {name: "1"})[0]


def test_what_a_package_without_its_dependencies_lacks_is_a_problem():
    def check(*needs):
        return check_requirements.check_needs(
            "x", list(needs), GOOD, without=frozenset({"xformers"})
        )

    assert check("transformers>=5.10,<5.18", "torch>=2.8", "numpy", "xformers>=0.0.27") == []
    assert check("numba; extra == 'audio'", "pywin32; sys_platform == 'win32'") == []
    assert "5.17.0 would be there" in check("transformers<5.17")[0]
    assert "2.11.0" in check("torch>=2.12")[0]
    assert "does not bring" in check("peft")[0]


def test_fastft_itself_allows_colabs_torch():
    needs = {
        check_requirements.split(line)[0]: check_requirements.split(line)[1]
        for line in check_requirements.fastft_needs()
    }
    assert check_requirements.within(check_requirements.TORCH, needs["torch"])


def test_no_cpu_pin_and_no_torch_in_the_ranges():
    lines = [
        line.split("#")[0].strip()
        for line in (ROOT / "requirements-colab.txt").read_text().splitlines()
    ]
    names = [check_requirements.split(line)[0] for line in lines if line]
    assert "torch" not in names
    assert not [line for line in lines if "==" in line]


def run(*arguments):
    command = [sys.executable, ROOT / "tools" / "check_requirements.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_pins_leave_the_indexs_own_torch_alone():
    """With the ordinary index alone torch is the CUDA build, which asks for a triton of its own."""
    done = run("linux")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch 2.13.0" in done.stdout


@pytest.mark.long
def test_pip_finds_a_set_beside_torch_2_11():
    python = shutil.which("python3.12") or next(
        iter(Path.home().glob(".pyenv/versions/3.12.*/bin/python3.12")), None
    )
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip("no Python 3.12 here")
    done = run("colab", "--python", python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "what was not checked" in done.stdout
