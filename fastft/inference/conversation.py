"""`fastft chat` at a terminal: one question, a conversation, base and adapter side by side."""

from __future__ import annotations

import sys
from typing import Any

from fastft.errors import FastFTError
from fastft.inference.generate import ChatModel, Messages, ask, messages_of, open_chat
from fastft.inference.sampling import Sampling


def single(
    target: str,
    prompt: str,
    *,
    system: str | None,
    sampling: Sampling,
    compare: bool,
    show: bool,
    **open_keywords: Any,
) -> dict[str, Any]:
    """Answer one prompt; returns {text, tokens, tokens_per_sec} (and base_text with `compare`)."""
    messages = messages_of(prompt, system)
    model = open_chat(target, **open_keywords)
    result: dict[str, Any] = {}
    if compare:
        base = _open_base(target, open_keywords)
        result["base_text"] = _show("base", base, messages, sampling, show).text
    said = _show("adapter" if compare else "", model, messages, sampling, show)
    return result | {
        "text": said.text,
        "tokens": said.tokens,
        "tokens_per_sec": said.tokens_per_sec,
    }


def converse(
    target: str, *, system: str | None, sampling: Sampling, compare: bool, **open_keywords: Any
) -> None:
    """Talk until an empty line or end of input; the conversation so far is part of each prompt."""
    model = open_chat(target, **open_keywords)
    base = _open_base(target, open_keywords) if compare else None
    history: Messages = [{"role": "system", "content": system}] if system else []
    print("An empty line ends the conversation.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()  # the shell's prompt begins a line of its own
            return
        if not prompt:
            return
        history.append({"role": "user", "content": prompt})
        if base is not None:
            _show("base", base, history, sampling, show=True)
        said = _show("adapter" if compare else "", model, history, sampling, show=True)
        history.append({"role": "assistant", "content": said.text})


def _open_base(target: str, keywords: dict[str, Any]) -> ChatModel:
    if str(target).endswith(".gguf"):
        raise FastFTError(
            "--compare needs a run or an adapter folder; a GGUF file holds one model."
        )
    return open_chat(target, **(keywords | {"with_adapter": False}))


def _show(label: str, model: ChatModel, messages: Messages, sampling: Sampling, show: bool) -> Any:
    if not show:
        return ask(model, messages, sampling)
    if label:
        print(f"[{label}] ", end="")
    said = ask(model, messages, sampling, lambda piece: print(piece, end="", flush=True))
    print()
    print(f"({len(said.tokens)} tokens, {said.tokens_per_sec:.1f} tokens/s)", file=sys.stderr)
    return said
