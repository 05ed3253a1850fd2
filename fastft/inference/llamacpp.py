"""Load a GGUF file in llama.cpp and use it: token ids, exact logits, chat.

A thin layer over the low-level bindings of llama-cpp-python. Its high-level `Llama` class keeps
n_ctx x n_vocab floats when all logits are wanted and hides how a prompt is tokenised; both matter
for certificates.
"""

from __future__ import annotations

import codecs
import ctypes
import functools
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.data.bounded import (
    OUTPUT_CHARACTERS,
    OWN_ERRORS,
    TemplateLimitError,
    huge_constant,
    limited,
)
from fastft.errors import FastFTError
from fastft.hardware import cpu_flags
from fastft.inference.gguf_header import check_header
from fastft.inference.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np

INSTALL_HINT = (
    "install it with: pip install 'llama-cpp-python>=0.3.36,<0.4'   (builds in a few "
    "minutes, needs cmake and a C++ "
    "compiler; for an NVIDIA GPU: CMAKE_ARGS='-DGGML_CUDA=on' pip install ..., for a Mac: "
    "CMAKE_ARGS='-DGGML_METAL=on')"
)
LOGITS_CHUNK_BYTES = 64 * 2**20  # how much of the logits llama.cpp holds at a time
DEFAULT_CHAT_CTX = 8192  # context of a chat where the model could do more: its cache stays small

LOG_KEPT = {3, 4}  # ggml's log levels: 1 debug, 2 info, 3 warning, 4 error
LOG_CONTINUES = 5  # the rest of a line that was begun

_log: deque[str] = deque(maxlen=200)
_last_level = [0]
_sinks: list[list[str]] = []
_callbacks: list[Any] = []  # ctypes callbacks must outlive the library's use of them


