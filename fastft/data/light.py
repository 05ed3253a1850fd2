"""A tokenizer for the data workers: the real one's Rust part and special tokens, without importing
torch.

transformers' tokenizer classes import torch, 0.2 GB and two seconds a process; a worker needs
neither. Rendering goes through transformers' own function, so a text is the same wherever it is
rendered.
"""

from __future__ import annotations

from typing import Any


class LightTokenizer:
    """What the data layer asks of a fast tokenizer, taken from one. Picklable."""

    is_fast = True

    def __init__(self, tokenizer: Any) -> None:
        self.backend_tokenizer = tokenizer.backend_tokenizer
        self.bos_token, self.bos_token_id = tokenizer.bos_token, tokenizer.bos_token_id
        self.eos_token, self.eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id
        self.unk_token, self.unk_token_id = tokenizer.unk_token, tokenizer.unk_token_id
        self.all_special_tokens = list(tokenizer.all_special_tokens)
        self.added_tokens_decoder = dict(tokenizer.added_tokens_decoder)
        self.special_tokens_map = dict(tokenizer.special_tokens_map)
        self._first = list(tokenizer("a")["input_ids"][:1])

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Return the ids of "a", by which it is told whether the tokenizer adds BOS."""
        assert text == "a"
        return {"input_ids": self._first}

    def apply_chat_template(
        self,
        conversation: list[Any],
        tools: list[Any] | None = None,
        *,
        chat_template: str,
        tokenize: bool,
        **values: Any,
    ) -> str:
        """Return the rendered text, as the real tokenizer's method of this name does."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        values = {**self.special_tokens_map, **values}  # as there: what is asked for wins
        texts = render_jinja_template(
            conversations=[conversation], tools=tools, chat_template=chat_template, **values
        )[0]
        return str(texts[0])


def light(tokenizer: Any) -> Any:
    """Return the light form of `tokenizer`; itself where its class renders chats in a way of its
    own (Mistral's).
    """
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    if own is not PreTrainedTokenizerBase.apply_chat_template or not getattr(
        tokenizer, "is_fast", False
    ):
        return tokenizer
    return LightTokenizer(tokenizer)
