"""Checks that the notebook's install leaves Colab's torch alone: python tools/check_colab.py
--python python3.12.

Resolves requirements-colab.txt with pip's own resolver for Python 3.12 in a fresh virtual
environment in which torch 2.11 counts as installed: a stand-in with nothing but the metadata of a
package, as pip looks at nothing else of what is installed. Nothing is installed (`--dry-run`); of
most packages only metadata is fetched, never torch. It fails where a requirement cannot be met
beside that torch, where torch or its CUDA packages would be installed, or where the set that
fastft itself and Unsloth need (both go in with --no-deps) is not covered.

What this cannot check: the versions of everything else that Colab brings along (pip replaces those
outside our ranges), that CUDA builds of the chosen packages load, and how long the download takes
there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "2.11.0+cu128"
# assumed, not looked up: torch pins its own, and a requirement without a version must not replace
# it
TRITON = "3.6.0"
# What Colab brings besides; everything else must be in requirements-colab.txt or come with what is.
BROUGHT = {"numpy", "torchvision"}
# Unsloth's requirements without which the whole test suite runs here, on the CPU: what its
# installer and its user interface want, image models, and a faster attention that a GPU without
# xformers replaces by SDPA. certifi: any recent one.
UNSLOTH_WITHOUT = frozenset(
    {
        "unsloth-zoo",
        "wheel",
        "diffusers",
        "json5",
        "nest-asyncio",
        "structlog",
        "xformers",
        "certifi",
    }
)


def main() -> int:
    """Return 0 where the install works and torch stays, else 1 with what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--python", default=sys.executable, help="a Python 3.12 (default: this one)"
    )
    python = parser.parse_args().python
    with tempfile.TemporaryDirectory() as folder:
        inside = environment(python, Path(folder))
        report = dry_run(inside, ["-r", str(ROOT / "requirements-colab.txt")])
        alone = dry_run(inside, ["--no-deps", "-r", str(ROOT / "requirements" / "unsloth.txt")])
    version = report["environment"]["python_version"]
    chosen = {
        normal(entry["metadata"]["name"]): entry["metadata"]["version"]
        for entry in report["install"]
    }
    problems = check_torch(chosen) + check_needs("fastft", fastft_needs(), chosen)
    for entry in alone["install"]:
        needs = entry["metadata"].get("requires_dist", [])
        problems += check_needs(entry["metadata"]["name"], needs, chosen, without=UNSLOTH_WITHOUT)
    print(f"Python {version}, torch {TORCH} installed; pip would install {len(chosen)} packages:")
    print("  " + ", ".join(f"{name} {chosen[name]}" for name in sorted(chosen)))
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("what was not checked: " + " ".join(__doc__.split("cannot check:")[1].split()))
    return 1 if problems else 0


def environment(python: str, folder: Path) -> Path:
    """Return the interpreter of a fresh virtual environment in which torch counts as installed."""
    subprocess.run([python, "-m", "venv", str(folder / "env")], check=True)
    inside = folder / "env" / "bin" / "python"
    subprocess.run([inside, "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25"], check=True)
    site = subprocess.run(
        [inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    stand_in(Path(site), "torch", TORCH)
    stand_in(Path(site), "triton", TRITON)
    return inside


def dry_run(inside: Path, arguments: list[str]) -> dict:
    """Return pip's report of what it would install; ends the program where there is no such set of
    versions.
    """
    command = [
        inside,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--only-binary=:all:",
        "--report",
        "-",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip finds no set of versions:\n{done.stderr.strip()[-3000:]}")
    return json.loads(done.stdout)


def stand_in(site: Path, name: str, version: str) -> None:
    """Make `name` count as installed in the site-packages folder `site`."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )
    (info / "RECORD").write_text("", encoding="utf-8")
    (info / "INSTALLER").write_text("stand-in\n", encoding="utf-8")


def check_torch(chosen: dict[str, str]) -> list[str]:
    """Return what of `chosen` {package: version} would replace torch or bring a second CUDA."""
    problems = [
        f"{name} {chosen[name]} would be installed"
        for name in chosen
        if name in {"torch", "torchvision", "triton"}
    ]
    return problems + [
        f"{name} would be installed: a second CUDA" for name in chosen if name.startswith("nvidia-")
    ]


def check_needs(
    who: str, needs: list[str], chosen: dict[str, str], without: frozenset[str] = frozenset()
) -> list[str]:
    """Return each requirement of `who`, installed with --no-deps, that the chosen set does not
    meet.
    """
    have, problems = chosen | {"torch": TORCH, "triton": TRITON}, []
    for line in needs:
        name, wanted, applies = split(line)
        if not applies or name in BROUGHT or name in without:
            continue
        if name not in have:
            problems.append(f"{who} needs {line}, which requirements-colab.txt does not bring")
        elif not within(have[name], wanted):
            problems.append(f"{who} needs {line}, but {have[name]} would be there")
    return problems


def fastft_needs() -> list[str]:
    """Return fastft's own dependencies as pyproject.toml declares them."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "dependencies"
    ]


def normal(name: str) -> str:
    """Return a package name in the spelling in which names are compared."""
    return name.lower().replace("_", "-")


def split(line: str) -> tuple[str, str, bool]:
    """Return (name, version range, whether it applies on Linux with Python 3.12 and no extras) of
    a requirement.
    """
    from packaging.requirements import Requirement

    parsed = Requirement(line)
    colab = {"python_version": "3.12", "python_full_version": "3.12.12", "sys_platform": "linux", "extra": "",
             "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}  # fmt: skip
    return (
        normal(parsed.name),
        str(parsed.specifier),
        parsed.marker is None or parsed.marker.evaluate(colab),
    )


def within(version: str, wanted: str) -> bool:
    """Return whether `version` is in the range `wanted`."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


if __name__ == "__main__":
    sys.exit(main())
