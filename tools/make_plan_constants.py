"""Write the constants of the plan into docs/plan.md, between its two marks, from the code: python
tools/make_plan_constants.py.

A constant's meaning is the text or the comment that stands with it in the code. A test compares
the committed page with what this program writes, so a number there cannot differ from the code's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
MODULES = ("memory", "time", "resolve", "several", "disk")
NOT_NUMBERS = {"GGUF_BITS", "GGUF_TYPES"}  # a table of llama.cpp's, in docs/gguf.md's terms
BEGIN, END = "<!-- constants: made by tools/make_plan_constants.py -->", "<!-- /constants -->"


def main() -> None:
    """Write the table into the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


def page(text: str) -> str:
    """Return the page's `text` with the table as the code has it now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}"


def table() -> str:
    """Return the constants as a Markdown table."""
    lines = ["| constant | value | meaning |", "|---|---|---|"]
    for module in MODULES:
        for name, value, meaning in constants(module):
            lines.append(
                f"| `{module}.{name}` | `{value}` | {meaning.replace('|', chr(92) + '|')} |"
            )
    return "\n".join(lines) + "\n"


def constants(module: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value as it stands in the code, meaning) of a module of fastft/planning."""
    source = (ROOT / "fastft" / "planning" / f"{module}.py").read_text(encoding="utf-8")
    lines, body = source.splitlines(), ast.parse(source).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if not isinstance(target, ast.Name) or not re.fullmatch(r"[A-Z][A-Z0-9_]+", target.id):
            continue
        if target.id not in NOT_NUMBERS:
            comment = lines[node.lineno - 1].partition("  # ")[2]
            value = ast.get_source_segment(source, node.value) or ""
            yield target.id, " ".join(value.split()), _text(after) or comment


def _text(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


if __name__ == "__main__":
    main()
