"""Write the notebooks from quickstart.md (and advice.md), deploy_vllm.md and benchmark.md: python
tools/make_notebooks.py [--repository USER/NAME].

Where the repository's address on GitHub is given, they get a badge that opens them in Colab, and
install fastft from there; without it they look for a wheel, or ask for one.

The source is Markdown. A fenced block ```python NAME is a code cell with that id, everything
between is a text cell; <<English||日本語>> is replaced by the one or the other; {{name}} by what
`values` says. The two languages of a notebook have the same cells, so they cannot drift, and a test
compares the committed files with what this program writes.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HERE = ROOT / "notebooks"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
FILES = {"en": "quickstart.ipynb", "ja": "quickstart_ja.ipynb"}
DEPLOY = {"en": "deploy_vllm.ipynb", "ja": "deploy_vllm_ja.ipynb"}
BENCHMARK = "benchmark.ipynb"
JAPANESE = r"[\u3001-\u30ff\u4e00-\u9fff\uff00-\uffef]"
CODE = re.compile(r"^```python (\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def main() -> None:
    """Write all notebooks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", default="", help="USER/NAME on GitHub, where it has one")
    repository = parser.parse_args().repository
    made = {BENCHMARK: benchmark_notebook(repository)}
    for language in FILES:
        made[FILES[language]] = notebook(language, repository)
        made[DEPLOY[language]] = deploy_notebook(language, repository)
    for name, text in made.items():
        (HERE / name).write_text(text, encoding="utf-8", newline="\n")


def notebook(language: str, repository: str = "") -> str:
    """Return the quickstart in `language` (en, ja) as the text of an .ipynb file."""
    text = (HERE / "quickstart.md").read_text(encoding="utf-8")
    text = text.replace("{{advice}}", (HERE / "advice.md").read_text(encoding="utf-8"))
    text = _filled(text, FILES[language], repository)
    return _ipynb(in_language(text, language), FILES[language])


def deploy_notebook(language: str, repository: str = "") -> str:
    """Return the notebook that serves a run with vLLM, in `language` (en, ja)."""
    text = (HERE / "deploy_vllm.md").read_text(encoding="utf-8")
    text = _filled(text, DEPLOY[language], repository)
    return _ipynb(in_language(text, language), DEPLOY[language])


def benchmark_notebook(repository: str = "") -> str:
    """Return the benchmark's notebook as the text of an .ipynb file."""
    text = (HERE / "benchmark.md").read_text(encoding="utf-8")
    return _ipynb(_filled(text, BENCHMARK, repository), BENCHMARK)


def _filled(text: str, file: str, repository: str) -> str:
    for name, value in values(file, repository).items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _ipynb(text: str, file: str) -> str:
    content = {
        "cells": list(_cells(text)),
        "metadata": {
            "accelerator": "GPU",
            "colab": {"gpuType": "T4", "name": file, "provenance": [], "toc_visible": True},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def in_language(text: str, language: str) -> str:
    """Return `text` with every <<English||日本語>> replaced by the part in `language`."""
    part = {"en": 1, "ja": 2}[language]
    text = re.sub(r"<<(.*?)\|\|(.*?)>>", lambda found: found.group(part), text, flags=re.DOTALL)
    assert not any(mark in text for mark in ("||", "{{")), "an unfinished << || >> or {{ }}"
    # Markdown shows a line break as a space, which does not belong between Japanese characters.
    return re.sub(f"(?<={JAPANESE})\n *(?={JAPANESE})", "", text)


def values(file: str, repository: str) -> dict[str, str]:
    """Return what stands for each {{name}}: the pins come from the requirements files, nowhere
    else.
    """
    page = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{file}"
    return {
        "badge": f"[![Open In Colab]({BADGE})]({page})\n\n" if repository else "",
        "source": f"git+https://github.com/{repository}" if repository else "",
        "requirements": textwrap.fill(" ".join(requirements(ROOT / "requirements-colab.txt")), 100),
        "unsloth": " ".join(requirements(ROOT / "requirements" / "unsloth.txt")),
        "llama": " ".join(requirements(ROOT / "requirements" / "gguf.txt")[:2]),
    }


def requirements(path: Path) -> list[str]:
    """Return the requirements in a file, without comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def _cells(text: str) -> Any:
    position = number = 0
    for found in CODE.finditer(text):
        yield from _markdown(text[position : found.start()], number)
        number += 1
        code = {"cell_type": "code", "execution_count": None, "id": found.group(1), "outputs": []}
        yield code | {
            "metadata": {"cellView": "form"} if number == 1 else {},
            "source": _lines(found.group(2)),
        }
        position = found.end()
    yield from _markdown(text[position:], number)


def _markdown(text: str, number: int) -> Any:
    if text.strip():
        yield {
            "cell_type": "markdown",
            "id": f"text-{number}",
            "metadata": {},
            "source": _lines(text),
        }


def _lines(text: str) -> list[str]:
    return text.strip().splitlines(keepends=True)


if __name__ == "__main__":
    main()
