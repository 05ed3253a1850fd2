"""Loading a base model and attaching LoRA: `FastLanguageModel`, and what `fastft train` does with
it.

`FastLanguageModel` takes the keywords of Unsloth's and returns the same things, so an Unsloth
notebook runs with only the import line changed. The functions below it turn a RunConfig into those
calls and check what came back.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastft.config import MOVES_THE_BASE, LoraConfig, ModelConfig, RunConfig
from fastft.data.bounded import matches
from fastft.engines import choose_engine, get_engine
from fastft.engines.base import Engine
from fastft.errors import FastFTError, did_you_mean
from fastft.families import EXPERTS, taken_for_experts
from fastft.hardware import Choice, Hardware, probe
from fastft.models import check_checkpoint, explained, location

if TYPE_CHECKING:
    from fastft.planning import Situation

# the other names of lora.init are peft's own
PEFT_INIT = {"default": True, "pissa": "pissa_niter_16"}


class FastLanguageModel:
    """Drop-in for Unsloth's FastLanguageModel, on Unsloth where it runs and on plain transformers
    + peft elsewhere.
    """

    @staticmethod
    def from_pretrained(*args: Any, engine: str = "auto", **kwargs: Any) -> tuple[Any, Any]:
        """Return (model, tokenizer).

        Every keyword of Unsloth's `FastLanguageModel.from_pretrained` is passed on; those not
        given keep Unsloth's defaults. `engine` (auto, unsloth, stock) is fastft's own. Raises
        FastFTError for an unknown model, a folder that is no model, and a checkpoint that has only
        pickle weights.
        """
        name = kwargs.get("model_name", args[0] if args else None)
        if name is not None:
            check_checkpoint(str(name), revision=kwargs.get("revision"), token=kwargs.get("token"))
        quantization = "int8" if kwargs.get("load_in_8bit") else "none"
        chosen = get_engine(choose_engine(engine, probe(), quantization=quantization).value)
        model, tokenizer = chosen.from_pretrained(*args, **kwargs)
        model._fastft_engine = chosen.name
        return model, tokenizer

    @staticmethod
    def get_peft_model(model: Any, *args: Any, **kwargs: Any) -> Any:
        """Return `model` with LoRA attached; every keyword of Unsloth's `get_peft_model` is passed
        on.

        Names of target modules that the model does not have are left aside with a note where
        others match, as Unsloth does. Raises FastFTError where none does; the message lists those
        it has.
        """
        targets = kwargs.get("target_modules", args[1] if len(args) > 1 else None)
        missing = unknown_target_modules(model, targets)
        if isinstance(targets, list | tuple | set) and 0 < len(missing) < len(targets):
            print(
                f"fastft: the model has no {', '.join(missing)}; LoRA goes on the others that "
                "target_modules names",
                file=sys.stderr,
            )
        else:
            check_target_modules(model, targets)
        engine = _engine_of(model)
        peft_model = engine.get_peft_model(model, *args, **kwargs)
        peft_model._fastft_engine = engine.name
        return peft_model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Return `model` switched to generation."""
        return _engine_of(model).for_inference(model)

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: Any = None) -> Any:
        """Return `model` switched to training."""
        return _engine_of(model).for_training(model, use_gradient_checkpointing)


def load_for_training(
    config: ModelConfig,
    hardware: Hardware,
    *,
    gradient_checkpointing: bool,
    choices: dict[str, Choice],
    in_ram: bool = False,
) -> tuple[Any, Any, Engine]:
    """Return (model, tokenizer, engine) of the config's base model, without LoRA; with `in_ram` it
    stays in RAM, whatever computes.

    `choices` holds the already made choices "engine", "quantization" and "dtype" (see
    `choose_loading`); "dtype" is changed where Unsloth trains the family in another one (gemma3,
    gpt-oss: never in float16). Raises FastFTError where the checkpoint cannot be used.
    """
    import torch

    check_checkpoint(config.name, revision=config.revision)
    engine = get_engine(choices["engine"].value)
    quantization = choices["quantization"].value
    keywords: dict[str, Any] = {
        "model_name": location(config.name),
        "max_seq_length": config.max_seq_length,
        "dtype": getattr(torch, choices["dtype"].value),
        "load_in_4bit": quantization == "nf4",
        "load_in_8bit": quantization == "int8",
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "use_gradient_checkpointing": _checkpointing(gradient_checkpointing, engine, hardware.kind),
    }
    if in_ram:
        keywords["device_map"] = {"": "cpu"}
    if engine.name == "unsloth" and hardware.kind == "cuda":
        # It would load its own copy of a model it knows (pre-quantised in 4 bit, and without the
        # revision), which is neither the base that was planned and recorded nor the one that is
        # exported.
        keywords["use_exact_model_name"] = True
    with explained(config.name):
        model, tokenizer = engine.from_pretrained(**keywords)
    forbid_packed_nf4(model)
    if quantization != "none":
        _leave_the_files(model)
        _return_holes()
    if getattr(model, "_unsloth_forced_float32", False):
        choices["dtype"] = Choice(
            "float32", "Unsloth computes this family in float32 here: float16 overflows in it"
        )
    model._fastft_engine = engine.name
    return model, tokenizer, engine


