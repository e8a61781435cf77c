"""The scheduler takes the sampler's steps, whatever the model predicts, and keeps diffusers' conventions."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dpm_solver_v3.diffusers import DPMSolverV3Scheduler
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import EMSFileError, load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta, FittedRow
from dpm_solver_v3.sampler import FittedSteps, Space, VPDiscrete, sample_dpm_solver_v3

ROOT = Path(__file__).resolve().parents[2]
STATS = ROOT / "stats" / "embedded-emoji.ems.safetensors"
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def run(scheduler: Any, model: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """A pipeline's loop: model(x as the scheduler scales it, time step) is its output."""
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def network(denoiser: Callable[..., Tensor], prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What a network of this kind predicts on Stable Diffusion's noise schedule, if `denoiser` is what it has learned."""
    schedule = VPDiscrete.linear()

    def output(x: Tensor, t: Tensor) -> Tensor:
        sigma = schedule.level_at((t.double() + 1) / 1000)
        alpha = (1 + sigma**2) ** -0.5
        x0 = denoiser(x / alpha, sigma.expand(len(x)))
        noise = (x - alpha * x0) / (sigma * alpha)
        return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * alpha * x0}[prediction]

    return output


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("options", [{}, {"order": 3, "corrector": "pseudo"}, {"use_karras_sigmas": True}])
def test_takes_the_samplers_steps(mixture: Any, y_start: Tensor, prediction: str, options: dict[str, Any]) -> None:
    scheduler = DPMSolverV3Scheduler(**SD, prediction_type=prediction, **options)
    scheduler.set_timesteps(7)
    levels = scheduler._levels
    assert levels[0] == pytest.approx(14.6146, abs=1e-4) and levels[-1] == 0 and len(levels) == 8
    alpha = (1 + levels[0] ** 2) ** -0.5
    found = run(scheduler, network(mixture, prediction), y_start * alpha)
    ours = {k: v for k, v in options.items() if not k.startswith("use")}
    expected = sample_dpm_solver_v3(mixture, y_start, levels, disable=True, **ours)
    # Between trained time steps the time that the model gets is rounded to float32.
    assert (found - expected).abs().max() < (1e-4 if "use_karras_sigmas" in options else 1e-9)


def test_flow_takes_the_samplers_steps(mixture: Any, y_start: Tensor) -> None:
    scheduler = DPMSolverV3Scheduler(prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(6)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 15 / 16, 6 / 7, 0.75, 0.6, 0.375, 0])
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 6000 / 7, 750, 600, 375])

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        scale = 1 - t.double().clamp(max=1 - 1e-9).reshape(-1, 1, 1, 1)
        return mixture(x / scale, (1 - scale.flatten()) / scale.flatten())

    def output(x: Tensor, time: Tensor) -> Tensor:
        return (x - denoiser(x, (time.double() / 1000).expand(len(x)))) / (time.double() / 1000)

    noise = y_start / y_start.std()
    found = run(scheduler, output, noise)
    expected = sample_dpm_solver_v3(denoiser, noise, scheduler._levels, space=Space.FLOW, disable=True)
    assert (found - expected).abs().max() < 2e-5  # the time steps are float32


