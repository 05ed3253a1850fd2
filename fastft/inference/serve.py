"""`fastft serve`: a GGUF file behind the part of OpenAI's API that clients use.

GET /v1/models      POST /v1/chat/completions      POST /v1/completions

Conversations are rendered as `fastft chat FILE.gguf` renders them, so a client gets what the
certificate was measured on. Whatever arrives is taken for hostile: see `gate.py` for who may ask,
and `requests.py` for what may be asked. One answer is generated at a time.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastft.errors import CouldNotFinishError, FastFTError
from fastft.inference.gate import Gate, is_loopback
from fastft.inference.llamacpp import GgufChat, bindings
from fastft.inference.requests import Completion, RefusedError, read_request, until_stop

INSTALL_SERVER = "install it with: pip install starlette uvicorn"
MOST_WAITING = 64  # requests that wait for their turn; the next one is told to come back


def serve(
    path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    loras: Sequence[str | Path] = (),
    gpu_layers: int | str = "auto",
    n_ctx: int | None = None,
    api_key: str | None = None,
    on_open: Callable[[], None] | None = None,
) -> None:
    """Serve the GGUF file at http://host:port/v1 until interrupted; `on_open` is called once it
    listens.

    Every adapter in `loras` is a model of its own beside the bare file: the request's "model" (a
    file name without .gguf) chooses. Only this machine can connect unless `host` says otherwise,
    which needs an `api_key`. Raises FastFTError where the server is not installed, the file does
    not load or the key is missing, CouldNotFinishError where the port is taken.
    """
    require_key(host, api_key)
    require_free_port(host, port)  # before the model is loaded
    app = make_app(
        path, loras=loras, gpu_layers=gpu_layers, n_ctx=n_ctx, api_key=api_key, host=host
    )
    require_free_port(host, port)
    import uvicorn

    class Server(uvicorn.Server):
        """Says where it listens once it does."""

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started and on_open is not None:
                on_open()

    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", http="h11", ws="none", lifespan="off",
        proxy_headers=False, server_header=False,
    )  # fmt: skip
    with suppress(KeyboardInterrupt):  # uvicorn has ended in order and raises what ended it
        Server(config).run()


def require_key(host: str, api_key: str | None) -> None:
    """Raise FastFTError where other machines could ask without a key."""
    if not is_loopback(host) and not api_key:
        raise FastFTError(
            f"--host {host} lets other machines ask; that needs a key: --api-key KEY, or the "
            "variable FASTFT_API_KEY."
        )


def make_app(
    path: str | Path,
    *,
    loras: Sequence[str | Path] = (),
    gpu_layers: int | str = "auto",
    n_ctx: int | None = None,
    api_key: str | None = None,
    host: str = "127.0.0.1",
) -> Any:
    """Return the server as an ASGI application, with the model loaded."""
    bindings()
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.routing import Route
    except ImportError as error:
        raise FastFTError(
            f"the server's packages are not installed ({error}); {INSTALL_SERVER}"
        ) from None
    served = Served(Path(path), loras, gpu_layers, n_ctx)
    return Starlette(
        routes=[
            Route("/v1/models", served.models, methods=["GET"]),
            Route("/v1/chat/completions", served.chat_completions, methods=["POST"]),
            Route("/v1/completions", served.completions, methods=["POST"]),
        ],
        middleware=[Middleware(Gate, host=host, api_key=api_key)],
    )


class Served:
    """A loaded file and what is answered about it, to one client at a time."""

    def __init__(
        self, path: Path, loras: Sequence[str | Path], gpu_layers: int | str, n_ctx: int | None
    ) -> None:
        self.chat = GgufChat(path, loras=loras, gpu_layers=gpu_layers, n_ctx=n_ctx)
        self.adapters: dict[str, str | None] = {path.stem: None}
        for name in self.chat.model.loras:
            self.adapters.setdefault(name, name)
        # asyncio's, not anyio's: a stream is begun in one task and ended in another.
        self.turn, self.waiting = asyncio.Lock(), 0

    async def models(self, request: Any) -> Any:
        """GET /v1/models: the bare file first, then its adapters."""
        from starlette.responses import JSONResponse

        data = [{"id": name, "object": "model", "owned_by": "me"} for name in self.adapters]
        return JSONResponse({"object": "list", "data": data})

    async def chat_completions(self, request: Any) -> Any:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def completions(self, request: Any) -> Any:
        """POST /v1/completions: the continuation of a plain text."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Any, chat: bool) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        try:
            asked = await read_request(request, chat=chat)
            asked = replace(asked, model=asked.model or next(iter(self.adapters)))
            if self.waiting >= MOST_WAITING:
                raise RefusedError(503, f"{self.waiting} requests are waiting; try again later")
            pieces = self._pieces(asked, request)
            await anext(pieces)  # empty; whatever is wrong shows before the answer begins
            if asked.stream:
                return StreamingResponse(_events(asked, pieces), media_type="text/event-stream")
            async with aclosing(pieces):
                return JSONResponse(_whole(asked, [piece async for piece in pieces]))
        except RefusedError as error:
            return error.response()

    async def _pieces(self, asked: Completion, request: Any) -> AsyncGenerator[dict[str, Any]]:
        """Yield {"text"} for each piece of the answer and at last {"reason", "usage"}.

        The first is always an empty piece, once the prompt was found to fit.
        """
        from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

        async with self._my_turn():
            try:
                prompt = await run_in_threadpool(self._prompt, asked)
            except FastFTError as error:
                raise RefusedError(400, str(error)) from error
            yield {"text": ""}
            limit = min(asked.limit or self.chat.model.n_ctx, self.chat.model.n_ctx - len(prompt))
            found = until_stop(self._generate(prompt, limit, asked), asked.stops)
            stopped = False
            try:
                async for text, at_stop in iterate_in_threadpool(found):
                    if await request.is_disconnected():
                        return
                    stopped = at_stop
                    yield {"text": text}
            except FastFTError as error:
                raise RefusedError(500, str(error)) from error
            made = len(self.chat.last_tokens)
            usage = {"prompt_tokens": len(prompt), "completion_tokens": made}
            usage["total_tokens"] = len(prompt) + made
            yield {"reason": "stop" if stopped or made < limit else "length", "usage": usage}

    @asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        self.waiting += 1
        try:
            async with self.turn:
                yield
        finally:
            self.waiting -= 1

    def _prompt(self, asked: Completion) -> list[int]:
        """Choose the adapter and return the prompt's ids; FastFTError where it does not fit."""
        if len(self.adapters) > 1 and asked.model and asked.model not in self.adapters:
            raise FastFTError(
                f"there is no model {asked.model!r} here; there are: {', '.join(self.adapters)}"
            )
        name = self.adapters.get(asked.model or "", next(iter(self.adapters.values())))
        if self.chat.model.loras and name != self.chat.model.active_lora:
            self.chat.use_lora(name)
        model = self.chat.model
        if asked.messages is None:
            ids = model.tokens(asked.prompt or "")
        else:
            ids = model.chat_tokens(asked.messages, tools=asked.tools)
        if not ids or len(ids) >= model.n_ctx:
            raise FastFTError(
                f"the prompt has {len(ids)} tokens, the context {model.n_ctx}; it must have at "
                "least one and leave room for an answer"
            )
        return ids

    def _generate(self, prompt: list[int], limit: int, asked: Completion) -> Iterator[str]:
        return self.chat._stream(prompt, limit, asked.temperature, asked.top_p, asked.seed)


