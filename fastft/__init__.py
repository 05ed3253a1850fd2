"""fastft: Unsloth-first LoRA and QLoRA fine-tuning, from a dataset to a file that llama.cpp runs.

The names below are loaded when they are first used (PEP 562); importing fastft imports nothing
heavy. `fastft.FastLanguageModel` imports Unsloth at that moment, so read it before importing trl
or transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name: module that defines it
_PUBLIC = {
    "FastFTError": "fastft.errors",
    "FastLanguageModel": "fastft.engines.loading",
    "FastSFTTrainer": "fastft.training.sft",
    "RunConfig": "fastft.config",
    "RunResult": "fastft.training.train",
    "Chat": "fastft.verbs",
    "chat": "fastft.inference.generate",
    "evaluate": "fastft.verification.evaluation",
    "export": "fastft.verbs",
    "inspect_data": "fastft.data.inspect",
    "load_config": "fastft.config",
    "plan": "fastft.planning",
    "probe": "fastft.hardware",
    "push": "fastft.verbs",
    "sweep": "fastft.verbs",
    "train": "fastft.verbs",
    "verify": "fastft.verbs",
}

# Unsloth's public names that fastft has no own of, on a GPU or a CPU: `from fastft import X` works
# for each, so that a notebook changes one line. A list, because asking Unsloth imports it.
# fmt: off
_UNSLOTH = frozenset({
    "DEVICE_COUNT", "DEVICE_TYPE", "DEVICE_TYPE_TORCH", "DIFFUSION_MODEL_TYPES",
    "DSparkTrainingArguments", "DecisionTrainer", "DiffusionConfig", "DiffusionTrainer",
    "FastDecisionModel", "FastDiffusionModel", "FastFalconH1Model", "FastGraniteModel",
    "FastLlamaModel", "FastMistralModel", "FastModel", "FastQwen2Model", "FastQwen3Model",
    "FastQwen3MoeModel", "FastSentenceTransformer", "FastTextModel", "FastVisionModel",
    "MTPTrainingArguments", "PatchDPOTrainer", "PatchFastRL", "PatchKTOTrainer", "QGaloreConfig",
    "Qwen3DSparkDrafter", "RawTextDataLoader", "TextPreprocessor", "UnslothDSparkTrainer",
    "UnslothMTPTrainer", "UnslothTrainer", "UnslothTrainingArguments",
    "UnslothVisionDataCollator", "add_new_tokens", "apply_chat_template",
    "check_dataset_for_missing_videos", "check_tokenizer", "clear_gpu_memory",
    "create_huggingface_repo", "fix_sentencepiece_gguf", "fix_sentencepiece_tokenizer",
    "get_chat_template", "get_gpu_memory_stats", "get_mtp_head", "get_tokenizer_info",
    "is_bfloat16_supported", "is_diffusion_model", "is_diffusion_model_type", "is_vLLM_available",
    "load_correct_tokenizer", "patch_saving_functions", "print_quantization_methods",
    "remove_special_tokens", "save_to_gguf", "standardize_data_formats", "standardize_sharegpt",
    "to_sharegpt", "train_on_responses_only", "unsloth_push_to_hub_openvino",
    "unsloth_save_model", "unsloth_save_pretrained_openvino", "unsloth_train",
    "vLLMSamplingParams",
})
# fmt: on

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from fastft.config import RunConfig, load_config
    from fastft.data.inspect import inspect_data
    from fastft.engines.loading import FastLanguageModel
    from fastft.errors import FastFTError
    from fastft.hardware import probe
    from fastft.inference.generate import chat
    from fastft.planning import plan
    from fastft.training.sft import FastSFTTrainer
    from fastft.training.train import RunResult
    from fastft.verbs import Chat, export, push, sweep, train, verify
    from fastft.verification.evaluation import evaluate


def __getattr__(name: str) -> Any:
    if name in _UNSLOTH:
        value = _of_unsloth(name)
    elif name in _PUBLIC:
        if name in {"FastLanguageModel", "FastSFTTrainer"}:
            _join_other_processes()
            _import_unsloth_first()
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    else:
        raise AttributeError(f"module 'fastft' has no attribute {name!r}")
    setattr(sys.modules[__name__], name, value)
    return value


def _of_unsloth(name: str) -> Any:
    """Return Unsloth's `name`. Raises ImportError where it is not there on this machine."""
    if "fastft.engines.stock" in sys.modules:
        raise ImportError(
            f"{name} is Unsloth's, and this process already runs the stock engine, which Unsloth's "
            "patches would change. Import it first, in a new process."
        )
    if importlib.util.find_spec("unsloth") is None:
        raise ImportError(f"{name} is Unsloth's, which is not installed: pip install unsloth")
    _join_other_processes()
    importlib.import_module("fastft.engines.unsloth")
    unsloth = importlib.import_module("unsloth")
    if not hasattr(unsloth, name):
        device = getattr(unsloth, "DEVICE_TYPE", "this machine")
        raise ImportError(
            f"Unsloth {unsloth.__version__} has no {name} on {device}: it belongs to its GPU path."
        )
    return getattr(unsloth, name)


def __dir__() -> list[str]:
    return __all__


def _join_other_processes() -> None:
    """Join what torchrun started, where it did, before any library reads its variables."""
    from fastft.config import TrainConfig
    from fastft.training import ranks

    ranks.join(TrainConfig().lost_after_minutes)


def _import_unsloth_first() -> None:
    """Import Unsloth where this machine will use it, so that what is imported afterwards is
    patched.
    """
    if "fastft.engines.stock" in sys.modules:
        return  # the process is the stock engine's
    from fastft.engines import choose_engine
    from fastft.hardware import probe

    if choose_engine("auto", probe()).value == "unsloth":
        importlib.import_module("fastft.engines.unsloth")
