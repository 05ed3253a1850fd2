"""The llama-cpp-python source archive, for tests: real chat templates, real vocabularies, the upstream converter.

Nothing of it is kept in the repository. It is fetched once from PyPI into a cache folder outside of it
(``FASTFT_TEST_CACHE``, default ``~/.cache/fastft-tests``) and never built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

VERSION = "0.3.36"


def cache_folder() -> Path:
    """Return the folder outside the repository in which tests keep what they fetched."""
    return Path(os.environ.get("FASTFT_TEST_CACHE", "~/.cache/fastft-tests")).expanduser()


@cache
def llama_cpp_sdist() -> Path:
    """Return the folder of the extracted source archive; ``vendor/llama.cpp`` lies in it.

    Fetched and extracted beside its final place and renamed, so that a killed test leaves no half-written folder.
    """
    name = f"llama_cpp_python-{VERSION}"
    home = cache_folder() / name
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as work:
            archive = _download(Path(work))
            with tarfile.open(archive) as tar:
                tar.extractall(work, filter="data")
            try:
                (Path(work) / name).rename(home)
            except OSError:
                if not home.is_dir():  # else another test process was faster
                    raise
    return home


def chat_templates() -> Path:
    """Return the folder of about 70 real chat templates (``*.jinja``)."""
    return llama_cpp_sdist() / "vendor" / "llama.cpp" / "models" / "templates"


def vocabulary(name: str) -> Path:
    """Return the vocab-only GGUF of a real model: llama-bpe, qwen2, phi-3, llama-spm, deepseek-llm, ..."""
    return llama_cpp_sdist() / "vendor" / "llama.cpp" / "models" / f"ggml-vocab-{name}.gguf"


def _download(folder: Path) -> Path:
    # pip asks the archive for its metadata, which needs the build tools but builds nothing.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
    ]
    done = subprocess.run(
        [*command, "-d", str(folder), f"llama-cpp-python=={VERSION}"],
        capture_output=True,
        text=True,
        check=False,
    )
    archives = list(folder.glob("llama_cpp_python-*.tar.gz"))
    if done.returncode or not archives:
        raise RuntimeError(
            f"could not fetch the llama-cpp-python {VERSION} source archive:\n{done.stderr[-2000:]}"
        )
    return archives[0]


if __name__ == "__main__":
    shutil.rmtree(cache_folder() / f"llama_cpp_python-{VERSION}", ignore_errors=True)
    print(llama_cpp_sdist())
