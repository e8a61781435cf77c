"""Passes of the host: generating pictures through its own loading, conditioning and denoiser, and its turn for one job."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor

from . import host
from .objects import Denoiser

__all__ = ["evaluate", "generate", "interrupt", "interrupted", "no_images", "report_progress", "session"]

T = TypeVar("T")


def generate(
    prompts: list[str],
    negative: str,
    size: tuple[int, int],
    sampler: str,
    mark: Mapping[str, object],
    finished: Callable[[], bool],
) -> None:
    """One pass of text to image with one prompt an image, through the host's own loading, conditioning and denoiser.

    Args:
        prompts: one for each image of the batch.
        negative: the negative prompt of all of them.
        size: width and height in pixels.
        sampler: name of the sampler.
        mark: becomes attributes of the processing object, by which the sampler function knows what to do instead of sampling.
        finished: once true, what goes wrong afterwards (decoding) is of no interest.
    """
    processing = importlib.import_module("modules.processing")
    p = processing.StableDiffusionProcessingTxt2Img(
        outpath_samples="",
        outpath_grids="",
        prompt=list(prompts),
        negative_prompt=negative,
        seed=0,
        sampler_name=sampler,
        batch_size=len(prompts),
        n_iter=1,
        steps=20,
        cfg_scale=7.0,  # not 1: hosts then leave the negative prompt out; the scales asked for are set at every call
        width=size[0],
        height=size[1],
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    runner = getattr(host.module("modules.scripts"), "ScriptRunner", None)
    if callable(runner):  # without scripts; reForge fails where there is no runner at all
        p.scripts = runner()
    for name, value in mark.items():
        setattr(p, name, value)
    try:
        processing.process_images(p)
    except Exception:
        if not finished():
            raise
    finally:
        close = getattr(p, "close", None)
        if callable(close):
            close()


def evaluate(
    denoiser: Denoiser, x: Tensor, level: Tensor, extra_args: Mapping[str, object], rows: list[int], scale: float
) -> Tensor:
    """D(x, level) by the host's CFGDenoiser at this CFG scale; `rows` name each image's place in the pass's batch."""
    chosen = {name: _of_rows(value, rows) for name, value in extra_args.items()}
    chosen.update(cond_scale=scale, s_min_uncond=0.0)
    # It counts its calls as steps. At the last one edited prompts have come to their end, and no early-step rule holds.
    denoiser.step = max((getattr(denoiser, "total_steps", None) or 1) - 1, 0)
    return denoiser(x, level.to(x).expand(len(x)), **chosen)


def _of_rows(value: object, rows: list[int]) -> object:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, list):
        return [value[row] for row in rows]
    batch = getattr(value, "batch", None)  # modules/prompt_parser.py: MulticondLearnedConditioning
    if batch is not None:
        kind = cast(Callable[..., object], type(value))
        return kind(shape=(len(rows),), batch=[batch[row] for row in rows])
    return value


def no_images(x: Tensor) -> Tensor:
    """What a sampler function returns for latents x [B, C, h, w] that nobody wants: one black image, decoded already."""
    decoded = getattr(host.module("modules.processing"), "DecodedSamples", None)
    if decoded is None:
        return torch.zeros_like(x[:1])
    return cast(Tensor, decoded([torch.zeros(3, 8 * x.shape[-2], 8 * x.shape[-1])]))


@contextmanager
def session(title: str) -> Iterator[Callable[[Callable[[], T]], T | None]]:
    """The host's turn for one GPU job; gives `call(function)`, which runs it where this host runs such jobs.

    Forge does all of them in its main thread. Exceptions are raised here either way.
    """
    queue, state = importlib.import_module("modules.call_queue"), host.shared("state")
    elsewhere = getattr(host.module("modules_forge.main_thread"), "run_and_wait_result", None)

    def call(function: Callable[[], T]) -> T | None:
        raised: list[BaseException] = []

        def guarded() -> T | None:
            try:
                return function()
            except BaseException as error:
                raised.append(error)
                return None

        result = cast("T | None", elsewhere(guarded)) if callable(elsewhere) else guarded()
        if raised:
            raise raised[0]
        return result

    with queue.queue_lock:
        state.begin(job=title)
        try:
            yield call
        finally:
            state.end()
            state.skipped = state.interrupted = False
            collect = getattr(host.module("modules.devices"), "torch_gc", None)
            if callable(collect):
                collect()


def interrupt() -> None:
    """The host's "Interrupt": the next call of its denoiser ends the pass."""
    host.shared("state").interrupt()


def interrupted() -> bool:
    """Whether someone pressed it."""
    state = host.shared("state")
    return bool(state.interrupted or getattr(state, "skipped", False))


def report_progress(done: int, total: int, text: str) -> None:
    """For the host's own progress display."""
    state = host.shared("state")
    state.sampling_step, state.sampling_steps, state.textinfo = done, total, text
