"""The set-up before anything is installed: what it says while pip works, and when a step fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import setup_env

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "starting"),
        (["Collecting trl==1.15.0 (from -r base.txt (line 70))"], "Collecting trl==1.15.0"),
        (["  Downloading torch-2.13.0.whl (526.6 MB)"], "Downloading torch-2.13.0.whl (526.6 MB)"),
        (["Processing /some/where/msgspec-0.22.0.whl"], "Processing msgspec-0.22.0.whl"),
        (["Installing collected packages: a, b, c"], "unpacking 3 packages"),
        (["Building wheel", "  [ 41/164] Building CXX object x.o"], "compiling, 41 of 164 (25 %)"),
    ],
)
def test_where_pip_is(lines, said):
    assert setup_env.where([*lines, "    noise"]) == said


def test_a_step_that_fails_says_which_and_why(tmp_path):
    setup = setup_env.Setup(tmp_path, hashes=False)
    setup.bin = Path(sys.executable).parent
    with pytest.raises(setup_env.StepFailedError, match=r"exit \d+(.|\n)*no-such-option"):
        setup._pip(["--no-such-option"])
    assert "no-such-option" in (tmp_path / "setup.log").read_text()


def test_another_python_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(setup_env.sys, "argv", ["setup_env.py", "x"])
    assert setup_env.main() == 2
    assert "3.11 to 3.13" in capsys.readouterr().err


def test_changed_pins_make_it_install_again(tmp_path):
    setup = setup_env.Setup(tmp_path, hashes=False)
    assert not setup._is_ready()
    (tmp_path / ".ready").touch()
    assert setup._is_ready()
    os.utime(tmp_path / ".ready", (0, 0))
    assert not setup._is_ready()


def test_the_makefile_sets_up_with_it():
    done = subprocess.run(
        ["make", "-n", "quickstart", "VENV=no-such-venv", "HASHES=1"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "tools/setup_env.py no-such-venv --hashes" in done.stdout, done.stderr
