"""The tab "EMS": compute statistics for the loaded checkpoint, and look after the files that are there.

The computation runs in a thread of its own (`session`). A page only watches it: whoever opens the page later sees the same.
It asks again and again, by a hidden text that each answer changes. A handler that goes on giving values would be shorter, but
AUTOMATIC1111 cannot reload its page any more once a page was closed under such a handler.
"""

from __future__ import annotations

import inspect as reflection
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..ems_tools.compute import EFFORTS
from ..ems_tools.estimate.job import EstimateError
from ..ems_tools.file import EMSFileError, load_ems_file
from ..ems_tools.hosting.jobs import PROMPTS
from ..ems_tools.judge.consistency import consistency_problems
from . import page
from .fewer import is_offered
from .find import library
from .session import BusyError, Work, begin, cost_in_words, current, request_of

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["make_tab"]

_SECONDS = 2.0
"""Between two answers to a page that watches; each costs its browser some tenths of a second, in gradio 4."""
_ABOUT = (
    "Measures the loaded checkpoint once (its empirical model statistics, EMS) and fits steps to it. The sampler DPM-Solver-v3 "
    "then finds the file by the checkpoint. Pictures wait while it runs; this page may be closed and opened again."
)
_Updates = tuple[object, ...]
"""Values for status, Compute, Interrupt, the table of files, the menu of files, the details of a file, and the beat."""


def make_tab() -> list[tuple[object, str, str]]:
    """What the host's `on_ui_tabs` wants: (gradio Blocks, title, element id)."""
    import gradio as gr

    with gr.Blocks(analytics_enabled=False) as tab:
        gr.HTML(f"{page.STYLE}<p>{_ABOUT}</p>")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs = _inputs(gr)
            with gr.Column(scale=3, min_width=380):
                cost = gr.HTML(elem_id="dpm_solver_v3_cost")
                with gr.Row():
                    start = gr.Button("Compute", variant="primary", elem_id="dpm_solver_v3_compute")
                    stop = gr.Button("Interrupt", interactive=False, elem_id="dpm_solver_v3_interrupt")
                status = gr.HTML(elem_id="dpm_solver_v3_status")
        files = gr.HTML(elem_id="dpm_solver_v3_files")
        with gr.Row():
            names = gr.Dropdown(_names(), value=None, label="File", scale=4, min_width=300, elem_id="dpm_solver_v3_file")
            inspect = gr.Button("Inspect", size="sm", elem_id="dpm_solver_v3_inspect")
            verify = gr.Button("Verify all", size="sm", elem_id="dpm_solver_v3_verify")
            refresh = gr.Button("Refresh", size="sm", elem_id="dpm_solver_v3_refresh")
        shown = gr.HTML(elem_id="dpm_solver_v3_shown")
        beat = gr.Textbox("", label="beat", elem_classes=["dpmv3-hidden"], elem_id="dpm_solver_v3_beat")
        results = [status, start, stop, files, names, shown, beat]
        start.click(_start, inputs=inputs, outputs=results, show_progress=False)
        tab.load(_now, inputs=[], outputs=results, show_progress=False)
        beat.change(_next, inputs=[beat], outputs=results, show_progress=False, **_without_limit(beat.change))
        stop.click(_interrupt, inputs=[], outputs=[status, stop], show_progress=False)
        refresh.click(_now, inputs=[], outputs=results, show_progress=False)
        inspect.click(_inspect, inputs=[names], outputs=[shown], show_progress=False)
        verify.click(_verify, inputs=[], outputs=[shown], show_progress=False)
        priced = [inputs[place] for place in _PRICED if place < len(inputs)]
        for event in (tab.load, *(field.change for field in priced)):
            event(_cost, inputs=priced, outputs=[cost], show_progress=False)
    return [(tab, "EMS", "dpm_solver_v3_ems")]


_PRICED = (5, 6, 7, 11, 12)
"""Places in `_inputs` of what a computation costs: CFG scales, effort, step counts, and the two more kinds of steps."""


def _without_limit(event: Callable[..., object]) -> dict[str, object]:
    """Gradio 4 runs a handler once at a time unless told otherwise; each page watches by itself."""
    return {"concurrency_limit": None} if "concurrency_limit" in reflection.signature(event).parameters else {}


