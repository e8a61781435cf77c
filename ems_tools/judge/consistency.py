"""What a statistics file says against itself; no model is needed.

Whether the moments, where there are any, give these l, s, b, and whether evidence, recommendation and fit agree. The reader has
checked format, checksum, shapes and ranges before.
"""

from __future__ import annotations

import math

from ..estimate.merge import moments_problem
from ..estimate.moments import Moments
from ..file.contents import EMSFile
from ..file.rows import EvidenceRow, advice_by_case

__all__ = ["case_of", "consistency_problems", "evidence_problems", "numbers_in"]


def consistency_problems(file: EMSFile) -> list[str]:
    """What in a file contradicts itself; empty if nothing does."""
    return [*evidence_problems(file), *_selection_problems(file), *_moment_problems(file), *_fit_problems(file)]


def _selection_problems(file: EMSFile) -> list[str]:
    """Settings were chosen as the best of several on calibration noise: what was among them cannot be better."""
    advice = advice_by_case(file.meta)
    problems = []
    for row in file.meta.evidence:
        entry = advice.get((row.guidance, row.schedule, row.steps))
        if row.split != "calibration" or entry is None:
            continue
        if row.ems > row.full_strength and entry.settings.strength:  # at strength 0 the run without a file may have won
            numbers = f"{row.full_strength:g} against {row.ems:g}"
            problems.append(
                f"{case_of(row)}: full strength, which was tried too, is better than the recommendation ({numbers})"
            )
        if entry.settings.strength == 0 and row.ems != row.data_prediction:
            problems.append(f"{case_of(row)}: strength 0 is data prediction, and yet the two errors differ")
    return problems


def case_of(row: EvidenceRow) -> str:
    """Guidance, schedule and steps, in words."""
    return f"guidance {row.guidance:g}, {row.schedule}, {row.steps} steps"


def _moment_problems(file: EMSFile) -> list[str]:
    """l, s, b again from the moments, to the precision in which they are kept."""
    problems = []
    claimed = numbers_in(file.meta.estimate.get("samples"))
    for g, guidance in enumerate(file.guidance.tolist()):
        sums, count = file.moments.get(f"sums.{g}"), file.moments.get(f"count.{g}")
        if sums is None or count is None:
            continue
        place = f"guidance {guidance:g}"
        problem = moments_problem(file, sums, count)
        if problem:
            problems.append(f"{place}: {problem}")
            continue
        moments = Moments(file.lambdas, count, sums)
        for name, theirs in zip("lsb", moments.values(), strict=True):
            mine = getattr(file, name)[g].double()
            off = (mine - theirs).abs() - 1e-5 * (1 + theirs.abs())
            if not bool((off <= 0).all()):
                worst = (mine - theirs).abs().max().item()
                problems.append(f"{place}: {name} is not what the moments give (it differs by up to {worst:.3g})")
        if g < len(claimed) and claimed[g] != moments.samples:
            problems.append(f"{place}: says {claimed[g]:g} samples, the moments hold {moments.samples}")
    return problems


def _fit_problems(file: EMSFile) -> list[str]:
    """Coefficients are kept where they won, or those of the panel's best, at ratio 1; the ratio is that of the errors.

    For image to image they are kept where they won over the run without them, and the ratio is that over the best other way.
    """
    problems = []
    for row in (*file.meta.fitted, *file.meta.passes, *file.meta.partial):
        inside = row in file.meta.partial
        begun = f", from lambda {row.lambdas[0]:g}" if inside else ""
        place = f"guidance {row.guidance:g}, fitted, {row.steps} steps in {row.passes} passes{begun}"
        lost = row.coefficients is not None and row.ratio[0] > 1
        if (row.coefficients is None and row.ratio[0] < 1) or (lost and not inside):
            problems.append(f"{place}: coefficients are kept where they win, and the ratio is {row.ratio[0]:g}")
        if min(row.fixed[0], row.fitted[0]) > 1e-25 and max(row.fixed[0], row.fitted[0]) < 1e25:
            expected = row.fitted[0] / row.fixed[0]
            if abs(math.log(max(row.ratio[0], 1e-30) / expected)) > 2e-3:
                problems.append(f"{place}: the ratio is {row.ratio[0]:g}, but the errors give {expected:.4g}")
    return problems


def evidence_problems(file: EMSFile) -> list[str]:
    """What does not fit between a file's evidence and its recommendation; empty if all does.

    On calibration noise a recommendation never loses to data prediction, and the two cover the same cases.
    """
    rows, advice = file.meta.evidence, advice_by_case(file.meta)
    problems = []
    for row in rows:
        if row.split == "calibration" and row.ems > row.data_prediction:
            case = f"guidance {row.guidance:g}, {row.schedule}, {row.steps} steps"
            lost = f"loses to data prediction on calibration noise, {row.ems:g} against {row.data_prediction:g}"
            problems.append(f"{case}: the recommendation {lost}")
    judged = {(r.guidance, r.schedule) for r in rows}
    advised = {(r.guidance, r.schedule) for r in file.meta.recommendation}
    for guidance, schedule in sorted((judged | advised) - {(g, name) for g, name, _ in advice}):
        problems.append(f"guidance {guidance:g}, {schedule}: evidence and recommendation are not for the same steps")
    return problems


def numbers_in(value: object) -> list[float]:
    """The numbers in a fact: of a tuple its numbers, of one number itself."""
    values = value if isinstance(value, tuple) else (value,)
    return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
