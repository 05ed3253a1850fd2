"""Calls into llama.cpp that may end the process, each in a process of its own: llama_job.py."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from fastft import child
from fastft.errors import FastFTError

INSTALL = (
    "GGUF export needs llama-cpp-python and gguf: pip install 'fastft[gguf]' (needs cmake and a "
    "C++ compiler)."
)


def run_isolated(**job: Any) -> tuple[list[Any], str]:
    """Run `job` in a subprocess; return the answers that it wrote and, where it died, the end of
    what it said.
    """
    done = subprocess.run(
        child.command("fastft.exporting.gguf.llama_job"),
        input=json.dumps(job),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=child.environment(GGML_NO_BACKTRACE="1"),
    )
    if "ModuleNotFoundError: No module named 'llama_cpp'" in done.stderr:
        raise FastFTError(INSTALL)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]
    return answers, "" if done.returncode == 0 else done.stderr.strip()[
        -1000:
    ] or f"exit code {done.returncode}"