def bindings() -> Any:
    """Return the llama-cpp-python module with llama.cpp's log captured; FastFTError where it is
    not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise FastFTError(
            f"GGUF files need llama-cpp-python, which is not installed ({error}); {INSTALL_HINT}"
        ) from None
    if not _callbacks:

        @llama_cpp.llama_log_callback
        def capture(level: int, text: bytes, _: Any) -> None:
            _last_level[0] = level if level != LOG_CONTINUES else _last_level[0]
            for sink in _sinks:
                sink.append(text.decode("utf-8", "replace"))
            if _last_level[0] in LOG_KEPT:
                _log.append(text.decode("utf-8", "replace"))

        _callbacks.append(capture)
        llama_cpp.llama_log_set(capture, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _leave_amx_alone(llama_cpp)
    return llama_cpp


def _leave_amx_alone(api: Any) -> None:
    """Load models without llama.cpp's "extra buffers", its kernels for AMX among them, where the
    processor has AMX.

    GCC 12 (Debian 12) drops most of the tile configuration that they load, since its intrinsic
    does not say that it reads 64 bytes; the first product of a quantised model then ends the
    process with SIGILL. A build does not say what compiled it.
    """
    if "amx_int8" not in cpu_flags():
        return
    low = api.llama_cpp  # where both the low-level functions and the class Llama look
    original = low.llama_model_default_params

    def without_extra_buffers() -> Any:
        params = original()
        params.use_extra_bufts = False
        return params

    low.llama_model_default_params = api.llama_model_default_params = without_extra_buffers


@contextmanager
def everything_logged(lines: list[str]) -> Iterator[None]:
    """Collect all that llama.cpp logs, of every level, in `lines` while inside."""
    bindings()
    _sinks.append(lines)
    try:
        yield
    finally:
        _sinks.pop()


def captured_log() -> str:
    """Return what llama.cpp has warned about or reported as an error lately, and forget it."""
    text = "".join(_log).strip()
    _log.clear()
    return text


def open_gguf(
    path: str | Path,
    *,
    n_ctx: int | None = None,
    gpu_layers: int | str = "auto",
    loras: Sequence[str | Path] = (),
    exact: bool = False,
    threads: int | None = None,
) -> GgufModel:
    """Return the loaded model in the GGUF file `path`.

    `n_ctx`: tokens of context; None: what the model was trained for, at most 8192. `gpu_layers`:
    layers on the GPU; "auto": all where this build of llama.cpp can use a GPU, halved until they
    fit. `loras`: adapter GGUF files; none is active until `use_lora`. `exact`: float32 KV cache
    and no flash attention, for comparing logits. Raises FastFTError with llama.cpp's own words
    where the file cannot be loaded. llama.cpp may end the whole process on a corrupt file: where
    that matters, call this in a subprocess (with GGML_NO_BACKTRACE=1).
    """
    path = Path(path)
    if n_ctx is not None and not 0 <= n_ctx < 2**31:
        raise FastFTError(f"--n-ctx is {n_ctx}; it must be a number of tokens above 0.")
    check_header(path)
    _log.clear()
    for layers in _layer_counts(gpu_layers):
        model = _try_open(path, n_ctx, layers, exact, threads)
        if model is not None:
            for lora in loras:
                model.add_lora(lora)
            return model
    raise FastFTError(f"llama.cpp cannot load {path}: {captured_log() or 'no reason given'}")


def _layer_counts(gpu_layers: int | str) -> list[int]:
    """Return the numbers of GPU layers to try, in order. llama.cpp counts layers; a number above
    them means all.
    """
    if isinstance(gpu_layers, str):
        if gpu_layers != "auto":
            raise FastFTError(
                f"--gpu-layers {gpu_layers!r}: write a number (0: CPU only, -1: all), or auto"
            )
        return [999, 48, 24, 12, 6, 0] if bindings().llama_supports_gpu_offload() else [0]
    return [999 if gpu_layers < 0 else gpu_layers]


def _try_open(
    path: Path, n_ctx: int | None, layers: int, exact: bool, threads: int | None
) -> GgufModel | None:
    api = bindings()
    params = api.llama_model_default_params()
    params.n_gpu_layers = layers
    model = api.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        return None
    trained = api.llama_model_n_ctx_train(model)
    context = api.llama_context_default_params()
    wanted = n_ctx or min(trained or DEFAULT_CHAT_CTX, DEFAULT_CHAT_CTX)
    if n_ctx is not None and layers == 0:
        _refuse_without_room(api, model, wanted, 4 if exact else 2)
    context.n_ctx = wanted
    context.n_batch = context.n_ubatch = _rows_at_a_time(api, model)
    context.n_threads = context.n_threads_batch = threads or _threads()
    context.no_perf = True
    if exact:
        context.type_k = context.type_v = api.GGML_TYPE_F32
        context.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    ctx = api.llama_init_from_model(model, context)
    if not ctx:
        api.llama_model_free(model)
        return None
    return GgufModel(path, api, model, ctx, layers)


def _refuse_without_room(api: Any, model: Any, n_ctx: int, number_bytes: int) -> None:
    """Raise FastFTError where the keys and values of `n_ctx` tokens are more than the free memory:
    llama.cpp would fill it. Not known of models whose layers keep a window only.
    """
    import psutil

    heads, width = api.llama_model_n_head(model), api.llama_model_n_embd(model)
    if api.llama_model_n_swa(model) > 0 or heads <= 0:
        return
    a_token = 2 * api.llama_model_n_layer(model) * api.llama_model_n_head_kv(model)
    needed = n_ctx * a_token * (width // heads) * number_bytes
    free = psutil.virtual_memory().available
    if needed > free:
        trained = api.llama_model_n_ctx_train(model)
        api.llama_model_free(model)
        raise FastFTError(
            f"a context of {n_ctx:,} tokens needs {needed / 2**30:,.1f} GiB for keys and values, "
            f"and {free / 2**30:,.1f} GiB of memory are free. The model was trained for "
            f"{trained:,} tokens; set --n-ctx to what you need."
        )


def _rows_at_a_time(api: Any, model: Any) -> int:
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    return max(16, min(512, LOGITS_CHUNK_BYTES // (4 * max(1, vocab_size))))


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count() or 1


def template_errors() -> tuple[type[Exception], ...]:
    """Return what a chat template may raise: jinja2's errors, and what its own expressions do."""
    import jinja2

    return (jinja2.TemplateError, TemplateLimitError, MemoryError, *OWN_ERRORS)


