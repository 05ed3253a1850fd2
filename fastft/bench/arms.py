"""The arms: five ways to train the same adapter on the same sequences. One process runs one of
them.

An arm loads the model with LoRA and trains with the settings of the case; everything that is
measured is measured outside (witness.py, worker.py). Settings are split as their libraries split
them: `model` goes to loading, `training` to TrainingArguments or SFTConfig, `train` to fastft's
own config. Imports are inside: Unsloth must come first.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from fastft.bench.job import Arm, Job, UnsupportedError, forbid_flash_attention_2, without_network
from fastft.bench.workload import Workload, lora_config
from fastft.errors import FastFTError, one_of
from fastft.models import bitsandbytes_config

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeftArm:
    """transformers.Trainer + peft, as peft's documentation shows it."""

    known = frozenset({"training", "prepare_for_kbit"})

    def load(self, job: Job) -> Any:
        """Load with AutoModelForCausalLM, attach LoRA with get_peft_model."""
        import torch
        from peft import get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, AutoTokenizer

        keywords: dict[str, Any] = {"dtype": getattr(torch, job.dtype)}
        if job.case.device == "cuda":
            keywords["device_map"] = {"": 0}
        if not job.case.flash_attention_2:
            keywords["attn_implementation"] = "sdpa"
        if job.case.quantization == "nf4":
            keywords["quantization_config"] = bitsandbytes_config("nf4", keywords["dtype"])
        model: Any = AutoModelForCausalLM.from_pretrained(job.model, **keywords)
        self.tokenizer = AutoTokenizer.from_pretrained(job.model)
        checkpointing = bool(job.settings.get("training", {}).get("gradient_checkpointing"))
        if job.case.quantization == "nf4":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        elif checkpointing:
            model.enable_input_require_grads()
        self.model = get_peft_model(model, lora_config(job.case))
        return self.model

    def train(self, job: Job, witness: Any) -> int | None:
        """Train with transformers.Trainer and the seq2seq collator, which pads to the longest of a
        batch.
        """
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        arguments = TrainingArguments(**_common_arguments(job))
        collator = DataCollatorForSeq2Seq(self.tokenizer, padding=True)
        dataset = _dataset(job.workload)
        trainer = Trainer(
            model=self.model,
            args=arguments,
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[witness],
        )
        trainer.train()
        return None


class LigerArm(PeftArm):
    """peft's arm with Liger's kernels patched into the model."""

    def load(self, job: Job) -> Any:
        """Patch the family's modules before the model is made."""
        if job.case.device != "cuda":
            raise UnsupportedError("Liger's kernels are Triton's: they need a GPU")
        if importlib.util.find_spec("liger_kernel") is None:
            raise UnsupportedError("liger_kernel is not installed (pip install liger-kernel)")
        model = super().load(job)
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model.get_base_model())
        return model


class TrlArm(PeftArm):
    """trl's SFTTrainer with peft's model."""

    def train(self, job: Job, witness: Any) -> int | None:
        """Train with SFTTrainer on tokenised rows."""
        trainer = _sft_trainer(self, job, witness, max_length=None)
        try:
            trainer.train()
        except RuntimeError as error:
            if "active drivers" not in str(error):
                raise
            raise UnsupportedError(
                f"trl's SFTTrainer computes its loss in a Triton kernel: {error}"
            ) from error
        return None


