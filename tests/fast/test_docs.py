"""Pages that are made from the code are what the code says now."""

import re
from pathlib import Path

import make_plan_constants
import make_readme
import make_settings

from fastft.config import RunConfig

ROOT = Path(__file__).parents[2]


def test_the_settings_page_is_up_to_date():
    assert make_settings.PAGE.read_text(encoding="utf-8") == make_settings.page(), (
        "python tools/make_settings.py"
    )


def test_every_setting_says_what_it_means():
    rows = re.findall(r"^\| `([\w.]+)`.*\| ([^|]*) \|$", make_settings.page(), re.MULTILINE)
    assert len(rows) > len(RunConfig.model_fields) * 3
    assert [key for key, meaning in rows if not meaning.strip()] == []


def test_the_plans_constants_are_the_codes():
    committed = make_plan_constants.PAGE.read_text(encoding="utf-8")
    assert committed == make_plan_constants.page(committed), "python tools/make_plan_constants.py"


def test_every_constant_of_the_plan_says_what_it_means():
    found = [
        c for module in make_plan_constants.MODULES for c in make_plan_constants.constants(module)
    ]
    assert len(found) > 20
    assert [name for name, _, meaning in found if not meaning] == []


def test_numbers_in_the_readmes_and_the_cards_are_their_sources():
    for path, text in make_readme.pages().items():
        assert path.read_text(encoding="utf-8") == text, "python tools/make_readme.py"
    for readme in make_readme.READMES:
        assert "<!-- speed -->" in readme.read_text(encoding="utf-8")


def test_links_inside_the_documents_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "README.ja.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
