"""The pages about models and adapters: their tables are what was measured, and nothing is missing."""

import json

from tests.families import FAMILIES
from tools import adapters_page, bases_page, models_page


def test_the_table_is_made_from_the_results():
    assert models_page.page() == models_page.PAGE.read_text(encoding="utf-8"), (
        "run: python tools/models_page.py"
    )


def test_every_promised_family_works_with_both_engines():
    results = json.loads(models_page.RESULTS.read_text(encoding="utf-8"))
    rows = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in models_page.table(results).splitlines()
    }
    for family in FAMILIES:
        assert "| yes / yes | exact, tested |" in rows[family], family
        assert "| exact | exact |" in rows[family], family


def test_what_did_not_work_is_not_called_working():
    entry = {"losses": [3.0, 2.0, 2.5], "reload": 0.0}
    assert models_page._trains(entry) == "not reproduced"
    assert models_page._trains({"failed": "out of words"}) == "no"


def test_the_table_of_adapters_holds_every_kind_as_the_test_has_it():
    results = json.loads(adapters_page.RESULTS.read_text(encoding="utf-8"))
    written = {name: {k: e[k] for k in ("family", "lora")} for name, e in results.items()}
    assert written == adapters_page.kinds(), "run: python tools/adapters_page.py --measure"
    assert adapters_page.page() == adapters_page.PAGE.read_text(encoding="utf-8"), (
        "run: python tools/adapters_page.py"
    )


def test_the_page_of_bases_is_what_was_found():
    assert bases_page.page() == bases_page.PAGE.read_text(encoding="utf-8"), (
        "run: python tools/bases_page.py"
    )
    assert sum(len(names.split()) for names in bases_page.BASES.values()) == 100


def test_what_did_not_work_stands_in_the_page_of_bases():
    found = {"doing": "lora", "failed": "no such | layer"}
    assert "no: LoRA fails: no such / layer" in bases_page._cells(found, "some")
    found = {"doing": "", "rows": "padded", "rows_why": "padded batches, because so"}
    found |= {"planned": None, "planned_why": "unknown", "trainable": 5, "merged": 1.0}
    found |= {"gguf": None, "gguf_why": "no converter"}
    expected = "padded: so | unknown | off by 1 | none: no converter |  |"
    assert bases_page._cells(found, "some") == expected
    found |= {"planned": 5, "merged": 1e-6, "gguf": "upstream", "kl": 0.5, "rows": "varlen"}
    expected = "by the check | exact | exact | llama.cpp's converter | 5e-01 (not exact) |"
    assert bases_page._cells(found, "some") == expected
