"""The table of adapters in docs/adapters.md: what plain peft made, and what became of it.

    python tools/adapters_page.py            # write the table from docs/adapters.json
    python tools/adapters_page.py --measure  # make and merge every kind first (half a minute)

The kinds are the cases of tests/unit/test_export_weights.py, measured by the test's own code.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "adapters.md", ROOT / "docs" / "adapters.json"
BEGIN, END = "<!-- adapters: begin -->\n", "<!-- adapters: end -->\n"
HEAD = (
    "| Kind | Base | peft's LoraConfig | Result | From the trained model's logits | "
    "From peft's merged tensors |\n|---|---|---|---|---|---|\n"
)
SAME_TENSORS = 3e-6


def kinds() -> dict[str, dict[str, Any]]:
    """Return every kind of the test with its base's family and its LoraConfig in words."""
    sys.path.insert(0, str(ROOT))
    from tests.unit.test_export_weights import CASES, REFUSED

    found = {name: ("llama", lora, None) for name, (lora, _) in REFUSED.items()}
    found |= {name: case[:3] for name, case in CASES.items()}
    return {
        name: {"family": family, "lora": _words(lora, vocabulary)}
        for name, (family, lora, vocabulary) in sorted(found.items())
    }


def _words(lora: dict[str, Any], vocabulary: int | None) -> str:
    parts = [f"{key}={json.dumps(value)}" for key, value in lora.items()]
    return ", ".join([*parts, *([f"embeddings resized to {vocabulary}"] if vocabulary else [])])


def measure() -> dict[str, dict[str, Any]]:
    """Make, merge and compare an adapter of every kind."""
    known = kinds()
    from tests.unit.test_export_weights import REFUSED, compare_merge, refusal

    for name, entry in known.items():
        with tempfile.TemporaryDirectory() as folder:
            if name in REFUSED:
                entry["refused"] = refusal(name, Path(folder)).replace(folder, "")
            else:
                entry |= compare_merge(name, Path(folder))
    return known


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table as Markdown, a row a kind, refused ones last."""
    rows = sorted(results.items(), key=lambda item: ("refused" in item[1], item[0]))
    return HEAD + "".join(_row(name, entry) for name, entry in rows)


def _row(name: str, entry: dict[str, Any]) -> str:
    keywords = entry["lora"].replace("|", "\\|")
    start = f"| {name} | {entry['family']} | `{keywords}` | "
    if "refused" in entry:
        return f"{start}refused: {' '.join(entry['refused'].split())} | | |\n"
    untied = "" if entry["tied"] is not False else ", head and embedding apart"
    peft = "equal" if entry["tensors"] == 0 else f"{entry['tensors']:.0e}"
    peft += "" if entry["tensors"] < SAME_TENSORS else " (peft merges into the one tied tensor)"
    return f"{start}merged{untied} | {entry['logits']:.0e} | {peft} |\n"


def page() -> str:
    """Return docs/adapters.md with the table of RESULTS in its place."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return before + BEGIN + table(results) + END + rest.partition(END)[2]


def main() -> None:
    """Read the command line, measure where asked, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
