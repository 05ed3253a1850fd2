"""What may be asked of the server: a request's body, read within bounds and checked to the last
field.

A field that would change the answer and is not supported is refused with its name, never ignored:
a client that asks for a grammar must not get an answer without one. Grammars stay off because
llama.cpp ends the process on some of them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastft.data.template import parse_arguments

MAX_BODY_BYTES = 4 * 2**20
BODY_SECONDS = 30.0  # a client that takes longer to send its request is given up


class RefusedError(Exception):
    """A request that is not answered: the HTTP status, and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def content(self) -> dict[str, Any]:
        """Return it in the form of OpenAI's errors."""
        kinds = {401: "authentication_error", 403: "permission_error"}
        kind = kinds.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        message = {"message": str(self)[:1000], "type": kind, "param": None, "code": None}
        return {"error": message}

    def response(self) -> Any:
        """Return the answer; the connection ends with it."""
        from starlette.responses import JSONResponse

        headers = {"connection": "close"} | ({"retry-after": "5"} if self.status == 503 else {})
        return JSONResponse(self.content(), status_code=self.status, headers=headers)


# Fields of OpenAI's and llama.cpp's APIs that are accepted only as what does nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repeat_penalty": (None, 1),
    "logit_bias": (None, {}),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "top_k": (None, 0),
    "min_p": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "grammar": (None, ""),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
}
# Fields that say something about the client, not about the answer.
IGNORED = frozenset(
    {"user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier"}
    | {"prompt_cache_key"}
)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class _Body(BaseModel):
    """The fields that are understood; everything else is neutral, ignored or an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    messages: list[_Message] | None = Field(None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    prompt: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


@dataclass(frozen=True)
class Completion:
    """What is to be answered; `messages` for a conversation, `prompt` for plain text."""

    model: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    prompt: str | None
    limit: int | None
    temperature: float
    top_p: float
    seed: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


async def read_request(request: Any, *, chat: bool) -> Completion:
    """Return the checked request; RefusedError with a status of 400, 408 or 413 where it is
    none.
    """
    return parse(await _body(request), chat=chat)


async def _body(request: Any) -> bytes:
    """Return at most MAX_BODY_BYTES, sent within BODY_SECONDS."""
    import anyio
    from starlette.requests import ClientDisconnect

    too_large = RefusedError(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes")
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > MAX_BODY_BYTES:
        raise too_large
    found = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for chunk in request.stream():
                found += chunk
                if len(found) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise RefusedError(408, f"the request took longer than {BODY_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise RefusedError(400, "the client has gone") from None
    return bytes(found)


def parse(body: bytes, *, chat: bool) -> Completion:
    """Return the request in `body`; raises RefusedError naming every field that is wrong."""
    values = _json_object(body)
    for name, value in list(values.items()):
        if name in IGNORED:
            del values[name]
        elif name in NEUTRAL:
            # with the type: in Python, 0 equals False
            if not any(value == same and type(value) is type(same) for same in _alike(name)):
                raise RefusedError(400, f"{name} is not supported here; leave it out")
            del values[name]
    try:
        asked = _Body.model_validate(values)
    except ValidationError as error:
        raise RefusedError(400, "; ".join(map(_explain, error.errors()[:5]))) from error
    wanted, other = (asked.messages, asked.prompt) if chat else (asked.prompt, asked.messages)
    if wanted is None or other is not None:
        raise RefusedError(400, f"give {'messages' if chat else 'a prompt'}, and only that")
    return Completion(
        model=asked.model,
        messages=None if asked.messages is None else [_plain(m) for m in asked.messages],
        tools=asked.tools or None,
        prompt=_one_prompt(asked.prompt),
        limit=asked.max_completion_tokens or asked.max_tokens or (None if chat else 16),
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=secrets.randbits(63) if asked.seed is None else asked.seed % 2**64,
        stops=_stops(asked.stop),
        stream=bool(asked.stream),
        include_usage=asked.stream_options is not None and asked.stream_options.include_usage,
    )


def _json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`: UTF-8, no NaN, no half characters, not nested too deep."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        values = json.loads(body.decode("utf-8"), parse_constant=no_constant)
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise RefusedError(400, f"the body is not JSON: {why}") from error
    if not isinstance(values, dict):
        raise RefusedError(400, "the body is not a JSON object")
    return values


def _alike(name: str) -> list[Any]:
    """Return the neutral values of a field, whole numbers also as floats."""
    values = NEUTRAL[name]
    return [*values, *(float(value) for value in values if type(value) is int)]


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where} is no field that this server knows"
    return f"{where}: {item['msg']}"


def _plain(message: _Message) -> dict[str, Any]:
    """Return a message with its text parts joined; RefusedError for images and the like."""
    values = message.model_dump(exclude_unset=True)
    values["role"] = "system" if values["role"] == "developer" else values["role"]
    content = values.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise RefusedError(400, "messages.content: only parts of type text are understood")
        values["content"] = "".join(texts)
    calls = values.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):  # clients send text, templates were trained on objects
            function["arguments"] = parse_arguments(function.get("arguments"))
    return values


def _one_prompt(prompt: str | list[str] | None) -> str | None:
    if isinstance(prompt, list):
        if len(prompt) != 1:
            raise RefusedError(400, f"prompt: {len(prompt)} texts were given, one is answered")
        return prompt[0]
    return prompt


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    found = [stop] if isinstance(stop, str) else stop or []
    if len(found) > 16 or any(not 0 < len(text) <= 1000 for text in found):
        raise RefusedError(400, "stop: at most 16 texts of 1 to 1000 characters")
    return tuple(found)


def until_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a stop text was reached) of `pieces`, up to the first of `stops`.

    What may still become a stop text is held back.
    """
    held = ""
    longest = max(map(len, stops), default=1) - 1
    for piece in pieces:
        held += piece
        at = min((i for i in (held.find(stop) for stop in stops) if i >= 0), default=None)
        if at is not None:
            yield held[:at], True
            return
        sure = len(held) - longest
        if sure > 0:
            yield held[:sure], False
            held = held[sure:]
    if held:
        yield held, False
