"""How much to fit, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["KEPT", "FitPlan", "evaluations_of_fit", "evaluations_of_passes", "searched_steps", "turned_steps"]

KEPT = 2
"""Entrants of the panel that are left after the first heat; this sampler without a file joins them."""


@dataclass(frozen=True)
class FitPlan:
    """How much to fit.

    Args:
        steps: step counts fitted.
        noises: to fit coefficients on; the statistics' own trajectories, as far as they reach.
        held_out: to judge on, those of no other use.
        fixed: schedules of the host that the panel of formulas may use too, levels as a function of the number of steps, by
            name.
        search: noises to choose the spacing on (0: the first candidate is taken), `spacings` of the candidates and the
            schedule of the panel's likeliest tried, at `searched` of the step counts (the others take over the choice of the
            nearest one).
        moves: further spacings tried around the best candidate, at the same step counts.
        finalists: of all these, the best so many are compared once more, on all noises.
        panel: formulas on schedules tried as what the fit has to beat, at the same step counts, on `heat` noises of the
            fit's: on the same noise they differ by what they are, so few tell them apart. The best two, and this sampler
            without a file, run at every step count on the first `panel_noises` of those held out, and the best of these on
            all of them.
        passes: for steps in fewer passes of the network, spacings that they are tried on beside that of the guided steps; 0:
            none are fitted.
        turns: rounds in which the lambdas are turned at `turned` of the step counts, on `turn_noises`.
        rounds: of refinement for the final error, on `refine_noises`, for at most `refined` steps, and for those in the passes
            of at most `passes_refined`.
        partial: whether steps for image to image are fitted as well, see `partial`.
    """

    steps: tuple[int, ...] = (4, 5, 6, 7, 8, 9, 10, 11, 12)
    noises: int = 24
    held_out: int = 16
    fixed: Mapping[str, Callable[[int], Tensor]] = field(default_factory=dict)
    search: int = 8
    spacings: int = 10
    searched: int = 4
    moves: int = 4
    finalists: int = 1
    panel: int = 24
    heat: int = 2
    panel_noises: int = 6
    turns: int = 2
    turned: int = 4
    turn_noises: int = 6
    rounds: int = 0
    refine_noises: int = 12
    refined: int = 8
    passes_refined: int = 8
    passes: int = 0
    partial: bool = False


def searched_steps(plan: FitPlan) -> list[int]:
    """The step counts at which spacings and formulas are compared."""
    return _spread(plan.steps, plan.searched)


def turned_steps(plan: FitPlan) -> list[int]:
    """The step counts at which lambdas are turned."""
    return _spread(plan.steps, plan.turned) if plan.turns else []


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """So many of the step counts, spread over all of them; one alone in the middle."""
    wanted = sorted(set(steps))
    count = min(count, len(wanted))
    if count == len(wanted):
        return wanted
    picks = [(2 * i + 1) * len(wanted) // (2 * count) for i in range(count)]
    return [wanted[i] for i in picks]


def evaluations_of_fit(plan: FitPlan, grid: int, scales: int, known: int = 0) -> int:
    """Denoiser evaluations of `fit_steps` at most, for this many guidance scales.

    `grid` points of a trajectory, `known` of which the statistics have solved already.
    """
    teacher = (max(plan.noises - known, 0) + plan.held_out) * grid
    search = plan.search * (plan.spacings + plan.moves + 1) if plan.spacings + plan.moves > 1 else 0
    searched = sum(searched_steps(plan)) * (search + plan.panel * plan.heat)
    if search and plan.finalists > 1:  # the winner's fit is that of its step count, unless its lambdas are turned as elsewhere
        turned = turned_steps(plan)
        searched += sum(n * plan.noises * (plan.finalists - (n in turned or not turned)) for n in searched_steps(plan))
    heat = min(plan.panel, KEPT) * min(plan.panel_noises, plan.held_out)
    runs = sum(set(plan.steps)) * (plan.noises + heat + 2 * plan.held_out)
    few = min(plan.turn_noises, plan.noises)
    turns = sum(few * (n * (n + 1) // 2 + n) + plan.noises * n for n in turned_steps(plan)) * plan.turns
    refinement = sum(_cost_of_refinement(plan, n) for n in set(plan.steps))
    return scales * (teacher + searched + runs + turns + refinement)


def evaluations_of_passes(plan: FitPlan, scales: Sequence[float]) -> int:
    """Denoiser evaluations of `fit_passes` at most, at these guidance scales; a conditional pass alone counts as one."""
    from .passes import FINALISTS, SEARCH, patterns

    if not plan.passes:
        return 0
    total = 0
    for n in set(plan.steps):
        sizes = [2 * len(pattern) for pattern in patterns(n)]
        if not sizes:
            continue
        total += ((plan.passes + 1) * sizes[0] + sum(sizes[1:])) * min(SEARCH, plan.noises)
        total += FINALISTS * max(sizes) * plan.noises + 3 * n * plan.held_out
        total += max(_cost_of_refinement(plan, n, pattern) for pattern in patterns(n))
    return total * sum(g != 1 for g in scales)


def _cost_of_refinement(plan: FitPlan, steps: int, guided: Sequence[bool] = ()) -> int:
    """A knob costs the evaluations after it; a round also one run before and at most three after it.

    `guided` is the pattern of steps in fewer passes, of as many passes as `steps` guided ones.
    """
    from .refine import knobs_of

    if not plan.rounds or steps > (plan.passes_refined if guided else plan.refined):
        return 0
    answers = [1 + both for both in guided] or [1] * steps
    knobs = knobs_of(len(answers), guided)
    runs = sum(sum(answers[i + (what in ("y", "D")) :]) for what, i, _ in knobs) + 4 * sum(answers)
    return plan.rounds * plan.refine_noises * runs + 2 * plan.noises * sum(answers)
