"""What `make release` refuses, and where the version stands."""

import tomllib
from pathlib import Path

from release import problems, section_of, version_of

ROOT = Path(__file__).parents[2]
LOG = "# Changelog\n\n## 0.3.0 (unreleased)\n\n- more\n\n## 0.2.0 (2026-12-01)\n\n- one\n- two\n\n## 0.1.0\n\n- first\n"


def test_the_tags_text_is_the_versions_section():
    assert section_of(LOG, "0.2.0") == "- one\n- two"
    assert section_of(LOG, "0.1.0") == "- first"
    assert section_of(LOG, "0.3.0") is None  # still unreleased
    assert section_of(LOG, "0.2") is None


def test_everything_in_the_way_is_named_at_once():
    assert problems("0.2.0", "- one", "", ["v0.1.0"]) == []
    found = problems("0.2.0", None, " M fastft/cli.py", ["v0.2.0"])
    assert len(found) == 3
    assert "the tag v0.2.0 exists" in found[2]


def test_the_version_has_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastft.__version__"}
    assert version_of(ROOT / "fastft" / "__init__.py").count(".") == 2
