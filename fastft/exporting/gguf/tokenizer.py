"""The tokenizer in GGUF's words: tokens, types, merges or scores, special ids, chat template.

The source of truth is the tokenizer as transformers loads it. llama.cpp knows each splitting rule
only by name (`tokenizer.ggml.pre`); the name is found by behaviour: the vocabulary is loaded in a
subprocess under each candidate name and must give the same token ids as transformers on a set of
texts.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.data.bounded import render
from fastft.exporting.gguf.architectures import Unsupported
from fastft.exporting.gguf.isolated import run_isolated
from fastft.files import read_json
from fastft.files.scratch import scratch
from fastft.models import explained, tokenizer_of, tokens_without_row

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
# One name for each splitting rule of llama.cpp, common ones first.
PRE_NAMES = [
    "llama-bpe", "qwen2", "gpt-4o", "gpt-2", "smaug-bpe", "tekken",
    "default", "deepseek-llm", "deepseek-coder", "deepseek-v3", "qwen35", "smollm",
    "stablelm2", "olmo", "dbrx", "chatglm-bpe", "falcon", "mpt",
    "starcoder", "refact", "command-r", "poro-chat", "viking", "codeshell",
    "bloom", "gpt3-finnish", "exaone", "exaone-moe", "chameleon", "minerva-7b",
    "superbpe", "trillion", "granite-docling", "bailingmoe", "seed-coder", "hunyuan",
    "hunyuan-dense", "kimi-k2", "grok-2", "afmoe", "minimax-m2", "tiny_aya",
    "youtu", "solar-open", "mellum2", "jais", "jais-2",
]  # fmt: skip
PROBES = (
    "Hello world! It's   three  spaces, I'LL say; we've 12345 and 1234567890.25%",
    "def main(a, b):\n    return a+b  # comment\n\n\n\tif x==3:\r\n\r\n  pass ",
    "吾輩は猫である。名前はまだ無い。ABCカタカナ、漢字とひらがな123。",
    "東京都は 日本の首都\n\nです。　全角空白。",
    "😀 👩‍👩‍👧‍👦 🇯🇵 ❤️‍🔥 emoji‍x",
    " leading and trailing \n",
    "Ünïcödé naïve façade — “quotes” … ½ ² ٣ १२३ Привет, мир! שלום مرحبا สวัสดี កាន់",
    "don't DON'T can't we're 'll \"x\" 'Tis o'clock HTTPServer camelCase XMLHttpRequest snake_case",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n",
    "a/b\\c <tag attr='1'/> {json: [1,2,3]} == != <= >= -> => ::: /// ,,, ....!!!!????",
    "3 33 333 3333 33333 333333 3333333 x1y22z333",
    "e\u200bx\u00a0y\u3000z\ufeffw é é",
)


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of `folder`."""
    with explained(str(folder)):
        return tokenizer_of(folder, trust_remote_code=False)


def tokenizer_metadata(
    folder: Path, vocab_size: int, arch: str, base: Path | None = None
) -> dict[str, tuple[Any, str]]:
    """Return GGUF's tokenizer keys with (value, type name).

    `base`: the base model's folder, for what a trained tokenizer's folder lacks (tokenizer.model,
    which transformers does not save, and generation_config.json). `vocab_size` is the number of
    embedding rows; rows without a token become unused ones, and added tokens without a row that
    the model can do without are left out. Raises Unsupported where the tokenizer is neither a
    byte-level BPE nor a SentencePiece BPE or Unigram, or where llama.cpp has no splitting rule that
    gives the same ids; FastFTError where there are more tokens than embedding rows.
    """
    tokenizer = read_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Unsupported(f"a {type(tokenizer).__name__} without a tokenizers backend")
    spec = json.loads(backend.to_str())
    if tokens_without_row(tokenizer, vocab_size):
        added = spec.get("added_tokens", [])
        spec["added_tokens"] = [token for token in added if token["id"] < vocab_size]
    model = spec["model"]
    if model.get("type") not in {"BPE", "Unigram"}:
        raise Unsupported(f"a {model.get('type')} tokenizer")
    if model["type"] == "Unigram":
        found = _unigram(spec, vocab_size)
    elif "ByteLevel" in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")]):
        found = _byte_level(tokenizer, spec, vocab_size)
    elif model.get("byte_fallback"):
        found = _sentencepiece(_file("tokenizer.model", folder, base), spec, vocab_size, arch)
    else:
        raise Unsupported("a BPE tokenizer that is neither byte-level nor has byte fall-back")
    found |= _specials(tokenizer, _file("generation_config.json", folder, base))
    found |= _templates(tokenizer)
    if model["type"] == "Unigram":
        _refuse_other_pieces(tokenizer, spec, found)
    if arch == "gemma4" and found["tokenizer.ggml.model"][0] == "llama":
        by_merges = found | _gemma4(spec, vocab_size)
        found = by_merges if _merges_alike(tokenizer, by_merges) else found
    if found["tokenizer.ggml.model"][0] == "gpt2":
        found["tokenizer.ggml.pre"] = (find_pre(tokenizer, found), "STRING")
    return found


