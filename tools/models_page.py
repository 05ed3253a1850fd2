"""The table of docs/models.md, made from what the tests measured for each family.

    python tools/models_page.py            # write the table from docs/models.json
    python tools/models_page.py --measure  # run every family with both engines first (minutes each)
    python tools/models_page.py --measure gemma4 qwen3-moe --engine stock   # these alone

docs/models.json holds one entry a family and engine: what tests/e2e/models_worker.py printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "docs" / "models.json"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
EXACT_LOGITS = 1e-4
HEAD = (
    "| Family | Trains (stock / Unsloth) | Rows without padding | fastft's own layers | Plan's "
    "trainable parameters | Merge | GGUF | KL of f32 | Certificate | Ollama |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)
PARTS = {"Attention": "attention", "MLP": "MLP", "RMSNorm": "norms", "ForCausalLM": "loss"}


def measure(families: list[str], engines: list[str]) -> None:
    """Run the families (none: all) with each engine, a process each, and put what they printed
    into RESULTS.
    """
    sys.path.insert(0, str(ROOT))
    from tests.families import FAMILIES, NEWEST

    everything = [*FAMILIES, *NEWEST, "gemma3-4b", "gemma4-e2b", "qwen3.5-4b"]
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for family in families or everything:
        for engine in engines:
            known.setdefault(family, {})[engine] = run_one(family, engine)
            found = {name: known[name] for name in everything if name in known}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run_one(family: str, engine: str) -> dict[str, Any]:
    """Return what tests/e2e/models_worker.py prints for a family, or its last words."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.e2e.models_worker", engine, family, folder],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table as Markdown, a row a family."""
    return HEAD + "".join(_row(family, engines) for family, engines in results.items())


def _row(family: str, engines: dict[str, Any]) -> str:
    stock = engines["stock"]
    if "failed" in stock:
        return f"| {family} | {stock['failed'][:120]} | | | | | | | | |\n"
    trains = " / ".join(_trains(engines.get(name, {})) for name in ("stock", "unsloth"))
    merged = "exact" if stock["merged"] < EXACT_LOGITS else f"off by {stock['merged']:.1g}"
    gguf = {"streaming": "own writer", "upstream": "llama.cpp's converter"}.get(stock["gguf"], "no")
    distance = f"{stock['kl']:.0e}" if "kl" in stock else ""
    planned = "exact" if stock["planned"] == stock["trainable"] else f"{stock['planned']:,}"
    cells = [family, trains, _rows(stock), _layers(stock["fused"]), planned, merged, gguf, distance]
    ollama = {True: "TEMPLATE", False: "none", None: "not measured"}[stock.get("ollama")]
    cells += [_certificate(stock.get("certificate", {})), ollama]
    return "| " + " | ".join(cells) + " |\n"


def _certificate(verdicts: dict[str, str]) -> str:
    """All that passed in one word, else each file with its verdict."""
    if verdicts and set(verdicts.values()) == {"pass"}:
        return "pass"
    return ", ".join(f"{kind} {verdict}" for kind, verdict in verdicts.items()) or "not measured"


def _trains(found: dict[str, Any]) -> str:
    if "losses" not in found:
        return "no"
    falls = all(a > b for a, b in zip(found["losses"], found["losses"][1:], strict=False))
    return "yes" if falls and found["reload"] < EXACT_LOGITS else "not reproduced"


def _rows(found: dict[str, Any]) -> str:
    if found["rows"] == "padded":
        return "padded: " + found["rows_why"].removeprefix("padded batches, because ")
    seen = found["rows_why"].startswith("exact here")
    return "exact, looked at in each run" if seen else "exact, tested"


def _layers(classes: list[str]) -> str:
    kinds = [name for end, name in PARTS.items() if any(c.endswith(end) for c in classes)]
    if any(c.endswith("ForConditionalGeneration") for c in classes):
        kinds.append("loss")
    return ", ".join(kinds) or "LoRA layers"


def page() -> str:
    """Return docs/models.md with the table of RESULTS in its place."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return before + BEGIN + table(results) + END + after


def main() -> None:
    """Read the command line, measure where asked, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs="*", metavar="FAMILY")
    parser.add_argument("--engine", nargs="*", default=["stock", "unsloth"])
    asked = parser.parse_args()
    if asked.measure is not None:
        measure(asked.measure, asked.engine)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
