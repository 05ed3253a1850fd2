"""What the trained model says: the measure that exported files are compared with.

Runs as a process of its own (``python -m fastft.verification.reference JOB.json``) with plain
transformers and peft, so that neither Unsloth's patches nor an out-of-memory death reach the
caller. Everything a check needs is written to a folder: ids, rendered conversations, greedy
answers (reference.json), logits (logits.npy, float32, one row for each counted position) and
sampled rows of every weight (weights.npz).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastft.data.bounded import render
from fastft.errors import FastFTError
from fastft.exporting.experts import PARTS, single
from fastft.families import Family, family_of, text_name
from fastft.models import tokenizer_of

HARD_TEXTS = [
    "Hello, world! It's 12:30, isn't it? 3.14159 1000000 007",
    "吾輩は猫である。名前はまだ無い。カタカナ、ひらがな、漢字、ｶﾞ！？「」",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 and 🇯🇵",
    "a  b   c    d     e\tf\t\tg        h",
    "line one\r\nline two\n\n\nline five\r\n\r\n  indented\n",
    "caf\u00e9 \u304c\u3071 (composed)",
    "cafe\u0301 \u304b\u3099\u306f\u309a (decomposed)",
    " leading space",
    "  two leading spaces and a trailing one ",
    "trailing newline\n",
    "def f(x):\n    return x**2  # \u00b5 \u00df \u0130 \ufb01\n",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \uc548\ub155\ud558\uc138\uc694 "
    "\u043f\u0440\u0438\u0432\u0435\u0442",
    "zero\u200bwidth\u00a0space\u3000ideographic",
    "https://example.org/a_b?c=d&e=%20#f <tag attr='x'/> {\"k\": [1, 2]}",
]
"""Texts on which tokenizers are known to differ; the model's own special tokens are added to them.
"""

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of Japan?"}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "日本の首都は？\n  二行目"},
    ],
    [
        {"role": "user", "content": " Hi"},
        {"role": "assistant", "content": "Hello! 👋🏽"},
        {"role": "user", "content": "Count to three.\r\n"},
    ],
]
MAX_LOGITS_BYTES = 2**30
MAX_POSITIONS = 4096
ROW_ELEMENTS = 2**18  # of each weight at most so many numbers are compared, in whole rows


def main() -> None:
    """Read the job file named on the command line and write the reference into its folder."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    write_reference(**job)


def write_reference(
    folder: str,
    base: str,
    adapter: str | None,
    samples: list[Any],
    max_new_tokens: int = 64,
    seed: int = 0,
) -> None:
    """Write reference.json, logits.npy and weights.npz for `base` with `adapter` into `folder`.

    `samples`: each a text, a list of messages, a list of token ids, or {"input_ids": ...,
    "labels": ...} where only positions whose label is not -100 are counted.
    """
    import torch

    torch.manual_seed(seed)
    out = Path(folder)
    tokenizer = load_tokenizer(base, adapter)
    model, compute = load_trained(base, adapter)
    encoded = [encode_sample(sample, tokenizer) for sample in samples]
    if not encoded:
        encoded = [encode_sample(text, tokenizer) for text in HARD_TEXTS]
    encoded = within_budget(encoded, model.config.get_text_config().vocab_size)
    facts = tokenizer_facts(tokenizer, model, encoded, samples)
    facts["greedy"] = [
        greedy(model, prompt, facts["stop_ids"], max_new_tokens)
        for prompt in chat_prompts(facts, samples, tokenizer)
    ]
    facts |= {"compute": compute, "sequences": encoded, "built_in_samples": not samples}
    write_logits(model, encoded, out / "logits.npy")
    merged = model.merge_and_unload() if adapter else model
    facts["tensors"] = write_weights(merged, out / "weights.npz")
    facts["config"] = json.loads(merged.config.get_text_config().to_json_string(use_diff=False))
    (out / "reference.json").write_text(json.dumps(facts), encoding="utf-8")


def load_tokenizer(base: str, adapter: str | None) -> Any:
    """Return the tokenizer of the run: the adapter folder's own where it has one, else the
    base's.
    """
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    return tokenizer_of(adapter if adapter and own else base)


