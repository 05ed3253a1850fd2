"""What several runs in one process share: the tokenizer, the tokenised data, the frozen base.

A run alone loads each of them once. In a sweep the next trial finds here what the last one used,
where its settings ask for the same, and the base as it was before the last trial's adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Kept:
    """Values by what they are and what they were made of; of each kind the latest alone is held."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[str, Any]] = {}
        self._adapted: Any = None
        self._weights: list[tuple[str, int]] = []

    def once(self, what: str, of: Any, make: Callable[[], T]) -> T:
        """Return what `make` gives, or gave before for an equal `of` (anything that JSON holds)."""
        key = json.dumps(of, sort_keys=True, default=str)
        if self._values.get(what, (None,))[0] != key:
            self._values.pop(what, None)  # released before the next one is made
            self._values[what] = (key, make())
        value: T = self._values[what][1]
        return value

    def base(self, of: Any, load: Callable[[], T]) -> T:
        """Return the loaded base (a tuple that begins with the model), without any adapter.

        It is loaded anew where the last adapter's removal left anything else behind than the
        parameters that were there before.
        """
        if self._adapted is not None:
            bare = self._adapted.unload()
            if _parameters(bare) != self._weights:
                self._values.pop("base", None)
            self._adapted = None
        loaded = self.once("base", of, load)
        self._weights = _parameters(loaded[0])  # type: ignore[index]
        return loaded

    def adapted(self, model: Any, *, moves_the_base: bool) -> None:
        """Remember that `model` is the base with an adapter; `moves_the_base`: the base's own
        weights were changed by it, so that no other run may have them.
        """
        self._adapted = None if moves_the_base else model
        if moves_the_base:
            self._values.pop("base", None)


def _parameters(model: Any) -> list[tuple[str, int]]:
    return [(name, id(parameter)) for name, parameter in model.named_parameters()]
