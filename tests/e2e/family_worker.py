"""One engine, all families, in one process: load, attach, compare gradients, train, save, reload. Prints JSON.

usage: python -m tests.e2e.family_worker ENGINE FOLDER
"""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from fastft.engines import get_engine

ENGINE = get_engine(sys.argv[1])  # before torch and transformers: Unsloth must come first

import numpy as np  # noqa: E402
import torch  # noqa: E402

from fastft.data.batches import micro_batches, segments_of, supervised_tokens  # noqa: E402
from fastft.engines.attention import is_known_family, padding_free  # noqa: E402
from tests.families import FAMILIES, make_checkpoint  # noqa: E402

EAGER = {"gemma2", "gpt-oss"}  # whose softcaps and sinks SDPA drops: the reference must be eager


def load(folder, family):
    model, _ = ENGINE.from_pretrained(
        str(folder),
        dtype=torch.float32,
        load_in_4bit=False,
        max_seq_length=128,
        attn_implementation="eager" if family in EAGER else None,
    )
    return model


def attach(model):
    return ENGINE.get_peft_model(
        model, r=4, target_modules="all-linear", use_gradient_checkpointing=False, random_state=1
    )


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def accumulate(model, segments, budget, padded):
    """Return (loss, gradient) of one step."""
    model.zero_grad()
    total, supervised = 0.0, supervised_tokens(segments)
    with contextlib.nullcontext() if padded else padding_free(model), ENGINE.loss_mode(model):
        for batch in micro_batches(segments, budget, padded=padded, pad_token_id=0, device="cpu"):
            loss = model(**batch.inputs, num_items_in_batch=supervised, use_cache=False).loss
            loss.backward()
            total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in trainable(model)])


def samples(vocab_size, lengths=(3, 40, 17, 29, 64, 5)):
    rng = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = rng.integers(0, vocab_size, length)
        labels = ids.copy()
        labels[: rng.integers(0, length - 1)] = -100
        rows.append(SimpleNamespace(input_ids=ids, labels=labels, segments=[length]))
    return rows


def examine(family, folder):
    base = make_checkpoint(family, folder / family)
    model = attach(load(base, family)).train()
    segments = segments_of(samples(model.config.get_text_config().vocab_size))
    with torch.no_grad():  # B starts at zero: without this no error in it could show
        generator = torch.Generator().manual_seed(0)
        for parameter in trainable(model):
            parameter.normal_(0, 0.05, generator=generator)
    reference_loss, reference = accumulate(model, segments, 10**6, padded=True)
    worst = 0.0
    for budget in (30, 70, 1000):
        loss, gradient = accumulate(model, segments, budget, padded=False)
        worst = max(worst, float((gradient - reference).norm() / reference.norm()), abs(loss - reference_loss))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(accumulate(model, segments, 70, padded=False)[0])
        optimizer.step()
    model.eval()
    ids = torch.from_numpy(segments[1].input_ids)[None]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        model.save_pretrained(str(folder / "adapter" / family))
        from peft import PeftModel

        again = PeftModel.from_pretrained(load(base, family), str(folder / "adapter" / family)).eval()
        reloaded = again(input_ids=ids).logits
    return {
        "known": is_known_family(model),
        "gradient_norm": float(reference.norm()),
        "exactness": worst,
        "losses": losses,
        "reload_difference": float((trained - reloaded).abs().max()),
        "attention_after": model.get_base_model().config._attn_implementation,
    }


if __name__ == "__main__":
    print(json.dumps({family: examine(family, Path(sys.argv[2])) for family in FAMILIES}))
