"""What the Hub's answers mean: each error of huggingface_hub and httpx as one clear message, with
the right exit code.

The user's own (exit code 2): no such repository, gated, no valid token, no right to write. Not the
user's (exit code 3, safe to try again): too many requests, the Hub's own errors, the network.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fastft.errors import CouldNotFinishError, FastFTError, first_line

LONGEST_WAIT = 120.0  # seconds; a longer Retry-After is said instead of waited for
SIGN_IN = "sign in with: hf auth login (or set HF_TOKEN; tokens: huggingface.co/settings/tokens)"


def endpoint() -> str:
    """Return the Hub's address without a trailing slash."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def shown_endpoint() -> str:
    """Return the Hub's address for messages: without a name or password that stands in it."""
    return re.sub(r"//[^/@]*@", "//", endpoint())


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE keeps everything to the local cache."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}


@functools.cache
def http() -> ModuleType:
    """Return the HTTP library that the installed huggingface_hub uses: httpx, from 2.0 on httpx2.

    Never both: an `isinstance` with the other one's errors would miss without a word.
    """
    major = int(importlib.metadata.version("huggingface_hub").split(".")[0])
    return importlib.import_module("httpx" if major < 2 else "httpx2")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what a call of huggingface_hub raises into the FastFTError about `what` ("model
    'a/b'").
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        with bounded_waits():
            yield
    except (
        HfHubHTTPError,
        http().HTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    ) as error:
        raise explain(error, what) from error


def explain(error: BaseException, what: str) -> FastFTError:
    """Return the FastFTError for `error`, which huggingface_hub, httpx or datasets raised about
    `what`.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = root(error)
    if isinstance(error, HFValidationError):
        return FastFTError(f"{what} is neither a folder nor a Hub id (owner/name).")
    if is_offline():
        return FastFTError(
            f"{what} is not in the local cache, and HF_HUB_OFFLINE is set. Unset it, or give "
            "a folder."
        )
    code = status(error)
    if isinstance(cause, GatedRepoError):
        return gated(what)
    if isinstance(cause, RevisionNotFoundError):
        return FastFTError(
            f"{what} has no such revision. Name a branch, a tag or a full commit of it."
        )
    if isinstance(cause, RepositoryNotFoundError) and (code == 404 or not token_is_known()):
        return not_found(what)
    if code == 401:
        return FastFTError(
            f"{what}: the Hub does not accept the token (401); it is wrong or has expired. "
            f"Again {SIGN_IN}."
        )
    if code == 403:
        return FastFTError(
            f"{what}: the token may not do this (403). Use a token with write access to that "
            "account, made at "
            "huggingface.co/settings/tokens."
        )
    return _not_the_users(error, what, code)


def gated(what: str) -> FastFTError:
    """Return the error for what needs its licence accepted."""
    how = "accept its licence on its page" + ("" if token_is_known() else f" and {SIGN_IN}")
    return FastFTError(f"{what} is gated: {how}. Access may take a while to be granted.")


def not_found(what: str) -> FastFTError:
    """Return the error for what is not there, or is hidden from whoever asks."""
    how = (
        "with this token"
        if token_is_known()
        else f"without signing in; for a private one {SIGN_IN}"
    )
    return FastFTError(f"there is no {what} on the Hub that can be seen {how}. Check the spelling.")


def _not_the_users(error: BaseException, what: str, code: int | None) -> FastFTError:
    """Return the error for what is worth another try, or for an answer nobody expects."""
    if code == 429:
        wait = retry_after(error)
        when = f"in {wait:,.0f} s" if wait is not None else "in some minutes"
        return CouldNotFinishError(
            f"{what}: the Hub allows no more requests for now (429). Try again {when}."
        )
    if code in {408, 409, 412} or (code is not None and code >= 500):
        return CouldNotFinishError(
            f"{what}: the Hub could not do it ({code}). Try again in some minutes."
        )
    if code is not None:
        return FastFTError(f"{what}: the Hub refused the request ({code}): {first_line(error)}.")
    if isinstance(error, OSError) and error.errno is not None:  # the disk, say
        return CouldNotFinishError(
            f"{what}: {error.strerror or error} ({error.filename or 'while it was loaded'})."
        )
    why = type(root(error)).__name__
    return CouldNotFinishError(
        f"{what}: the Hub at {shown_endpoint()} cannot be reached, or the connection broke "
        f"({why}). Check the network and try again."
    )


def worth_another_try(error: BaseException) -> bool:
    """Return whether the same request may succeed later: the network, 408, 409, 412, 429 and
    5xx.
    """
    code = status(error)
    if code is None:
        return isinstance(root(error), http().TransportError)
    return code in {408, 409, 412, 429} or code >= 500


def retry_after(error: BaseException) -> float | None:
    """Return the seconds that the Hub asks to wait, where it says so."""
    response = getattr(root(error), "response", None)
    text = "" if response is None else response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


def token_is_known() -> bool:
    """Return whether a token is at hand (HF_TOKEN, or `hf auth login`); the token itself is
    nobody's business.
    """
    from huggingface_hub import get_token

    return get_token() is not None


@contextmanager
def bounded_waits() -> Iterator[None]:
    """Within it huggingface_hub's client gives up a silent connection and never sleeps longer than
    LONGEST_WAIT.

    By default it has no timeout at all, and sleeps as long as a Retry-After says.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import hf_raise_for_status
    from huggingface_hub.utils._http import default_client_factory

    def refuse_long_waits(response: Any) -> None:
        wait = response.headers.get("Retry-After", "")
        if response.status_code in {429, 503} and wait.isdigit() and float(wait) > LONGEST_WAIT:
            response.read()
            hf_raise_for_status(response)

    def make() -> Any:
        client = default_client_factory()
        client.timeout = http().Timeout(60.0, connect=10.0)
        client.event_hooks = {**client.event_hooks, "response": [refuse_long_waits]}
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "tokenizer*", "merges*")
"""What a base model's folder needs; pickles, GGUF files and pictures stay on the Hub."""
NOT_MODEL_FILES = ("original/*", "consolidated*", "*/*.safetensors", "onnx/*")


