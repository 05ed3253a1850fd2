"""What an engine must offer. Both keep Unsloth's keyword names, so that one call site serves
both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fastft.data.batches import Rows


class Engine(Protocol):
    """Loads a base model, attaches LoRA, and computes a training loss the way its kernels like
    it.
    """

    name: str

    def from_pretrained(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Return (model, tokenizer); Unsloth's keywords (model_name, max_seq_length, dtype,
        load_in_4bit ...).
        """
        ...

    def get_peft_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the model with LoRA attached; Unsloth's keywords (r, target_modules, lora_alpha
        ...).
        """
        ...

    def for_inference(self, model: Any) -> Any:
        """Return the model switched to generation."""
        ...

    def for_training(self, model: Any, use_gradient_checkpointing: Any = None) -> Any:
        """Return the model switched to training."""
        ...

    def accept_rows(self, model: Any) -> Rows:
        """Make `model` take rows without padding; returns how it is told their boundaries."""
        ...

    def forget_check(self, model: Any) -> None:
        """Reset torch.compile caches left by the pre-training check."""
        ...

    def announce_scale(self, model: Any, scale: Any) -> None:
        """Tell `model` what its loss will be multiplied by before backward (float16): a
        GradScaler, a number, or None.
        """
        ...

    def loss_mode(self, model: Any) -> AbstractContextManager[None]:
        """Inside, `model(labels=..., num_items_in_batch=n).loss` is the sum of token losses over
        n, without logits kept.
        """
        ...

    def patches(self) -> dict[str, str]:
        """Return what the engine changed in this process, for run.json and `fastft doctor`."""
        ...
