"""Write docs/settings.md, the page of all settings, from fastft/config.py: python
tools/make_settings.py.

A test compares the committed page with what this program writes.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fastft.config import RunConfig
from fastft.runs.checkpoint import MAY_CHANGE, MAY_CHANGE_SECTIONS

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# All settings

Generated from `fastft/config.py` by `python tools/make_settings.py`; do not edit. `fastft init`
writes a config with every one of them, `--set section.key=value` (or `section.key=value` after the
config) overrides one. ↻: may be changed when a run goes on; a change of any other is refused with
the differences.
"""
WORDS = {bool: "true, false", int: "whole number", float: "number", str: "text", type(None): "null"}


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8", newline="\n")


def page() -> str:
    """Return the page as Markdown."""
    own = {n: f for n, f in RunConfig.model_fields.items() if not _is_section(f.annotation)}
    parts = [HEAD, "## The run\n", _table(own, ())]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and _is_section(section):
            about = " ".join((section.__doc__ or "").split())
            parts += [f"## `{name}`\n\n{about}\n", _table(section.model_fields, (name,))]
    return "\n".join(parts)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _table(fields: dict[str, Any], path: tuple[str, ...]) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        key = ".".join((*path, name))
        mark = " ↻" if _may_change((*path, name)[0], name) else ""
        cells = [f"`{key}`{mark}", _kind(field), _default(field), field.description or ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        for inner in get_args(field.annotation):
            if _is_section(inner):  # a list of sections: its own settings follow it
                lines += _table(inner.model_fields, (*path, f"{name}[]")).splitlines()[2:]
    return "\n".join(lines) + "\n"


def _may_change(section: str, name: str) -> bool:
    return section in MAY_CHANGE_SECTIONS or name in MAY_CHANGE.get(section, set())


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    text = {None: "null", True: "true", False: "false"}.get(value) if _plain(value) else None
    return f"`{text if text is not None else value}`"


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _kind(field: Any) -> str:
    """Return the type in words, with its bounds."""
    bounds = []
    for limit in field.metadata:
        for name, sign in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "to")):
            if getattr(limit, name, None) is not None:
                bounds.append(f"{sign} {getattr(limit, name):,}")
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return ", ".join(dict.fromkeys(_words(part) for part in inner))
    if origin is list:
        return f"list of {_words(inner[0])}"
    if origin is dict:
        return "mapping"
    if origin is not None and inner:  # Annotated[int, ...]
        return _words(inner[0])
    if _is_section(annotation):
        return "section"
    return WORDS.get(annotation, str(annotation))


if __name__ == "__main__":
    main()
