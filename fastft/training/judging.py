"""What `train.eval_metrics` measures at each evaluation: greedy answers to held-out
conversations.
"""

from __future__ import annotations

from typing import Any

from fastft.config import TrainConfig
from fastft.inference import metrics
from fastft.inference.generate import answer

SAMPLES = 3  # answers kept of each evaluation
MOST_NEW_TOKENS = 256


def judge_answers(prepared: Any, settings: TrainConfig) -> dict[str, Any]:
    """Return {metric: share of right answers, 0 to 1}, with "samples" and what is best "by".

    `prepared` is the session's. The questions are the conversations that the data layer keeps (64
    at most, always the same), the answers greedy and at most twice as long as the longest expected
    one. No random number is drawn, so training goes on as if nothing had been asked.
    """
    asked = prepared.data.eval_conversations(64)
    longest = max((len(turn.reference.encode()) for turn in asked), default=0)
    said = [
        answer(
            prepared.model,
            prepared.engine,
            prepared.tokenizer,
            prepared.data.template,
            turn.prompt,
            max_new_tokens=min(MOST_NEW_TOKENS, max(32, 2 * longest)),
            tools=turn.tools,
        )
        for turn in asked
    ]
    pairs = list(zip(said, asked, strict=True))
    found: dict[str, Any] = {}
    for name in settings.eval_metrics:
        score = getattr(metrics, name)
        found[name] = sum(score(text, [turn.reference]) for text, turn in pairs) / max(len(said), 1)
    if settings.best_by != "loss":
        found["best_by"] = settings.best_by
    found["samples"] = [
        {"prompt": turn.prompt[-1]["content"], "reference": turn.reference, "answer": text}
        for text, turn in pairs[:SAMPLES]
    ]
    return found