def _head(asked: Completion, kind: str) -> dict[str, Any]:
    return {
        "id": f"{'chatcmpl' if asked.messages is not None else 'cmpl'}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": asked.model,
    }


def _whole(asked: Completion, pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the answer as one object of OpenAI's API."""
    text, end = "".join(piece.get("text", "") for piece in pieces), (pieces or [{}])[-1]
    choice: dict[str, Any] = {"index": 0, "finish_reason": end.get("reason", "stop")}
    if asked.messages is None:
        return _head(asked, "text_completion") | {
            "choices": [choice | {"text": text, "logprobs": None}],
            "usage": end.get("usage"),
        }
    choice |= {"message": {"role": "assistant", "content": text}, "logprobs": None}
    return _head(asked, "chat.completion") | {"choices": [choice], "usage": end.get("usage")}


async def _events(asked: Completion, pieces: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[str]:
    """Yield the answer as server-sent events, as OpenAI's API does."""
    chat = asked.messages is not None
    head = _head(asked, "chat.completion.chunk" if chat else "text_completion")

    def event(content: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "finish_reason": reason, "logprobs": None} | content
        return f"data: {json.dumps(head | {'choices': [choice]}, ensure_ascii=False)}\n\n"

    if chat:
        yield event({"delta": {"role": "assistant", "content": ""}})
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                if "reason" in piece:
                    yield event({"delta": {}} if chat else {"text": ""}, piece["reason"])
                    if asked.include_usage:
                        last = head | {"choices": [], "usage": piece["usage"]}
                        yield f"data: {json.dumps(last)}\n\n"
                elif text := piece["text"]:
                    yield event({"delta": {"content": text}} if chat else {"text": text})
    except RefusedError as error:
        yield f"data: {json.dumps(error.content())}\n\n"
        return
    yield "data: [DONE]\n\n"


def require_free_port(host: str, port: int) -> None:
    """Raise CouldNotFinishError where nothing can listen at host:port."""
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise CouldNotFinishError(
                f"cannot listen on {host}:{port}: {why}. Choose another --host or --port."
            ) from error
