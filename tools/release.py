"""`make release`: the wheel and the tag's text, or what stands in the way.

Writes dist/fastft-VERSION-py3-none-any.whl and dist/TAG.txt; tagging and pushing stay with a
person.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version_of(package: Path) -> str:
    """Return `__version__` of the package's __init__.py, the only place that holds it."""
    found = re.search(r'^__version__ = "([^"]+)"$', package.read_text(encoding="utf-8"), re.M)
    assert found is not None, f"{package} has no __version__"
    return found[1]


def section_of(changelog: str, version: str) -> str | None:
    """Return the text below `## VERSION` in the changelog; None where there is no such heading, or
    where it is still marked as unreleased.
    """
    found = re.search(
        rf"^## {re.escape(version)}(?P<rest>(?: [^\n]*)?)\n(?P<text>.*?)(?=^## |\Z)",
        changelog,
        re.M | re.S,
    )
    if found is None or "unreleased" in found["rest"]:
        return None
    return found["text"].strip()


def problems(version: str, section: str | None, dirty: str, tags: list[str]) -> list[str]:
    """Return everything that stands in the way of releasing `version`."""
    found = []
    if section is None:
        found.append(f"CHANGELOG.md has no section '## {version} (DATE)' that is not unreleased")
    elif not section:
        found.append(f"the section {version} of CHANGELOG.md is empty")
    if dirty:
        found.append(f"the tree is not clean:\n{dirty}")
    if f"v{version}" in tags:
        found.append(f"the tag v{version} exists; raise __version__ in fastft/__init__.py")
    return found


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Build the release; returns 1 and says why where it may not be."""
    version = version_of(ROOT / "fastft" / "__init__.py")
    section = section_of((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    found = problems(version, section, _git("status", "--porcelain"), _git("tag").split())
    if found:
        print("\n".join(f"- {line}" for line in found), file=sys.stderr)
        return 1
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(dist), str(ROOT)]
    subprocess.run(wheel, check=True)
    (dist / "TAG.txt").write_text(f"fastft {version}\n\n{section}\n", encoding="utf-8")
    print(f"dist/ holds the wheel. Next: git tag -a v{version} -F dist/TAG.txt && git push --tags")
    return 0


if __name__ == "__main__":
    sys.exit(main())
