"""`fastft serve`: a GGUF file behind llama-cpp-python's OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.errors import CouldNotFinishError, FastFTError
from fastft.inference.llamacpp import DEFAULT_CHAT_CTX, bindings, open_gguf

INSTALL_SERVER = "install it with: pip install 'llama-cpp-python[server]'"


def serve(
    path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    loras: Sequence[str | Path] = (),
    gpu_layers: int | str = "auto",
    n_ctx: int | None = None,
    api_key: str | None = None,
) -> None:
    """Serve the GGUF file at http://host:port/v1 until interrupted.

    Every adapter in `loras` is a model of its own beside the bare file: the request's "model" (a
    file name without .gguf) chooses; only one is in memory at a time. Conversations are rendered
    with the template inside of the file. Only this machine can connect unless `host` says
    otherwise. Raises FastFTError where the server is not installed or the file does not load,
    CouldNotFinishError where the port is taken.
    """
    app = make_app(path, loras=loras, gpu_layers=gpu_layers, n_ctx=n_ctx, api_key=api_key)
    require_free_port(host, port)
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning")


def make_app(
    path: str | Path,
    *,
    loras: Sequence[str | Path] = (),
    gpu_layers: int | str = "auto",
    n_ctx: int | None = None,
    api_key: str | None = None,
) -> Any:
    """Return the server as an ASGI application, with the model loaded."""
    bindings()
    try:
        from llama_cpp.server.app import create_app
        from llama_cpp.server.settings import ModelSettings, ServerSettings
    except ImportError as error:
        raise FastFTError(
            f"the server's packages are not installed ({error}); {INSTALL_SERVER}"
        ) from None
    path = Path(path)
    layers, has_template, context = probe(path, gpu_layers, n_ctx)
    common: dict[str, Any] = {
        "model": str(path),
        "n_gpu_layers": layers,
        "n_ctx": context,
        # Else a guessed format of llama-cpp-python's own would stand in for some templates.
        "chat_format": "chat_template.default" if has_template else None,
        "verbose": False,
    }
    models = [ModelSettings(**common, model_alias=path.stem)]
    for lora in map(Path, loras):
        if not lora.is_file():
            raise FastFTError(f"{lora} is not a file; a LoRA adapter in GGUF form is expected.")
        models.append(ModelSettings(**common, model_alias=lora.stem, lora_path=str(lora)))
    return create_app(server_settings=ServerSettings(api_key=api_key), model_settings=models)


def probe(path: Path, gpu_layers: int | str, n_ctx: int | None) -> tuple[int, bool, int]:
    """Load the file once; return (layers that fit on the GPU, whether it has a chat template,
    tokens of context).
    """
    with open_gguf(path, n_ctx=n_ctx, gpu_layers=gpu_layers) as model:
        has_template = model.metadata("tokenizer.chat_template") is not None
        return model.gpu_layers, has_template, min(model.n_ctx, n_ctx or DEFAULT_CHAT_CTX)


def require_free_port(host: str, port: int) -> None:
    """Raise CouldNotFinishError where nothing can listen at host:port."""
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise CouldNotFinishError(
                f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port."
            ) from error
