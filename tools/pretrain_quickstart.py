"""Make the quickstart's base model: ``python tools/pretrain_quickstart.py --out DIR``.

A Llama of 3.6M parameters reads about 120 made-up towns until it can complete most sentences about
them. Two things decide whether it does: it begins with 20 towns and meets the others step by step
(drawing from all of them at once stays on a plateau where only the form of the sentences is
learnt), and progress is judged by recall of the facts, since the loss is mostly the unguessable
choice of town and wording.

With one machine and thread count a seed gives one result; other machines round differently.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastft.quickstart import world
from fastft.quickstart.tables import ATTRIBUTES, LANGUAGES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCAB_SIZE = 1920
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = [END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>"]
SEQUENCE_LENGTH, SEQUENCES = 256, 8
PEAK_LEARNING_RATE = 2e-3
FIRST_TOWNS = 20


def make_tokenizer(seed: int) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer of 1,920 tokens, trained on the world's documents.

    The merges are learnt on text that is also cut where the script changes, so no token spans a
    particle and the word beside it, and a Japanese value has the same tokens in a sentence and
    alone. What ships is GPT-2's plain pre-tokenizer, which llama.cpp knows.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    by_script = pre_tokenizers.Split(
        Regex(r"\p{Han}+|\p{Hiragana}+|[\p{Katakana}ー]+"), behavior="isolated"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_script, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = world.documents(random.Random(seed), world.PRETRAINED)
    tokenizer.train_from_iterator((next(stream) for _ in range(30_000)), trainer)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the random Llama: 3.6M parameters, every row length a multiple of 256 (K-quants need
    that).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def towns_known_at(step: int, steps: int) -> Sequence[world.Town]:
    """Return the towns that documents tell about at `step`: 20, growing geometrically to all by
    half of `steps`.
    """
    share = min(1.0, step / (0.5 * steps))
    count = round(FIRST_TOWNS * (len(world.PRETRAINED) / FIRST_TOWNS) ** share)
    # Fine-tuned and held-out towns take turns, so that both halves are read equally often.
    order = [town for pair in zip(world.FINE_TUNED, world.HELD_OUT, strict=True) for town in pair]
    return order[:count]


def learning_rate_at(step: int, steps: int) -> float:
    """Return the rate: warm-up over 20 steps, constant, then linear to zero over the last 35 %."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 20, (steps - step) / (0.35 * steps))


def batches(tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield `steps` tensors of token ids, (8, 256): documents joined by <|endoftext|>, cut without
    padding.
    """
    import torch

    rng = random.Random(seed)
    ids: list[int] = []
    for step in range(steps):
        stream = world.documents(rng, towns_known_at(step, steps))
        while len(ids) < SEQUENCES * SEQUENCE_LENGTH:
            ids += [
                *tokenizer.encode(next(stream), add_special_tokens=False),
                tokenizer.eos_token_id,
            ]
        yield torch.tensor(ids[: SEQUENCES * SEQUENCE_LENGTH]).view(SEQUENCES, SEQUENCE_LENGTH)
        ids = []  # the curriculum moves on; what is left over is not worth keeping


def cloze_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, clozes: Sequence[world.Cloze]
) -> float:
    """Return the share of `clozes` whose whole value is what greedy decoding gives after the
    prompt.

    One teacher-forced pass over right-padded rows: every token of the value must be the argmax,
    which is the same as decoding it greedily.
    """
    import torch

    recalled = 0
    for start in range(0, len(clozes), 64):
        part = clozes[start : start + 64]
        prompts = [tokenizer.encode(END_OF_TEXT + c.prompt, add_special_tokens=False) for c in part]
        values = [tokenizer.encode(c.value, add_special_tokens=False) for c in part]
        rows = [p + v for p, v in zip(prompts, values, strict=True)]
        width = max(map(len, rows))
        batch = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        with torch.no_grad():
            best = model(input_ids=batch).logits.argmax(
                -1
            )  # (rows, width); position t predicts t + 1
        for guess, prompt, value in zip(best.tolist(), prompts, values, strict=True):
            recalled += guess[len(prompt) - 1 : len(prompt) - 1 + len(value)] == value
    return recalled / len(clozes)


def recall_by_language(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, towns: Sequence[world.Town]
) -> dict[str, float]:
    """Return the cloze recall over every paraphrase of every fact of `towns`, by language."""
    return {
        language: cloze_recall(
            model,
            tokenizer,
            [c for town in towns for a in ATTRIBUTES for c in world.clozes(town, a, language)],
        )
        for language in LANGUAGES
    }


def pretrain(out: Path, steps: int = 800, seed: int = 3407) -> dict[str, float]:
    """Train and save the base model in `out` (bfloat16); return the recall of the saved model, by
    language.
    """
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer)
    print(
        f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    began = time.monotonic()
    for step, batch in enumerate(batches(tokenizer, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            known = towns_known_at(step, steps)
            recall = recall_by_language(model, tokenizer, known[:: max(1, len(known) // 10)])
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.3f}  towns {len(known)}  recall "
                f"en {recall['en']:.0%} "
                f"ja {recall['ja']:.0%}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    return recall_by_language(saved, tokenizer, world.PRETRAINED)


def main() -> None:
    """Read the command line, pretrain, print the recall as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model and its tokenizer"
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=3407)
    options = parser.parse_args()
    print(json.dumps({"cloze_recall": pretrain(options.out, options.steps, options.seed)}))


if __name__ == "__main__":
    main()