def _byte_level(
    tokenizer: Any, spec: dict[str, Any], vocab_size: int
) -> dict[str, tuple[Any, str]]:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, index in spec["model"]["vocab"].items():
        tokens[index], types[index] = text, NORMAL
    for added in spec.get("added_tokens", []):
        text = added["content"]
        if not added["normalized"]:  # llama.cpp takes these as they come out of the tokenizer
            text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        control = added["special"] or _looks_special(text)
        tokens[added["id"]] = text if control else text.replace("▁", " ")
        types[added["id"]] = CONTROL if control else USER_DEFINED
    return {
        "tokenizer.ggml.model": ("gpt2", "STRING"),
        "tokenizer.ggml.pre": ("default", "STRING"),
        "tokenizer.ggml.tokens": (tokens, "STRINGS"),
        "tokenizer.ggml.token_type": (types, "INT32S"),
        "tokenizer.ggml.merges": ([_merge(pair) for pair in spec["model"]["merges"]], "STRINGS"),
    }


def _merge(pair: list[str] | str) -> str:
    """Write a merge on one line; a space inside a part is written as byte-level BPE writes it."""
    return (
        pair
        if isinstance(pair, str)
        else " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)
    )


def _looks_special(text: str) -> bool:
    # Some tokenizers do not mark their control tokens; llama.cpp's converter goes by these shapes
    # as well.
    shapes = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"} or any(
        text.startswith(begin) and text.endswith(end) for begin, end in shapes
    )


def _sentencepiece(
    model_file: Path | None, spec: dict[str, Any], vocab_size: int, arch: str
) -> dict[str, tuple[Any, str]]:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    scores = [-10000.0] * vocab_size
    types = [UNUSED] * vocab_size
    vocabulary = spec["model"]["vocab"]
    model = _model_file(model_file, vocabulary)
    known = _merge_scores(spec) if model is None else {}
    for text, index in vocabulary.items():
        tokens[index], types[index] = text, NORMAL
        if model is None:
            scores[index] = known[text]
        elif index < len(model):
            scores[index] = model.get_score(index)
            types[index] = (
                CONTROL if model.is_control(index) else UNUSED if model.is_unused(index) else NORMAL
            )
        if _is_byte(text):
            types[index] = BYTE
        elif text == spec["model"].get("unk_token"):
            types[index] = UNKNOWN
    for added in spec.get("added_tokens", []):
        text, index = added["content"], added["id"]
        control = added["special"] or (arch != "phi3" and _looks_special(text))
        tokens[index] = text if control else text.replace("▁", " ")
        types[index] = CONTROL if control else USER_DEFINED
        scores[index] = -1000.0
    found: dict[str, tuple[Any, str]] = {
        "tokenizer.ggml.model": ("llama", "STRING"),
        "tokenizer.ggml.pre": ("default", "STRING"),
        "tokenizer.ggml.tokens": (tokens, "STRINGS"),
        "tokenizer.ggml.scores": (scores, "FLOAT32S"),
        "tokenizer.ggml.token_type": (types, "INT32S"),
    }
    if not _adds_a_space(spec):
        found["tokenizer.ggml.add_space_prefix"] = (False, "BOOL")
    return found


