"""What a statistics file holds, in words: for `ems inspect`, the nodes and the WebUI's tab."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ...sampler import Settings
from ..file.contents import EMSFile
from ..file.rows import FittedRow, RecommendedSetting, advice_by_case

__all__ = ["beginning_of", "facts_of", "gain_of", "gains_of", "lines_of", "rival_in_words"]

_TIMES = {"model": "time", "vp": "VP time", "flow": "flow time"}
_POWERS = {"1": "uniform", "1.5": "power 1.5 of", "2": "quadratic"}


def lines_of(file: EMSFile) -> list[str]:
    """A summary for people: what the file gains, sections of facts, ranges of l, s, b, and the evidence."""
    lines = gains_of(file)
    facts = facts_of(file)
    for name in ("model", "noise", "grid", "statistics", "estimate", "made"):
        lines += ["", name, *(f"  {key:<18} {_shown(value)}" for key, value in facts[name].items())]
    lines += ["", "ranges, smallest to largest over the grid (root mean square of the standard errors)"]
    lines += [f"  {line}" for line in _ranges(file)]
    lines += ["", "evidence: error with the recommended settings against the best without EMS"]
    lines += [f"  {line}" for line in _evidence_table(file) or ["none in this file: its statistics have not been tried"]]
    if file.meta.fitted:
        lines += ["", "fitted schedules: error on noise of no other use, against the best other sampler and schedule"]
        lines += [f"  {line}" for line in _fitted_table(file)]
    if file.meta.passes:
        lines += ["", "in fewer passes (of the network; a guided step makes two): error against guided steps of as many passes"]
        lines += [f"  {line}" for line in _passes_table(file)]
    if file.meta.partial:
        lines += [
            "",
            "image to image: error from a picture with noise of this sigma on it, against the best other way from there",
            "(steps are kept where they beat this sampler without a file on Karras steps)",
        ]
        lines += [f"  {line}" for line in _partial_table(file)]
    return lines


def gains_of(file: EMSFile) -> list[str]:
    """What the fitted steps are worth, for people who only want to know that; empty where none were fitted."""
    rows = sorted(file.meta.fitted, key=lambda r: (r.guidance, r.steps))
    if not rows:
        return []
    noises = sorted({r.noises for r in rows})
    lines = [
        "",
        "gains: error with the fitted steps over that of the best other sampler and schedule tried on this model,",
        f"with its 95 % interval, on {' or '.join(map(str, noises))} noises that took no part in the fit; below 1 is better",
    ]
    for r in rows:
        value, low, high = r.ratio
        other = rival_in_words(r.fixed_schedule) or "another schedule"
        lost = (value, low, high) == (1, 1, 1)
        told = f"no better than {other}, whose steps are used" if lost else f"{value:.2f} ({low:.2f} to {high:.2f}) of {other}"
        lines.append(f"  cfg {r.guidance:g}, {r.steps} steps: {told}")
    return lines


def rival_in_words(name: str) -> str:
    """What files call a sampler on a schedule ("UniPC 2 on model 1"), in the words of the nodes ("UniPC 2 on uniform time")."""
    sampler, on, schedule = name.rpartition(" on ")
    kind, _, rest = schedule.partition(" ")
    power, _, end = rest.partition(" ")
    if schedule == "the steps that hosts take then":
        return sampler
    if kind in _TIMES and power in _POWERS:
        schedule = f"{_POWERS[power]} {_TIMES[kind]} {end}".strip()
    elif kind in ("lambda", "karras"):
        schedule = f"{'uniform lambda' if kind == 'lambda' else 'Karras'} {rest}".strip()
    return f"{sampler}{on}{schedule}"


def gain_of(file: EMSFile) -> str:
    """The same in a few words, for a status line of a node's width; "" where no steps were fitted."""
    ratios = sorted(r.ratio[0] for r in file.meta.fitted)
    if not ratios:
        return ""
    if ratios[0] == 1:
        return "no fit beat the best other sampler, whose steps are used"
    span = f"{ratios[0]:.2f}" if ratios[0] == ratios[-1] else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return f"error {span} of the best other sampler's"


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def facts_of(file: EMSFile) -> dict[str, Any]:
    """What a file says, JSON-serialisable."""
    meta = file.meta
    return {
        "model": dict(meta.model),
        "noise": {n: getattr(meta, n) for n in ("space", "sigma_min", "sigma_max", "schedule")},
        "grid": {
            "points": len(file.lambdas),
            "lambda": [file.lambdas[0].item(), file.lambdas[-1].item()],
            **{k: v for k, v in meta.grid.items() if k not in ("points", "lambda")},
        },
        "statistics": {
            "guidance": file.guidance.tolist(),
            "channels": file.channels,
            "per element": "x".join(str(n) for n in file.l.shape[3:]) if file.per_element else "no",
            "type": str(file.l.dtype).removeprefix("torch."),
            "standard errors": _errors_kept(file),
            "moments": sorted(file.moments),
        },
        "estimate": dict(meta.estimate),
        "made": {"program": meta.program, "date": meta.date, **meta.foreign},
        "evidence": [asdict(row) for row in meta.evidence],
        "recommendation": [_plain(entry) for entry in meta.recommendation],
        "fitted": [asdict(row) for row in meta.fitted],
        "passes": [asdict(row) for row in meta.passes],
        "partial": [{**asdict(row), "sigma": beginning_of(row)} for row in meta.partial],
    }


