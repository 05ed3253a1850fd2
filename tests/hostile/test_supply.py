"""What is fetched and then run is what it should be."""

import hashlib

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
