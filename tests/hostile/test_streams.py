"""Closed, full and abandoned standard output; signals before the loop; what is never printed."""

import signal
import subprocess
import sys
import time

import pytest

from fastft.errors import CouldNotFinishError, FastFTError, explained
from fastft.secrets import redact

FASTFT = [sys.executable, "-m", "fastft"]


def shell(command, **keywords):
    return subprocess.run(
        ["bash", "-c", command, "bash", *FASTFT], capture_output=True, text=True, **keywords
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ('"$@" config-schema | head -c 1; exit ${PIPESTATUS[0]}', 0),
        ('"$@" config-schema >/dev/full', 0),
        ('"$@" config-schema >&-', 0),
        ('"$@" config-schema >&- 2>&- <&-', 0),
        ('"$@" train nowhere.yaml 2>/dev/full', 2),
        ('"$@" plan --table --json >/dev/full', 3),
        ('PYTHONIOENCODING=ascii "$@" train 日本.yaml', 2),
    ],
)
def test_output_that_cannot_be_written_changes_nothing(tmp_path, command, code):
    done = shell(command, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_signal_before_the_loop_is_130_and_one_line():
    code = (
        "import sys, fastft.config as c, time; c.load_config = lambda *a: time.sleep(60)\n"
        "from fastft.cli import main; sys.argv = ['fastft', 'train', 'run.yaml']; "
        "print('ready', flush=True); main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_what_the_machine_says_is_no_bug():
    panic = type("PanicException", (BaseException,), {})
    for error in (
        panic("The global thread pool has not been initialized.: ThreadPoolBuildError { kind }"),
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError("libllama.so: cannot allocate memory in static TLS block"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        OSError(12, "Cannot allocate memory"),
        OSError(28, "No space left on device", "/x"),
        OSError(5, "Input/output error"),
    ):
        assert isinstance(explained(error), CouldNotFinishError), error
    assert "GiB" in str(explained(MemoryError()))
    wrapped = KeyError("weights")
    wrapped.__context__ = MemoryError()
    assert isinstance(explained(wrapped), CouldNotFinishError)
    for error in (
        PermissionError(13, "Permission denied", "/x"),
        OSError(36, "File name too long", "/x" * 200),
        ValueError("embedded null byte"),
    ):
        found = explained(error)
        assert isinstance(found, FastFTError)
        assert found.exit_code == 2
    with pytest.MonkeyPatch.context() as none_left:
        none_left.setitem(sys.modules, "psutil", None)  # importing it takes memory, too
        assert "cannot be asked" in str(explained(MemoryError()))
    assert explained(ValueError("a fault of ours")) is None
    assert explained(KeyError("rows")) is None


KEYS = (
    "hf_Abcdefghijklmnopqrstuvwxyz012345",
    "sk-proj-abcdefghijklmnop1234",
    "ghp_abcdefghijklmnopqrstuvwxyz0123",
    "AKIAABCDEFGHIJKLMNOP",
)


@pytest.mark.parametrize("key", KEYS)
def test_no_key_is_printed_or_written(key, tmp_path):
    from fastft.files import write_atomically

    assert key not in redact(f"token={key}, again '{key}'")
    write_atomically(tmp_path / "run.json", f'{{"token": "{key}"}}')
    assert key not in (tmp_path / "run.json").read_text()


def test_addresses_and_variables_lose_their_password(monkeypatch):
    assert redact("https://me:pass@hub.example/x") == "https://***@hub.example/x"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert redact("key 0123456789abcdef.") == "key ***."
    assert redact("Authorization: Bearer abcdefghijklmnop") == "Authorization: Bearer ***"


def test_a_folder_whose_name_looks_like_a_key_keeps_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "my models" / KEYS[0] / "base"
    folder.mkdir(parents=True)
    text = f"model:\n  name: {folder}\ntoken: {KEYS[0]}\n"
    assert redact(text) == f"model:\n  name: {folder}\ntoken: ***\n"
    monkeypatch.chdir(tmp_path / "my models")
    assert redact(f'{{"name": "{KEYS[0]}/base"}}') == f'{{"name": "{KEYS[0]}/base"}}'
