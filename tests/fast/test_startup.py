"""What a user waits for: importing fastft and asking for help load nothing heavy."""

import statistics
import subprocess
import sys
import time

import pytest


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_is_light():
    heavy = run(
        "import sys, fastft; names = dir(fastft)\n"
        "print([m for m in ('torch', 'transformers', 'unsloth', 'pydantic', 'numpy') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_help_does_not_import_torch():
    code = "import sys\nfrom fastft.cli import run\ncode = run(['--help'])\nprint(code, 'torch' in sys.modules)"
    assert run(code).splitlines()[-1] == "0 False"


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "limit"), [(["-c", "import fastft"], 0.3), (["-m", "fastft", "--help"], 1.0)]
)
def test_start_up_time(arguments, limit):
    """Median of 5 above the interpreter's own start. Not part of the default suite: timings never decide it."""

    def seconds(command):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        return time.perf_counter() - started

    empty = statistics.median(seconds(["-c", "pass"]) for _ in range(5))
    assert statistics.median(seconds(arguments) for _ in range(5)) - empty < limit


def test_a_verb_is_the_function_also_after_its_module_was_imported():
    code = "import fastft, fastft.config; from fastft.data.inspect import inspect_data\nfrom fastft import load_config\n"
    assert (
        run(code + "print(fastft.inspect_data is inspect_data, callable(load_config))").strip()
        == "True True"
    )