def test_edm_takes_the_samplers_steps(mixture: Any, y_start: Tensor) -> None:
    scheduler = DPMSolverV3Scheduler.from_config(diffusers.EDMEulerScheduler(sigma_min=0.1, sigma_max=6.0).config)
    scheduler.set_timesteps(6)
    assert scheduler.sigmas[0] == 6 and scheduler.init_noise_sigma == pytest.approx(37**0.5)

    def output(scaled: Tensor, time: Tensor) -> Tensor:
        sigma = (4 * time.double()).exp()
        x = scaled * (sigma**2 + 0.25) ** 0.5
        out = sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
        return (mixture(x, sigma.expand(len(x))) - x * 0.25 / (sigma**2 + 0.25)) / out

    found = run(scheduler, output, y_start)
    expected = sample_dpm_solver_v3(mixture, y_start, scheduler._levels, disable=True)
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", sorted({*DPMSolverV3Scheduler._compatibles}))
def test_from_config_of_every_compatible_scheduler(name: str) -> None:
    kind = getattr(diffusers, name, None)
    if kind is None or type(kind).__name__ == "DummyObject":
        pytest.skip(f"this diffusers has no {name}, or not what it needs")
    theirs = kind()
    ours = DPMSolverV3Scheduler.from_config(theirs.config)
    ours.set_timesteps(5, **({"mu": 1.0} if theirs.config.get("use_dynamic_shifting") else {}))
    assert torch.isfinite(ours.sigmas).all() and len(ours.timesteps) == 5
    flow = name.startswith("FlowMatch")
    assert (ours.config.use_flow_sigmas, ours.config.sigma_data is None) == (flow, not name.startswith("EDM"))
    back = kind.from_config(ours.config)  # and what is theirs alone survives
    assert {k: v for k, v in back.config.items() if k in theirs.config and not k.startswith("_")} == {
        k: v for k, v in theirs.config.items() if not k.startswith("_")
    }


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_time_steps_are_those_of_dpm_solver(spacing: str) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing=spacing, steps_offset=1)
    ours = DPMSolverV3Scheduler.from_config(theirs.config)
    for n in (1, 5, 20, 50):
        theirs.set_timesteps(n)
        ours.set_timesteps(n)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=2e-3, atol=1e-5)  # float32 betas there


@pytest.mark.parametrize("shape", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
def test_shapes_of_steps_are_those_of_dpm_solver(shape: str) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, **{shape: True})
    ours = DPMSolverV3Scheduler.from_config(theirs.config)
    theirs.set_timesteps(9)
    ours.set_timesteps(9)
    assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-3)
    assert (ours.timesteps - theirs.timesteps).abs().max() <= 1  # theirs are whole numbers


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift": 2.0, "shift_terminal": 0.1}])
def test_given_sigmas_are_shifted_as_flow_matching_does(config: dict[str, Any]) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = DPMSolverV3Scheduler.from_config(theirs.config)
    sigmas = [1.0, 0.75, 0.5, 0.25]
    more = {"mu": 0.8} if "use_dynamic_shifting" in config else {}
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas, **more)
    assert torch.allclose(ours.sigmas, theirs.sigmas) and torch.allclose(ours.timesteps, theirs.timesteps)


def test_given_steps_are_followed() -> None:
    scheduler = DPMSolverV3Scheduler(**SD)
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == [900, 500, 100] and scheduler.num_inference_steps == 3
    scheduler.set_timesteps(sigmas=[10.0, 2.0, 0.5, 0.0])
    assert scheduler.sigmas.tolist() == [10, 2, 0.5, 0] and len(scheduler.timesteps) == 3


def test_noise_is_added_at_the_level_of_the_time_step() -> None:
    vp, flow = DPMSolverV3Scheduler(**SD), DPMSolverV3Scheduler(prediction_type="flow_prediction")
    x, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    rival = diffusers.DDPMScheduler(**SD)
    assert torch.allclose(vp.add_noise(x, noise, torch.tensor([999, 3])), rival.add_noise(x, noise, torch.tensor([999, 3])))
    flow.set_timesteps(4)
    assert flow.scale_noise(x, flow.timesteps[1:2], noise).flatten().tolist() == pytest.approx([0.25 + 0.75 * 3] * 8)
    vp.set_timesteps(4)
    vp.set_begin_index(2)  # image to image: the level where the run begins, whatever the time step says
    alpha = (1 + vp._levels[2] ** 2) ** -0.5
    assert vp.add_noise(x, noise, vp.timesteps[2:3])[0, 0, 0, 0] == pytest.approx(alpha.item() * (1 + 3 * vp._levels[2].item()))


