"""The decisions that the hosts share: which statistics and which steps a run uses, and what the user is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpm_solver_v3.ems_tools.embedded import load_network
from dpm_solver_v3.ems_tools.file import EMSFile, load_ems_file
from dpm_solver_v3.ems_tools.hosting import Run, choose_statistics, choose_steps, one_line, printable, unfitted_steps
from dpm_solver_v3.ems_tools.hosting.runs import GUIDER
from dpm_solver_v3.sampler import (
    EDM,
    Flow,
    LevelTable,
    NoiseSchedule,
    Space,
    VPDiscrete,
    karras,
    sample_dpm_solver_v3,
    uniform_lambda,
    uniform_time,
)

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (1, 3, 32, 32)
VP = VPDiscrete.linear()


@pytest.fixture(scope="module")
def file() -> EMSFile:
    return load_ems_file(ROOT / "stats" / "embedded-emoji.ems.safetensors")


def under(file: EMSFile, guider: str) -> EMSFile:
    return replace(file, meta=replace(file.meta, model={**file.meta.model, GUIDER: guider}))


def test_fitted_steps_where_everything_is_known_and_agrees(file: EMSFile) -> None:
    steps = choose_steps(file, "emoji", Run(VP, 4.0, "", "dpm_solver_v3"), 6)
    assert steps.fitted and torch.equal(steps.levels, file.fitted_sigmas(6, 4.0))
    assert steps.message == "schedule fitted for 6 steps at cfg 4, from emoji"
    assert choose_steps(file, "emoji", Run(VP, 4.0, "", "DPM-Solver-v3"), 6).fitted
    cfg_zero = choose_steps(under(file, "CFGZeroStar"), "emoji", Run(VP, 4.0, "CFGZeroStar"), 6)
    assert cfg_zero.fitted


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (Run(VP, None, unknown="cfg comes from another node: link it here too"), "link it here too"),
        (Run(VP, 4.0, None, unknown="the guider DualCFG has two scales"), "two scales"),
        (Run(VP, 4.0, "CFGZeroStar"), "computed under plain guidance, this run has CFGZeroStar"),
        (Run(Flow(3.0), 4.0), "this is a rectified flow"),
        (Run(EDM(0.03, 120.0), 4.0), "this model's begins at 120"),
        (Run(EDM(3.0, 14.6), 4.0), "this model's noise ends at 3"),
        (Run(VP, 4.0, sampler="euler"), "only, not euler"),
        (Run(VP, 40.0), "no schedule fitted for 6 steps at cfg 40"),
    ],
)
def test_unfitted_steps_and_the_reason_otherwise(file: EMSFile, run: Run, words: str) -> None:
    steps = choose_steps(file, "emoji", run, 6)
    assert not steps.fitted and words in steps.message and steps.message.endswith("steps instead")
    assert torch.equal(steps.levels, unfitted_steps(run.schedule, 6)[1])


def test_a_shifted_flow_is_the_same_network(file: EMSFile) -> None:
    """Only where its noise begins matters: a larger shift moves the table and its last level, not the denoiser."""
    flow = replace(file, meta=replace(file.meta, space="flow", sigma_min=1e-3, sigma_max=999.0))
    for shift in (1.0, 3.0, 8.0):
        assert choose_steps(flow, "flow", Run(Flow(shift), 4.0), 6).fitted


def test_without_a_file_and_with_denoise(file: EMSFile) -> None:
    steps = choose_steps(None, "no EMS for this model", Run(VP, 1.0), 4, 0.5)
    assert steps.message == "no EMS for this model: Karras steps instead"
    assert torch.equal(steps.levels, karras(VP, 8, to_zero=True)[-5:])
    half = choose_steps(file, "emoji", Run(VP, 4.0), 3, 0.5)
    assert half.fitted and torch.equal(half.levels, file.fitted_sigmas(6, 4.0)[-4:])
    for bad in ((0, 1.0), (4, 0.0), (4, 1.5)):
        with pytest.raises(ValueError, match="at least 1 and denoise"):
            choose_steps(file, "emoji", Run(VP, 4.0), *bad)


@pytest.mark.parametrize("space", [Space.SIGMA, Space.FLOW])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 20, 50])
def test_unfitted_steps_are_a_schedule(space: Space, steps: int) -> None:
    table = VP if space is Space.SIGMA else LevelTable(torch.linspace(0.001, 1.0, 1000, dtype=torch.float64), space)
    levels = unfitted_steps(table, steps)[1]
    assert len(levels) == steps + 1 and levels[-1] == 0 and (levels.diff() < 0).all()
    assert levels[0] == pytest.approx(table.level_at(torch.tensor(1.0, dtype=torch.float64)).item())


@pytest.mark.parametrize("steps", [6, 12])
def test_unfitted_steps_suit_a_flow(steps: int) -> None:
    """On the embedded network as a flow, Karras steps had 4 to 300 times the error of equal steps in time (issue 15)."""
    net, labels = load_network(), torch.arange(4)
    noise = torch.randn((4, 3, 32, 32), generator=torch.Generator().manual_seed(3))

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.clamp(1e-4, 0.9999)
        return net(x / (1 - t).reshape(-1, 1, 1, 1), t / (1 - t), labels[: len(x)])

    def run(levels: torch.Tensor, **options: object) -> torch.Tensor:
        return sample_dpm_solver_v3(model, noise, levels.float(), disable=True, space="flow", **options)  # type: ignore[arg-type]

    table: NoiseSchedule = Flow(3.0)
    exact = run(uniform_lambda(table, 40, to_zero=True), order=3, corrector="none", lower_order_final=False)

    def error(levels: torch.Tensor) -> float:
        return float((run(levels) - exact).double().square().mean((1, 2, 3)).log().mean().exp())

    mine, equal = error(unfitted_steps(table, steps)[1]), error(uniform_time(table, steps, to_zero=True))
    assert mine < equal < error(karras(table, steps, to_zero=True))


def test_statistics(file: EMSFile) -> None:
    found = choose_statistics(file, "emoji", "made for this checkpoint", Run(VP, 4.0), SHAPE)
    assert found.ems is not None and not found.warn
    assert found.message == "EMS emoji, made for this checkpoint, guidance 4"
    assert found.ems.recommendation is not None and found.ems.recommendation.fitted

    other = choose_statistics(file, "emoji", "attached", Run(VP, 4.0, "RescaleCFG"), SHAPE)
    assert other.ems is not None and other.warn and "this run has RescaleCFG" in other.message
    assert other.ems.recommendation is not None and not other.ems.recommendation.fitted


@pytest.mark.parametrize(
    ("run", "shape", "words"),
    [
        (Run(Flow(1.0), 4.0), SHAPE, "not used: it was made for a model of the EPS or v kind, this is a rectified flow"),
        (Run(EDM(0.03, 120.0), 4.0), SHAPE, "begins at 120"),
        (Run(VP, None, unknown="this guider has two scales"), SHAPE, "two scales"),
        (Run(VP, 4.0), (1, 4, 8, 8), "does not fit"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_in_words(file: EMSFile, run: Run, shape: tuple[int, ...], words: str) -> None:
    found = choose_statistics(file, "emoji", "attached", run, shape)
    assert found.ems is None and found.warn and words in found.message
    assert found.message.endswith("Sampling without statistics")


def test_one_line() -> None:
    assert one_line("a", "", "b", "a") == "a; b"


def test_log_lines_that_every_console_can_print() -> None:
    assert printable("模型 é", "cp1252") == "\\u6a21\\u578b é"
    assert printable("模型\x1b]0;title\x07", "utf-8") == "模型\\x1b]0;title\\x07"
