"""What is fetched and then run is what it should be."""

import hashlib
import re
from pathlib import Path

import pytest

from fastft.errors import FastFTError
from fastft.exporting.gguf.upstream import check_archive


def test_an_archive_with_another_hash_is_not_run(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTFT_CONVERTER_SHA256", raising=False)
    archive = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    archive.write_bytes(b"evil")
    with pytest.raises(FastFTError, match="Nothing of it was run"):
        check_archive(archive, "0.3.36")
    with pytest.raises(FastFTError, match="set FASTFT_CONVERTER_SHA256="):
        check_archive(archive, "9.9.9")
    monkeypatch.setenv("FASTFT_CONVERTER_SHA256", hashlib.sha256(b"evil").hexdigest())
    check_archive(archive, "9.9.9")


@pytest.mark.parametrize("name", ["torch", "base", "unsloth", "gguf", "dev"])
def test_the_lock_files_hold_the_pins_and_a_hash_for_each(name):
    """`make setup HASHES=1` must install what every other machine has."""
    requirements = Path(__file__).parents[2] / "requirements"

    def pins(path):
        lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
        return [line for line in lines if line]

    text = "\n".join(pins(requirements / f"lock-{name}.txt"))
    entries = re.split(r"\n(?=\S+==)", text.replace("\\\n", " "))
    assert [entry.split("--hash")[0].strip() for entry in entries] == pins(
        requirements / f"{name}.txt"
    )
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)
