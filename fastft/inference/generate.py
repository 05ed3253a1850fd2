"""`fastft chat`: answers from a run, an adapter, a model folder (all through plain transformers +
peft) or a GGUF file.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastft.engines import loading
from fastft.engines.base import Engine
from fastft.errors import FastFTError, one_of
from fastft.hardware import compute_dtype, probe
from fastft.inference.llamacpp import HALF_A_CHARACTER, GgufChat
from fastft.inference.sampling import Sampling
from fastft.models import (
    bitsandbytes_config,
    check_checkpoint,
    check_finite,
    explained,
    tokenizer_of,
)
from fastft.runs.target import Target, resolve

Messages = list[dict[str, Any]]
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    text: str
    tokens: list[int]
    """Ids of the generated tokens, the end token included."""
    tokens_per_sec: float
    seconds: float = field(default=0.0, compare=False)


class ChatModel(Protocol):
    """A loaded model one can talk to."""

    def stream(self, messages: Messages, sampling: Sampling) -> Iterator[str]:
        """Yield the answer in pieces; afterwards `last_tokens` holds its ids."""
        ...

    @property
    def last_tokens(self) -> list[int]:
        """Ids of the last answer."""
        ...


class HuggingFaceChat:
    """A base model, with an adapter or without, on plain transformers + peft.

    A base that was quantised in training is quantised here, too: the adapter was trained to go
    with its rounding, and what fitted the GPU then fits it again.
    """

    def __init__(self, target: Target, *, dtype: str = "auto", with_adapter: bool = True) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from fastft.data.template import choose_template

        if dtype not in DTYPES:
            raise one_of("dtype", dtype, DTYPES)
        hardware = probe()
        self.dtype = compute_dtype(hardware, dtype)
        device = {"cuda": "cuda", "mps": "mps"}.get(hardware.kind, "cpu")
        adapter = target.adapter if with_adapter else None
        check_checkpoint(target.base, revision=target.revision)
        own = target.adapter and (target.adapter / "tokenizer_config.json").is_file()
        source = str(target.adapter) if own else target.base
        compute = getattr(torch, self.dtype.value)
        quantized = bitsandbytes_config(target.quantization, compute)
        with explained(target.base):
            revision = target.revision if source == target.base else None
            self.tokenizer = tokenizer_of(source, revision=revision)
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                target.base,
                revision=target.revision,
                dtype=compute,
                device_map=device,
                use_safetensors=True,
                **({} if quantized is None else {"quantization_config": quantized}),
            )
        loading.forbid_packed_nf4(self.model)
        if adapter is not None:
            from peft import PeftModel

            rows: Any = self.model.get_input_embeddings().num_embeddings
            if len(self.tokenizer) > rows:
                self.model.resize_token_embeddings(len(self.tokenizer))
            check_finite(adapter / "adapter_model.safetensors")
            with explained(str(adapter)):
                self.model = PeftModel.from_pretrained(self.model, str(adapter))
        self.model.eval()
        self.template = choose_template(self.tokenizer, None)
        self.last_tokens: list[int] = []

    def prompt_of(self, messages: Messages, tools: Any = None) -> list[int]:
        """Return the ids that ask for an answer; raises FastFTError where they are more than the
        model has positions, which would take minutes and give nonsense.
        """
        from fastft.data.encode import generation_prompt

        try:
            json.dumps(messages, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError as error:
            raise FastFTError(HALF_A_CHARACTER) from error
        prompt = generation_prompt(self.tokenizer, self.template, messages, tools)
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(prompt) >= most:
            raise FastFTError(
                f"the conversation has {len(prompt):,} tokens, the model's positions end at "
                f"{most:,}. Shorten it."
            )
        return prompt

    def stream(self, messages: Messages, sampling: Sampling) -> Iterator[str]:
        """Yield the answer to `messages` in pieces of text."""
        prompt = self.prompt_of(messages)
        pieces = _Pieces(self.tokenizer)
        result: dict[str, Any] = {}

        def run() -> None:
            try:
                ends = self.template.end_token_ids
                result["ids"] = _generate(
                    self.model, self.tokenizer, prompt, ends, sampling, pieces
                )
            except BaseException as error:  # handed to the reader's thread, which raises it
                result["error"] = error
            finally:
                pieces.end()

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        yield from pieces
        worker.join()
        if "error" in result:
            raise result["error"]
        self.last_tokens = result["ids"]

    def answer_all(
        self,
        conversations: list[Messages],
        *,
        max_new_tokens: int,
        batch_size: int = 64,
        tools: Sequence[Any] | None = None,
    ) -> list[str]:
        """Return the greedy answer to each of `conversations`, computed in padded batches.

        `tools`: what each conversation may call, None for those without.
        """
        import torch

        prompts = [
            self.prompt_of(messages, tools[i] if tools else None)
            for i, messages in enumerate(conversations)
        ]
        pad = self.tokenizer.pad_token_id
        pad = self.template.end_token_ids[0] if pad is None else pad
        answers: list[str] = []
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            longest = max(map(len, batch))
            # Padded on the left, so that every answer starts right after its prompt.
            ids = torch.tensor(
                [[pad] * (longest - len(p)) + list(p) for p in batch], device=self.model.device
            )
            mask = torch.tensor(
                [[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=self.model.device
            )
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=list(self.template.end_token_ids),
                    pad_token_id=pad,
                )
            answers += self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in answers]


def open_chat(
    target: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    with_adapter: bool = True,
    loras: list[str] | None = None,
    gpu_layers: int | str = "auto",
    n_ctx: int | None = None,
) -> ChatModel:
    """Return a loaded chat for a run, an adapter or model folder, or a .gguf file.

    Raises FastFTError where `target` is none of these.
    """
    path = Path(target).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FastFTError(f"{path} does not exist.")
        return GgufChat(path, loras=loras or [], gpu_layers=gpu_layers, n_ctx=n_ctx)
    if loras:
        raise FastFTError(
            "--lora switches adapters on a GGUF file; for a folder, give the adapter's "
            "folder itself."
        )
    return HuggingFaceChat(resolve(target, base=base), dtype=dtype, with_adapter=with_adapter)


def chat(
    target: str | Path,
    prompt: str,
    *,
    system: str | None = None,
    sampling: Sampling | None = None,
    on_piece: Callable[[str], None] = lambda piece: None,
    **open_keywords: Any,
) -> Answer:
    """Return the answer of `target` to one prompt. `on_piece` sees the text as it comes."""
    model = open_chat(target, **open_keywords)
    return ask(model, messages_of(prompt, system), sampling or Sampling(), on_piece)


def ask(
    chat_model: ChatModel,
    messages: Messages,
    sampling: Sampling,
    on_piece: Callable[[str], None] = lambda p: None,
) -> Answer:
    """Return the answer of a loaded chat to `messages`."""
    started, pieces = time.perf_counter(), []
    for piece in chat_model.stream(messages, sampling):
        pieces.append(piece)
        on_piece(piece)
    seconds = time.perf_counter() - started
    tokens = chat_model.last_tokens
    return Answer("".join(pieces).strip(), tokens, len(tokens) / max(seconds, 1e-9), seconds)


def messages_of(prompt: str, system: str | None = None) -> Messages:
    """Return the messages of one question."""
    if not prompt.strip():
        raise FastFTError("the prompt is empty; say something with --prompt.")
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": prompt}]


def answer(
    trained: Any,
    engine: Engine,
    tokenizer: Any,
    template: Any,
    messages: Messages,
    *,
    max_new_tokens: int,
    tools: Any = None,
) -> str:
    """Return the greedy answer of a model in training, and leave it in training mode."""
    from fastft.data.encode import generation_prompt

    prompt = generation_prompt(tokenizer, template, messages, tools=tools)
    if engine.name == "mlx":
        said = trained.greedy(prompt, template.end_token_ids, max_new_tokens)
        return tokenizer.decode(said, skip_special_tokens=True).strip()
    checkpointing = getattr(trained.get_base_model(), "is_gradient_checkpointing", False)
    engine.for_inference(trained)
    try:
        ids = _generate(
            trained, tokenizer, prompt, template.end_token_ids, Sampling(max_new_tokens)
        )
    finally:
        engine.for_training(trained, checkpointing or None)
        trained.config.use_cache = False
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _generate(
    causal: Any,
    tokenizer: Any,
    prompt: list[int],
    end_token_ids: Any,
    sampling: Sampling,
    streamer: Any = None,
) -> list[int]:
    """Return the ids that follow `prompt`, up to and including an end token."""
    import torch

    ids = torch.tensor([list(prompt)], device=causal.device)
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        how["top_k"] = 0
    ends = sorted({*end_token_ids, tokenizer.eos_token_id} - {None})
    with torch.inference_mode():
        out = causal.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
            streamer=streamer,
            **how,
        )
    return out[0, ids.shape[1] :].tolist()


class _Pieces:
    """transformers' streamer interface: text as it comes, holding back half a character (Japanese
    spans tokens).
    """

    def __init__(self, tokenizer: Any) -> None:
        import queue

        self.tokenizer, self.sent, self.prompt_seen = tokenizer, "", False
        self.ids: list[int] = []
        self.queue: Any = queue.SimpleQueue()

    def put(self, value: Any) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self.queue.put(text[len(self.sent) :])
            self.sent = text

    def end(self) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.queue.put(text[len(self.sent) :])
        self.sent = text
        self.queue.put(None)

    def __iter__(self) -> Iterator[str]:
        while (piece := self.queue.get()) is not None:
            if piece:
                yield piece
