"""`FastSFTTrainer`: trl's SFTTrainer, with each optimizer step computed without padding.

    from fastft import FastLanguageModel, FastSFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(...)
    model = FastLanguageModel.get_peft_model(model, ...)
    trainer = FastSFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=dataset, args=SFTConfig(...)
    )
    trainer.train()

trl prepares the dataset, masks, collates, logs, evaluates and saves, as it would alone (also after
Unsloth's `train_on_responses_only`); what changes is how a step's gradient is computed. All
sequences of a step, across gradient accumulation, become rows of at most `micro_batch_tokens`
tokens; the loss is the same sum over the same tokens. trl's entropy and token accuracy need a pass
over the vocabulary and are not measured while training.

Under torchrun each process draws the same batches and computes its share of them, so losses and
steps are those of one process; the first one logs and saves. `per_device_train_batch_size` times
`gradient_accumulation_steps` is the whole step, whatever the number of processes.

Import this after the engine (`fastft.FastSFTTrainer` sees to it): Unsloth must come before trl.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from trl import SFTConfig, SFTTrainer

from fastft.data.batches import IGNORE, Rows, Segment, supervised_tokens
from fastft.engines import get_engine
from fastft.errors import CouldNotFinishError, FastFTError
from fastft.kernels.fused import FusedLayers
from fastft.kernels.varlen import rope_changes_at
from fastft.training import ranks
from fastft.training.exactness import (
    MOST_TOKENS,
    RowCheck,
    check_rows,
    choose_rows,
    choose_sharing,
)
from fastft.training.step import Stepper, StepPolicy

CPU_TOKENS = 1024  # enough to keep a CPU's matrix products busy


class FastSFTTrainer(SFTTrainer):
    """trl's SFTTrainer on padding-free rows; takes what trl's takes, and `tokenizer` for
    `processing_class`.

    `micro_batch_tokens`: most tokens of one forward pass (default: 1,024 on a CPU, on a GPU what
    per_device_train_batch_size sequences of max_length would be); after an out-of-memory it is
    halved within the same step. `fused_layers`: fastft's own CPU layers (on by default).
    `share_prefixes`: a beginning that sequences of a step share is computed once ("auto": where
    that is exact). Raises FastFTError for settings that this step would not honour; the message
    names them all.
    """

    def __init__(
        self,
        *args: Any,
        tokenizer: Any = None,
        micro_batch_tokens: int | None = None,
        fused_layers: bool = True,
        share_prefixes: bool | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None:
            if kwargs.get("processing_class") is not None:
                raise FastFTError(
                    "both tokenizer and processing_class are given; they are two names of "
                    "one argument."
                )
            kwargs["processing_class"] = tokenizer
        if len(args) < 2 and "args" not in kwargs:
            kwargs["args"] = SFTConfig()  # only then: trl's default refuses a CPU without bfloat16
        settings = args[1] if len(args) > 1 else kwargs["args"]
        keep_batches_padded(settings)
        super().__init__(*args, **kwargs)
        self._refuse_what_would_be_ignored()
        self._stepper = self._make_stepper(micro_batch_tokens, fused_layers)
        self._share_prefixes = share_prefixes
        self._rows_chosen = False
        self.loss_trace: list[float] = []

    def _refuse_what_would_be_ignored(self) -> None:
        settings = self.args
        problems = {
            "compute_loss_func": self.compute_loss_func is not None,
            "args.loss_type other than nll": str(getattr(settings, "loss_type", "nll") or "nll")
            != "nll",
            "args.label_smoothing_factor": bool(settings.label_smoothing_factor),
            "args.neftune_noise_alpha": bool(getattr(settings, "neftune_noise_alpha", None)),
            "args.packing (rows hold no padding already)": bool(
                getattr(settings, "packing", False)
            ),
            "args.padding_free (rows hold no padding already)": bool(
                getattr(settings, "padding_free", False)
            ),
            "args.activation_offloading": bool(getattr(settings, "activation_offloading", False)),
            "the router loss of a mixture of experts": bool(
                getattr(self, "aux_loss_enabled", False)
            ),
            "more than one GPU in a process (start one process a GPU with torchrun)": settings.n_gpu
            > 1,
            "processes that accelerate joined (read fastft.FastSFTTrainer before making an "
            "SFTConfig)": settings.world_size > 1,
            "deepspeed or fsdp": self.is_deepspeed_enabled or self.is_fsdp_enabled,
        }
        found = [name for name, present in problems.items() if present]
        if found:
            raise FastFTError(
                f"FastSFTTrainer does not honour: {'; '.join(found)}. Remove "
                f"{'it' if len(found) == 1 else 'them'}, or use "
                "trl's SFTTrainer."
            )

    def _make_stepper(self, micro_batch_tokens: int | None, fused_layers: bool) -> Stepper:
        """Choose the budget and the layers, and say so; rows are chosen when there is data to look
        at.
        """
        from fastft.kernels import native

        on_cpu = self.args.device.type == "cpu"
        name = getattr(self.model, "_fastft_engine", None) or (
            "unsloth" if "unsloth" in sys.modules else "stock"
        )
        if micro_batch_tokens is None:
            length = getattr(self.args, "max_length", None) or 1024
            micro_batch_tokens = (
                CPU_TOKENS if on_cpu else self.args.per_device_train_batch_size * length
            )
        fused = FusedLayers(self.model, self._compute_dtype()) if fused_layers and on_cpu else None
        if fused is not None and not fused.forwards:
            fused = None
        layers = f", {len(fused.forwards)} fused layers" if fused else ""
        layers += f" ({native.why_not()})" if fused and native.why_not() else ""
        _say(f"FastSFTTrainer: at most {micro_batch_tokens} tokens a forward pass{layers}")
        pad = getattr(self.processing_class, "pad_token_id", None) or 0
        return Stepper(
            self.model,
            get_engine(name),
            StepPolicy(
                micro_batch_tokens, "padded", pad, rope_changes_at=rope_changes_at(self.model)
            ),
            device=self.args.device,
            on_note=_say,
            fused=fused,
            scale=self.accelerator.scaler,
        )

    def _choose_rows(self, segments: list[Segment]) -> None:
        """Take rows without padding where they are exact: known for tested families on a CPU,
        looked at with the first step's data for others and on a GPU.
        """
        engine, check = self._stepper.engine, partial(self._check_rows, segments)
        tested = self.args.device.type == "cpu"
        longest = getattr(self.args, "max_length", None) or MOST_TOKENS
        rows, choice = choose_rows(
            "auto", self.model, engine, check, tested=tested, longest=longest
        )
        _say(f"FastSFTTrainer: {'rows without padding: ' if choice.value else ''}{choice.reason}")
        wanted = self._share_prefixes
        rows, choice = choose_sharing(
            wanted, self.model, engine, check, rows=rows, tested=tested, longest=longest
        )
        _say(f"FastSFTTrainer: beginnings {'' if choice.value else 'not '}shared: {choice.reason}")
        self._stepper.policy.rows = rows

    def _check_rows(self, segments: list[Segment], rows: Rows) -> RowCheck | None:
        candidate = self._stepper.with_policy(replace(self._stepper.policy, rows=rows))
        return check_rows(candidate, segments, self.compute_loss_context_manager)

    def _compute_dtype(self) -> torch.dtype:
        """Return what matrix products compute in: autocast's type, else the weights'."""
        if self.args.bf16:
            return torch.bfloat16
        model: Any = self.model
        return model.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the step's micro-batches, all of its sequences in the last: one gradient a
        step.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        found = [segment for batch in batches for segment in _segments(batch)]
        segments = [replace(segment, place=place) for place, segment in enumerate(found)]
        return [[] for _ in batches[1:]] + ([segments] if batches else []), items

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the step's loss with its gradient added; zero for the accumulation steps before
        the last.
        """
        if not inputs or not supervised_tokens(inputs):
            return torch.zeros((), device=self.args.device)
        if not self._rows_chosen:
            self._choose_rows(inputs)
            self._rows_chosen = True
            found = ranks.everybodys(self._stepper.policy.rows)
            self._split_as_trie = all(rows == "trie" for rows in found)
        model.train()
        by_sequence = self.args.device.type == "cpu" or ranks.world().size > 1
        mine = self._stepper.gradient(
            model,
            ranks.share(inputs, trie=self._split_as_trie),
            self.accelerator.backward,
            self.compute_loss_context_manager,
            supervised=supervised_tokens(inputs),
            drawn=(self.args.seed, self.state.global_step) if by_sequence else None,
        )
        loss, *_ = ranks.add_up(model.parameters(), mine)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise CouldNotFinishError(
                f"the loss is {loss} at step {self.state.global_step + 1}; nothing of this "
                "step was kept."
            )
        tokens = sum(len(segment) for segment in inputs)
        self._total_train_tokens += tokens
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        self.loss_trace.append(loss)
        return torch.tensor(loss, device=self.args.device)

    def is_world_process_zero(self) -> bool:
        """Whether this process is the one that reports (callbacks read it from the state too)."""
        return ranks.first()

    def is_local_process_zero(self) -> bool:
        """The same: only the first process of all prints."""
        return ranks.first()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as trl does; of several processes the first."""
        if ranks.first():
            super().save_model(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if ranks.first():
            super()._save_checkpoint(model, trial)
        ranks.wait()

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers' estimate does not know rows."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        self.state.num_input_tokens_seen += sum(len(segment) for segment in inputs)


def keep_batches_padded(settings: Any) -> None:
    """Turn `padding_free` off where it was left open: Unsloth would turn it on (GPU), and rows are
    made here from batches.
    """
    if getattr(settings, "padding_free", False) is None:
        settings.padding_free = False


def _segments(batch: Any) -> list[Segment]:
    """Return the sequences of a collated batch without their padding; raises FastFTError for one
    that is no plain batch.
    """
    unknown = sorted(set(batch) - {"input_ids", "labels", "attention_mask"})
    if unknown or "labels" not in batch:
        raise FastFTError(
            "FastSFTTrainer's step takes input_ids, labels and attention_mask; the data "
            "collator gives "
            f"{', '.join(sorted(batch))}. Use trl's SFTTrainer for this collator."
        )
    ids, labels = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
    mask = (
        batch["attention_mask"].cpu().numpy().astype(bool)
        if "attention_mask" in batch
        else ids == ids
    )
    result = []
    for row_ids, row_labels, row_mask in zip(ids, labels, mask, strict=True):
        kept = row_labels[row_mask].copy()
        if len(kept):
            kept[0] = IGNORE  # nothing predicts it
            result.append(Segment(row_ids[row_mask], kept))
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr)
