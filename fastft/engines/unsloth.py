"""The Unsloth engine: the only module that imports unsloth, and it does so before transformers,
trl or peft.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft.data.batches import Rows

_EARLY = [name for name in ("transformers", "trl", "peft") if name in sys.modules]

# Unsloth otherwise may install packages and ask the network for statistics on import.
os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
# Standard output belongs to --json; Unsloth's banner goes with the rest of the log.
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import unsloth
    from unsloth import FastLanguageModel as UnslothFastLanguageModel


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
            peft_model = UnslothFastLanguageModel.get_peft_model(model, *args, **kwargs)
        train_token_rows(peft_model)
        return peft_model

    def for_inference(self, model: Any) -> Any:
        """See Unsloth's FastLanguageModel.for_inference."""
        return UnslothFastLanguageModel.for_inference(model)

    def for_training(self, model: Any, use_gradient_checkpointing: Any = None) -> Any:
        """See Unsloth's FastLanguageModel.for_training; None keeps the checkpointing as it is."""
        if use_gradient_checkpointing is None:
            return UnslothFastLanguageModel.for_training(model)
        return UnslothFastLanguageModel.for_training(model, use_gradient_checkpointing)

    def accept_rows(self, model: Any) -> Rows:
        """Return "packed" on a GPU: Unsloth's attention takes `packed_seq_lengths`; "varlen" on
        its CPU path.
        """
        if getattr(unsloth, "DEVICE_TYPE", "cpu") == "cpu":
            return "varlen"
        from unsloth.utils.hf_packed_attention import enable_hf_packed_attention
        from unsloth.utils.packing import mark_allow_overlength

        # for the families that stay on transformers' own modelling code
        enable_hf_packed_attention()
        # The check compares with the sequences joined to one, maybe longer than max_seq_length:
        # Unsloth would cut its ids, but not its labels.
        mark_allow_overlength(model)
        return "packed"

    def forget_check(self, model: Any) -> None:
        """Reset torch.compile after passes outside of a trainer, whose graphs give NaN or zero
        gradients in training.

        Unsloth's own trainers do it when `train` begins; a plain Trainer's only for llama,
        mistral, qwen and gemma2.
        """
        if getattr(unsloth, "DEVICE_TYPE", "cpu") == "cpu":
            return
        from unsloth.models._utils import _unsloth_reset_stray_compile_cache

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it advises against such passes
            _unsloth_reset_stray_compile_cache(SimpleNamespace(model=model))

    def announce_scale(self, model: Any, scale: Any) -> None:
        """Hand `scale` to Unsloth's fused cross entropy, which computes its gradient in the
        forward pass.

        Not told, it rounds d loss / d hidden to float16 unscaled, where a token's share of a large
        step underflows.
        """
        owner = model.get_base_model() if hasattr(model, "get_base_model") else model
        owner.accelerator_scaler = scale

    @contextlib.contextmanager
    def loss_mode(self, model: Any) -> Iterator[None]:
        """Turn on Unsloth's chunked cross entropy, which on the CPU only its patched SFTTrainer
        does.
        """
        settle_compiled_layers()
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
        """Return Unsloth's version, backend, and what could not be patched because it was imported
        too early.
        """
        state = {
            "unsloth": unsloth.__version__,
            "backend": str(getattr(unsloth, "DEVICE_TYPE", "unknown")),
        }
        if _EARLY:
            state["imported_before_unsloth"] = ", ".join(_EARLY)
        return state


def train_token_rows(peft_model: Any) -> None:
    """Let the rows of `trainable_token_indices` train: on a GPU, Unsloth freezes everything that
    is not called lora_*.
    """
    for name, parameter in peft_model.named_parameters():
        if ".trainable_tokens_delta." in name:
            parameter.requires_grad_(True)


def settle_compiled_layers() -> None:
    """Do between steps what Unsloth's Trainer.training_step does, which fastft's trainers replace.

    A compiled layer that ran out of recompilations (rows have many lengths) goes on without the
    compiler from there on; inside a step, a checkpointed layer would be recomputed in another way
    than it was computed.
    """
    if getattr(unsloth, "DEVICE_TYPE", "cpu") == "cpu":
        return
    from unsloth_zoo.temporary_patches.utils import apply_pending_eager_fallbacks

    apply_pending_eager_fallbacks()


ENGINE = UnslothEngine()
