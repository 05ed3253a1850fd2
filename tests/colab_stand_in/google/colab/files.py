"""Upload and download through the browser."""

import os
from pathlib import Path

__all__ = ["download", "upload"]


def upload(target_dir=""):
    if "COLAB_UPLOAD" not in os.environ:  # the user closed the file dialog
        return {}
    source = Path(os.environ["COLAB_UPLOAD"])
    content = source.read_bytes()
    saved = Path(target_dir) / source.name
    number = 0
    while saved.exists():
        number += 1
        saved = Path(target_dir) / f"{source.stem} ({number}){source.suffix}"
    saved.write_bytes(content)
    print(f"Saving {source.name} to {saved}")
    return {source.name: content}


def download(filename):
    if not os.path.exists(filename):
        raise FileNotFoundError(f"Cannot find file: {filename}")
    with open(os.environ["COLAB_DOWNLOADS"], "a", encoding="utf-8") as log:
        log.write(f"{filename}\n")
