"""From a config and a machine to a `Situation`: every `auto` decided, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastft.config import MOVES_THE_BASE, RunConfig
from fastft.errors import FastFTError
from fastft.families import family_of
from fastft.hardware import (
    GIB,
    Choice,
    Hardware,
    compute_dtype,
    mlx_is_installed,
    optimizer,
)
from fastft.planning.memory import (
    Situation,
    Term,
    eval_terms,
    host_terms,
    imports_term,
    train_terms,
    weight_terms,
)
from fastft.planning.shape import ModelShape
from fastft.planning.time import step_time

MARGIN = 0.10
"""Share of the memory that automatic choices leave free, and below which a plan is `tight`: the
published error.
"""
CPU_ROW = 1024
"""More tokens in a row make a CPU no faster: its matrix products are at full speed and the caches
are not.
"""


@dataclass(frozen=True)
class Lengths:
    """How long the sequences of a run are, in tokens."""

    longest: int
    step: int
    """The most tokens that one optimizer step can have."""
    each: tuple[int, ...] = field(default=(), compare=False, repr=False)
    """Of every sequence, the longest first; empty before the data is read."""

    @staticmethod
    def of(lengths: Iterable[int], effective_batch_size: int) -> Lengths:
        """Return those of sequences of so many tokens each, however they are shuffled."""
        falling = sorted((int(length) for length in lengths), reverse=True)
        return Lengths(falling[0], sum(falling[:effective_batch_size]), tuple(falling))


@dataclass(frozen=True)
class Resolved:
    """A situation, and the choices that led to it."""

    situation: Situation
    choices: dict[str, Choice]


def resolve(
    config: RunConfig, hardware: Hardware, shape: ModelShape, lengths: Lengths | None = None
) -> Resolved:
    """Return the situation that `fastft train` would be in. Raises FastFTError for what cannot be
    trained here.

    `lengths` are the data's, once it is read; without them every sequence is as long as the config
    allows.
    """
    quantization = pick_quantization(
        config.model.quantization, shape, hardware, lora_init=config.lora.init
    )
    resolved = _resolve(config, hardware, shape, quantization, lengths)
    if (
        config.model.quantization != "auto"
        or quantization.value != "none"
        or hardware.kind != "cuda"
    ):
        return resolved
    if config.lora.init in MOVES_THE_BASE or config.model.dtype == "float32":
        return resolved  # neither goes with quantised weights
    peak, free = train_peak_bytes(shape, resolved.situation), hardware.vram_free_bytes
    if peak <= (1 - MARGIN) * free:
        return resolved
    why = f"with 16-bit weights a step takes {peak / GIB:.1f} of {free / GIB:.1f} GiB"
    return _resolve(config, hardware, shape, Choice("nf4", why), lengths)


def settle(
    config: RunConfig, hardware: Hardware, shape: ModelShape, quantization: str, lengths: Lengths
) -> Resolved:
    """Return the situation again once the data is read: what depends on the length of its sequences
    is decided by theirs, on the base that was chosen (`quantization`).
    """
    return _resolve(config, hardware, shape, Choice(quantization, "chosen before"), lengths)


def _resolve(
    config: RunConfig,
    hardware: Hardware,
    shape: ModelShape,
    quantization: Choice[Any],
    lengths: Lengths | None,
) -> Resolved:
    on_mlx = trains_in_mlx(config, hardware)
    changed = _choices_of_mlx(config, hardware) if on_mlx else {}
    dtype = changed.get("dtype") or compute_dtype(hardware, config.model.dtype)
    most = config.model.max_seq_length
    lengths = lengths or Lengths(most, most * config.train.effective_batch_size)
    longest, whole = lengths.longest, lengths.step
    forced = _forced_float32(config, hardware, shape, dtype.value)
    tokens, asked = config.lora.train_tokens, config.train.micro_batch_tokens
    optimizer_choice = changed.get("optimizer") or optimizer(hardware, config.train.optimizer)
    start = Situation(
        device=hardware.kind,
        kernels=_kernels(config, hardware),
        # What an automatic choice must make room for: one sequence, or the row that was asked for.
        tokens=longest if asked == "auto" else _row(asked, lengths),
        longest=longest,
        compute_bytes=4 if forced or dtype.value == "float32" else 2,
        forced_float32=forced,
        quantization=quantization.value,
        multiplies_nf4=hardware.kind == "cpu" and hardware.bf16 and dtype.value == "bfloat16",
        rank=config.lora.r,
        target_modules=_frozen(config.lora.target_modules),
        target_parameters=tuple(config.lora.target_parameters),
        use_dora=config.lora.use_dora,
        dropout=config.lora.dropout,
        train_tokens=0 if tokens == "auto" else len(tokens),
        optimizer=optimizer_choice.value,
        loss=_loss_of(config, hardware, shape),
        cores=hardware.cpu_cores,
    )
    shape.lora_parameters(*start.lora)  # refuses unknown target modules now
    weights = _total(weight_terms(shape, start))
    start = replace(
        start,
        free_bytes=max(GIB // 2, hardware.vram_free_bytes - weights)
        if hardware.kind == "cuda"
        else 0,
    )
    checkpointing = pick_gradient_checkpointing(
        config.train.gradient_checkpointing, shape=shape, situation=start, hardware=hardware
    )
    start = replace(start, checkpointing=_how(checkpointing.value, start))
    budget = pick_micro_batch_tokens(
        asked, shape=shape, situation=start, hardware=hardware, whole=whole
    )
    alike = _why_all_rows_alike(config, hardware)
    if alike and checkpointing.value == "long":
        raise FastFTError(
            f"train.gradient_checkpointing: long is not possible, because {alike}. Set it to auto, "
            "true or false."
        )
    if checkpointing.value and not alike:
        all_rows = Batching(checkpointing, budget, start)
        checkpointing, budget, start = _recompute_long_rows(
            config, all_rows, shape=shape, hardware=hardware, lengths=lengths
        )
    choices: dict[str, Choice[Any]] = {
        "quantization": quantization,
        "dtype": dtype,
        "optimizer": optimizer_choice,
        "gradient_checkpointing": checkpointing,
        "micro_batch_tokens": budget,
    } | changed
    return Resolved(replace(start, tokens=_row(budget.value, lengths)), choices)


def _row(budget: int, lengths: Lengths) -> int:
    """Most tokens of one forward pass: a sequence is never cut, and a step has no more than its
    sequences.
    """
    return min(max(lengths.longest, budget), lengths.step)


def _forced_float32(config: RunConfig, hardware: Hardware, shape: ModelShape, dtype: str) -> bool:
    """Whether Unsloth computes this family in float32 here, whatever was chosen."""
    overflows = family_of(shape.family).float16_overflows and dtype == "float16"
    return overflows and _kernels(config, hardware) == "unsloth"


def trains_in_mlx(config: RunConfig, hardware: Hardware) -> bool:
    """Whether the run is the MLX engine's: asked for, or a Mac's that has it or is only named."""
    named = hardware.disk_assumed_bytes is not None  # not this machine, whose packages count
    on_a_mac = hardware.kind == "mps" and (named or mlx_is_installed())
    return config.model.engine == "mlx" or (config.model.engine == "auto" and on_a_mac)


def _kernels(config: RunConfig, hardware: Hardware) -> Literal["unsloth", "fused", "peft", "mlx"]:
    if trains_in_mlx(config, hardware):
        return "mlx"
    if hardware.kind == "cuda":
        return "peft" if config.model.engine == "stock" else "unsloth"
    return "fused" if hardware.kind == "cpu" and config.train.fused_layers is not False else "peft"


def _choices_of_mlx(config: RunConfig, hardware: Hardware) -> dict[str, Choice[Any]]:
    """Return what the MLX engine chooses otherwise; FastFTError for what it does not have."""
    dtype, wanted = config.model.dtype, config.train.optimizer
    if dtype == "float16":
        raise FastFTError(
            "model.dtype float16 needs a loss scaler, which the mlx engine does not have. Set it "
            "to auto, bfloat16 or float32."
        )
    if wanted not in ("auto", "adamw"):
        raise FastFTError(f"train.optimizer {wanted} is not in MLX. Set it to auto or adamw.")
    chosen = Choice(dtype, "asked for")
    if dtype == "auto" and hardware.kind == "mps":
        chosen = Choice("bfloat16", "weights of the base; A and B are float32")
    elif dtype == "auto":
        chosen = Choice("float32", "MLX on a CPU: exact, and bfloat16 would not be faster")
    if config.model.quantization in ("nf4", "int8") and dtype == "auto":
        chosen = Choice("bfloat16", "computes on quantised weights")
    bits = {"nf4": 4, "int8": 8}.get(config.model.quantization)
    found: dict[str, Choice[Any]] = {
        "dtype": chosen,
        "optimizer": Choice("adamw", "MLX's AdamW, with bias correction"),
    }
    if bits is not None:
        reason = f"asked for; in MLX: {bits} bit, groups of 64 weights with scale and offset"
        found["quantization"] = Choice(config.model.quantization, reason)
    return found


def _loss_of(
    config: RunConfig, hardware: Hardware, shape: ModelShape
) -> Literal["chunked", "full", "fused"]:
    changed_head = "lm_head" in config.lora.target_modules or (
        shape.tied and isinstance(config.lora.train_tokens, list)
    )
    family = family_of(shape.family)
    if _kernels(config, hardware) == "fused" and "head" in family.fused and not changed_head:
        return "fused"
    if config.model.engine in ("stock", "mlx") or hardware.kind == "mps":
        return "full"
    whole = (
        family.whole_logits_on_gpu if hardware.kind == "cuda" else not family.chunked_loss_on_cpu
    )
    return "full" if whole else "chunked"


def _frozen(targets: str | list[str]) -> str | tuple[str, ...]:
    return targets if isinstance(targets, str) else tuple(targets)


def _how(checkpointing: bool, s: Situation) -> Literal["off", "recompute", "offload"]:
    if not checkpointing:
        return "off"
    return "offload" if s.kernels == "unsloth" else "recompute"


def pick_quantization(
    requested: str, shape: ModelShape, hardware: Hardware, *, lora_init: str = "default"
) -> Choice[Any]:
    """Return none, nf4 or int8 and why: nf4 on a GPU whose memory 16-bit weights would fill to
    more than 60 %.

    Raises FastFTError where `lora_init` has to change base weights that are stored in 4 bit.
    """
    moves = lora_init in MOVES_THE_BASE
    if requested == "auto" and shape.stored == "nf4" and moves:
        raise FastFTError(
            f"lora.init {lora_init} changes the base weights, which {shape.name} stores in 4 "
            "bit; set lora.init: default, "
            "or name the model's 16-bit checkpoint."
        )
    if requested != "auto":
        return Choice(requested, "asked for")
    if shape.stored == "nf4":
        return Choice("nf4", "the checkpoint is stored in bitsandbytes 4 bit")
    if hardware.kind != "cuda":
        return Choice("none", "no NVIDIA GPU: 16-bit weights are faster than NF4")
    if moves:
        return Choice(
            "none", f"lora.init {lora_init} changes the base weights, which NF4 cannot hold"
        )
    weights, free = 2 * shape.parameters, hardware.vram_free_bytes
    numbers = f"16-bit weights take {weights / GIB:.1f} of {free / GIB:.1f} GiB"
    if weights > 0.6 * free:
        return Choice("nf4", numbers)
    return Choice("none", f"{numbers} and need no dequantisation")


def available_bytes(hardware: Hardware) -> int:
    """Memory that training may take where the tensors live: free VRAM, or free RAM on a CPU."""
    return hardware.ram_free_bytes if hardware.kind == "cpu" else hardware.vram_free_bytes


def train_peak_bytes(shape: ModelShape, s: Situation) -> int:
    """Peak of a training step (or of the evaluation between, where that is larger), with the CPU's
    imports.
    """
    peak = max(_total(train_terms(shape, s)), _total(eval_terms(shape, s)))
    return peak + (imports_term(s).bytes if s.device == "cpu" else 0)


def pick_gradient_checkpointing(
    requested: bool | str, *, shape: ModelShape, situation: Situation, hardware: Hardware
) -> Choice[Any]:
    """Return whether layers are recomputed, and why: off where one full-length sequence fits
    without it. "long" (asked for) stays as it is.

    `situation.tokens` is the row that must fit; checkpointing costs one more forward pass, a third
    of the time.
    """
    if requested != "auto":
        return Choice(requested if requested == "long" else bool(requested), "asked for")
    peak = train_peak_bytes(shape, replace(situation, checkpointing="off"))
    free = available_bytes(hardware)
    numbers = f"{peak / GIB:.1f} GiB without it, {free / GIB:.1f} GiB free"
    if peak <= (1 - MARGIN) * free:
        return Choice(False, f"not needed: {numbers}")
    return Choice(True, f"needed: {numbers}")


@dataclass(frozen=True)
class Batching:
    """How the rows of a step are computed: two choices, and the situation that they lead to."""

    checkpointing: Choice[Any]
    budget: Choice[Any]
    situation: Situation

    def __iter__(self) -> Iterator[Any]:
        return iter((self.checkpointing, self.budget, self.situation))


WORTH = 0.95
"""Rows of two kinds are chosen where the step then takes at most this share of its time: the time
is the weakest part of a plan, and cutting a step into more rows costs something for certain.
"""


GPU_LAUNCH_SECONDS = 0.01
"""Host time to launch a layer's forward and backward pass, below which a row cannot be computed:
0.25 to 0.4 s for the 32 layers of an 8B by Unsloth's own figures, not measured by us.
"""


def _why_all_rows_alike(config: RunConfig, hardware: Hardware) -> str:
    """Return why all rows must be recomputed where one is, or an empty string."""
    if config.model.engine == "mlx" or hardware.kind == "mps":
        return "on a Mac all rows are computed alike"
    if config.train.shard_base:
        return "with train.shard_base the processes compute the same layer at the same time"
    return ""


def _recompute_long_rows(
    config: RunConfig,
    all_rows: Batching,
    *,
    shape: ModelShape,
    hardware: Hardware,
    lengths: Lengths,
) -> Batching:
    """Return the choice to recompute only the sequences that do not fit otherwise, each in a row of
    its own, where that was asked for or takes less time by the plan; else `all_rows`.
    """
    asked, situation = config.train.micro_batch_tokens, all_rows.situation
    most = _most_kept(shape, situation, hardware, lengths.step)
    budget = all_rows.budget
    if asked == "auto" and most:
        row = min(most, CPU_ROW) if hardware.kind == "cpu" else most
        budget = Choice(row, "the largest row that fits without being recomputed")
    elif asked != "auto":
        most = min(most, int(asked))
    if all_rows.checkpointing.value == "long":
        return Batching(all_rows.checkpointing, budget, replace(situation, recompute_above=most))
    if not most or not lengths.each or asked != "auto":
        return all_rows
    batch = config.train.effective_batch_size
    mixed = _seconds(shape, situation, hardware, lengths, batch, budget.value, most)
    alike = _seconds(shape, situation, hardware, lengths, batch, all_rows.budget.value, 0)
    if mixed is None or alike is None or mixed > WORTH * alike:
        return all_rows
    why = (
        f"sequences above {most:,} tokens are recomputed, shorter ones fit without it; all of them "
        f"would take {alike / mixed:.2f}x the time"
    )
    return Batching(Choice("long", why), budget, replace(situation, recompute_above=most))


def _most_kept(shape: ModelShape, s: Situation, hardware: Hardware, step: int) -> int:
    """The most tokens of a row that fits, with the margin, without being recomputed: at most a
    whole `step`'s; 0 for none.
    """
    allowed = (1 - MARGIN) * available_bytes(hardware)

    def fits(tokens: int) -> bool:
        row = replace(s, checkpointing="off", tokens=tokens, longest=tokens)
        return train_peak_bytes(shape, row) <= allowed

    low, high = 0, step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _seconds(
    shape: ModelShape,
    s: Situation,
    hardware: Hardware,
    lengths: Lengths,
    batch: int,
    budget: int,
    kept: int,
) -> float | None:
    """Seconds of an epoch whose sequences of at most `kept` tokens are computed once and the others
    twice; None where the machine's speed is not known.
    """
    total = 0.0
    short = [n for n in lengths.each if n <= kept]
    long = lengths.each[: len(lengths.each) - len(short)]
    parts: list[tuple[Sequence[int], Literal["off", "recompute", "offload"]]]
    parts = [(short, "off"), (long, s.checkpointing)]
    for part, how in parts:
        if not part:
            continue
        tokens = sum(part)
        # A row has no more than the budget, nor than its share of a step; a longer sequence is one.
        row = max(min(budget, tokens * batch / len(lengths.each)), tokens / len(part))
        kind = replace(s, checkpointing=how, tokens=int(row), recompute_above=0)
        seconds = step_time(
            shape, kind, hardware, sequences=len(part), mean_length=tokens / len(part)
        ).seconds
        if seconds is None:
            return None
        launched = tokens / row * shape.layers * GPU_LAUNCH_SECONDS * (1.5 if how != "off" else 1)
        total += max(seconds, launched) if s.device == "cuda" else seconds
    return total


def pick_micro_batch_tokens(
    requested: int | str,
    *,
    shape: ModelShape,
    situation: Situation,
    hardware: Hardware,
    whole: int,
    together: int = 0,
) -> Choice[int]:
    """Return the most tokens of one forward pass, and why: the largest budget that fits with a
    margin of 10 %.

    Never more than the `whole` step's tokens, nor, on a CPU, than keeps it busy or holds the
    `together` tokens of sequences that share a beginning; never less than the longest sequence,
    which is a row of its own anyway.
    """
    if requested != "auto":
        return Choice(int(requested), "asked for")
    longest = situation.longest
    cap = min(whole, max(CPU_ROW, longest, together)) if hardware.kind == "cpu" else whole

    def has_room(tokens: int) -> bool:
        s = replace(situation, tokens=tokens)
        if train_peak_bytes(shape, s) > (1 - MARGIN) * available_bytes(hardware):
            return False
        # Beside a GPU: the layer inputs that checkpointing offloads lie in RAM.
        return (
            s.device != "cuda"
            or _total(host_terms(shape, s, "train")) <= (1 - MARGIN) * hardware.ram_free_bytes
        )

    fits = longest
    while fits < cap and has_room(min(cap, 2 * fits)):
        fits = min(cap, 2 * fits)
    peak = train_peak_bytes(shape, replace(situation, tokens=fits))
    numbers = f"{peak / GIB:.1f} of {available_bytes(hardware) / GIB:.1f} GiB"
    if fits == cap:
        why = "a whole step in one pass"
        if hardware.kind == "cpu" and cap < whole:
            why = "keeps a CPU busy"
        if cap == together:
            why = "holds what shares a beginning"
        return Choice(fits, f"{why}: {numbers}")
    # Between the doubling that fits and the one that does not, in steps of 512 tokens.
    low, high = fits, min(cap, 2 * fits)
    while high - low > 512:
        middle = (low + high) // 2
        if has_room(middle):
            low = middle
        else:
            high = middle
    peak = train_peak_bytes(shape, replace(situation, tokens=low))
    why = (
        "the largest that fits"
        if has_room(low)
        else "one sequence, and that takes more than nine tenths"
    )
    return Choice(low, f"{why}: {peak / GIB:.1f} of {available_bytes(hardware) / GIB:.1f} GiB")


def _total(terms: list[Term]) -> int:
    return sum(term.bytes for term in terms)


def ram_terms(shape: ModelShape, s: Situation, phase: str) -> list[Term]:
    """RAM of a phase beside a GPU, or the imports alone on a CPU (whose tensors are counted
    apart).
    """
    return [imports_term(s)] if s.device == "cpu" else host_terms(shape, s, phase)