def test_begins_where_it_is_told(mixture: Any, y_start: Tensor) -> None:
    model = network(mixture, "epsilon")
    ends = []
    for begin in (lambda s: s.set_begin_index(3), lambda s: None):
        scheduler = DPMSolverV3Scheduler(**SD)
        scheduler.set_timesteps(8)
        begin(scheduler)
        x = y_start.double() / 8
        for t in scheduler.timesteps[3:]:
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        ends.append(x)
    levels = scheduler._levels[3:]
    expected = sample_dpm_solver_v3(mixture, y_start / 8 * (1 + levels[0] ** 2) ** 0.5, levels, disable=True)
    assert torch.equal(*ends) and (ends[0] - expected).abs().max() < 1e-9


def test_what_a_pipeline_changes_between_steps_stays_changed(mixture: Any, y_start: Tensor) -> None:
    """Inpainting writes the known half back after every step; the corrector must not take it away."""
    model, scheduler = network(mixture, "epsilon"), DPMSolverV3Scheduler(**SD)
    scheduler.set_timesteps(30)
    known, noise = torch.full_like(y_start, 0.7), y_start / 6
    x = noise.clone()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, t), t, x).prev_sample
        later = scheduler.timesteps[i + 1 : i + 2]
        there = scheduler.add_noise(known, noise, later) if len(later) else known
        x[..., 0] = there[..., 0]  # in place, which must not reach the scheduler's own latents
    again = DPMSolverV3Scheduler(**SD)
    again.set_timesteps(30)
    free = run(again, model, noise.clone())
    assert (x[..., 1] - free[..., 1]).abs().max() > 0.01  # the known half had its influence
    step = scheduler._stepping
    assert step is not None and step._run is not None
    kept, lost = ((v[..., 0] - known[..., 0]).square().mean().sqrt() for v in (step._run.x, free))
    assert kept < lost / 4  # and was not forgotten, though the solver's last latents are those before the last writing


def test_half_precision_latents_are_summed_in_float32(mixture: Any, y_start: Tensor) -> None:
    """Given back as they were, float16 latents cost the rounding of the model's input only."""
    ends = {}
    for dtype in (torch.float16, torch.float64):
        scheduler = DPMSolverV3Scheduler(**SD, prediction_type="sample")
        scheduler.set_timesteps(200)
        fixed = y_start.to(dtype) / 50
        ends[dtype] = run(scheduler, partial(lambda fixed, x, t: fixed, fixed), (y_start / 6).to(dtype))
        assert ends[dtype].dtype == dtype
    assert (ends[torch.float16].double() - ends[torch.float64]).abs().max() < 1e-3


def test_fitted_steps_are_used_with_a_file_and_a_guidance_scale() -> None:
    file = load_ems_file(STATS)
    scheduler = DPMSolverV3Scheduler(**SD, ems=str(STATS), guidance_scale=4.0)
    scheduler.set_timesteps(8)
    assert torch.allclose(scheduler._levels, file.fitted_sigmas(8, 4.0))
    row = next(r for r in file.meta.fitted if r.steps == 8 and r.guidance == 4)
    sigma = scheduler._levels[0].item()
    assert scheduler.init_noise_sigma == pytest.approx(row.coefficients.start * sigma / (1 + sigma**2) ** 0.5)
    plain = DPMSolverV3Scheduler(**SD)
    plain.set_timesteps(8)
    assert plain.init_noise_sigma == 1 and not torch.allclose(scheduler._levels, plain._levels)
    asked = DPMSolverV3Scheduler(**SD, ems=str(STATS), guidance_scale=4.0, use_karras_sigmas=True)
    asked.set_timesteps(8)
    assert asked.sigmas[1] == pytest.approx(7.9029, abs=1e-3)