def _unigram(spec: dict[str, Any], vocab_size: int) -> dict[str, tuple[Any, str]]:
    """A SentencePiece Unigram (LLM-jp, Sarashina, rinna), for llama.cpp's Viterbi search: "t5"."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    scores = [-10000.0] * vocab_size
    types = [UNUSED] * vocab_size
    for index, (text, score) in enumerate(spec["model"]["vocab"]):
        tokens[index], scores[index], types[index] = text, score, NORMAL
        if _is_byte(text):
            types[index] = BYTE
        elif index == spec["model"].get("unk_id"):
            types[index] = UNKNOWN
    for added in spec.get("added_tokens", []):
        text, index = added["content"], added["id"]
        control = added["special"] or _looks_special(text)
        tokens[index] = text if control else text.replace("▁", " ")
        if types[index] != UNKNOWN:
            types[index] = CONTROL if control else USER_DEFINED
    found: dict[str, tuple[Any, str]] = {
        "tokenizer.ggml.model": ("t5", "STRING"),
        "tokenizer.ggml.pre": ("default", "STRING"),
        "tokenizer.ggml.tokens": (tokens, "STRINGS"),
        "tokenizer.ggml.scores": (scores, "FLOAT32S"),
        "tokenizer.ggml.token_type": (types, "INT32S"),
        "tokenizer.ggml.add_space_prefix": (_adds_a_space(spec), "BOOL"),
    }
    normalizers = spec.get("normalizer") or {}
    steps = normalizers.get("normalizers", [normalizers])
    maps = [step for step in steps if step.get("type") == "Precompiled"]
    if maps and maps[0].get("precompiled_charsmap"):
        charsmap = base64.b64decode(maps[0]["precompiled_charsmap"])
        found["tokenizer.ggml.precompiled_charsmap"] = (list(charsmap), "UINT8S")
    if any(step.get("type") == "Replace" and "Regex" in step.get("pattern", {}) for step in steps):
        found["tokenizer.ggml.remove_extra_whitespaces"] = (True, "BOOL")
    return found


# What Gemma 4 writes for its thoughts and calls; llama.cpp's reader of answers wants to see it.
GEMMA4_VISIBLE = frozenset(
    {
        *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
        *("<|tool_response>", "<tool_response|>", '<|"|>'),
    }
)


def _gemma4(spec: dict[str, Any], vocab_size: int) -> dict[str, tuple[Any, str]]:
    """A BPE with byte fall-back that llama.cpp merges by the list of merges (Gemma 4)."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, index in spec["model"]["vocab"].items():
        tokens[index], types[index] = text, BYTE if _is_byte(text) else NORMAL
    for added in spec.get("added_tokens", []):
        text, index = added["content"], added["id"]
        control = (added["special"] or _looks_special(text)) and text not in GEMMA4_VISIBLE
        tokens[index], types[index] = text, CONTROL if control else USER_DEFINED
    return {
        "tokenizer.ggml.model": ("gemma4", "STRING"),
        "tokenizer.ggml.pre": ("gemma4", "STRING"),
        "tokenizer.ggml.tokens": (tokens, "STRINGS"),
        "tokenizer.ggml.scores": ([-1000.0] * vocab_size, "FLOAT32S"),
        "tokenizer.ggml.token_type": (types, "INT32S"),
        "tokenizer.ggml.merges": ([_merge(pair) for pair in spec["model"]["merges"]], "STRINGS"),
        "tokenizer.ggml.add_space_prefix": (_adds_a_space(spec), "BOOL"),
    }


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _refuse_other_pieces(
    tokenizer: Any, spec: dict[str, Any], found: dict[str, tuple[Any, str]]
) -> None:
    """Raise Unsupported where llama.cpp cuts a text of known pieces otherwise than the tokenizer.

    What no piece covers comes out as bytes in the tokenizer, and as one unknown token in llama.cpp:
    such texts say nothing here, and the certificate speaks of them.
    """
    pieces = spec["model"]["vocab"]
    beyond = {i for i, (text, _) in enumerate(pieces) if _is_byte(text)}
    beyond.add(spec["model"].get("unk_id"))
    texts = [line for text in PROBES for line in text.splitlines() if line.strip()]
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    known = [(t, ids) for t, ids in zip(texts, encoded, strict=True) if not beyond & set(ids)]
    if not known:
        return
    with scratch("fastft-gguf-") as work:
        path = work / "vocabulary.gguf"
        write_vocabulary(path, found)
        right = probe(
            path, ["default"], [ids for _, ids in known], texts=[text for text, _ in known]
        ).get("default", 0)
    if right < len(known):
        raise Unsupported(
            f"llama.cpp's Unigram gives this tokenizer's ids for {right} of {len(known)} texts"
        )


