"""The loss curve while a notebook's cell trains: one picture below it, drawn again in place."""

from __future__ import annotations

import io
import sys
import time
from typing import Any

from fastft.runs.folder import loss_figure

SECONDS_BETWEEN_PICTURES = 5.0


class LivePlot:
    """Shows the loss of a run that goes on; does nothing outside a notebook."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._handle: Any = None
        self._last = time.monotonic() - SECONDS_BETWEEN_PICTURES + 1.0
        self._display = _display() if in_notebook() else None

    def show(self, log: list[dict[str, Any]], *, now: bool = False) -> None:
        """Draw the lines of log.jsonl so far, if the last picture is some seconds old or `now`."""
        late = time.monotonic() - self._last >= SECONDS_BETWEEN_PICTURES
        if self._display is None or not (late or now):
            return
        self._last = time.monotonic()
        figure = loss_figure(log, None, title=self.title)
        if figure is None:
            return
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=90)
        image = _image(picture.getvalue())
        if self._handle is None:
            self._handle = self._display(image, display_id=True)
        else:
            self._handle.update(image)


def in_notebook() -> bool:
    """Return whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


def _display() -> Any:
    from IPython.display import display

    return display


def _image(png: bytes) -> Any:
    from IPython.display import Image

    return Image(data=png, format="png", width=640)
