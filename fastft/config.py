"""RunConfig: everything that decides a run, declared once.

The CLI, the docs, `fastft init` and the JSON Schema derive from the fields below. An unknown key
is an error that names the nearest known one; all problems are collected and reported together.
"""

from __future__ import annotations

import copy
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fastft.errors import FastFTError, did_you_mean
from fastft.secrets import redact


def _none_words(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in {"none", "null", ""} else value


Positive = Annotated[int, Field(gt=0)]
# `--set train.max_steps=null` arrives as YAML null, but people also write None.
MaybeSteps = Annotated[int | None, BeforeValidator(_none_words)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, numbers may not be strings, nothing is NaN."""

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        validate_assignment=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        """Refuse whole numbers that nothing here can count to: they overflow far from their key."""
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"is {_short(value)}; nothing here counts beyond 2**63")
        return value


EMBEDDED = "quickstart"
"""As a model's name: the tiny base model that comes with fastft."""


class ModelConfig(Section):
    """Which base model is fine-tuned, and how it is loaded."""

    name: str = Field(
        description="Hub id or local folder of the base model; quickstart: the embedded tiny one"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    quantization: Literal["auto", "nf4", "int8", "none"] = Field(
        "auto",
        description="auto: nf4 on a GPU where 16-bit weights would not fit or the checkpoint is "
        "4-bit, else none",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="compute type; auto: bfloat16 where the hardware has it, else float16 (GPU) or "
        "float32 (CPU)",
    )
    max_seq_length: int = Field(2048, ge=8, description="longest sequence in tokens")
    engine: Literal["auto", "unsloth", "stock", "mlx"] = Field(
        "auto", description="auto: unsloth, with a reason where not"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the checkpoint"
    )

    @field_validator("name")
    @classmethod
    def _home(cls, value: str) -> str:
        if value == EMBEDDED and not Path(value).exists():
            return str(Path(__file__).parent / "quickstart" / "base")
        return str(Path(value).expanduser()) if value.startswith("~") else value


DataFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text"
]


class SourceConfig(Section):
    """One of several sources; what is not set here is as in data."""

    source: str = Field(description="file, folder, or Hub dataset id")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the samples drawn, relative to the other weights; null everywhere: "
        "every sample once",
    )
    name: str | None = Field(None, description="configuration of a Hub dataset")
    split: str | None = Field(None, description="split of this source")
    format: DataFormat | None = Field(None, description="format of this source")
    columns: dict[str, str] | None = Field(None, description="columns of this source")
    take: Literal["chosen"] | None = Field(None, description="as data.take, for this source")
    ignore: list[str] | None = Field(None, description="as data.ignore, for this source")
    eval_source: str | None = Field(None, description="own evaluation file of this source")
    eval_fraction: float | None = Field(None, ge=0, lt=1, description="share held out of this one")


class DataConfig(Section):
    """What is trained on."""

    source: str = Field(description="file, folder, or Hub dataset id")
    sources: list[SourceConfig] = Field(
        default_factory=list,
        description="several sources instead of one, mixed by a seeded draw",
    )
    name: str | None = Field(None, description="configuration of a Hub dataset")
    split: str = Field("train", description="split of a Hub dataset or a saved dataset folder")
    format: DataFormat = Field("auto", description="auto: detected from the columns, and said")
    columns: dict[str, str] = Field(
        default_factory=dict, description="what the format calls a column: what your file calls it"
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="columns that carry nothing to learn from, such as a score or a topic",
    )
    take: Literal["chosen"] | None = Field(
        None,
        description="of preference and KTO data: chosen trains the good answers alone; null: such "
        "data is refused",
    )
    chat_template: str | None = Field(
        None,
        description="a named template (chatml, llama3, alpaca, alpaca_ja ...), or a file; null: "
        "the tokenizer's own",
    )
    train_on: Literal["responses", "everything"] = Field(
        "responses", description="tokens that carry loss"
    )
    turns: Literal["all", "last"] = Field(
        "all",
        description="answers of a conversation that are trained; last costs one pass where a "
        "template rewrites history",
    )
    deduplicate: bool = Field(
        False, description="remove rows that give exactly the same samples as an earlier row"
    )
    documents: Literal["auto", "file", "paragraph", "line"] = Field(
        "auto", description="what one document of a .txt or .md file is; auto says what it took"
    )
    long_text: Literal["split", "truncate", "drop"] = Field(
        "split",
        description="plain text: documents joined by EOS and cut to max_seq_length, or truncated, "
        "or dropped",
    )
    over_long: Literal["truncate", "drop"] = Field(
        "truncate", description="conversations above max_seq_length"
    )
    eval_source: str | None = Field(
        None, description="own evaluation file; null: eval_fraction of the source"
    )
    eval_fraction: float = Field(
        0.05, ge=0, lt=1, description="share held out, by a hash of the content"
    )
    streaming: bool = Field(False, description="read the source in passes instead of loading it")
    strict: bool = Field(
        False, description="a row that cannot be used is an error instead of being counted"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("sources") and not values.get("source"):
            return {**values, "source": ""}
        return values

    @model_validator(mode="after")
    def _not_both(self) -> DataConfig:
        weights = [one.weight is None for one in self.sources]
        if bool(self.source) == bool(self.sources):
            raise ValueError("set either source or sources")
        if any(weights) and not all(weights):
            raise ValueError(
                "sources: give every source a weight, or none (then every sample is taken once)"
            )
        if self.sources and self.eval_source:
            raise ValueError("with sources, set eval_source in each of them")
        return self

    @property
    def all_sources(self) -> list[str]:
        """Everything that rows are read from, evaluation files too."""
        each: list[DataConfig | SourceConfig] = [self, *self.sources]
        return [path for one in each for path in (one.source, one.eval_source) if path]

    @property
    def named(self) -> str:
        """The training sources in words."""
        return self.source or ", ".join(one.source for one in self.sources)


# These start from the base's own weights and take what they start with out of the base.
MOVES_THE_BASE = frozenset({"pissa", "olora"})


class LoraConfig(Section):
    """The adapter."""

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(16, gt=0, description="scale: the delta is alpha / r times B A")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A; 0 is fastest")
    target_modules: str | list[str] = Field("all-linear", description="all-linear, or module names")
    target_parameters: list[str] = Field(
        default_factory=list,
        description="expert parameters of a mixture that LoRA is put on as well, such as "
        "mlp.experts.gate_up_proj and mlp.experts.down_proj (peft's target_parameters)",
    )
    # LoftQ is not among them: it needs its own copy of the changed base beside the adapter.
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = Field(
        "default", description="how A and B start (peft's init_lora_weights)"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) (arXiv 2312.03732)")
    use_dora: bool = Field(False, description="weight-decomposed LoRA (arXiv 2402.09353)")
    train_tokens: Literal["auto"] | list[str] = Field(
        "auto",
        description="tokens whose embedding rows are trained; auto: those that an added chat "
        "template needs",
    )


TRACKERS = {
    "azure_ml": "azureml", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "kubeflow": "",
    "mlflow": "mlflow", "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard",
    "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
"""The names of train.report_to, and the module that each needs (a test compares them with
transformers' own list)."""


class TrainConfig(Section):
    """One optimizer step is `effective_batch_size` sequences; how they are cut into micro-batches
    changes nothing.
    """

    effective_batch_size: int = Field(8, ge=1, description="sequences an optimizer step")
    epochs: float = Field(1, gt=0, le=1e6, description="passes over the data")
    max_steps: MaybeSteps = Field(
        None, description="stop after so many optimizer steps; overrides epochs"
    )
    max_minutes: float | None = Field(
        None, description="stop cleanly with a checkpoint after so many minutes"
    )
    learning_rate: float = Field(2e-4, gt=0, lt=1, description="peak learning rate")
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_steps: MaybeSteps = Field(
        None, description="steps over which the learning rate rises; overrides warmup_ratio"
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW, on the LoRA weights")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 turns it off")
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "auto", description="auto: adamw_8bit on a GPU, fused AdamW elsewhere"
    )
    seed: int = Field(
        3407, ge=0, lt=2**32, description="of the LoRA weights, the order of the data, and dropout"
    )
    logging_steps: int = Field(1, ge=1, description="steps between two lines to the trackers")
    save_steps: int = Field(50, ge=1, description="steps between two checkpoints")
    save_total_limit: int = Field(
        2, ge=1, description="checkpoints kept (the best one is kept besides)"
    )
    eval_steps: int = Field(50, ge=1, description="steps between two evaluations")
    max_eval_samples: MaybeSteps = Field(
        500,
        description="held-out samples that each evaluation measures, always the same ones; "
        "null: all",
    )
    eval_metrics: list[Literal["exact_match", "contains"]] = Field(
        default_factory=list,
        description="judge the answers to held-out conversations (64 at most) at each evaluation",
    )
    best_by: Literal["loss", "exact_match", "contains"] = Field(
        "loss", description="what the best checkpoint and early stopping go by"
    )
    early_stopping_patience: MaybeSteps = Field(
        None, description="stop after so many evaluations without a better one (see best_by)"
    )
    micro_batch_tokens: Literal["auto"] | Positive = Field(
        "auto", description="most tokens in one forward pass; a longer sequence is a row of its own"
    )
    padding_free: Literal["auto"] | bool = Field(
        "auto",
        description="auto: rows without padding where that is exact (CPU: known families, GPU: "
        "checked at the start)",
    )
    share_prefixes: Literal["auto"] | bool = Field(
        "auto",
        description="auto: a beginning that sequences of a step share is computed once, where that "
        "is exact",
    )
    order: Literal["shuffled", "grouped"] = Field(
        "shuffled",
        description="grouped: sequences with a common beginning come into the same step, and the "
        "groups are shuffled; which rows meet in a step is then no longer random",
    )
    fused_layers: Literal["auto"] | bool = Field(
        "auto",
        description="auto: fastft's own LoRA, MLP, attention and loss on a CPU; off: "
        "transformers' and peft's",
    )
    gradient_checkpointing: Literal["auto", "long"] | bool = Field(
        "auto",
        description="layers are computed again in the backward pass, which takes less memory; "
        "auto: off where memory allows; long: only of sequences that do not fit otherwise, which "
        "auto chooses where that takes less time by the plan",
    )
    prefetch: bool = Field(
        False,
        description="on a GPU: rows are copied from pinned memory, and those of the next step are "
        "made while this one is computed; no GPU has measured yet what that gains",
    )
    shard_base: bool = Field(
        False,
        description="several processes: spread the frozen base over them (FSDP2), where one card "
        "cannot hold it",
    )
    lost_after_minutes: float = Field(
        10,
        gt=0,
        description="several processes: one that the others wait for longer than this is taken for "
        "lost, and all end",
    )
    report_to: list[str] = Field(
        default_factory=list,
        description="trackers that follow the run: tensorboard, wandb, mlflow, trackio, swanlab, "
        "comet_ml ... (every one that transformers knows)",
    )

    @field_validator("report_to")
    @classmethod
    def _known_trackers(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in TRACKERS:
                raise ValueError(
                    f"unknown tracker {name!r}{did_you_mean(name, TRACKERS)}; known: "
                    f"{', '.join(TRACKERS)}"
                )
        return value


EXPORT_KINDS = ("adapter", "merged", "gguf-lora", "ollama")


class ExportConfig(Section):
    """What `fastft train` exports when it is done."""

    to: list[str] = Field(
        default_factory=lambda: ["adapter"],
        description="adapter, merged, gguf:TYPE, gguf-lora, ollama",
    )

    @field_validator("to")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        return export_targets(value)


def export_targets(to: list[str]) -> list[str]:
    """Return the targets, each once, in the order given; raises one ValueError for all unknown
    ones.
    """
    examples = (*EXPORT_KINDS, "gguf:q4_k_m", "gguf:q8_0")
    unknown = [t for t in to if t not in EXPORT_KINDS and not re.fullmatch(r"gguf:[a-z0-9_]+", t)]
    if unknown:
        named = "; ".join(
            f"unknown export target {target!r}{did_you_mean(target, examples)}"
            for target in unknown
        )
        raise ValueError(
            f"{named}. Known: {', '.join(EXPORT_KINDS)}, gguf:TYPE (for example gguf:q4_k_m)."
        )
    return list(dict.fromkeys(to))


class RunConfig(Section):
    """A whole run. Required: `model.name` and `data.source`; everything else has a default."""

    project: str = Field("my-run", description="name of the run's folder below output_dir")
    output_dir: str = Field("runs", description="where runs are kept")
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    mirror: str | None = Field(
        None,
        description="folder (Google Drive) that receives verified copies of checkpoints and final/",
    )
    export: ExportConfig = Field(default_factory=ExportConfig)

    @field_validator("project")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[^/\\\0]+", value) or value in {".", ".."}:
            raise ValueError(
                f"{value!r} is not a folder name; put the parent folder into output_dir"
            )
        if not value.isprintable():
            raise ValueError(
                f"{value!r} holds control characters; use letters, digits, spaces, '-' and '_'"
            )
        if len(value.encode()) > 200:
            raise ValueError(
                f"is {len(value.encode())} bytes long; file systems take 255, so 200 at most"
            )
        return value

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        problems = []
        if (
            self.model.quantization != "none"
            and self.model.dtype == "float32"
            and self.model.quantization != "auto"
        ):
            problems.append(
                f"model.dtype float32 with model.quantization {self.model.quantization}: "
                "quantised weights compute in "
                "16 bit; set quantization: none or dtype: auto"
            )
        if self.lora.init in MOVES_THE_BASE and self.model.quantization in {"nf4", "int8"}:
            problems.append(
                f"lora.init {self.lora.init} changes the base weights, which "
                f"{self.model.quantization} cannot hold; "
                "set model.quantization: none, or lora.init: default"
            )
        if self.train.share_prefixes is True and self.lora.dropout > 0:
            problems.append(
                f"train.share_prefixes true with lora.dropout {self.lora.dropout:g}: sequences "
                "that share a beginning would share its mask; set share_prefixes: auto, or "
                "dropout: 0"
            )
        if self.train.share_prefixes is True and self.train.padding_free is False:
            problems.append(
                "train.share_prefixes true with train.padding_free false: padded batches share "
                "nothing; set padding_free: auto"
            )
        if self.lora.init == "orthogonal" and self.lora.r % 2:
            problems.append(
                f"lora.init orthogonal needs an even rank, lora.r is {self.lora.r}; set "
                f"lora.r: {self.lora.r + 1}"
            )
        if (
            self.train.early_stopping_patience is not None
            and self.data.eval_source is None
            and self.data.eval_fraction == 0
        ):
            problems.append(
                "train.early_stopping_patience needs held-out data; set data.eval_fraction "
                "above 0 or data.eval_source"
            )
        if self.train.best_by not in ("loss", *self.train.eval_metrics):
            problems.append(
                f"train.best_by is {self.train.best_by}, which is not measured; add it to "
                "train.eval_metrics"
            )
        for key in (
            "max_steps",
            "warmup_steps",
            "early_stopping_patience",
            "max_eval_samples",
            "max_minutes",
        ):
            value = getattr(self.train, key)
            if value is not None and value < (0 if key == "warmup_steps" else 1e-9):
                problems.append(f"train.{key} is {value}; it must be positive, or null")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def run_dir(self) -> Path:
        """The run's folder, output_dir/project."""
        return Path(self.output_dir).expanduser() / self.project


DATA_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".gz"}


def long_warmup(train: TrainConfig, total_steps: int) -> str | None:
    """Return what to say of a warm-up that outlasts the run; None where it does not."""
    warmup = train.warmup_steps
    if warmup is None or warmup < total_steps:
        return None
    return (
        f"the warm-up of {warmup} steps is longer than the run of {total_steps}: the learning rate "
        f"reaches {total_steps / warmup:.0%} of train.learning_rate at most. Set "
        f"train.warmup_steps to {total_steps // 10} or so, or leave it out."
    )


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Return the config in the YAML file `path` with `--set a.b=c` `overrides` applied.

    Raises FastFTError naming every problem at once: unknown keys (with the nearest known one),
    wrong types, impossible combinations.
    """
    path = Path(path)
    if path.suffix.lower() in DATA_SUFFIXES:
        config = f"{path.stem}.yaml"
        raise FastFTError(
            f"{path} is data, not a config. Make one for it, then train with that:\n"
            f"  fastft init --data {path} -o {config}\n  fastft train {config}"
        )
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = did_you_mean(path.name, beside)
        raise FastFTError(f"config file {path} {what}{near}. Write one with: fastft init -o {path}")
    values = read_yaml(path)
    if not overrides:
        return make_config(values, where=str(path))
    changed = copy.deepcopy(values)
    for override in overrides:
        _apply_override(changed, override)
    try:
        return make_config(changed, where=str(path))
    except FastFTError:
        make_config(values, where=str(path))  # the file's own mistakes are said first
        settings = " ".join(map(_short_setting, overrides))
        return make_config(changed, where=f"the settings on the command line ({settings})")


def _short_setting(override: str) -> str:
    return override if len(override) <= 60 else f"{override[:60]}..."


MOST_ALIASES = 50
MOST_CHARACTERS = 1_000_000
MOST_PROBLEMS = 50
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice, of which YAML would keep the last without a
    word, and more references to other places (`*name`) than a config has any use for: each can
    double what the file means.
    """

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MOST_ALIASES:
                mark = self.peek_event().start_mark
                problem = f"it has more than {MOST_ALIASES} aliases (*name)"
                raise yaml.composer.ComposerError(None, None, problem, mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key is a list or a mapping; keys are names"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first = seen.setdefault(key.value, key.start_mark.line + 1)
            if first != key.start_mark.line + 1:
                problem = f"the key {_short(key.value)} stands twice, first on line {first}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> Any:
    """Return what YAML `text` means; raises FastFTError where it is none, or absurdly large."""
    if len(text) > MOST_CHARACTERS:
        raise FastFTError(
            f"{where} has {len(text):,} characters; a config has at most {MOST_CHARACTERS:,}."
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise FastFTError(f"{where}{place}: not valid YAML: {problem}.") from error
    except RecursionError as error:
        raise FastFTError(f"{where}: not valid YAML: it is nested too deep.") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        # What PyYAML's own constructors say of a date that is none, or a number of 5,000 digits.
        raise FastFTError(f"{where}: not valid YAML: {_short(str(error))}.") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises FastFTError where it is not text, not YAML or not
    a mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(4 * MOST_CHARACTERS).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastFTError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise FastFTError(
            f"{path} is empty or not a mapping. Write a config with: fastft init > {path}"
        )
    return values


def _refuse_unwritable(value: Any, where: str, seen: set[int]) -> None:
    """Raise FastFTError for a text that no file name and no file can hold (NUL, half a character),
    and for a value that holds itself.
    """
    if isinstance(value, str):
        if "\0" in value or (not value.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in value)):
            raise FastFTError(
                f"{where}: {_short(value)} holds a NUL or half a character; no file is called so."
            )
    elif isinstance(value, dict | list):
        if id(value) in seen:
            raise FastFTError(f"{where}: it holds itself.")
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in inner:
            _refuse_unwritable(
                item, f"{where}: {key}" if not seen else f"{where}.{key}", seen | {id(value)}
            )


def _short(value: Any) -> str:
    """Return how a value is written, cut: a file may hold anything, a message only so much."""
    text = _SHORT.repr(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def make_config(values: dict[str, Any], where: str = "config") -> RunConfig:
    """Return the RunConfig of nested `values`; raises one FastFTError with all problems."""
    _refuse_unwritable(values, where, set())
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(item)]
        if len(lines) > MOST_PROBLEMS:
            lines = [*lines[:MOST_PROBLEMS], f"and {len(lines) - MOST_PROBLEMS:,} more"]
        head = f"{where}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise FastFTError(redact(head + "".join(f"\n  - {line}" for line in lines))) from error


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML with every default written out and no secrets."""
    return redact(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise FastFTError(
            f"--set {override!r}: write it as --set section.key=value, for example --set lora.r=32"
        )
    value = _parse(text, f"--set {_short(override)}")
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4 as text; people mean the number
    *parents, last = key.strip().split(".")
    for parent in parents:
        node = values.setdefault(parent, {})
        if not isinstance(node, dict):
            raise FastFTError(f"--set {override!r}: {parent} is {node!r}, not a section")
        values = node
    values[last] = value


def _explain(item: Any) -> list[str]:
    """Turn one pydantic error into lines a person can act on."""
    path = [str(part) for part in item["loc"]]
    # Union members put their own names into the location; keep what the user wrote.
    dotted = ".".join(
        part for part in path if part.isidentifier() and not part.startswith("literal")
    )
    if item["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        everywhere = {
            f"{s}.{k}" for s, f in RunConfig.model_fields.items() for k in _known_keys([s])
        } | set(known)
        near = did_you_mean(path[-1], known) or did_you_mean(dotted, everywhere)
        elsewhere = [full for full in sorted(everywhere) if full.split(".")[-1] == path[-1]]
        if not near and elsewhere:
            near = f" (did you mean {elsewhere[0]!r}?)"
        return [f"unknown key {dotted or path[-1]}{near}. Known here: {', '.join(known)}"]
    if item["type"] == "missing":
        return [f"{dotted} is missing; it has no default"]
    if item["type"] == "value_error":
        text = str(item["ctx"]["error"])
        return [f"{dotted}: {line}" if dotted else line for line in text.splitlines()]
    return [f"{dotted}: {item['msg'][0].lower()}{item['msg'][1:]}, got {_short(item['input'])}"]


def _known_keys(path: list[str]) -> list[str]:
    node: Any = RunConfig
    for part in path:
        field = node.model_fields.get(part)
        annotation = field.annotation if field else None
        node = next(
            (
                a
                for a in (annotation, *get_args(annotation))
                if isinstance(a, type) and issubclass(a, BaseModel)
            ),
            None,
        )
        if node is None:
            return []
    return list(node.model_fields)