def _inputs(gr: ModuleType) -> list[Any]:
    """The fields of a `Request`, in the order of `request_of`."""
    prompt = gr.Textbox(label="Prompt (with the LoRAs that you always use)", lines=2, elem_id="dpm_solver_v3_prompt")
    label = f"Add {len(PROMPTS)} built-in prompts. Statistics of one prompt do not carry over to others."
    more = gr.Checkbox(True, label=label, elem_id="dpm_solver_v3_more")
    negative = gr.Textbox(label="Negative prompt", lines=1, elem_id="dpm_solver_v3_negative")
    with gr.Row():
        width = gr.Slider(64, 2048, value=512, step=8, label="Width", elem_id="dpm_solver_v3_width")
        height = gr.Slider(64, 2048, value=512, step=8, label="Height", elem_id="dpm_solver_v3_height")
    label = "CFG scales, with commas (between two of them the statistics are interpolated)"
    scales = gr.Textbox("1, 4, 7.5", label=label, elem_id="dpm_solver_v3_scales")
    effort = gr.Radio(list(EFFORTS), value="quick", label="Effort", elem_id="dpm_solver_v3_effort")
    label = "Step counts to fit, with commas (empty: those of the effort)"
    steps = gr.Textbox("", label=label, placeholder="4, 6, 8", elem_id="dpm_solver_v3_steps")
    with gr.Row():
        name = gr.Textbox(label="File name", placeholder="the checkpoint's", elem_id="dpm_solver_v3_name")
        batch = gr.Number(4, label="Samples at once", precision=0, elem_id="dpm_solver_v3_batch")
        seed = gr.Number(0, label="Seed", precision=0, elem_id="dpm_solver_v3_seed")
    label = "Also fit steps for image to image and hires fix (several times as long)"
    image = gr.Checkbox(False, label=label, elem_id="dpm_solver_v3_image")
    fields = [prompt, more, negative, width, height, scales, effort, steps, name, batch, seed, image]
    if is_offered():
        label = "Also fit steps in fewer passes, some without the negative prompt (takes up to four times as long)"
        fields.append(gr.Checkbox(False, label=label, elem_id="dpm_solver_v3_fewer"))
    return fields


def _cost(scales: str, effort: str, steps: str, image_to_image: bool = False, fewer: bool = False) -> str:
    try:
        return page.box(cost_in_words(scales, effort, steps, image_to_image, fewer))
    except EstimateError as error:
        return page.box(str(error), "error")


@dataclass(frozen=True)
class _Beat:
    """What a page that watches hands back with its next question.

    Args:
        count: of its questions, so that each text differs from the one before.
        busy: whether its form was refused because a computation was under way.
        listed: whether its table shows the unfinished file.
    """

    count: int = 1
    busy: bool = False
    listed: bool = False

    @classmethod
    def of(cls, text: str) -> _Beat:
        """From `text`; the first one from anything else."""
        parts = text.split()
        return cls(int(parts[0]), "busy" in parts, "listed" in parts) if parts and parts[0].isdecimal() else cls()

    @property
    def text(self) -> str:
        """For the hidden box of the page."""
        return " ".join([str(self.count), *(["busy"] if self.busy else []), *(["listed"] if self.listed else [])])


def _start(*values: Any) -> _Updates:
    """Begin a computation; one that is under way goes on, and the page says that this form was not used."""
    try:
        begin(request_of(*values))
    except BusyError:
        return _state(_Beat(busy=True))
    except EstimateError as error:
        return _updates(page.box(str(error), "error"), current())
    return _state(_Beat())


def _next(text: str) -> _Updates:
    """The page a little later; everything on it once the computation is over."""
    work = current()
    if work is not None:
        work.over.wait(_SECONDS)
    before = _Beat.of(text)
    return _state(replace(before, count=before.count + 1))


def _now() -> _Updates:
    """Everything on the page, read anew."""
    return _state(_Beat(), files=True)


def _state(beat: _Beat, files: bool = False) -> _Updates:
    work = current()
    note = page.box(str(BusyError()), "stopped") if beat.busy else ""
    if work is None or work.state != "running":
        return _updates(note + page.status(work), work, files=True, show=work is not None and work.state == "done")
    begun = work.path is not None and work.path.with_name(f"{work.path.name}.partial").exists()
    files = files or (begun and not beat.listed)
    return _updates(note + page.status(work), work, files=files, beat=replace(beat, listed=begun))


def _updates(status: str, work: Work | None, files: bool = False, show: bool = False, beat: _Beat | None = None) -> _Updates:
    """`_Updates`: what is not asked for stays as it is on the page; without a beat the page stops asking."""
    import gradio as gr

    same, running = gr.update(), work is not None and work.state == "running"
    stoppable = running and work is not None and not work.stopped
    name = work.path.name if show and work is not None and work.path is not None else None
    menu = same
    if files:
        menu = gr.update(choices=_names(), value=name) if name else gr.update(choices=_names())
    table = page.file_table(work) if files else same
    shown = same
    if name is not None and work is not None and work.path is not None and work.file is not None:
        shown = page.details(name, work.path, work.file)
    buttons = gr.update(interactive=not running), gr.update(interactive=stoppable)
    return (status, *buttons, table, menu, shown, same if beat is None else beat.text)


def _interrupt() -> tuple[str, object]:
    import gradio as gr

    work = current()
    if work is not None:
        work.interrupt()
    return page.status(work), gr.update(interactive=False)


def _names() -> list[str]:
    return [name for name, _ in library().paths()]


def _inspect(name: str | None) -> str:
    if not name:
        return page.box("Choose a file first.", "error")
    try:
        entry = library().get(name)
    except EMSFileError as error:
        return page.box(str(error), "error")
    assert entry.file is not None
    return page.details(name, entry.path, entry.file)


def _verify() -> str:
    """Every file read again from the disk, and checked as `ems verify` does without a model.

    All bytes by the file's checksum, what it says of itself, and its evidence against its recommendation.
    """
    lines = []
    for name, path in library().paths():
        try:
            problems = consistency_problems(load_ems_file(path))
        except EMSFileError as error:
            problems = [error.what]
        lines.append(f"{name}: {'; '.join(problems) or 'ok'}")
    return page.preformatted("\n".join(lines) or "There are no EMS files yet.")
