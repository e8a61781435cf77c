"""The tab "EMS": compute statistics for the loaded checkpoint, and look after the files that are there."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..ems_tools.compute import EFFORTS
from ..ems_tools.estimate.run import EstimateError
from ..ems_tools.file.contents import EMSFile
from ..ems_tools.file.reader import EMSFileError, load_ems_file
from ..ems_tools.hosting import PROMPTS, effort_in_words, scales_of
from ..ems_tools.judge.consistency import evidence_problems
from ..ems_tools.show.describe import lines_of
from ..ems_tools.show.draw import plot_ems
from . import host
from .find import fingerprint, library
from .session import Request, Work, begin, current

__all__ = ["make_tab"]

_SECONDS = 0.5
_FILES = ["file", "fingerprint", "made for", "guidance", "channels", "computed", "problem"]
_EVIDENCE = ["guidance", "schedule", "steps", "noise", "without", "with EMS", "ratio"]


def make_tab() -> list[tuple[Any, str, str]]:
    """What the host's `on_ui_tabs` wants."""
    import gradio as gr

    with gr.Blocks(analytics_enabled=False) as tab:
        with gr.Row():
            with gr.Column(scale=2):
                inputs = _inputs(gr)
            with gr.Column(scale=3):
                with gr.Row():
                    start = gr.Button("Compute", variant="primary", elem_id="dpm_solver_v3_compute")
                    stop = gr.Button("Interrupt", elem_id="dpm_solver_v3_interrupt")
                status = gr.HTML(_status(current()), elem_id="dpm_solver_v3_status")
                evidence = gr.Dataframe(
                    headers=_EVIDENCE, label="Evidence: distance from what many steps give", interactive=False
                )
        plot = gr.HTML(elem_id="dpm_solver_v3_plot")
        with gr.Accordion("Installed EMS files", open=True):
            files = gr.Dataframe(_file_rows(), headers=_FILES, label="Files", interactive=False)
            with gr.Row():
                names = gr.Dropdown(_names(), value=None, label="File", scale=4, elem_id="dpm_solver_v3_file")
                inspect = gr.Button("Inspect", size="sm", elem_id="dpm_solver_v3_inspect")
                verify = gr.Button("Verify all", size="sm", elem_id="dpm_solver_v3_verify")
                refresh = gr.Button("Refresh", size="sm", elem_id="dpm_solver_v3_refresh")
            report = gr.HTML(elem_id="dpm_solver_v3_report")

        def listed() -> tuple[Any, Any]:
            return gr.update(value=_file_rows()), gr.update(choices=_names())

        results = [status, plot, evidence, files, names]
        start.click(_follow if host.streams() else _finish, inputs=inputs, outputs=results, show_progress=False)
        stop.click(_interrupt, inputs=[], outputs=[status], show_progress=False)
        refresh.click(listed, inputs=[], outputs=[files, names], show_progress=False)
        inspect.click(_inspect, inputs=[names], outputs=[plot, evidence, report], show_progress=False)
        verify.click(_verify, inputs=[], outputs=[report], show_progress=False)
    return [(tab, "EMS", "dpm_solver_v3_ems")]


def _inputs(gr: Any) -> list[Any]:
    """The fields of a `Request`, in its order."""
    about = "Measure the loaded checkpoint once; the sampler DPM-Solver-v3 then finds the file by the checkpoint."
    gr.HTML(f"<p>{about}</p>")
    prompt = gr.Textbox(label="Prompt (with the LoRAs that you always use)", lines=2, elem_id="dpm_solver_v3_prompt")
    more = gr.Checkbox(True, label=f"Add {len(PROMPTS)} built-in prompts: statistics of one prompt are that prompt's")
    negative = gr.Textbox(label="Negative prompt", lines=1)
    with gr.Row():
        width = gr.Slider(64, 2048, value=512, step=8, label="Width", elem_id="dpm_solver_v3_width")
        height = gr.Slider(64, 2048, value=512, step=8, label="Height", elem_id="dpm_solver_v3_height")
    scales = gr.Textbox("1, 4, 7.5", label="CFG scales (in between is interpolated)", elem_id="dpm_solver_v3_scales")
    effort = gr.Radio(list(EFFORTS), value="quick", label="Effort", info=effort_in_words(), elem_id="dpm_solver_v3_effort")
    with gr.Row():
        name = gr.Textbox(label="File name", placeholder="the checkpoint's", elem_id="dpm_solver_v3_name")
        batch = gr.Number(4, label="Samples at once", precision=0)
        seed = gr.Number(0, label="Seed", precision=0)
    return [prompt, more, negative, width, height, scales, effort, name, batch, seed]