HALF_A_CHARACTER = (
    "the text holds half a character (a lone surrogate, or a byte that is not UTF-8). Write it "
    "whole, or leave it out."
)
_MARK = chr(0xF0FFF)
"""A character that no vocabulary holds, so it is bytes, and nothing beside it joins with them."""


class _Guards:
    """One private-use character for each control token that a conversation spells out.

    The characters are none that the conversation holds itself.
    """

    def __init__(self, controls: Sequence[str], *values: Any) -> None:
        text = json.dumps(values, ensure_ascii=False, default=str)
        spelled = [
            control for control in controls if json.dumps(control, ensure_ascii=False)[1:-1] in text
        ]
        free = (chr(c) for c in range(0xF1000, 0xFFFFD) if chr(c) not in text)
        self.of = dict(zip(spelled, free, strict=False))
        self._spellings = {char: control for control, char in self.of.items()}
        self._control = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        self.pattern = re.compile(f"[{''.join(self._spellings)}]") if spelled else None

    def put(self, value: Any) -> Any:
        """Return `value`, anything made of texts, with its control tokens replaced."""
        if self._control is None:
            return value
        if isinstance(value, str):
            return self._control.sub(lambda match: self.of[match.group()], value)
        if isinstance(value, dict):
            return {self.put(key): self.put(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.put(item) for item in value]
        return value

    def spelling(self, char: str) -> str:
        """Return the control token that a guard stands for."""
        return self._spellings[char]


class GgufModel:
    """A GGUF file loaded in llama.cpp; made by `open_gguf`, freed by `close` or at the end of a
    with block.
    """

    def __init__(self, path: Path, api: Any, model: Any, ctx: Any, gpu_layers: int) -> None:
        self.path, self.gpu_layers = path, gpu_layers
        self._api, self._model, self._ctx = api, model, ctx
        self._vocab = api.llama_model_get_vocab(model)
        self._memory = api.llama_get_memory(ctx)
        self.n_vocab: int = api.llama_vocab_n_tokens(self._vocab)
        self.n_ctx: int = api.llama_n_ctx(ctx)
        self._rows: int = api.llama_n_batch(ctx)
        self._batch = api.llama_batch_init(self._rows, 0, 1)
        self._loras: dict[str, Any] = {}
        self.active_lora: str | None = None
        self._cached: list[int] = []  # tokens whose keys and values llama.cpp still holds

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what llama.cpp holds. The model cannot be used afterwards."""
        if self._model:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._ctx)
            self._api.llama_model_free(self._model)  # frees its adapters too
            self._model = self._ctx = None

    # What the file says about itself

    def metadata(self, key: str) -> str | None:
        """Return the metadata value of `key` as text, or None; llama.cpp gives no arrays."""
        size = self._api.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self._api.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    @property
    def bos(self) -> int:
        """Id of the token that begins a text, -1 where there is none."""
        return self._api.llama_vocab_bos(self._vocab)

    @property
    def eos(self) -> int:
        """Id of the token that ends a text, -1 where there is none."""
        return self._api.llama_vocab_eos(self._vocab)

    @property
    def adds_bos(self) -> bool:
        """Whether a raw text is tokenised with a BOS in front."""
        return self._api.llama_vocab_get_add_bos(self._vocab)

    def ends(self, token: int) -> bool:
        """Return whether generation stops at this token (llama.cpp's end-of-generation set)."""
        return self._api.llama_vocab_is_eog(self._vocab, token)

    def is_control(self, token: int) -> bool:
        """Return whether a token is one that no text spells, such as "<|im_end|>"."""
        return self._api.llama_vocab_is_control(self._vocab, token)

    # Text and token ids

    def tokens(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the token ids of `text`.

        `add_special`: add BOS / EOS as the file asks for; `parse_special`: read "<|im_end|>" as
        that token.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FastFTError(HALF_A_CHARACTER) from error
        size = len(data) + 8
        while True:
            ids = (self._api.llama_token * size)()
            count = self._api.llama_tokenize(
                self._vocab, data, len(data), ids, size, add_special, parse_special
            )
            if count >= 0:
                return list(ids[:count])
            size = -count

    def piece(self, token: int, *, special: bool = False, strip_space: bool = False) -> bytes:
        """Return the bytes of one token; control tokens are empty unless `special`. May be part of
        a character.
        """
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._api.llama_token_to_piece(
                self._vocab, token, buffer, size, int(strip_space), special
            )
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def is_byte_or_unknown(self, token: int) -> bool:
        """Return whether a token stands for one byte, or for what no piece covers."""
        attributes = self._api.llama_vocab_get_attr(self._vocab, token)
        either = self._api.LLAMA_TOKEN_ATTR_BYTE | self._api.LLAMA_TOKEN_ATTR_UNKNOWN
        return bool(attributes & either)

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of token ids (the space that SentencePiece puts in front of a text is
        not part of it).
        """
        text, strip = b"", self._prefixes_space
        for token in ids:
            piece = self.piece(token, special=special, strip_space=strip)
            text += piece
            strip = strip and not piece  # BOS is empty: the space comes after it
        return text.decode("utf-8", "replace")

    @property
    def _prefixes_space(self) -> bool:
        is_spm = self._api.llama_vocab_type(self._vocab) == self._api.LLAMA_VOCAB_TYPE_SPM
        return is_spm and self.metadata("tokenizer.ggml.add_space_prefix") != "false"

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """Return the conversation as the file's own chat template writes it.

        Raises FastFTError where the file has no template, or the template refuses the messages.
        """
        template = self.metadata("tokenizer.chat_template")
        if template is None:
            raise FastFTError(
                f"{self.path} has no chat template; complete plain text with it instead of "
                "chatting."
            )
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        if huge := huge_constant(template):
            raise FastFTError(
                f"the chat template of {self.path}, {huge}: that would make something huge in one "
                "step, so it is not run."
            )
        try:
            formatter = Jinja2ChatFormatter(
                template=template,
                bos_token=self._spelling(self.bos),
                eos_token=self._spelling(self.eos),
                add_generation_prompt=add_generation_prompt,
            )
            with limited():
                text = formatter(messages=list(messages), tools=tools).prompt  # type: ignore[arg-type]
            if len(text) > OUTPUT_CHARACTERS:
                raise TemplateLimitError(f"it wrote {len(text):,} characters")
            return text
        except template_errors() as error:
            what = str(error).strip()[:300] or type(error).__name__
            raise FastFTError(
                f"the chat template of {self.path} refuses these messages: {what}"
            ) from error

    def _spelling(self, token: int) -> str:
        """Return how a control token is written; empty for -1, which stands for none."""
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def chat_tokens(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        then: str = "",
    ) -> list[int]:
        """Return the ids of the rendered conversation: exactly the template's text, no BOS beyond
        the template's own; and of the answer `then`, where one is given.

        This is how the model was trained: the template, and nothing else, decides about BOS, and a
        control token that somebody spells out in a message is text. Such a spelling goes through
        the template as one private-use character, as in `fastft.data.encode`.
        """
        guards = _Guards(self.controls, messages, tools, then)
        rendered = self.render(
            guards.put(list(messages)),
            add_generation_prompt=add_generation_prompt,
            tools=guards.put(tools),
        ) + guards.put(then)
        found = guards.pattern and guards.pattern.search(rendered)
        if not found:
            return self.tokens(rendered, add_special=False, parse_special=True)
        return self._resolved(rendered, guards)

    @functools.cached_property
    def controls(self) -> list[str]:
        """How the file's control tokens are written, the longest first."""
        texts = {self._spelling(i) for i in filter(self.is_control, range(self.n_vocab))}
        return sorted(texts - {""}, key=len, reverse=True)

    def _resolved(self, rendered: str, guards: _Guards) -> list[int]:
        """Return the ids of a text with guards in it, each replaced by its spelling's own ids.

        Where a token reaches over a guard's edge, the text before it and after it are tokenised on
        their own.
        """
        ids = self.tokens(rendered, add_special=False, parse_special=True)
        pieces = [self.piece(token, special=True) for token in ids]
        data, whole = rendered.encode("utf-8"), b"".join(pieces)
        shift = len(whole) - len(data)  # the space that SentencePiece puts in front
        ends = list(itertools.accumulate(map(len, pieces)))
        out: list[int] = []
        token = 0
        assert guards.pattern is not None
        for match in guards.pattern.finditer(rendered):
            start = len(rendered[: match.start()].encode("utf-8")) + shift
            end = start + len(match.group().encode("utf-8"))
            if (start not in ends and start != 0) or end not in ends:
                return self._in_parts(rendered, guards)
            while token < len(ids) and ends[token] <= start:
                out.append(ids[token])
                token += 1
            out += self._tokens_inside(guards.spelling(match.group()), parse_special=False)
            while token < len(ids) and ends[token] <= end:
                token += 1
        return out + ids[token:]

    def _in_parts(self, rendered: str, guards: _Guards) -> list[int]:
        assert guards.pattern is not None
        first, *parts = re.split(f"({guards.pattern.pattern})", rendered)
        out = self.tokens(first, add_special=False, parse_special=True)
        for part in parts:
            is_guard = guards.pattern.fullmatch(part) is not None
            text = guards.spelling(part) if is_guard else part
            out += self._tokens_inside(text, parse_special=not is_guard)
        return out

    def _tokens_inside(self, text: str, *, parse_special: bool) -> list[int]:
        """Return the ids of `text` as they stand within a longer one: SentencePiece puts a space in
        front of every text, so one is given something else for it to stand before.
        """
        if not self._prefixes_space or not text:
            return self.tokens(text, add_special=False, parse_special=parse_special)
        mark = self.tokens(_MARK, add_special=False, parse_special=False)
        ids = self.tokens(_MARK + text, add_special=False, parse_special=parse_special)
        return ids[len(mark) :]

    # LoRA adapters

    def add_lora(self, path: str | Path) -> str:
        """Load an adapter GGUF onto this base; return the name (file name without .gguf) to
        activate it by.
        """
        path = Path(path)
        if not path.is_file():
            raise FastFTError(f"{path} is not a file; a LoRA adapter in GGUF form is expected.")
        check_header(path)
        adapter = self._api.llama_adapter_lora_init(self._model, str(path).encode())
        if not adapter:
            raise FastFTError(
                f"llama.cpp cannot load the adapter {path} on {self.path}: {captured_log()}"
            )
        self._loras[path.stem] = adapter
        return path.stem

    @property
    def loras(self) -> list[str]:
        """Names of the adapters that were loaded."""
        return list(self._loras)

    def use_lora(self, name: str | None, scale: float = 1.0) -> None:
        """Activate one loaded adapter, or none. What was cached of the conversation is computed
        anew.
        """
        if name is not None and name not in self._loras:
            raise FastFTError(
                f"no adapter {name!r} is loaded. Loaded: {', '.join(self._loras) or 'none'}."
            )
        chosen = [] if name is None else [self._loras[name]]
        adapters = (self._api.llama_adapter_lora_p_ctypes * max(1, len(chosen)))(*chosen)
        scales = (ctypes.c_float * max(1, len(chosen)))(*[scale] * len(chosen))
        if self._api.llama_set_adapters_lora(self._ctx, adapters, len(chosen), scales):
            raise FastFTError(f"llama.cpp cannot apply the adapter {name!r}: {captured_log()}")
        self.active_lora = name
        self._forget()

    # Computing

    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the logits of every position of one sequence, in chunks of float32 (rows,
        n_vocab), in order.

        Only one chunk is held at a time: rows * n_vocab * 4 is at most about 64 MiB.
        """
        if len(ids) > self.n_ctx:
            raise FastFTError(
                f"{len(ids)} tokens do not fit into a context of {self.n_ctx}; open the file "
                "with more."
            )
        self._forget()
        for start in range(0, len(ids), self._rows):
            yield self._decode(ids[start : start + self._rows], start, every=True)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield new token ids until the model ends by itself (that token is not yielded), or the
        limit is reached.

        Temperature 0 is greedy. Raises FastFTError where the prompt leaves no room in the context.
        """
        import numpy as np

        if not prompt or len(prompt) >= self.n_ctx:
            raise FastFTError(
                f"a prompt of {len(prompt)} tokens does not fit into a context of "
                f"{self.n_ctx} tokens."
            )
        rng = np.random.default_rng(seed)
        row = self._prefill(list(prompt))
        for _ in range(min(max_new_tokens, self.n_ctx - len(prompt))):
            token = sample(row, temperature=temperature, top_p=top_p, rng=rng)
            if self.ends(token):
                return
            yield token
            if len(self._cached) < self.n_ctx:
                row = self._decode([token], len(self._cached))[-1]

    def _prefill(self, prompt: list[int]) -> np.ndarray:
        """Return the logits after `prompt`; what an earlier turn shares with it is not computed
        again.
        """
        shared = 0
        for old, new in zip(self._cached, prompt[:-1], strict=False):
            if old != new:
                break
            shared += 1
        # Caches of sliding-window models cannot always be cut back; then begin anew.
        if shared == 0 or not self._api.llama_memory_seq_rm(self._memory, 0, shared, -1):
            self._forget()
            shared = 0
        self._cached = self._cached[:shared]
        row = None
        for start in range(shared, len(prompt), self._rows):
            row = self._decode(prompt[start : start + self._rows], start)[-1]
        assert row is not None
        return row

    def _decode(self, ids: Sequence[int], position: int, every: bool = False) -> np.ndarray:
        """Run `ids` at `position` of sequence 0; return a copy of the logits of all or the last,
        (rows, n_vocab).
        """
        import numpy as np

        batch, count = self._batch, len(ids)
        batch.n_tokens = count
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == count - 1
        code = self._api.llama_decode(self._ctx, batch)
        if code:
            raise FastFTError(
                f"llama.cpp could not compute {count} tokens at {position} (code {code}): "
                f"{captured_log()}"
            )
        self._cached.extend(ids)
        rows = count if every else 1
        pointer = self._api.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.n_vocab)).copy()

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._memory, True)
        self._cached = []


