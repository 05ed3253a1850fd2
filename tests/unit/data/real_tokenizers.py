"""Tokenizers for the tests: tiny ones trained here, and real vocabularies rebuilt from vocab-only GGUF files."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.sdist import cache_folder, chat_templates, vocabulary

CONTROL = 3  # ggml's token type of control tokens; 4: user defined
THINK = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
_GPT4_LIKE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT = [
    "hello world the quick brown fox assistant user system",
    "東京は日本の首都です。質問に答えてください。",
] * 3


def template(name: str) -> str:
    """Return a real chat template's source."""
    return (chat_templates() / f"{name}.jinja").read_text(encoding="utf-8")


def special_tokens_in(source: str) -> list[str]:
    """Return what looks like a special token in a template's source."""
    found = re.findall(
        r"<\|[^\s<>'\"|]{1,40}\|>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,}\]|<\|?/?turn\|?>"
        r"|<｜[^\s<>｜'\"]{1,40}｜>|<SPECIAL_\d+>|<seed:[a-z]+>|</?ctx[^<>\s]*>|\]~!b\[|\]~b\]|\[e~\["
        r"|<\|[a-z_]{1,20}>|<[a-z_]{1,20}\|>",
        source,
    )
    return sorted(set(found))


@cache
def tiny(*special: str, bos: str | None = "<s>", eos: str = "</s>", adds_bos: bool = False) -> Any:
    """Return a byte-level BPE of 600 tokens and the `special` ones."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_TEXT, trainer)
    made.add_tokens([AddedToken(token, normalized=False) for token in THINK])
    names = dict.fromkeys([*([bos] if bos else []), eos, *special])
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in names])
    if adds_bos and bos:
        made.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos)


def tiny_for(source: str, **keywords: Any) -> Any:
    """Return a tiny tokenizer whose vocabulary and template fit a template's source."""
    tokenizer = tiny(*special_tokens_in(source), **keywords)
    tokenizer.chat_template = source
    return tokenizer


def _kept(name: str, make: Callable[[], Any]) -> Any:
    """Return the tokenizer `name` from the cache outside the repository; reading a large GGUF takes long."""
    from transformers import PreTrainedTokenizerFast

    folder = cache_folder() / "tokenizers" / name
    if not (folder / "tokenizer_config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            make().save_pretrained(Path(work) / name)
            with contextlib.suppress(OSError):  # another test process was faster
                (Path(work) / name).rename(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def real(
    name: str,
    *,
    extra: tuple[str, ...] = (),
    bos: str | None = None,
    eos: str = "",
    nfc: bool = False,
) -> Any:
    """Return the tokenizer of a real byte-level BPE model (llama-bpe, qwen2), rebuilt from its vocabulary."""
    from gguf import GGUFReader
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(vocabulary(name)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    # Padding entries of the GGUF stand for ids that the model does not use.
    known = {token: i for i, token in enumerate(tokens) if not token.startswith("[PAD")}
    made = Tokenizer(models.BPE(known, merges, ignore_merges=name == "llama-bpe"))
    digits = "3" if name == "llama-bpe" else "1"
    split = pre_tokenizers.Split(Regex(_GPT4_LIKE.replace("1,DIGITS", f"1,{digits}")), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    if nfc:
        made.normalizer = normalizers.NFC()
    control = [
        token
        for token, kind in zip(tokens, types, strict=True)
        if kind == CONTROL and token in known
    ]
    made.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control]
    )
    made.add_tokens([AddedToken(token, normalized=False) for token in extra])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos)


@cache
def llama3() -> Any:
    """Return Llama 3's real tokenizer."""
    return _kept("llama-bpe", lambda: real("llama-bpe", bos="<|begin_of_text|>", eos="<|eot_id|>"))


@cache
def qwen() -> Any:
    """Return Qwen's real tokenizer, with the tokens that Qwen 3 added as text tokens."""
    return _kept("qwen2", lambda: real("qwen2", extra=THINK, eos="<|im_end|>", nfc=True))


@cache
def phi3() -> Any:
    """Return Phi-3's real SentencePiece-like tokenizer (the one of Llama 2, with Phi's tokens)."""
    return _kept("phi-3", _phi3)


def _phi3() -> Any:
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(vocabulary("phi-3")).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocabulary_ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, rank in vocabulary_ids.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        fitting = [(a, b) for a, b in pairs if a in vocabulary_ids and b in vocabulary_ids]
        merges += [(rank, vocabulary_ids[a], vocabulary_ids[b], a, b) for a, b in fitting]
    merges.sort()
    bpe = models.BPE(
        vocabulary_ids,
        [m[3:] for m in merges],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    made.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(t for t in tokens[32000:] if t.startswith("<|"))]
    # Phi-3's own setting: white space after these tokens belongs to them.
    made.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, rstrip=t.startswith("<|")) for t in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>"
    )