def _request(
    prompt: str,
    more: bool,
    negative: str,
    width: float,
    height: float,
    scales: str,
    effort: str,
    name: str,
    batch: float,
    seed: float,
) -> Request:
    prompts = (prompt.strip(), *(PROMPTS if more else ()))
    return Request(
        prompts, negative, int(width), int(height), scales_of(scales), effort, name.strip(), int(batch), int(seed or 0)
    )


def _follow(*values: Any) -> Iterator[tuple[Any, ...]]:
    """Start, or join what is under way; gives the page's state until it is over."""
    import gradio as gr

    same = gr.update()
    try:
        work = begin(_request(*values))
    except EstimateError as error:
        yield (_status(None, str(error)), same, same, same, same)
        return
    while not work.over.wait(_SECONDS):
        yield (_status(work), same, same, same, same)
    names = gr.update(choices=_names())
    if work.file is None or work.path is None:
        yield (_status(work), same, same, _file_rows(), names)
        return
    yield (_status(work), _picture(work.file, work.path.name), _evidence_rows(work.file), _file_rows(), names)


def _finish(*values: Any) -> tuple[Any, ...]:
    """The same where the host's pages cannot show values in between."""
    *_, last = _follow(*values)
    return last


def _interrupt() -> str:
    work = current()
    if work is not None:
        work.interrupt()
    return _status(work)


def _status(work: Work | None, message: str = "") -> str:
    text = message or (work.message if work else "")
    share = 100 * work.share if work else 0.0
    bar = f'<progress value="{share:.1f}" max="100" style="width:100%"></progress>' if work and not work.over.is_set() else ""
    return f"{bar}<p>{escape(text)}</p>"


def _picture(file: EMSFile, title: str) -> str:
    """As SVG: the text of a PNG would be tiny with the Pillow 9 that hosts pin."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plot.svg"
        plot_ems(file, path, title)
        data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(title)}" style="width: 100%" src="data:image/svg+xml;base64,{data}">'


def _evidence_rows(file: EMSFile) -> list[list[Any]]:
    rows = []
    for r in sorted(file.meta.evidence, key=lambda r: (r.guidance, r.schedule, r.steps, r.split)):
        ratio = f"{r.ems / r.data_prediction:.3f}" if r.data_prediction else ""
        rows.append([f"{r.guidance:g}", r.schedule, r.steps, r.split, f"{r.data_prediction:.2e}", f"{r.ems:.2e}", ratio])
    return rows


def _file_rows() -> list[list[Any]]:
    rows = []
    for entry in library().entries():
        if entry.file is None:
            rows.append([entry.name, "", "", "", "", "", entry.problem])
            continue
        scales = ", ".join(f"{g:g}" for g in entry.file.guidance.tolist())
        made_for, date = entry.identity.name or "unknown", entry.file.meta.date
        rows.append([entry.name, fingerprint(entry.path), made_for, scales, str(entry.file.channels), date, ""])
    for folder in host.ems_folders():
        unfinished = sorted(folder.glob("*.partial")) if folder.is_dir() else []
        rows += [[path.name, "", "", "", "", "", "unfinished: compute with the same settings to go on"] for path in unfinished]
    return rows


def _names() -> list[str]:
    return [name for name, _ in library().paths()]


def _inspect(name: str | None) -> tuple[Any, Any, str]:
    import gradio as gr

    if not name:
        return gr.update(), gr.update(), "<p>Choose a file first.</p>"
    try:
        file = library().get(name).file
    except EMSFileError as error:
        return gr.update(), gr.update(), f"<p>{escape(str(error))}</p>"
    assert file is not None
    return _picture(file, name), _evidence_rows(file), _pre("\n".join([name, *lines_of(file)]))


def _verify() -> str:
    """Every file read again from the disk: all bytes by its own checksum, and its evidence against its recommendation."""
    lines = []
    for name, path in library().paths():
        try:
            problems = evidence_problems(load_ems_file(path))
        except EMSFileError as error:
            problems = [error.what]
        lines.append(f"{name}: {'; '.join(problems) or 'ok'}")
    return _pre("\n".join(lines) or "There are no EMS files yet.")


def _pre(text: str) -> str:
    return f'<pre style="overflow-x:auto">{escape(text)}</pre>'
