"""Checks what pip makes of the requirement files: python tools/check_requirements.py colab|linux.

Uses pip's own resolver in a fresh virtual environment. Nothing is installed (`--dry-run`), torch
is never downloaded: a stand-in with nothing but a package's metadata counts as installed, and pip
looks at nothing else of what is installed.

colab  requirements-colab.txt for Python 3.12 beside Colab's own torch 2.11. Fails where a
       requirement cannot be met, where torch or its CUDA packages would be installed, or where the
       set that fastft itself and Unsloth need (both go in with --no-deps) is not covered.
linux  requirements/torch.txt and base.txt as on a Linux machine that has the ordinary index alone
       and so gets the CUDA build: torch's own requirements are asked of the index. Fails where
       torch or triton would be replaced.

What this cannot check: the versions of everything else that Colab brings along (pip replaces those
outside our ranges), that CUDA builds of the chosen packages load, and how long a download takes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
CUDA_PACKAGE = re.compile(r"(nvidia|cuda)-", re.IGNORECASE)
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
        "certifi",
    }
)


def main() -> int:
    """Return 0 where the install works and torch stays, else 1 with what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["colab", "linux"])
    parser.add_argument("--python", default=sys.executable, help="for colab a Python 3.12")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems = {"colab": colab, "linux": linux}[options.what](options.python, Path(folder))
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("what was not checked: " + " ".join(__doc__.split("cannot check:")[1].split()))
    return 1 if problems else 0


def colab(python: str, folder: Path) -> list[str]:
    """Return the problems of the notebook's install beside Colab's torch."""
    inside = environment(python, folder)
    stand_in(inside, "torch", TORCH)
    stand_in(inside, "triton", TRITON)
    report = dry_run(inside, ["-r", str(ROOT / "requirements-colab.txt")])
    alone = dry_run(inside, ["--no-deps", "-r", str(REQUIREMENTS / "unsloth.txt")])
    chosen = versions(report)
    problems = check_torch(chosen) + check_needs("fastft", fastft_needs(), chosen)
    for entry in alone["install"]:
        needs = entry["metadata"].get("requires_dist", [])
        problems += check_needs(entry["metadata"]["name"], needs, chosen, without=UNSLOTH_WITHOUT)
    version = report["environment"]["python_version"]
    print(f"Python {version}, torch {TORCH} installed; pip would install {len(chosen)} packages:")
    print("  " + ", ".join(f"{name} {chosen[name]}" for name in sorted(chosen)))
    return problems


def linux(python: str, folder: Path) -> list[str]:
    """Return the problems of `make setup` where pip knows only the ordinary index."""
    inside = environment(python, folder, upgrade=False)
    environ = ordinary_index()
    pin = ["--no-deps", "--ignore-installed", "-r", str(REQUIREMENTS / "torch.txt")]
    (torch,) = dry_run(inside, pin, environ)["install"]
    # Its CUDA packages are gigabytes, pinned by torch alone; all others must agree with our pins.
    needs = [n for n in torch["metadata"]["requires_dist"] if not CUDA_PACKAGE.match(n)]
    stand_in(inside, "torch", torch["metadata"]["version"], needs)
    for need in needs:
        if normal(need).startswith("triton=="):
            stand_in(inside, "triton", need.split("==")[1].split(";")[0].strip())
    files = [str(REQUIREMENTS / name) for name in ("torch.txt", "base.txt")]
    chosen = versions(dry_run(inside, ["-r", files[0], "-r", files[1]], environ))
    print(f"torch {torch['metadata']['version']} and {len(chosen)} packages of the tested set")
    return check_torch(chosen)


def ordinary_index() -> dict[str, str]:
    """Return the environment without this machine's own sources of wheels."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    return environ | {"PIP_CONFIG_FILE": os.devnull}


def versions(report: dict) -> dict[str, str]:
    """Return {package: version} of what pip would install."""
    metadata = (entry["metadata"] for entry in report["install"])
    return {normal(entry["name"]): entry["version"] for entry in metadata}


def environment(python: str, folder: Path, *, upgrade: bool = True) -> Path:
    """Return the interpreter of a fresh virtual environment."""
    subprocess.run([python, "-m", "venv", str(folder / "env")], check=True)
    inside = folder / "env" / "bin" / "python"
    if upgrade:
        subprocess.run(
            [inside, "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25"], check=True
        )
    return inside


def dry_run(inside: Path, arguments: list[str], environ: dict[str, str] | None = None) -> dict:
    """Return pip's report of what it would install; ends the program where no set fits."""
    options = ["--dry-run", "--quiet", "--only-binary=:all:", "--report", "-"]
    command = [inside, "-m", "pip", "--disable-pip-version-check", "install", *options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode:
        raise SystemExit(f"pip finds no set of versions:\n{done.stderr.strip()[-3000:]}")
    return json.loads(done.stdout)


def stand_in(inside: Path, name: str, version: str, needs: list[str] | None = None) -> None:
    """Make `name` count as installed for the interpreter `inside`."""
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([inside, "-c", where], check=True, capture_output=True, text=True)
    info = Path(site.stdout.strip()) / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs or []]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
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
    colab = {
        "python_version": "3.12",
        "python_full_version": "3.12.12",
        "sys_platform": "linux",
        "extra": "",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
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
