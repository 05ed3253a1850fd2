"""Run llama.cpp's own converter in a child process: FOLDER SCRIPT ARGUMENTS.

FOLDER holds the converter and the gguf-py that it came with, which must win over the installed one.
FASTFT_NO_MTP says that the checkpoint has no heads that predict several tokens, which the converter
would look for where the config speaks of them. FASTFT_TOKENIZER is a JSON file of the tokenizer's
keys as fastft found them by behaviour:

- Of a byte-level BPE the converter gets the splitting rule where it does not know it by its hash,
  and whether BOS is added where it says nothing (llama.cpp then goes by the rule's default).
- A SentencePiece BPE or Unigram is written in fastft's words. The converter reads its scores from
  tokenizer.model, which transformers no longer saves; without it it fails or writes wrong ones, and
  a Unigram it takes for a BPE.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

Words = dict[str, tuple[Any, str]]
"""GGUF keys with value and type name, such as ([0.0, -1.0], "FLOAT32S")."""


def main() -> None:
    """Run the converter as a script, with `sys.argv` as it expects it."""
    folder, script, *arguments = sys.argv[1:]
    sys.path[:0] = [folder, f"{folder}/gguf-py"]
    from conversion.base import ModelBase

    ModelBase.no_mtp = bool(os.environ.get("FASTFT_NO_MTP"))
    words = json.loads(Path(os.environ["FASTFT_TOKENIZER"]).read_text(encoding="utf-8"))
    if words and words["tokenizer.ggml.model"][0] == "gpt2":
        _complete(words)
    elif words:
        _replace(words)
    sys.argv = [script, *arguments]
    runpy.run_path(f"{folder}/{script}", run_name="__main__")


def _complete(words: Words) -> None:
    """Let the converter write the tokenizer, and tell it what it does not know."""
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def by_behaviour(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return str(words["tokenizer.ggml.pre"][0])

    TextModel.get_vocab_base_pre = by_behaviour

    said = words.get("tokenizer.ggml.add_bos_token")

    def add_bos(writer: Any, keys: dict[str, Any]) -> None:
        if said and "tokenizer.ggml.add_bos_token" not in keys:
            writer.add_add_bos_token(said[0])

    _before_the_header(add_bos)


def _replace(words: Words) -> None:
    """Write the tokenizer in `words`, whatever the converter made of it."""
    from conversion.base import TextModel

    lists = [words[f"tokenizer.ggml.{name}"][0] for name in ("tokens", "scores", "token_type")]
    pieces = [token.encode("utf-8") for token in lists[0]]
    TextModel._create_vocab_sentencepiece = lambda self: (pieces, *lists[1:])

    def write(writer: Any, keys: dict[str, Any]) -> None:
        for key in [key for key in keys if key.startswith("tokenizer.")]:
            del keys[key]
        add = {"STRING": writer.add_string, "BOOL": writer.add_bool, "UINT32": writer.add_uint32}
        for key, (value, kind) in words.items():
            if kind == "UINT8S":
                writer.add_array(key, bytes(value))
            else:
                add.get(kind, writer.add_array)(key, value)

    _before_the_header(write)


def _before_the_header(change: Any) -> None:
    """Have `change(writer, its keys)` called before a file's keys are written."""
    import gguf

    header = gguf.GGUFWriter.write_header_to_file

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        change(self, self.kv_data[0])
        header(self, *args, **kwargs)

    gguf.GGUFWriter.write_header_to_file = changed  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
