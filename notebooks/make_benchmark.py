"""Write benchmark.ipynb from benchmark.md, as make.py writes the quickstart: python notebooks/make_benchmark.py."""

from __future__ import annotations

import json
from pathlib import Path

import make

HERE = Path(__file__).parent
FILE = "benchmark.ipynb"


def main() -> None:
    """Write the notebook."""
    (HERE / FILE).write_text(notebook(), encoding="utf-8", newline="\n")


def notebook() -> str:
    """Return the notebook as the text of an .ipynb file."""
    text = (HERE / "benchmark.md").read_text(encoding="utf-8")
    badge = f"https://colab.research.google.com/github/{make.REPOSITORY}/blob/main/notebooks/{FILE}"
    for name, value in {**make.values("en"), "badge": badge}.items():
        text = text.replace("{{" + name + "}}", value)
    content = {
        "cells": list(make._cells(text)),
        "metadata": {
            "accelerator": "GPU",
            "colab": {"gpuType": "T4", "name": FILE, "provenance": [], "toc_visible": True},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    main()