@pytest.mark.parametrize(("start", "used"), [(1.0, True), (1.2, False)])
def test_fitted_steps_of_a_flow_that_its_pipeline_cannot_begin_are_left(tmp_path: Path, start: float, used: bool) -> None:
    """Pipelines of flows begin with unit noise, whatever the scheduler says."""
    lambdas = (-6.9, -1.0, 0.5)
    steps = FittedSteps(lambdas, (0.5, 0.5, 0.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), start)
    row = FittedRow(3.0, 3, lambdas, steps, (0.1,) * 3, (0.2,) * 3, "karras", (0.5, 0.4, 0.6), 8)
    meta = EMSMeta(space="flow", sigma_min=0.001, sigma_max=999.0, fitted=(row,))
    grid, one = torch.linspace(-6.9, 6.9, 9, dtype=torch.float64), torch.ones(1, 9, 4)
    file = EMSFile(lambdas=grid, guidance=torch.tensor([3.0], dtype=torch.float64), l=one, s=0 * one, b=0 * one, meta=meta)
    file.save(tmp_path / "flow.ems.safetensors")
    scheduler = DPMSolverV3Scheduler(prediction_type="flow_prediction", ems=str(tmp_path / "flow.ems.safetensors"))
    scheduler.set_timesteps(3)
    assert (scheduler.sigmas[1].item() == pytest.approx(1 / (1 + math.exp(-1.0)))) == used
    assert (scheduler.init_noise_sigma == 1) == (not used)


def test_outputs_as_a_tuple_and_after_loading_are_the_same(mixture: Any, y_start: Tensor, tmp_path: Path) -> None:
    model, scheduler = network(mixture, "epsilon"), DPMSolverV3Scheduler(trained_betas=[0.01 + 0.0001 * k for k in range(100)])
    scheduler.save_pretrained(tmp_path)
    ends = []
    for other in (
        scheduler,
        DPMSolverV3Scheduler.from_pretrained(tmp_path),
        DPMSolverV3Scheduler.from_config(scheduler.config),
    ):
        other.set_timesteps(4)
        x, t = y_start / 6, other.timesteps[0]
        output = model(x, t)
        result = other.step(output, t, x)
        ends.append(result.prev_sample)
        other.set_timesteps(4)  # which begins anew
        pair = other.step(output, t, x, return_dict=False)
        assert torch.equal(pair[0], result.prev_sample) and torch.equal(pair[1], result.pred_original_sample)
        assert pair[0].shape == x.shape and len(other) == 1000 and other.order == 1
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_saved_and_loaded_with_the_file_beside(tmp_path: Path) -> None:
    scheduler = DPMSolverV3Scheduler(**SD, ems=str(STATS), guidance_scale=4.0, order=3)
    scheduler.save_pretrained(tmp_path / "scheduler")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "scheduler").rename(moved / "scheduler")
    assert json.loads((moved / "scheduler" / "scheduler_config.json").read_text())["ems"] == "scheduler.ems.safetensors"
    assert scheduler.config.ems == str(STATS)  # what is in memory stays
    for loaded in (
        DPMSolverV3Scheduler.from_pretrained(moved / "scheduler"),
        DPMSolverV3Scheduler.from_pretrained(moved, "scheduler"),
    ):
        assert loaded.config.ems == str(moved / "scheduler" / "scheduler.ems.safetensors")
        assert (loaded.config.order, loaded.config.guidance_scale, loaded.config.beta_start) == (3, 4.0, 0.00085)
        assert loaded._file is not None and torch.equal(loaded._file.l, load_ems_file(STATS).l)
    (moved / "scheduler" / "scheduler.ems.safetensors").unlink()
    with pytest.raises(EMSFileError, match="not there"):
        DPMSolverV3Scheduler.from_pretrained(moved / "scheduler")


def test_a_configuration_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    DPMSolverV3Scheduler(**SD).save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ems": "../secret.ems.safetensors"}))
    with pytest.raises(EMSFileError, match="beside it only"):
        DPMSolverV3Scheduler.from_pretrained(tmp_path)