def _leave_the_files(model: Any) -> None:
    """Give what is not quantised (embedding, head, norms) memory of its own.

    On a CPU it lies where the 16-bit checkpoint is mapped. A file is mapped as long as one tensor
    lies in it, and all of it that was read counts as memory of this process.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        quantised = type(tensor).__module__.startswith("bitsandbytes")
        if tensor.device.type == "cpu" and not quantised:
            tensor.data = tensor.data.clone()


def _return_holes() -> None:
    """Give the system back what quantising has freed: 16-bit weights lay between the 4-bit ones,
    and glibc keeps such holes unless it is asked (malloc_trim(3); others have no such call).
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _checkpointing(wanted: bool, engine: Engine, device: str) -> bool | str:
    """Return "unsloth" for Unsloth on a GPU, which offloads layer inputs to RAM; a plain True
    afterwards would undo it.
    """
    return "unsloth" if wanted and engine.name == "unsloth" and device == "cuda" else wanted


def tokens_to_train(
    config: LoraConfig, tokenizer: Any, template: Any, untrained: Sequence[int] = ()
) -> list[int]:
    """Return ids of the tokens whose embedding rows are trained: those named, or (auto) those an
    added template needs and those that the base never learnt (`untrained`, see
    `engines.rows.untrained_rows`).

    A base model whose vocabulary has the template's special tokens but never saw them in training
    answers with noise, without an end, unless these rows are learnt.
    """
    needed = template.needs_tokens if template is not None else []
    names = list(needed if config.train_tokens == "auto" else config.train_tokens)
    vocabulary = tokenizer.get_vocab()
    unknown = [name for name in names if name not in vocabulary]
    if unknown:
        raise FastFTError(
            f"lora.train_tokens: the tokenizer has no {', '.join(map(repr, unknown))}. Name "
            "tokens of its vocabulary."
        )
    found = untrained if config.train_tokens == "auto" else ()
    return sorted({*(vocabulary[name] for name in names), *found})


def choose_loading(config: RunConfig, hardware: Hardware) -> dict[str, Choice]:
    """Return every automatic choice of a run with its reason, before any engine is imported.

    quantization, dtype, optimizer, gradient_checkpointing and micro_batch_tokens come from the
    plan's arithmetic. Raises FastFTError for a checkpoint that cannot be used and for unknown
    target modules.
    """
    from fastft.planning import load_shape
    from fastft.planning.resolve import resolve

    check_checkpoint(config.model.name, revision=config.model.revision)
    shape = load_shape(config.model.name, config.model.revision)
    choices = dict(resolve(config, hardware, shape).choices)
    engine = choose_engine(
        config.model.engine, hardware, quantization=choices["quantization"].value
    )
    return {"engine": engine, **choices}


def settle_batching(
    config: RunConfig, hardware: Hardware, choices: dict[str, Choice], lengths: Iterable[int]
) -> Situation:
    """Choose gradient_checkpointing and micro_batch_tokens again, by the tokens of each of the
    data's sequences; changes `choices` and returns what is planned for.

    Before the data is read, both go by model.max_seq_length, which few sequences reach.
    """
    from fastft.planning import load_shape
    from fastft.planning.resolve import Lengths, settle

    shape = load_shape(config.model.name, config.model.revision)
    found = Lengths.of(lengths, config.train.effective_batch_size)
    resolved = settle(config, hardware, shape, choices["quantization"].value, found)
    seen = f"; the longest of the data's sequences has {found.longest:,} tokens"
    for name in ("gradient_checkpointing", "micro_batch_tokens"):
        choice = resolved.choices[name]
        asked = choice.reason == "asked for"
        choices[name] = choice if asked else Choice(choice.value, choice.reason + seen)
    return resolved.situation