def load_trained(base: str, adapter: str | None) -> tuple[Any, str]:
    """Return (model, how it computes): `base` with `adapter` in float32 where that fits into
    memory, else 16 bit.

    Attention is "eager": sdpa drops gemma2's softcap.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    kind, device = place_for(parameters, *_free_memory())
    dtype = getattr(torch, kind)
    # Straight onto the card: a Colab T4 has more VRAM than RAM.
    where = {"device_map": {"": device}} if device == "cuda" else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, attn_implementation="eager", **where
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), f"{kind} on {device}"


ROOM = 1.15
"""Weights, and what a pass over one sample takes beside them."""


def place_for(parameters: int, vram_free_bytes: int, ram_free_bytes: int) -> tuple[str, str]:
    """Return (dtype, device) for a model of so many parameters: in float32 where that fits, on the
    GPU where it fits there.
    """
    rooms = {"cuda": vram_free_bytes, "cpu": ram_free_bytes}
    for kind, size in (("float32", 4), ("bfloat16", 2)):
        for device, free in rooms.items():
            if size * parameters * ROOM < free:
                return kind, device
    return "bfloat16", "cpu"  # which can page


def _free_memory() -> tuple[int, int]:
    """Return the free bytes of VRAM (0 without a GPU) and of RAM."""
    import psutil
    import torch

    vram = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return vram, psutil.virtual_memory().available


def encode_sample(sample: Any, tokenizer: Any) -> dict[str, list[int]]:
    """Return {"ids", "counted"}: token ids, and the positions whose prediction of the next token
    is counted.
    """
    if isinstance(sample, str):
        ids = tokenizer(sample)["input_ids"]
    elif isinstance(sample, dict) and "input_ids" in sample:
        ids = list(sample["input_ids"])
        labels = list(sample.get("labels") or ids)
        return {"ids": ids, "counted": [i for i in range(len(ids) - 1) if labels[i + 1] != -100]}
    elif messages := as_messages(sample):
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    else:
        ids = [int(token) for token in sample]
    return {"ids": ids, "counted": list(range(len(ids) - 1))}


def as_messages(sample: Any) -> list[dict[str, Any]] | None:
    """Return the messages of a sample that is a conversation, else None."""
    if isinstance(sample, dict):
        sample = sample.get("messages")
    is_chat = (
        isinstance(sample, list)
        and bool(sample)
        and isinstance(sample[0], dict)
        and "role" in sample[0]
    )
    return sample if is_chat else None


def within_budget(
    encoded: list[dict[str, list[int]]], vocab_size: int
) -> list[dict[str, list[int]]]:
    """Return as many samples as the logits' budget allows (4096 positions, 1 GiB); the last one
    may be cut.
    """
    room = min(MAX_POSITIONS, MAX_LOGITS_BYTES // (4 * vocab_size))
    kept = []
    for sample in encoded:
        counted = sample["counted"][:room]
        if not counted:
            continue
        kept.append({"ids": sample["ids"][: counted[-1] + 2], "counted": counted})
        room -= len(counted)
    return kept


def tokenizer_facts(
    tokenizer: Any, model: Any, encoded: list[dict[str, list[int]]], samples: list[Any]
) -> Any:
    """Return the ids, rendered conversations, and stop tokens that a file must agree with."""
    rows = model.get_input_embeddings().weight.shape[0]
    specials = [
        str(t)
        for t, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        if i < rows
    ]
    texts = [("hard", text) for text in HARD_TEXTS]
    texts += [("special tokens", f"{token}Hello{token} {token}\nx") for token in specials[:6]]
    texts += [("data", tokenizer.decode(s["ids"], skip_special_tokens=False)) for s in encoded[:64]]
    chats = []
    for messages in CHATS + [m for m in map(as_messages, samples[:64]) if m]:
        for add_generation_prompt in (False, True):
            chats.append(render_chat(tokenizer, messages, add_generation_prompt))
    return {
        "texts": [
            {
                "origin": origin,
                "text": text,
                "with_special": tokenizer(text, add_special_tokens=True)["input_ids"],
                "without": tokenizer(text, add_special_tokens=False)["input_ids"],
            }
            for origin, text in texts
        ],
        "chats": chats if tokenizer.chat_template else [],
        "spelled": spelled_chats(tokenizer, specials[:6]) if tokenizer.chat_template else [],
        "bos_id": tokenizer.bos_token_id,
        "stop_ids": stop_ids(tokenizer, model),
        "stop_names": [tokenizer.convert_ids_to_tokens(i) for i in stop_ids(tokenizer, model)],
        "vocab_size": len(tokenizer),
    }


def render_chat(
    tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> dict[str, Any]:
    """Return the conversation as the template writes it: {"messages", "add_generation_prompt",
    "text", "ids"}.

    Text and ids are None where the template refuses it (gemma has no system role).
    """
    import jinja2

    chat = {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "text": None,
        "ids": None,
    }
    if not tokenizer.chat_template:
        return chat
    try:
        chat["text"] = render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError:
        return chat
    chat["ids"] = tokenizer(chat["text"], add_special_tokens=False)["input_ids"]
    return chat


def spelled_chats(tokenizer: Any, controls: list[str]) -> list[dict[str, Any]]:
    """Return conversations whose user writes a control token, with the ids of training and of
    `fastft chat RUN`, where it is text: [{"token", "messages", "ids"}]; none where the template
    cannot be read.
    """
    from fastft.data.encode import Coder
    from fastft.data.template import choose_template

    try:
        coder = Coder.of(tokenizer, choose_template(tokenizer, None))
    except FastFTError:
        return []
    chats = []
    for token in controls:
        messages = [{"role": "user", "content": f"What is {token} here?"}]
        text = render_chat(tokenizer, coder.guard(messages), True)["text"]
        if text is not None:
            chats.append({"token": token, "messages": messages, "ids": coder.encode(text)})
    return chats


def stop_ids(tokenizer: Any, model: Any) -> list[int]:
    """Return the ids that end generation: of the generation config, the tokenizer's EOS, and the
    template's turn end.

    The turn end is the special token that the template writes after an answer: what the model was
    trained to say.
    """
    configured = getattr(model, "generation_config", None)
    ids = getattr(configured, "eos_token_id", None)
    found = set(ids if isinstance(ids, list) else [ids]) | {
        tokenizer.eos_token_id,
        turn_end(tokenizer),
    }
    return sorted(i for i in found if i is not None)


def turn_end(tokenizer: Any) -> int | None:
    """Return the id of the special token right after an answer in the chat template, or None."""
    answer = "Answer"
    messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": answer}]
    text = render_chat(tokenizer, messages, False)["text"]
    if text is None or answer not in text:
        return None
    after = tokenizer(text[text.rindex(answer) + len(answer) :].lstrip(), add_special_tokens=False)[
        "input_ids"
    ]
    specials = set(tokenizer.all_special_ids) | {
        i for i, t in tokenizer.added_tokens_decoder.items() if t.special
    }
    return after[0] if after and after[0] in specials else None


def chat_prompts(facts: dict[str, Any], samples: list[Any], tokenizer: Any) -> list[list[int]]:
    """Return up to eight prompts for greedy answers: of the samples' conversations, else of the
    built-in ones.
    """
    prompts: list[Any] = []
    for messages in filter(None, map(as_messages, samples)):
        last = max(
            (i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages)
        )
        prompts.append(render_chat(tokenizer, messages[:last], True)["ids"] if last else None)
    for sample in samples:
        if isinstance(sample, dict) and sample.get("labels"):
            labels = list(sample["labels"])
            first = next((i for i, label in enumerate(labels) if label != -100), 0)
            prompts.append(list(sample["input_ids"])[:first])
    prompts = [p for p in prompts if p] or [
        c["ids"] for c in facts["chats"] if c["add_generation_prompt"] and c["ids"]
    ]
    return prompts[:8]


def greedy(model: Any, prompt: list[int], stops: list[int], max_new_tokens: int) -> dict[str, Any]:
    """Return {"prompt", "ids", "ended"}: the greedy answer without its end token."""
    import torch

    given = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        made = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
        )
    ids = made[0, len(prompt) :].tolist()
    ended = bool(ids) and ids[-1] in stops
    return {"prompt": prompt, "ids": ids[:-1] if ended else ids, "ended": ended}


def write_logits(model: Any, encoded: list[dict[str, list[int]]], path: Path) -> None:
    """Write the float32 logits of all counted positions, (positions, vocabulary), sample after
    sample.
    """
    import torch

    total = sum(len(sample["counted"]) for sample in encoded)
    file, row = None, 0
    for sample in encoded:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sample["ids"]], device=model.device)).logits[0]
        chosen = logits[sample["counted"]].float().cpu().numpy()
        if file is None:
            file = np.lib.format.open_memmap(path, "w+", np.float32, (total, chosen.shape[-1]))
        file[row : row + len(chosen)] = chosen
        row += len(chosen)
    if file is not None:
        file.flush()


def write_weights(model: Any, path: Path) -> dict[str, list[int]]:
    """Write evenly spread rows of every trained weight as float32 and return {name: shape} of all
    of them.

    Of a multimodal model they are those of its language model, named as its own class names them.
    Of each tensor at most about 2**18 numbers are kept. For q and k projections the rows are kept
    in both orders that a GGUF file may have them in (see `rotary_rows`).
    """
    config, kept, shapes = model.config.get_text_config(), {}, {}
    wrapped = config is not model.config
    seen: dict[int, str] = {}
    for full_name, weight in model.state_dict().items():
        name = text_name(full_name) if wrapped else full_name
        if name is None:
            continue
        if weight.data_ptr() in seen and weight.ndim == 2:
            continue  # tied to one that was written
        seen[weight.data_ptr()] = name
        for own, matrix in one_matrix_a_tensor(name, weight, family_of(config.model_type)):
            shapes[own] = list(matrix.shape)
            rows = sampled_rows(matrix.shape)
            heads = head_count(own, config.num_attention_heads, config.num_key_value_heads)
            if heads and matrix.shape[0] % (2 * heads) == 0:
                order = rotary_rows(matrix.shape[0], heads)
                rows = np.unique(np.concatenate([rows, order[rows]]))
            kept[f"{own}#rows"] = rows
            flat = matrix.reshape(-1, matrix.shape[-1]) if matrix.ndim > 2 else matrix
            kept[own] = flat[rows].float().cpu().numpy()
    np.savez(path, **kept)  # type: ignore[arg-type]
    return shapes


def one_matrix_a_tensor(name: str, weight: Any, family: Family) -> list[tuple[str, Any]]:
    """Return (name, tensor) of a trained weight; of a parameter that holds experts, one pair for
    each of gate, up and down, (experts, outputs, inputs), named as a linear layer would be.
    """
    home, _, leaf = name.rpartition(".")
    parameter = leaf.removesuffix("_bias")
    if family.experts == "none" or not home.endswith(".experts"):
        return [(name, weight)]
    suffix = "bias" if leaf.endswith("_bias") else "weight"
    return [
        (f"{home}.{part}.{suffix}", single(weight, part, family.experts))
        for part, held in PARTS.items()
        if held == parameter
    ]


def sampled_rows(shape: Any) -> Any:
    """Return the indices of the rows of a tensor of `shape` that are compared, sorted; the rows of
    experts count one after the other.
    """
    width = shape[-1] if len(shape) > 1 else 1
    total = int(np.prod(shape)) // width
    count = max(1, min(total, ROW_ELEMENTS // width))
    return np.unique(np.linspace(0, total - 1, count).round().astype(np.int64))


def head_count(name: str, query_heads: int, key_heads: int) -> int:
    """Return the number of heads of a q or k projection, 0 for every other tensor."""
    part = name.split(".")[-2] if "." in name else ""
    return {"q_proj": query_heads, "k_proj": key_heads}.get(part, 0)


def rotary_rows(rows: int, heads: int) -> Any:
    """Return, for each row of a GGUF q/k tensor of the llama family, the row of the checkpoint
    that lies there.

    llama.cpp rotates neighbouring pairs where transformers rotates the two halves of a head, so
    the rows of each head are interleaved: row 2i comes from i, row 2i+1 from i + half.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


if __name__ == "__main__":
    main()
