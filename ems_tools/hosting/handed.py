"""The schedules that our own scheduler gave to the host, by which its sampler knows their last part again.

For image to image a host asks for the schedule of more steps and gives the sampler its last part; denoise itself it tells
neither of the two. Only there may the sampler place evaluations where a file has fitted them for such a beginning: any other
schedule was chosen by the user, and is followed exactly.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from .runs import Steps

__all__ = ["Handed"]

_KEPT = 64
_TOLERANCE = 5e-6
"""Relative, of levels: hosts hold them in float32. `runs.choose_steps` sees to it that no other schedule is as near."""


class Handed:
    """The latest schedules that were given out."""

    def __init__(self) -> None:
        self._known: deque[tuple[Tensor, bool]] = deque(maxlen=_KEPT)

    def give(self, chosen: Steps) -> Tensor:
        """The levels of `chosen` [n + 1] in float32, remembered where its file holds steps for image to image."""
        levels = chosen.levels.to(torch.float32)
        if chosen.images:
            self._known.append((levels.to("cpu", torch.float64), chosen.part))
        return levels

    def is_part(self, levels: Tensor) -> bool:
        """Whether these levels are the last part of a schedule that was given out."""
        mine = levels.detach().to("cpu", torch.float64)
        return len(mine) > 1 and any(_ends_with(known, part, mine) for known, part in self._known)


def _ends_with(known: Tensor, part: bool, mine: Tensor) -> bool:
    if len(mine) > len(known) - (not part):
        return False
    return torch.allclose(known[len(known) - len(mine) :], mine, rtol=_TOLERANCE, atol=0)
