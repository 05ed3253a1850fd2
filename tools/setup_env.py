"""Make the environment that `make quickstart` and `make test` use: python tools/setup_env.py .venv.

Only the standard library: it runs before anything is installed. Each step says what it does and
how much is downloaded, and is never silent for long; pip's whole output is in VENV/setup.log.

torch and the set that was tested with it are resolved in one call, so that they cannot disagree:
a pin of another triton than torch's own once made pip replace torch without an error.

    --dev      pytest, ruff, mypy and what the notebooks' tests need, too
    --hashes   check the SHA-256 of the tested set against requirements/lock-*.txt (torch and the
               tools that pip builds llama.cpp with excepted)
    TORCH_INDEX=URL (environment)  an index to take torch from, besides those that pip knows
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
# Megabytes to download on Linux x86-64 with Python 3.11, by the sizes of the files on 28 November
# 2026; the CUDA build of torch counts its CUDA packages; triton is in the tested set.
MEGABYTES = {"torch, CPU": 192, "torch, CUDA": 2524, "tested set": 405, "unsloth": 32, "dev": 62}
BUILD_STEP = re.compile(r"\[ *(\d+)/(\d+)\]")
NOTABLE = re.compile(r"(Collecting|Downloading|Building|Processing|Using cached)\b.*")
SECONDS_BETWEEN_LINES = 15


def main() -> int:
    """Make the environment; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path, help="folder of the virtual environment")
    parser.add_argument("--dev", action="store_true", help="what the tests need, too")
    parser.add_argument("--hashes", action="store_true", help="only files of the lock files")
    options = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(
            f"Python {sys.version.split()[0]} is not 3.11 to 3.13; set PYTHON=...", file=sys.stderr
        )
        return 2
    try:
        Setup(options.venv, hashes=options.hashes).run(dev=options.dev)
    except StepFailedError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


class StepFailedError(Exception):
    """One step of the set-up failed; the message says which, and why."""


