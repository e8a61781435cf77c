"""How long statistics would take on this machine, measured during a run that had none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...sampler import StepInfo

__all__ = ["Clock"]


class Clock:
    """A callback of a run: seconds of one evaluation of the whole batch, from the second on (the first may load the model).

    Args:
        callback: the host's own, called after it.
    """

    def __init__(self, callback: Callable[[StepInfo], object] | None) -> None:
        self.callback, self.seconds = callback, 0.0
        self._first, self._count = 0.0, 0

    def __call__(self, state: StepInfo) -> None:
        """After each step."""
        now = time.perf_counter()
        if self._count:
            self.seconds = (now - self._first) / self._count
        else:
            self._first = now
        self._count += 1
        if self.callback is not None:
            self.callback(state)

    def cost(self, batch: int) -> str:
        """What "quick" would take for one guidance scale, as "12 min"; "" before the second evaluation.

        Args:
            batch: pictures that were evaluated at once.
        """
        from .jobs import evaluations_of_effort, in_words  # brings the estimator, which a run with a file does not need

        return in_words(self.seconds / batch * evaluations_of_effort("quick")) if self.seconds else ""