def download_model(
    name: str, revision: str | None = None, *, progress: Callable[[str], Any]
) -> None:
    """Bring the base model `name` into the local cache, showing how far it is.

    `progress(what)` is Reporter.bytes: a context that yields a function of (bytes done, bytes
    total). Does nothing for a folder, offline, and where every file is in the cache. Raises as
    `hub_errors` does.
    """
    if Path(name).expanduser().is_dir() or is_offline() or "/" not in name:
        return
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    with hub_errors(f"model {name!r}"):
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        except http().TransportError:
            if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
                return  # no network, but the model is here; loading says it if a file is missing
            raise
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = filter_repo_objects(
            sizes, allow_patterns=[*MODEL_FILES], ignore_patterns=[*NOT_MODEL_FILES]
        )
        missing = [
            file
            for file in wanted
            if not isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)
        ]
        if not missing:
            return
        total = sum(sizes[file] for file in missing)
        with watched(name, "models", total, progress):
            snapshot_download(name, revision=revision, allow_patterns=missing)


@contextmanager
def watched(
    name: str, kind: str, total: int | None, progress: Callable[[str], Any]
) -> Iterator[None]:
    """Within it, show how much of the repository `name` (kind: models, datasets) has arrived.

    What counts is the growth of its folder in the cache: every way of downloading ends there.
    """
    from huggingface_hub import constants

    blobs = Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}" / "blobs"
    before, done = _bytes_in(blobs), threading.Event()
    size = f" ({total / 1e6:,.0f} MB)" if total else ""
    with progress(f"downloading {name}{size}") as show:

        def look() -> None:
            while not done.wait(0.5):
                show(max(_bytes_in(blobs) - before, 0), total)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            show(max(_bytes_in(blobs) - before, 0), total)


def _bytes_in(folder: Path) -> int:
    """Return the bytes on disk below `folder`: a file that is being filled counts as it grows."""
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # renamed while we look
                about = entry.stat()
                total += min(about.st_size, getattr(about, "st_blocks", 1 << 60) * 512)
    return total


def root(error: BaseException) -> BaseException:
    """Return the error of the request itself: huggingface_hub and datasets wrap it in others;
    `error` where there is none.
    """
    waiting: list[BaseException | None] = [error]
    for seen in waiting:
        if isinstance(seen, http().HTTPError):  # HfHubHTTPError, with the answer, is one too
            return seen
        if seen is not None:
            waiting += [
                inner for inner in (seen.__cause__, seen.__context__) if inner not in waiting
            ]
    return error


def status(error: BaseException) -> int | None:
    """Return the HTTP status of the answer behind `error`; None where there was no answer."""
    response = getattr(root(error), "response", None)
    return None if response is None else int(response.status_code)