def attach_lora(
    model: Any,
    engine: Engine,
    config: LoraConfig,
    *,
    seed: int,
    gradient_checkpointing: bool,
    train_token_ids: list[int],
) -> tuple[Any, int]:
    """Return (peft model, number of trainable parameters), checked against the closed form.

    LoRA on a linear layer of shape (out, in) has r (in + out) parameters (arXiv 2106.09685,
    section 4.1), DoRA `out` more; each trained token row has the embedding's width.
    """
    check_target_modules(model, config.target_modules)
    _refuse_names_of_experts(model, config.target_modules)
    check_target_parameters(model, config)
    _refuse_whole_embeddings(engine, config.target_modules)
    if config.init in MOVES_THE_BASE and train_token_ids:
        raise FastFTError(
            f"lora.init {config.init} cannot be combined with trained token rows "
            f"({len(train_token_ids)} tokens): peft loses "
            "them when it turns the adapter into one of the plain base. Set "
            "lora.train_tokens: [] or lora.init: default."
        )
    expected = count_lora_parameters(model, config, len(train_token_ids))
    keywords: dict[str, Any] = {
        "r": config.r,
        "target_modules": within_the_language_model(model, config.target_modules),
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "random_state": seed,
        "use_rslora": config.use_rslora,
        "init_lora_weights": PEFT_INIT.get(config.init, config.init),
        "use_gradient_checkpointing": _checkpointing(
            gradient_checkpointing, engine, model.device.type
        ),
    }
    if config.use_dora:
        keywords["use_dora"] = True
    if config.target_parameters:
        keywords["target_parameters"] = list(config.target_parameters)
    elif engine.name == "unsloth" and model.device.type == "cuda":
        # Left to itself, Unsloth's GPU path adds LoRA to the expert parameters of a mixture of
        # experts; fastft trains, counts, plans and exports the same adapter on every machine.
        keywords["target_parameters"] = []
    if train_token_ids:
        keywords["trainable_token_indices"] = sorted(train_token_ids)
    peft_model = engine.get_peft_model(model, **keywords)
    peft_model._fastft_engine = engine.name
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    if trainable != expected:
        raise FastFTError(
            f"the model has {trainable:,} trainable parameters, but LoRA r={config.r} on "
            f"{config.target_modules!r} should have {expected:,}. The {engine.name} engine trains "
            f"{_what_is_trained(peft_model)}. Name the wanted layers in lora.target_modules, "
            "or set "
            "model.engine: stock."
        )
    return peft_model, trainable


def _refuse_whole_embeddings(engine: Engine, target_modules: Any) -> None:
    """Raise FastFTError where Unsloth would train a whole matrix instead of a LoRA on it."""
    whole = {"lm_head", "embed_tokens"} & set(
        [target_modules] if isinstance(target_modules, str) else target_modules
    )
    if engine.name == "unsloth" and whole:
        name = min(whole)
        raise FastFTError(
            f"lora.target_modules names {name}: Unsloth trains that in full (it puts it into "
            "modules_to_save), instead of a LoRA on it. Set model.engine: stock for LoRA on "
            f"{name}, or leave it out."
        )


def _what_is_trained(peft_model: Any) -> str:
    """Say which kinds of parameters are trained, with their numbers."""
    sizes: Counter[str] = Counter()
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            kind = "in full" if ".modules_to_save." in name else "as LoRA"
            layer = re.sub(r"\.(lora_\w+|modules_to_save|base_layer)\..*", "", name)
            sizes[f"{layer.rsplit('.', 1)[-1]} {kind}"] += parameter.numel()
    return ", ".join(f"{count:,} of {what}" for what, count in sizes.most_common(8))