class UnslothArm:
    """Unsloth's FastLanguageModel and SFTTrainer, as its official notebooks show them."""

    known = frozenset({"training", "use_gradient_checkpointing"})

    def load(self, job: Job) -> Any:
        """Import unsloth before everything else; load and attach LoRA through it."""
        without_network()
        import unsloth  # noqa: F401  # must come before transformers, trl and peft
        from unsloth import FastLanguageModel

        if not job.case.flash_attention_2:
            forbid_flash_attention_2()
        import torch

        longest = max(len(ids) for ids in job.workload.input_ids)
        checkpointing = job.settings.get("use_gradient_checkpointing", False)
        model, self.tokenizer = FastLanguageModel.from_pretrained(
            model_name=job.model,
            max_seq_length=longest,
            dtype=getattr(torch, job.dtype),
            load_in_4bit=job.case.quantization == "nf4",
            use_gradient_checkpointing=checkpointing,
        )
        lora = job.case.lora
        self.model = FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=PROJECTIONS,
            bias="none",
            use_gradient_checkpointing=checkpointing,
            random_state=job.case.seed,
        )
        return self.model

    def train(self, job: Job, witness: Any) -> int | None:
        """Train with the SFTTrainer that Unsloth has patched."""
        longest = max(len(ids) for ids in job.workload.input_ids)
        _sft_trainer(self, job, witness, max_length=longest).train()
        return None


class FastftArm:
    """fastft's own training session, with pre-tokenised rows in place of its data layer."""

    known = frozenset({"train", "engine", "processes"})

    def load(self, job: Job) -> Any:
        """Make the choices that `fastft train` makes, then load and attach as it does."""
        from fastft.bench.session import open_session

        self.session = open_session(job)
        return self.session.model

    def train(self, job: Job, witness: Any) -> int | None:
        """Train with the session's own trainer; fastft counts its tokens itself."""
        trainer = self.session.loop.trainer
        trainer.add_callback(witness)
        self.session.run()
        return trainer.progress.tokens


BUILT_IN: dict[str, type] = {
    "peft": PeftArm,
    "trl": TrlArm,
    "unsloth": UnslothArm,
    "liger": LigerArm,
    "fastft": FastftArm,
}


def make_arm(name: str, implementation: str | None, settings: dict[str, Any]) -> Arm:
    """Return the arm; raises FastFTError for an unknown name or settings that it would ignore."""
    if implementation is not None:
        module, _, attribute = implementation.partition(":")
        arm = getattr(importlib.import_module(module), attribute)()
    elif name in BUILT_IN:
        arm = BUILT_IN[name]()
    else:
        raise one_of("arm", name, BUILT_IN)
    unknown = sorted(set(settings) - arm.known)
    if unknown:
        raise FastFTError(
            f"arm {name}: unknown settings {', '.join(unknown)}. It knows: "
            f"{', '.join(sorted(arm.known))}."
        )
    return arm


def _sft_trainer(arm: Any, job: Job, witness: Any, *, max_length: int | None) -> Any:
    """Return trl's SFTTrainer, or what Unsloth has made of it, on tokenised rows."""
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=arm.model,
        args=SFTConfig(**_common_arguments(job), max_length=max_length),
        train_dataset=_dataset(job.workload),
        processing_class=arm.tokenizer,
        callbacks=[witness],
    )


def _common_arguments(job: Job) -> dict[str, Any]:
    """Arguments that every Hugging Face trainer gets, with the case's settings of this arm over
    them.
    """
    work = job.workload
    values: dict[str, Any] = {
        "output_dir": str(job.work / "trainer"),
        "max_steps": work.steps,
        "learning_rate": job.case.learning_rate,
        # the trace of losses is compared, so the schedule is everyone's
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job.case.seed,
        "data_seed": job.case.seed,
        "train_sampling_strategy": "sequential",  # the same sequences in the same steps
        "disable_tqdm": True,
        "use_cpu": job.case.device == "cpu",
        "bf16": job.dtype == "bfloat16",
        "fp16": job.dtype == "float16",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": job.case.device == "cuda",
    }
    values |= job.settings.get("training", {})
    product = values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
    if product != work.effective_batch_size:
        raise FastFTError(
            f"arm {job.arm}: per_device_train_batch_size x gradient_accumulation_steps is "
            f"{product}, the case's effective "
            f"batch is {work.effective_batch_size}. Make them equal."
        )
    return values


def _dataset(workload: Workload) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids in workload.input_ids],
            "attention_mask": [[1] * len(ids) for ids in workload.input_ids],
            "labels": [labels.tolist() for labels in workload.labels],
        }
    )