class Setup:
    """The steps, in order; each is skipped where an earlier call finished it with the same pins."""

    def __init__(self, venv: Path, *, hashes: bool) -> None:
        self.venv, self.hashes = venv, hashes
        self.bin = venv / ("Scripts" if os.name == "nt" else "bin")
        self.log = venv / "setup.log"

    def run(self, *, dev: bool) -> None:
        """Do what is missing."""
        started = time.monotonic()
        if not self._is_ready():
            self._base()
        if dev:
            self._step("test tools", ["-r", self._pins("dev")], MEGABYTES["dev"])
            (self.venv / ".ready-dev").touch()
        print(
            f"ready after {spoken(time.monotonic() - started)}: {self.bin / 'fastft'}", flush=True
        )

    def _is_ready(self) -> bool:
        """Whether the environment is whole and no pin has changed since."""
        mark = self.venv / ".ready"
        pins = [ROOT / "pyproject.toml", *REQUIREMENTS.glob("*.txt")]
        return mark.exists() and all(pin.stat().st_mtime <= mark.stat().st_mtime for pin in pins)

    def _base(self) -> None:
        print(f"environment in {self.venv} (everything pip says is in {self.log})", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.venv)], check=True)
        self.log.write_text("", encoding="utf-8")
        build, megabytes = self._torch_build()
        self._packages(build, megabytes)
        # --no-deps: Unsloth's metadata asks for torchvision and xformers, which have no CPU build.
        self._step("Unsloth", ["--no-deps", "-r", self._pins("unsloth")], MEGABYTES["unsloth"])
        # -v: pip then passes on the compiler's own progress.
        self._step(
            "llama.cpp, compiled (about 4 minutes on 2 cores)", ["-v", "-r", self._pins("gguf")]
        )
        # compat: with setuptools' default, Python started in the folder above the clone would take
        # the clone for the package.
        editable = ["--config-settings", "editable_mode=compat", "--editable", str(ROOT)]
        self._step("fastft itself", ["--no-deps", *editable], hashed=False)
        (self.venv / ".ready").touch()

    def _packages(self, build: str, megabytes: int) -> None:
        """Install torch and the tested set, in one call, so that they cannot disagree.

        With hashes the set comes file by file, without resolving; torch's own file is not checked:
        which build of it there is, is the machine's business.
        """
        torch = [*self._index(), "-r", str(REQUIREMENTS / "torch.txt")]
        if not self.hashes:
            tested = ["-r", self._pins("base")]
            size = megabytes + MEGABYTES["tested set"]
            return self._step(f"torch ({build}) and the tested set", [*torch, *tested], size)
        self._step(f"torch ({build}), without a hash", torch, megabytes, hashed=False)
        tested = ["--no-deps", "-r", self._pins("base")]
        self._step("the tested set, hashes checked", tested, MEGABYTES["tested set"])

    def _torch_build(self) -> tuple[str, int]:
        """Return (CPU build or CUDA build, megabytes): what pip will take, said before it does."""
        command = ["install", "--dry-run", "--no-deps", "--ignore-installed", "-v"]
        found = self._pip([*command, *self._index(), "-r", str(REQUIREMENTS / "torch.txt")])
        is_cpu = bool(re.search(r"torch-[\d.]+(\+|%2B)cpu|macosx", found))
        card = has_nvidia_card()
        name, megabytes = ("CPU build", MEGABYTES["torch, CPU"])
        if not is_cpu:
            name, megabytes = ("CUDA build", MEGABYTES["torch, CUDA"])
        if is_cpu and card:
            print(
                "note: an NVIDIA card is here, but pip's sources hold the CPU build of torch first"
            )
        if not is_cpu and not card:
            print(
                "note: no NVIDIA card is here, and pip's sources hold only the CUDA build of "
                f"torch ({megabytes / 1000:.1f} GB, not {MEGABYTES['torch, CPU'] / 1000:.1f}). It "
                "works. For the CPU build stop this, and set TORCH_INDEX to the address that "
                "PyTorch's 'Get Started' page shows for Linux, Pip, CPU: make quickstart "
                "TORCH_INDEX=..."
            )
        return name, megabytes

    def _step(
        self, what: str, arguments: list[str], megabytes: int = 0, *, hashed: bool = True
    ) -> None:
        size = f", up to {megabytes / 1000:.1f} GB to download" if megabytes >= 100 else ""
        size = f", {megabytes} MB to download" if 0 < megabytes < 100 else size
        print(f"- {what}{size}", flush=True)
        started = time.monotonic()
        check = ["--require-hashes"] if self.hashes and hashed else []
        self._pip(["install", *check, *arguments], show=True)
        print(f"  done in {spoken(time.monotonic() - started)}", flush=True)

    def _pip(self, arguments: list[str], *, show: bool = False) -> str:
        """Run pip; returns its output. With `show` a line now and then says where it is."""
        command = [str(self.bin / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        lines: list[str] = []
        with self.log.open("a", encoding="utf-8") as log, Heartbeat(lines, enabled=show):
            for line in process.stdout:
                lines.append(line.rstrip())
                log.write(line)
        if process.wait():
            tail = "\n".join(f"    {line}" for line in lines if "WARNING: Location" not in line)
            raise StepFailedError(
                f"pip failed (exit {process.returncode}). Its last lines:\n{tail[-2500:]}\n"
                f"The whole output is in {self.log}. The same command goes on from here."
            )
        return "\n".join(lines)

    def _pins(self, name: str) -> str:
        path = REQUIREMENTS / f"{'lock-' if self.hashes else ''}{name}.txt"
        if not path.is_file():
            raise StepFailedError(f"{path} is missing; without --hashes the plain pins are used.")
        return str(path)

    def _index(self) -> list[str]:
        url = os.environ.get("TORCH_INDEX")
        return ["--extra-index-url", url] if url else []


class Heartbeat:
    """Says where pip is: in place on a terminal, a line every 15 seconds in a log file."""

    def __init__(self, lines: list[str], *, enabled: bool) -> None:
        self.lines, self.enabled, self.done = lines, enabled, threading.Event()
        self.terminal = sys.stdout.isatty()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self.started = time.monotonic()
        if self.enabled:
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        if self.enabled:
            self.thread.join()
            if self.terminal:
                print("\r\033[K", end="", flush=True)

    def _beat(self) -> None:
        while not self.done.wait(0.5 if self.terminal else SECONDS_BETWEEN_LINES):
            text = f"  {spoken(time.monotonic() - self.started)}: {where(self.lines)}"
            if self.terminal:
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\033[K{text[:width]}", end="", flush=True)
            else:
                print(text, flush=True)


def where(lines: list[str]) -> str:
    """Return what pip did last: the compiler's progress as a share, or the package it is at."""
    for line in reversed(lines):
        if step := BUILD_STEP.search(line):
            done, total = int(step[1]), int(step[2])
            return f"compiling, {done} of {total} ({100 * done // max(total, 1)} %)"
        if line.startswith("Installing collected packages:"):
            return f"unpacking {line.count(',') + 1} packages"
        if notable := NOTABLE.search(line):
            return re.sub(r" \(from .*|\S*/(?=\S+$)", "", notable[0])
    return "starting"


def has_nvidia_card() -> bool:
    """Return whether an NVIDIA driver is here (Linux, or WSL2, where it lies elsewhere)."""
    paths = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")
    return shutil.which("nvidia-smi") is not None or any(Path(path).exists() for path in paths)


def spoken(seconds: float) -> str:
    """Return a duration for a person: 42 s, 3 min 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    sys.exit(main())