def language_model_path(model: Any) -> str:
    """Return where the language model lies in a multimodal class; "" for a plain one."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def within_the_language_model(model: Any, target_modules: Any) -> Any:
    """Return `target_modules` as peft takes them, kept to the language model's linear layers.

    Text never reaches a vision tower, so an adapter there would only cost memory. Experts are
    parameters, not layers: peft would take all-linear to mean them, too, where older versions of
    transformers had layers there; and routers, which it cannot all compute. A regular expression or
    a dotted name is meant as it stands.
    """
    path = language_model_path(model)
    if not path and target_modules == "all-linear" and _is_mixture(model):
        return sorted({name.rsplit(".", 1)[-1] for name, _ in _targeted(model, "all-linear")})
    if isinstance(target_modules, str) and target_modules.isidentifier():
        target_modules = [target_modules]  # peft would take a text for a pattern of whole names
    if not path or not _plain_names(target_modules):
        return target_modules
    names = [name for name, _ in _targeted(model, target_modules)]
    inside = sorted({n.rsplit(".", 1)[-1] for n in names if n.startswith(f"{path}.")})
    outside = [re.escape(n) for n in names if not n.startswith(f"{path}.")]  # the head
    return "|".join([rf"{re.escape(path)}\.(?:.*\.)?(?:{'|'.join(inside)})", *outside])


def _is_mixture(model: Any) -> bool:
    experts = _experts(model)
    routers = (_is_router(name, module, experts) for name, module in model.named_modules())
    return _has_experts(model) or any(routers)


def _experts(model: Any) -> int:
    """Return how many experts a layer of the model has; 0 for none."""
    config = model.config.get_text_config()
    return next((n for key in EXPERTS if isinstance(n := getattr(config, key, None), int)), 0)


def _is_router(name: str, module: Any, experts: int) -> bool:
    """Whether a module is the linear layer that gives each token its experts.

    Some return more than a product (PhiMoE's), on which peft's LoRA fails; and a changed router
    sends tokens elsewhere, which is not what all-linear asks for.
    """
    tail = name.split(".")[-2:]
    gate = "gate" in tail and getattr(module, "out_features", None) == experts
    return hasattr(module, "in_features") and (gate or "router" in tail)


def _has_experts(model: Any) -> bool:
    return any(p.ndim == 3 and ".experts." in name for name, p in model.named_parameters())


def _plain_names(target_modules: Any) -> bool:
    """Whether these are names of layers, without a path or a pattern."""
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    return all(name == "all-linear" or name.isidentifier() for name in names)


def count_lora_parameters(model: Any, config: LoraConfig, train_tokens: int = 0) -> int:
    """Return the closed-form number of LoRA parameters: sum of r (in + out) over targets and
    experts, DoRA + out, token rows.
    """
    total = 0
    for _, module in _targeted(model, config.target_modules):
        total += config.r * (module.in_features + module.out_features)
        total += module.out_features if config.use_dora else 0
    for _, parameter in expert_parameters(model, config.target_parameters):
        experts, *sizes = parameter.shape
        total += experts * config.r * sum(sizes)
    if train_tokens:
        total += train_tokens * model.get_input_embeddings().embedding_dim
    return total


def expert_parameters(model: Any, target_parameters: Sequence[str]) -> list[tuple[str, Any]]:
    """Return (name, parameter) of every expert parameter that `target_parameters` names, as peft
    finds them: by the whole name or its end.
    """
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and any(name == wanted or name.endswith(f".{wanted}") for wanted in target_parameters)
    ]


def check_target_parameters(model: Any, config: LoraConfig) -> None:
    """Raise FastFTError for names of lora.target_parameters that match no expert parameter, and
    for what peft cannot do on one.
    """
    experts = sorted(
        {
            ".".join(name.split(".")[-3:])
            for name, p in model.named_parameters()
            if p.ndim == 3 and ".experts." in name
        }
    )
    missing = [n for n in config.target_parameters if not expert_parameters(model, [n])]
    if missing:
        has = f"It has: {', '.join(experts)}." if experts else "It is no mixture of experts."
        raise FastFTError(
            f"lora.target_parameters: the model has no {', '.join(map(repr, missing))}. {has}"
        )
    wrong = {
        "lora.dropout": config.dropout > 0,
        "lora.use_dora": config.use_dora,
        f"lora.init {config.init}": config.init not in {"default", "gaussian"},
    }
    if config.target_parameters and any(wrong.values()):
        names = ", ".join(name for name, set_so in wrong.items() if set_so)
        raise FastFTError(
            f"lora.target_parameters cannot be combined with {names}: peft has LoRA on experts "
            "only plain. Set them to their defaults, or leave the experts out."
        )


def check_target_modules(model: Any, target_modules: Any) -> None:
    """Raise FastFTError for target modules that match nothing; the message lists the model's
    linear layers.
    """
    missing = unknown_target_modules(model, target_modules)
    empty = not target_modules and target_modules is not None
    if missing or empty:
        valid = sorted({name.rsplit(".", 1)[-1] for name, _ in _targeted(model, "all-linear")})
        what = (
            ", ".join(f"{name!r}{did_you_mean(name, valid)}" for name in missing) or "an empty list"
        )
        experts = (
            " Its experts are parameters, not layers, and stay as they are."
            if _has_experts(model)
            else ""
        )
        raise FastFTError(
            f"lora.target_modules: the model has no {what}. It has: {', '.join(valid)}; or "
            f"use all-linear.{experts}"
        )


def _refuse_names_of_experts(model: Any, target_modules: Any) -> None:
    """Raise FastFTError where peft would train the experts instead of layers of the same name: the
    config means what it says. The notebook path leaves it to peft, as Unsloth does.
    """
    others = taken_for_experts(getattr(model.config, "model_type", ""))
    if not others or target_modules is None or target_modules == "all-linear":
        return
    named = {name.rsplit(".", 1)[-1] for name, _ in _targeted(model, target_modules)} & others
    if named:
        raise FastFTError(
            f"lora.target_modules means {', '.join(sorted(named))}: of {model.config.model_type} "
            "peft takes these names for the experts, also where a shared or dense layer has them. "
            "Leave them out, or train the experts with lora.target_parameters."
        )


def unknown_target_modules(model: Any, target_modules: Any) -> list[str]:
    """Return the names of `target_modules` that no layer of the model has."""
    if target_modules is None or target_modules == "all-linear":
        return []
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if isinstance(target_modules, str) and not target_modules.isidentifier():
        return [] if _targeted(model, target_modules) else [target_modules]
    have = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if not list(module.children())
    }
    paths = [name for name, _ in model.named_modules()]
    # Phi-3 and others fuse what Llama splits; Unsloth and fastft map the split names onto the fused
    # ones.
    have |= {split for split, fused in FUSED.items() if fused in have}
    return [
        n for n in names if n not in have and not any(p == n or p.endswith("." + n) for p in paths)
    ]


FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}  # fmt: skip


def _targeted(model: Any, target_modules: Any) -> list[tuple[str, Any]]:
    """Return (name, linear layer) of every layer that LoRA is put on; the head is not part of
    all-linear, nor are routers and what peft takes for experts, and of a multimodal model only the
    language model is.
    """
    path = language_model_path(model) if _plain_names(target_modules) else ""
    head = model.get_output_embeddings()
    linear = [
        (n, m)
        for n, m in model.named_modules()
        if hasattr(m, "in_features")
        and hasattr(m, "out_features")
        and (n.startswith(f"{path}." if path else "") or m is head)
    ]
    if target_modules == "all-linear":
        others = taken_for_experts(getattr(model.config, "model_type", ""))
        experts = _experts(model)
        return [
            (n, m)
            for n, m in linear
            if m is not head
            and n.rsplit(".", 1)[-1] not in others
            and not _is_router(n, m, experts)
        ]
    if isinstance(target_modules, str) and not _plain_names(target_modules):
        return [(n, m) for n, m in linear if matches(target_modules, n, whole=True)]
    leaves = {name.rsplit(".", 1)[-1] for name, _ in linear}
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    wanted += [FUSED[n] for n in wanted if n in FUSED and n not in leaves and FUSED[n] in leaves]
    return [(n, m) for n, m in linear if any(n == w or n.endswith("." + w) for w in wanted)]


def forbid_packed_nf4(model: Any) -> None:
    """Keep bitsandbytes' CPU layers on the layout that has a backward.

    Its CPU path repacks NF4 weights at the first forward without gradients (an evaluation, a
    generation) and never unpacks them; the backward of a later training step is then silently
    wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _engine_of(model: Any) -> Engine:
    return get_engine(
        getattr(model, "_fastft_engine", None) or choose_engine("auto", probe()).value
    )
