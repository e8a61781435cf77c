"""What the tab "EMS" shows, as HTML: how a computation stands, which files there are, and what one of them holds.

The pages of the hosts are light or dark and of any width: colours are those of the page, tables scroll by themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ..ems_tools.file import EMSFile, EvidenceRow, FittedRow
from ..ems_tools.share.library import Entry
from ..ems_tools.show.describe import beginning_of, lines_of, rival_in_words
from ..ems_tools.show.draw import HEAD, svg_of
from ..ems_tools.show.panels import Panel, statistics_of, summary_of
from . import host
from .find import fingerprint, library
from .sampling import FITTED_LABEL, NAME
from .session import Work

__all__ = ["STYLE", "box", "details", "file_table", "plain", "preformatted", "status"]

STYLE = """<style>
.dpmv3-box { border-left: 4px solid var(--border-color-primary, #888); padding: 0.5em 0.9em; margin: 0.3em 0;
  overflow-wrap: anywhere; background: var(--background-fill-secondary, transparent); border-radius: 4px }
.dpmv3-box p { margin: 0.2em 0 }
.dpmv3-error { border-color: #d32f2f; background: rgba(211, 47, 47, 0.14) }
.dpmv3-done { border-color: #2e8b57 }
.dpmv3-stopped { border-color: #e69f00 }
.dpmv3-box progress { width: 100%; height: 1em }
.dpmv3-scroll { overflow: auto; max-height: 32em; margin-bottom: 0.8em; border: 1px solid var(--border-color-primary, #888) }
.dpmv3-scroll table { border-collapse: collapse; width: 100%; margin: 0 }
.dpmv3-scroll table, .dpmv3-scroll tr { border: 0 !important }
.dpmv3-scroll th, .dpmv3-scroll td { padding: 0.25em 0.7em !important; text-align: left; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary, #888) !important; vertical-align: top }
.dpmv3-scroll th { position: sticky; top: 0; background: var(--background-fill-secondary, #888); font-weight: 600 }
.dpmv3-scroll td.dpmv3-number { white-space: nowrap; font-variant-numeric: tabular-nums }
.dpmv3-quiet { opacity: 0.8; margin: 0.2em 0 0.5em }
.dpmv3-name { overflow-wrap: anywhere; margin: 0.6em 0 0.2em; font-size: 1.15em; font-weight: 600 }
.dpmv3-head { margin: 0.7em 0 0.2em; font-weight: 600 }
.dpmv3-side { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 0 1.2em; align-items: start }
.dpmv3-plot { display: grid; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); gap: 0.2em 0.8em }
.dpmv3-plot svg { width: 100%; max-width: 520px; height: auto }
.dpmv3-plot svg > rect { fill: transparent }
.dpmv3-plot svg text { fill: currentColor }
.dpmv3-plot svg [stroke="#e2e2e2"] { stroke: currentColor; stroke-opacity: 0.15 }
.dpmv3-plot svg [stroke="#000000"] { stroke: currentColor }
.dpmv3-plot svg [fill="#000000"] { fill: currentColor }
.dpmv3-text { overflow: auto; max-height: 30em; white-space: pre; font-family: monospace; font-size: 0.85em; margin: 0.4em 0 }
#dpm_solver_v3_beat, .dpmv3-hidden { display: none !important }
[id^="dpm_solver_v3_"] .pending { opacity: 1 !important }
#dpm_solver_v3_inspect, #dpm_solver_v3_verify, #dpm_solver_v3_refresh { align-self: end; max-height: 3em }
details.dpmv3 > summary { cursor: pointer; margin: 0.5em 0 }
</style>"""


def box(text: str, kind: str = "", share: float | None = None) -> str:
    """Text in a box, a paragraph for each line.

    Args:
        text: what to say.
        kind: "error", "done", "stopped" or "", by which it is coloured.
        share: of the work that is done, 0 to 1; adds a bar.
    """
    bar = "" if share is None else f'<progress value="{100 * share:.1f}" max="100"></progress>'
    label = "<b>Error.</b> " if kind == "error" else ""
    text = text[:1].upper() + text[1:]
    paragraphs = "".join(f"<p>{label if k == 0 else ''}{escape(line)}</p>" for k, line in enumerate(text.splitlines()))
    return f'<div class="dpmv3-box{f" dpmv3-{kind}" if kind else ""}" role="status">{bar}{paragraphs}</div>'


def status(work: Work | None) -> str:
    """How the latest computation of this process stands."""
    if work is None:
        return box("Nothing is being computed.")
    if work.state == "running":
        return box(work.message, share=work.share)
    if work.state == "done" and work.file is not None:
        return box(f"{work.message}\n{next_step(work.file)}", "done")
    return box(work.message, {"failed": "error"}.get(work.state, work.state))


def next_step(file: EMSFile) -> str:
    """What to do with a finished file."""
    counts = sorted({row.steps for row in file.meta.fitted})
    scales = ", ".join(f"{g:g}" for g in file.guidance.tolist())
    if not counts:
        return f"Next: choose the sampler {NAME}. It finds this file by the checkpoint."
    others = "The schedule types listed below use the file as well." if file.meta.evidence else "Others work as without a file."
    begun = sorted({row.steps for row in file.meta.partial})
    images = f" So too in image to image and the hires pass, where {runs_of(begun)} steps are made." if begun else ""
    return (
        f'Next: choose the sampler {NAME} and the schedule type "{FITTED_LABEL}", with {runs_of(counts)} steps and a CFG scale '
        f"near {scales}.{images} {others}"
    )


def runs_of(numbers: Sequence[int]) -> str:
    """Sorted whole numbers in words: [4, 5, 6, 8] -> "4 to 6, 8"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


def plain(value: float) -> str:
    """Three digits without an exponent: 1.61, 0.0123, 24."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(digits, 0), 9)}f}"


def file_table(current: Work | None) -> str:
    """Every file of the host's folders, the unfinished and the unusable ones with what to do about them."""
    rows = [_file_row(entry) for entry in library().entries()]
    running = current.path if current is not None and current.state == "running" else None
    for folder in host.ems_folders():
        for path in sorted(folder.glob("*.partial")) if folder.is_dir() else []:
            mine = running is not None and path.name == f"{running.name}.partial"
            what = "being computed" if mine else "unfinished: compute with the same settings to go on"
            rows.append([path.name, "", "", "", "", what])
    if not rows:
        return box(f"There are no EMS files yet. They lie in {host.ems_folders()[0]}.")
    return _table(["File", "Made for checkpoint", "CFG scales", "Fitted steps", "Computed", "State"], rows)


def _file_row(entry: Entry) -> list[str]:
    if entry.file is None:
        return [entry.name, "", "", "", "", f"cannot be used: {entry.problem}"]
    meta = entry.file.meta
    scales = ", ".join(f"{g:g}" for g in entry.file.guidance.tolist())
    fitted = runs_of(sorted({row.steps for row in meta.fitted})) or "none"
    return [entry.name, entry.identity.name or "unknown", scales, fitted, meta.date, "ready"]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(_cell(text) for text in row) + "</tr>" for row in rows)
    return f'<div class="dpmv3-scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    numeric = text[:1].isdigit() and not any(c.isalpha() for c in text.replace("to", ""))
    return f"<td{' class=dpmv3-number' if numeric else ''}>{escape(text)}</td>"


def details(name: str, path: Path, file: EMSFile) -> str:
    """What one file holds: what the user gets from it, its evidence, its curves, and all of it as text."""
    facts = f"made for {file.meta.model.get('name') or 'an unknown checkpoint'} on {file.meta.date or 'an unknown day'}"
    scales = ", ".join(f"{g:g}" for g in file.guidance.tolist())
    parts = [f'<p class="dpmv3-name">{escape(name)}</p>']
    about = f"{facts}; CFG scales {scales}; {file.channels} latent channels; fingerprint {fingerprint(path)}"
    parts.append(f'<p class="dpmv3-quiet">{escape(about)}</p>')
    tables = _fitted(file.meta.fitted) + _begun(file.meta.partial) + _evidence(file.meta.evidence, bool(file.meta.fitted))
    parts.append(f'<div class="dpmv3-side"><div>{_drawn(summary_of(file)[0])}</div><div>{tables}</div></div>')
    parts.append(f'<details class="dpmv3"><summary>Curves of the statistics</summary>{_plot(file)}</details>')
    text = preformatted("\n".join(lines_of(file)))
    parts.append(f'<details class="dpmv3"><summary>Everything in the file, as text</summary>{text}</details>')
    return "".join(parts)


def _head(title: str, about: str) -> str:
    return f'<p class="dpmv3-head">{escape(title)}</p><p class="dpmv3-quiet">{escape(about)}</p>'


def _fitted(rows: Sequence[FittedRow]) -> str:
    if not rows:
        return _head(f'Schedule type "{FITTED_LABEL}"', "Nothing was fitted: this schedule type gives unfitted steps.")
    table = []
    for row in sorted(rows, key=lambda r: (r.guidance, r.steps)):
        ratio, low, high = row.ratio
        better = row.coefficients is not None and row.ratio != (1.0, 1.0, 1.0)
        gain = f"{ratio:.2f} ({low:.2f} to {high:.2f})" if better else "1"
        use = "fitted steps" if better else "the best known"
        table.append([f"{row.guidance:g}", str(row.steps), gain, rival_in_words(row.fixed_schedule), use])
    about = (
        "Error of a picture with these steps, over that of the best known method and schedule for this checkpoint, on start "
        "noise that took no part in the fit; in brackets the interval that holds it in 95 of 100 cases. 0.5 is half the error. "
        "Where nothing fitted was better, the best known is used."
    )
    heads = ["CFG scale", "Steps", "Error ratio", "Best known", "In use"]
    return _head(f'Schedule type "{FITTED_LABEL}"', about) + _table(heads, table)


def _begun(rows: Sequence[FittedRow]) -> str:
    if not rows:
        return ""
    table = []
    for row in sorted(rows, key=lambda r: (r.guidance, r.lambdas[0], r.steps)):
        ratio, low, high = row.ratio
        gain = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
        case = [f"{row.guidance:g}", plain(beginning_of(row)), str(row.steps)]
        table.append([*case, gain, rival_in_words(row.fixed_schedule)])
    about = (
        "The same for a run that begins with a picture, with noise of this sigma on it, on the same schedule type: over the "
        "best of what the sampler and UniPC do from there without the file. Steps are kept where they beat the sampler on "
        "Karras steps without it. Between two of these beginnings both are mixed."
    )
    return _head("Image to image", about) + _table(["CFG scale", "Sigma", "Steps", "Error ratio", "Best other"], table)


def _evidence(rows: Sequence[EvidenceRow], fitted: bool) -> str:
    if not rows and fitted:
        return _head("Other schedule types", "They were not measured: there the sampler works as without this file.")
    if not rows:
        return _head("Evidence", "None: these statistics have not been tried against sampling without them.")
    judged = [r for r in rows if r.split == "report"] or list(rows)
    table = []
    for r in sorted(judged, key=lambda r: (r.guidance, r.schedule, r.steps)):
        ratio = f"{r.ems / r.data_prediction:.2f}" if r.data_prediction else ""
        table.append([f"{r.guidance:g}", r.schedule, str(r.steps), plain(r.data_prediction), plain(r.ems), ratio])
    noise = "that took no part in choosing the settings" if judged[0].split == "report" else "that also chose the settings"
    about = (
        "Mean squared distance, in latent space, of a picture of few steps from the one that many steps give, without this "
        f"file and with it, on start noise {noise}. A ratio below 1 means that the file helps."
    )
    heads = ["CFG scale", "Schedule type", "Steps", "Error without", "Error with", "Ratio"]
    return _head("Other schedule types", about) + _table(heads, table)


def _plot(file: EMSFile) -> str:
    rows = statistics_of(file)
    shown = sorted({0, len(rows) // 2, len(rows) - 1})
    return _drawn([panel for k in shown for panel in rows[k] if panel.curves])


def _drawn(panels: Sequence[Panel]) -> str:
    """Each panel as an SVG of its own, so that they find their places in a page of any width."""
    return f'<div class="dpmv3-plot">{"".join(_without_head(svg_of([[panel]], "").decode()) for panel in panels)}</div>'


def _without_head(svg: str) -> str:
    """Cut off the place of the title, which the page has already."""

    def cut(view: re.Match[str]) -> str:
        return f'viewBox="0 {HEAD} {view[1]} {int(view[2]) - HEAD}"'

    return re.sub(r'viewBox="0 0 (\d+) (\d+)"', cut, svg, count=1)


def preformatted(text: str) -> str:
    """Text whose lines stay as they are."""
    return f'<div class="dpmv3-text">{escape(text)}</div>'