def sample(row: np.ndarray, *, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """Return one token id drawn from the logits `row` (n_vocab,): greedy at temperature 0, else
    nucleus sampling.

    Top-p keeps the smallest set of tokens whose probability reaches `top_p` (arXiv 1904.09751,
    section 3.1).
    """
    import numpy as np

    if temperature <= 0:
        return int(row.argmax())
    probabilities = np.exp((row.astype(np.float64) - row.max()) / temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    return int(rng.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


class GgufChat:
    """Chat with a GGUF file, optionally with LoRA adapters on it; the first one is active at the
    start.
    """

    def __init__(
        self,
        path: str | Path,
        loras: Sequence[str | Path] = (),
        gpu_layers: int | str = "auto",
        n_ctx: int | None = None,
    ) -> None:
        self.model = open_gguf(path, n_ctx=n_ctx, gpu_layers=gpu_layers, loras=loras)
        self.last_tokens: list[int] = []
        """Ids of the last answer, without the token that ended it."""
        self.last_prompt_tokens: list[int] = []
        """Ids of the last prompt, as the model saw them."""
        if self.model.loras:
            self.model.use_lora(self.model.loras[0])

    def use_lora(self, name: str | None) -> None:
        """Switch to another of the adapters by its file name without .gguf, or to the bare base
        with None.
        """
        self.model.use_lora(name)

    def stream(
        self,
        messages: Sequence[dict[str, Any]],
        sampling: Sampling,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[str]:
        """Yield the answer to `messages` piece by piece; ends when the model does. Ids are in
        `last_tokens`.
        """
        self.last_prompt_tokens = self.model.chat_tokens(messages, tools=tools)
        how = (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed)
        return self._stream(self.last_prompt_tokens, *how)

    def _stream(
        self, prompt: list[int], limit: int, temperature: float, top_p: float, seed: int
    ) -> Iterator[str]:
        self.last_tokens = []
        # a character may be spread over tokens
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        ids = self.model.generate(
            prompt, max_new_tokens=limit, temperature=temperature, top_p=top_p, seed=seed
        )
        for token in ids:
            self.last_tokens.append(token)
            first = len(self.last_tokens) == 1
            strip = first and self.model._prefixes_space
            if piece := decoder.decode(self.model.piece(token, strip_space=strip)):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def close(self) -> None:
        """Free the model."""
        self.model.close()
