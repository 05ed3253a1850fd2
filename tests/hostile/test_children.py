"""What a child process imports, and what is left when its parent is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastft import child
from fastft.data.workers import map_in_order
from fastft.errors import FastFTError
from fastft.files.locks import held
from fastft.files.scratch import scratch

ROOT = str(Path(__file__).parents[2])
STANDARD = ("random", "tokenize", "json", "typing", "socket", "logging", "inspect", "queue")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A current folder whose files stand in for the standard library's and leave a trace."""
    for name in STANDARD:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'sprung')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Lengths:
    def chunk(self, item):
        return len(item)


@pytest.mark.parametrize("path", [None, "", f":{ROOT}"], ids=["none", "empty", "empty entry"])
def test_no_child_imports_from_the_current_folder(trap, monkeypatch, path):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    code = f"import {', '.join(STANDARD)}; import fastft; print(random.__file__)"
    done = subprocess.run(
        child.command("-c", code), capture_output=True, text=True, env=child.environment()
    )
    assert done.returncode == 0, done.stderr
    assert not (trap / "sprung").exists()


def test_a_data_worker_does_not_either(trap):
    assert list(map_in_order(Lengths(), ["a", "bb"], 2)) == [1, 2]
    assert not (trap / "sprung").exists()


def test_the_command_itself_imports_nothing_from_there_once_it_runs(trap):
    for name in ("json", "typing", "socket", "logging", "inspect"):
        (trap / f"{name}.py").unlink()  # python imports these itself before fastft has a say
    done = subprocess.run(
        [sys.executable, "-m", "fastft", "config-schema"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    assert done.returncode == 0, done.stderr
    assert not (trap / "sprung").exists()


PARENT = """
import subprocess, sys, time
from fastft import child
from fastft.files.scratch import scratch
with scratch(".verify-", sys.argv[1]) as folder:
    (folder / "model.gguf").write_bytes(b"x" * 1000)
    process = subprocess.Popen(child.command("-c", "import time; time.sleep(60)"))
    print(process.pid, flush=True)
    time.sleep(60)
"""


def test_a_killed_parent_leaves_no_child_and_the_next_call_removes_its_folder(tmp_path):
    (tmp_path / ".verify-mine").mkdir()  # looks alike, is nobody's
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    orphan = int(parent.stdout.readline())
    time.sleep(0.5)
    with scratch(".verify-", tmp_path):
        assert len(list(tmp_path.glob(".verify-*/model.gguf"))) == 1  # the living one's is left
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(orphan) and psutil.Process(orphan).status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with scratch(".verify-", tmp_path) as folder:
        assert {p.name for p in tmp_path.iterdir()} == {folder.name, ".verify-mine"}


def test_a_lock_that_is_a_link_is_refused_and_its_target_keeps_its_content(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    for make in (os.symlink, os.link):
        make(tmp_path / "letter.txt", tmp_path / ".lock")
        with pytest.raises(FastFTError, match="link"), held(tmp_path / ".lock", FastFTError):
            pass
        (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(FastFTError, match="no plain file"), held(tmp_path / ".lock", FastFTError):
        pass
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_lock_is_one_processes_and_is_gone_afterwards(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys, pathlib; from fastft.files.locks import held; from fastft.errors import FastFTError\n"
        "with held(pathlib.Path(sys.argv[1]), FastFTError): pass"
    )
    with held(path, FastFTError, remove=True):
        other = subprocess.run(child.command("-c", code, str(path)), capture_output=True, text=True)
        assert f"process {os.getpid()} on" in other.stderr
    assert not path.exists()