def test_a_copy_goes_its_own_way(mixture: Any, y_start: Tensor) -> None:
    model, scheduler = network(mixture, "epsilon"), DPMSolverV3Scheduler(**SD)
    scheduler.set_timesteps(6)
    x = y_start / 6
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(model(x, t), t, x).prev_sample
    other, y = copy.deepcopy(scheduler), x.clone()
    for t in scheduler.timesteps[3:]:
        x = scheduler.step(model(x, t), t, x).prev_sample
    for t in other.timesteps[3:]:
        y = other.step(model(y, t), t, y).prev_sample
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("options", "call", "match"),
    [
        ({}, {}, "give num_inference_steps"),
        ({}, {"sigmas": [1.0, 0.0], "timesteps": [3]}, "give num_inference_steps"),
        ({}, {"num_inference_steps": 0}, "1 .. 10000"),
        ({}, {"num_inference_steps": 3, "timesteps": [3, 2]}, "3, but 2"),
        ({"timestep_spacing": "even"}, {"num_inference_steps": 3}, "timestep_spacing"),
        ({"use_karras_sigmas": True, "use_lu_lambdas": True}, {"num_inference_steps": 3}, "only one of"),
        ({"prediction_type": "flow_prediction", "use_dynamic_shifting": True}, {"num_inference_steps": 3}, "needs `mu`"),
        ({"final_sigmas_type": "one"}, {"num_inference_steps": 3}, "final_sigmas_type"),
    ],
)
def test_steps_that_cannot_be_are_refused(options: dict[str, Any], call: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DPMSolverV3Scheduler(**options).set_timesteps(**call)


def test_wrong_configurations_and_calls_are_refused() -> None:
    for options, match in (({"prediction_type": "x"}, "prediction_type"), ({"beta_schedule": "x"}, "beta_schedule")):
        with pytest.raises(ValueError, match=match):
            DPMSolverV3Scheduler(**options)
    x = torch.zeros(1, 1, 2, 2)
    scheduler = DPMSolverV3Scheduler()
    with pytest.raises(ValueError, match="set_timesteps has not been called"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(1)
    scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="all 1 steps are done"):
        scheduler.step(x, 999, x)


def test_variance_beside_the_prediction_is_left_out() -> None:
    x, output = torch.ones(1, 3, 2, 2), torch.full((1, 6, 2, 2), 0.5)
    ends = []
    for options, given in (({"variance_type": "learned_range"}, output), ({}, output[:, :3])):
        scheduler = DPMSolverV3Scheduler(**options)
        scheduler.set_timesteps(3)
        ends.append(scheduler.step(given, scheduler.timesteps[0], x).prev_sample)
    assert torch.equal(*ends)


def test_thresholding_keeps_pixels_in_range() -> None:
    scheduler = DPMSolverV3Scheduler(thresholding=True, prediction_type="sample")
    scheduler.set_timesteps(3)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = scheduler.step(5 * x, scheduler.timesteps[0], x)
    assert found.pred_original_sample.abs().max() <= 1
    assert torch.allclose(found.pred_original_sample, (5 * x).clamp(-1, 1))


def test_the_real_diffusers_is_never_shadowed(tmp_path: Path) -> None:
    """From the checkout's folder `import diffusers` is the library; our name for the package imports it only when used."""
    code = """
        import sys
        import dpm_solver_v3, dpm_solver_v3.diffusers
        print("diffusers" in sys.modules, "torch" in sys.modules)
        import diffusers
        print(hasattr(diffusers, "__version__"))
        from dpm_solver_v3.diffusers import DPMSolverV3Scheduler
        import dpm_solver_v3.pipelines
        print(DPMSolverV3Scheduler is dpm_solver_v3.pipelines.DPMSolverV3Scheduler, DPMSolverV3Scheduler.__module__)
    """
    lines = [line.strip() for line in code.splitlines()]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "True", "True", "dpm_solver_v3.pipelines.scheduler"], done.stderr


def test_without_diffusers_all_else_works() -> None:
    code = """
        import sys
        sys.modules["diffusers"] = None
        import dpm_solver_v3.sampler, dpm_solver_v3.ems_tools.compute
        from dpm_solver_v3.ems_tools.cli import main
        print(main(["compute", "--diffusers", "embedded", "--guidance", "1"]))
        try:
            from dpm_solver_v3.diffusers import DPMSolverV3Scheduler
        except ImportError as error:
            print(error)
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("1\nDPMSolverV3Scheduler needs the library diffusers"), done.stderr
    assert done.stderr.count("\n") == 1 and "pip install diffusers" in done.stderr