def _merges_alike(tokenizer: Any, found: dict[str, tuple[Any, str]]) -> bool:
    """Whether llama.cpp's Gemma 4, which merges nothing across the end of a line, gives the
    tokenizer's ids on all PROBES.
    """
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in PROBES]
    with scratch("fastft-gguf-") as work:
        path = work / "vocabulary.gguf"
        write_vocabulary(path, found)
        return probe(path, ["gemma4"], expected).get("gemma4", 0) == len(PROBES)


def _adds_a_space(spec: dict[str, Any]) -> bool:
    text = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")], ensure_ascii=False)
    return (
        '"Prepend"' in text
        or '"prepend_scheme": "first"' in text
        or '"prepend_scheme": "always"' in text
    )


def _file(name: str, *folders: Path | None) -> Path | None:
    return next((folder / name for folder in folders if folder and (folder / name).is_file()), None)


def _model_file(path: Path | None, vocabulary: dict[str, int]) -> Any:
    """Return tokenizer.model where it is the same vocabulary, which it may not be after a change;
    else None.
    """
    if path is None:
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        # not a SentencePiece file: some models keep another format under that name
        return None
    same = all(i >= len(model) or model.id_to_piece(i) == text for text, i in vocabulary.items())
    return model if same else None


def _merge_scores(spec: dict[str, Any]) -> dict[str, float]:
    """Return scores under which SentencePiece merges in the order of the merge list: the earlier,
    the higher.

    Runs of spaces are not merged by tokenizers that were converted without their merges; tokens
    that no merge makes must never be made.
    """
    scores: dict[str, float] = {}
    for rank, pair in enumerate(spec["model"]["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        scores.setdefault(left + right, -float(rank))
    return {
        text: scores.get(text, -1e9 if len(text) > 1 and set(text) == {"▁"} else 0.0)
        for text in spec["model"]["vocab"]
    }


def _specials(tokenizer: Any, generation: Path | None) -> dict[str, tuple[Any, str]]:
    """Return the ids of BOS, EOS, padding and unknown, the end of a turn, and whether BOS and EOS
    are added.
    """
    found: dict[str, tuple[Any, str]] = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = getattr(tokenizer, f"{name}_token_id")
        if isinstance(index, int):
            found[f"tokenizer.ggml.{key}_token_id"] = (index, "UINT32")
    ends = turn_ends(tokenizer, generation)
    for key, index in zip(
        ("eot", "eom"), (e for e in ends if e != tokenizer.eos_token_id), strict=False
    ):
        found[f"tokenizer.ggml.{key}_token_id"] = (index, "UINT32")
    ids = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    adds_bos = bool(ids) and ids[0] == tokenizer.bos_token_id and ids[: len(bare)] != bare
    adds_eos = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and ids[-len(bare) :] != bare
    found["tokenizer.ggml.add_bos_token"] = (adds_bos, "BOOL")
    found["tokenizer.ggml.add_eos_token"] = (adds_eos, "BOOL")
    return found


def turn_ends(tokenizer: Any, generation: Path | None = None) -> list[int]:
    """Return the token ids that end an answer: what the chat template puts after it, then
    generation_config.json's.
    """
    ends: list[int] = []
    after = _after_an_answer(tokenizer)
    if after is not None:
        ends.append(after)
    if generation:
        said = read_json(generation).get("eos_token_id")
        ends += said if isinstance(said, list) else [said] if isinstance(said, int) else []
    return list(dict.fromkeys(ends))


def _after_an_answer(tokenizer: Any) -> int | None:
    """Return the special token that the chat template writes right after an assistant's message."""
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "the-answer"}]
    try:
        text = render(tokenizer, messages)
    except (TemplateError, TypeError, ValueError):  # a template that wants more than messages
        return None
    _, found, rest = text.rpartition("the-answer")
    ids = tokenizer(rest, add_special_tokens=False).input_ids if found and rest else []
    added = tokenizer.added_tokens_decoder
    return next((i for i in ids[:2] if i in added), None)


