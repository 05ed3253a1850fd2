"""The Unsloth engine: the only module that imports unsloth, and it does so before transformers, trl or peft."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

_EARLY = [name for name in ("transformers", "trl", "peft") if name in sys.modules]

# Unsloth otherwise may install packages and ask the network for statistics on import.
os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
# Standard output belongs to --json; Unsloth's banner goes with the rest of the log.
with contextlib.redirect_stdout(io.StringIO()) as _banner, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import unsloth
    from unsloth import FastLanguageModel as UnslothFastLanguageModel

BANNER = _banner.getvalue().strip()


class UnslothEngine:
    """Unsloth's own FastLanguageModel (GPU or CPU), with its prints sent to standard error."""

    name = "unsloth"

    def from_pretrained(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See Unsloth's FastLanguageModel.from_pretrained."""
        with contextlib.redirect_stdout(sys.stderr):
            return UnslothFastLanguageModel.from_pretrained(*args, **kwargs)

    def get_peft_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """See Unsloth's FastLanguageModel.get_peft_model."""
        with contextlib.redirect_stdout(sys.stderr):
            return UnslothFastLanguageModel.get_peft_model(model, *args, **kwargs)

    def for_inference(self, model: Any) -> Any:
        """See Unsloth's FastLanguageModel.for_inference."""
        return UnslothFastLanguageModel.for_inference(model)

    def for_training(self, model: Any, use_gradient_checkpointing: Any = None) -> Any:
        """See Unsloth's FastLanguageModel.for_training; None keeps the checkpointing as it is."""
        if use_gradient_checkpointing is None:
            return UnslothFastLanguageModel.for_training(model)
        return UnslothFastLanguageModel.for_training(model, use_gradient_checkpointing)

    @contextlib.contextmanager
    def loss_mode(self, model: Any) -> Iterator[None]:
        """Turn on Unsloth's chunked cross entropy, which on the CPU only its patched SFTTrainer does."""
        owner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not vars(owner).get("_unsloth_cpu_chunked_ce", False):
            yield
            return
        owner._unsloth_cpu_chunked_ce_active = True
        try:
            yield
        finally:
            owner._unsloth_cpu_chunked_ce_active = False

    def patches(self) -> dict[str, str]:
        """Return Unsloth's version, backend, and what could not be patched because it was imported too early."""
        state = {"unsloth": unsloth.__version__, "backend": str(getattr(unsloth, "DEVICE_TYPE", "unknown"))}
        if _EARLY:
            state["imported_before_unsloth"] = ", ".join(_EARLY)
        return state


ENGINE = UnslothEngine()