def _errors_kept(file: EMSFile) -> str:
    if file.errors is None:
        return "none"
    return "at every point" if file.errors["l"].shape[1] == file.l.shape[1] else "root mean square over the grid"


def _plain(entry: RecommendedSetting) -> dict[str, object]:
    plain = asdict(entry)
    if math.isinf(entry.settings.corrector_below):
        plain["settings"]["corrector_below"] = None
    return plain


def _ranges(file: EMSFile) -> list[str]:
    lines = []
    for g, guidance in enumerate(file.guidance.tolist()):
        for c in range(min(file.channels, 16)):
            parts = []
            for name in ("l", "s", "b"):
                values = getattr(file, name)[g, :, c]
                error = f" ({file.errors[name][g, :, c].double().square().mean().sqrt():.1e})" if file.errors else ""
                parts.append(f"{name} {values.min().item():7.3f} to {values.max().item():7.3f}{error}")
            lines.append(f"guidance {guidance:<5g} channel {c:<2} {'   '.join(parts)}")
    return lines


def _evidence_table(file: EMSFile) -> list[str]:
    if not file.meta.evidence:
        return []
    titles = f"{'without':>9}  {'with':>9}  {'ratio':>6}  recommended"
    lines = [f"{'guidance':>8}  {'schedule':<20} {'steps':>5}  {'noise':<11}  {titles}"]
    advice = advice_by_case(file.meta)
    for r in sorted(file.meta.evidence, key=lambda r: (r.guidance, r.schedule, r.steps, r.split)):
        ratio = f"{r.ems / r.data_prediction:6.3f}" if r.data_prediction else "     -"
        errors = f"{r.data_prediction:9.2e}  {r.ems:9.2e}  {ratio}"
        case = f"{r.guidance:8g}  {r.schedule:<20.20} {r.steps:5}  {r.split:<11}"
        entry = advice.get((r.guidance, r.schedule, r.steps))
        lines.append(f"{case}  {errors}  {_in_words(entry.settings) if entry else '-'}")
    return lines


def _fitted_table(file: EMSFile) -> list[str]:
    lines = [f"{'guidance':>8}  {'steps':>5}  {'best other':<40} {'error':>9}  {'fitted':>9}  {'ratio':>6}  95 % interval"]
    for r in sorted(file.meta.fitted, key=lambda r: (r.guidance, r.steps)):
        value, low, high = r.ratio
        kept = "" if r.coefficients and r.ratio != (1, 1, 1) else "  (the other is kept)"
        errors = f"{r.fixed[0]:9.2e}  {r.fitted[0]:9.2e}  {value:6.3f}  {low:.3f} to {high:.3f}"
        lines.append(f"{r.guidance:8g}  {r.steps:5}  {rival_in_words(r.fixed_schedule):<40.40} {errors}{kept}")
    return lines


def _passes_table(file: EMSFile) -> list[str]:
    lines = [f"{'guidance':>8}  {'passes':>6}  {'steps':>5}  {'guided':>6}  {'ratio':>6}  95 % interval"]
    for r in sorted(file.meta.passes, key=lambda r: (r.guidance, r.passes)):
        value, low, high = r.ratio
        counts = f"{r.guidance:8g}  {r.passes:6}  {r.steps:5}  {r.passes - r.steps:6}"
        lines.append(f"{counts}  {value:6.3f}  {low:.3f} to {high:.3f}")
    return lines


def beginning_of(row: FittedRow) -> float:
    """The sigma at which the steps of a row for image to image begin."""
    return math.exp(-row.lambdas[0])


def _partial_table(file: EMSFile) -> list[str]:
    lines = [f"{'guidance':>8}  {'sigma':>8}  {'steps':>5}  {'best other':<47} {'ratio':>6}  95 % interval"]
    for r in sorted(file.meta.partial, key=lambda r: (r.guidance, r.lambdas[0], r.steps)):
        value, low, high = r.ratio
        case = f"{r.guidance:8g}  {beginning_of(r):8.3g}  {r.steps:5}  {rival_in_words(r.fixed_schedule):<47.47}"
        lines.append(f"{case} {value:6.3f}  {low:.3f} to {high:.3f}")
    return lines


def _in_words(s: Settings) -> str:
    predictor = " pseudo" if s.predictor == "pseudo" else ""
    limit = "" if math.isinf(s.corrector_below) else f" below sigma {s.corrector_below:g}"
    return f"order {s.order}{predictor}, corrector {s.corrector}{limit}, strength {s.strength:g}"
