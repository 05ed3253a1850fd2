"""Write requirements/lock-*.txt: the pinned set with the SHA-256 of every file that pip may take.

    python tools/make_lock.py            # all of them, for Python 3.11 to 3.13 on Linux x86-64
    python tools/make_lock.py gguf       # one

`make setup HASHES=1` installs from them. pip itself is asked what it would install (a dry run with
a report), so the hashes are those of the index that is configured here; nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
NAMES = ("torch", "base", "unsloth", "gguf", "dev")
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = [
    f"{kind}_x86_64" for kind in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24",
                                  "manylinux_2_17", "manylinux2014", "manylinux1", "linux")
]  # fmt: skip
SOURCE_ONLY = {"llama-cpp-python"}  # built on the user's machine


def main() -> int:
    """Write the lock files that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    for name in parser.parse_args().names or NAMES:
        path = REQUIREMENTS / f"lock-{name}.txt"
        pins = pinned(REQUIREMENTS / f"{name}.txt")
        path.write_text(lock(name, pins), encoding="utf-8")
        print(f"{path.name}: {len(pins)} packages")
    return 0


def pinned(path: Path) -> list[str]:
    """Return the lines `name==version[; marker]` of a requirements file."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line]


def lock(name: str, pins: list[str]) -> str:
    """Return a lock file's text."""
    found: dict[str, set[str]] = {}
    for python in PYTHONS:
        for project, digest in asked(pins, python):
            found.setdefault(project, set()).add(digest)
    lines = [f"# {name}.txt with hashes, by tools/make_lock.py; for `make setup HASHES=1`."]
    for pin in pins:
        project = canonical(pin.partition("==")[0])
        hashes = sorted(found.get(project, ()))
        if not hashes:
            raise SystemExit(f"pip names no file for {pin}")
        lines.append(" \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in hashes)]))
    return "\n".join(lines) + "\n"


def asked(pins: list[str], python: str) -> list[tuple[str, str]]:
    """Return (project, sha256) of the file that pip would take for each pin with this Python."""
    wheels = [pin for pin in pins if canonical(pin.partition("==")[0]) not in SOURCE_ONLY]
    sources = [pin for pin in pins if pin not in wheels]
    tags = [part for platform in PLATFORMS for part in ("--platform", platform)]
    found = _report(
        wheels, "--only-binary=:all:", "--target", "unused", "--python-version", python, *tags
    )
    if sources and python == f"{sys.version_info[0]}.{sys.version_info[1]}":
        found += _report(sources, "--no-binary", ",".join(SOURCE_ONLY))
    return found


def _report(pins: list[str], *options: str) -> list[tuple[str, str]]:
    if not pins:
        return []
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "pins.txt", Path(folder) / "report.json"
        wanted.write_text("\n".join(pins), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--no-deps"]
        command += ["--ignore-installed", "--report", str(report), "-r", str(wanted), *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise SystemExit(f"pip: {done.stderr.strip()[-2000:]}")
        entries = json.loads(report.read_text("utf-8"))["install"]
    return [
        (
            canonical(entry["metadata"]["name"]),
            entry["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for entry in entries
    ]


def canonical(name: str) -> str:
    """Return a project's name as indexes compare it."""
    return name.strip().lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    sys.exit(main())
