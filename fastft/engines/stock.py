"""The stock engine: plain transformers + peft + bitsandbytes, as their documentation shows them.

It is the benchmark's baseline, and the way out where Unsloth does not support a model or a
machine. The keywords are Unsloth's, so that both engines are called alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fastft.models import bitsandbytes_config, tokenizer_of

if TYPE_CHECKING:
    from fastft.data.batches import Rows


class StockEngine:
    """transformers' AutoModelForCausalLM with peft's LoRA."""

    name = "stock"

    def from_pretrained(
        self,
        model_name: str,
        max_seq_length: int = 2048,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        token: str | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        attn_implementation: str | None = None,
        use_gradient_checkpointing: Any = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Return (model, tokenizer). NF4 has double quantisation (arXiv 2305.14314, section 3) and
        a `dtype` compute type.
        """
        from transformers import AutoModelForCausalLM

        dtype = dtype or _default_dtype()
        kind = "int8" if load_in_8bit else "nf4" if load_in_4bit else "none"
        quantization = bitsandbytes_config(kind, dtype)
        if quantization is not None:
            kwargs["quantization_config"] = quantization
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_name,
            dtype=dtype,
            device_map=device_map or _default_device(),
            token=token,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **kwargs,
        )
        tokenizer = tokenizer_of(
            model_name,
            token=token,
            revision=revision,
            trust_remote_code=trust_remote_code,
            padding_side="right",
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.max_seq_length = max_seq_length
        model._fastft_checkpointing = use_gradient_checkpointing
        return model, tokenizer

    def get_peft_model(
        self,
        model: Any,
        r: int = 16,
        target_modules: Any = "all-linear",
        lora_alpha: Any = 16,
        lora_dropout: float = 0.0,
        bias: Any = "none",
        use_gradient_checkpointing: Any = None,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return peft's model; A and B are float32 and drawn with `random_state`."""
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if use_gradient_checkpointing is None:
            use_gradient_checkpointing = getattr(model, "_fastft_checkpointing", False)
        checkpointing = bool(use_gradient_checkpointing)
        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            model = prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
        elif checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            model.enable_input_require_grads()
        model.config.use_cache = False
        torch.manual_seed(random_state)
        config = LoraConfig(
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            task_type="CAUSAL_LM",
            **kwargs,
        )
        return get_peft_model(model, config)

    def for_inference(self, model: Any) -> Any:
        """Return the model in eval mode with its cache on."""
        model.eval()
        model.config.use_cache = True
        return model

    def for_training(self, model: Any, use_gradient_checkpointing: Any = None) -> Any:
        """Return the model in train mode; None keeps the checkpointing as it is."""
        model.train()
        model.config.use_cache = False
        if use_gradient_checkpointing is True:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        elif use_gradient_checkpointing is False:
            model.gradient_checkpointing_disable()
        return model

    def accept_rows(self, model: Any) -> Rows:
        """Return "varlen": fastft's own attention function, on every device."""
        return "varlen"

    def forget_check(self, model: Any) -> None:
        """Nothing to drop: nothing is compiled."""

    def announce_scale(self, model: Any, scale: Any) -> None:
        """Nothing to tell: autograd multiplies before the first gradient is rounded."""

    @contextlib.contextmanager
    def loss_mode(self, model: Any) -> Iterator[None]:
        """Plain transformers computes the loss over whole logits."""
        yield

    def patches(self) -> dict[str, str]:
        """Return nothing: this engine patches nothing."""
        return {}


def _default_dtype() -> torch.dtype:
    if torch.cuda.is_available():
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return torch.float32


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


ENGINE = StockEngine()