def _templates(tokenizer: Any) -> dict[str, tuple[Any, str]]:
    template = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": (template, "STRING")}
    named = {f"tokenizer.chat_template.{name}": (text, "STRING") for name, text in template.items()}
    default = named.pop("tokenizer.chat_template.default", None)
    names = [name.rpartition(".")[2] for name in named]
    found: dict[str, tuple[Any, str]] = named | (
        {"tokenizer.chat_templates": (names, "STRINGS")} if names else {}
    )
    return found | ({"tokenizer.chat_template": default} if default else {})


def find_pre(tokenizer: Any, metadata: dict[str, tuple[Any, str]]) -> str:
    """Return the name of llama.cpp's splitting rule that gives the tokenizer's ids on all PROBES.

    Raises Unsupported with the nearest candidate where none does.
    """
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in PROBES]
    with scratch("fastft-gguf-") as work:
        path = work / "vocabulary.gguf"
        write_vocabulary(path, metadata)
        right = probe(path, _likely_first(tokenizer), expected)
    best = max(right, key=lambda name: right[name], default=None)
    if best is None or right[best] < len(PROBES):
        nearest = (
            f"; the nearest, {best}, gives {right[best]} of {len(PROBES)} texts" if best else ""
        )
        raise Unsupported(f"no splitting rule of llama.cpp gives this tokenizer's ids{nearest}")
    return best


def _likely_first(tokenizer: Any) -> list[str]:
    """Return PRE_NAMES with the one first that the splitting pattern looks like.

    Behaviour decides; but where a small vocabulary cannot tell two rules apart, the likelier one
    is to be named.
    """
    pattern = tokenizer.backend_tokenizer.to_str()
    hints = (
        ("\\\\p{Lu}\\\\p{Lt}", "gpt-4o"),
        ("\\\\p{N}{1,3}", "llama-bpe"),
        ("|\\\\p{N}|", "qwen2"),
    )
    first = [name for part, name in hints if part in pattern][:1]
    return first + [name for name in PRE_NAMES if name not in first]


def write_vocabulary(path: Path, metadata: dict[str, tuple[Any, str]]) -> None:
    """Write a GGUF file that has a vocabulary and no tensors."""
    from fastft.exporting.gguf.writer import header_bytes

    fields: dict[str, tuple[Any, str]] = {
        "llama.block_count": (1, "UINT32"),
        "llama.context_length": (512, "UINT32"),
    }
    fields |= {"llama.embedding_length": (64, "UINT32")}
    fields |= {"llama.attention.head_count": (4, "UINT32")}
    fields |= {
        "llama.feed_forward_length": (64, "UINT32"),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, "FLOAT32"),
    }
    path.write_bytes(header_bytes("llama", fields | metadata, [])[0])


def probe(
    path: Path, names: list[str], expected: list[list[int]], texts: Sequence[str] = PROBES
) -> dict[str, int]:
    """Return how many of `texts` each name gets right, stopping at the first that gets all.

    llama.cpp may end the process on a rule that does not go with a vocabulary; we go on after the
    name that did.
    """
    right: dict[str, int] = {}
    left = list(names)
    while left:
        answers, died = run_isolated(
            do="probe", path=str(path), names=left, texts=texts, expected=expected
        )
        right |= dict(answers)
        if not died:
            break
        left = left[len(answers) + 1 :]
    return right
