"""The pack in a real ComfyUI: what is there after the start, and the sampler against the plain library."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_solver_v3.ems_tools.embedded import load_network
from dpm_solver_v3.sampler import Space, sample_dpm_solver_v3

ROOT = Path(__file__).resolve().parents[2]
NULL = 9
IDS = {
    f"DPMSolverV3_{name}"
    for name in (
        *("Sampler", "Scheduler", "ComputeEMS", "LoadEMS", "ApplyEMS", "SaveEMS", "InspectEMS", "MergeEMS", "FindEMS"),
        "CompareSamplers",
    )
}


def emoji(prediction: str, label: int = 3, shape: str = "2,3,32,32") -> list[tuple[str, str, dict[str, Any]]]:
    return [
        ("model", "Test_EmojiModel", {"prediction": prediction}),
        ("positive", "Test_Label", {"label": label}),
        ("negative", "Test_Label", {"label": NULL}),
        ("latent", "Test_Latent", {"shape": shape, "value": 0.0}),
    ]


def ksampler(scheduler: str, steps: int = 6, cfg: float = 4.0, **changed: Any) -> tuple[str, str, dict[str, Any]]:
    inputs = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
        "seed": 5,
        "steps": steps,
        "cfg": cfg,
        "sampler_name": "dpm_solver_v3",
        "scheduler": scheduler,
        "denoise": 1.0,
    }
    return ("sample", "KSampler", {**inputs, **changed})


def save(node: str = "sample") -> tuple[str, str, dict[str, Any]]:
    return ("save", "SaveLatent", {"samples": [node, 0], "filename_prefix": "latents/test"})


def test_every_node_is_there_and_the_sampler_is_in_the_list(any_server: Any) -> None:
    info = any_server.get("/object_info")
    assert {name for name in info if name.startswith("DPMSolverV3_")} >= IDS
    for node in ("KSampler", "KSamplerAdvanced", "KSamplerSelect"):
        given = info[node]["input"]["required"]["sampler_name"]
        names = given[1]["options"] if given[0] == "COMBO" else given[0]  # as V3 and as V1 nodes say it
        assert names.count("dpm_solver_v3") == 1
    for node in ("KSampler", "KSamplerAdvanced", "BasicScheduler"):
        given = info[node]["input"]["required"]["scheduler"]
        names = given[1]["options"] if given[0] == "COMBO" else given[0]
        assert names.count("dpm_solver_v3_fitted") == any_server.lists_schedulers
    failed = [line for line in any_server.log().splitlines() if "IMPORT FAILED" in line]  # of the host's own nodes, perhaps
    assert not any("custom_nodes" in line for line in failed), failed


@pytest.mark.parametrize("language", ["en", "zh"])
def test_locales_and_help_pages_name_what_the_nodes_have(server: Any, language: str) -> None:
    info = server.get("/object_info")
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    mine = {name for name in info if name.startswith("DPMSolverV3_")}
    assert set(texts) == mine
    for name in mine:
        inputs = {key for group in ("required", "optional") for key in info[name]["input"].get(group, {})}
        assert set(texts[name].get("inputs", {})) == inputs, name
        assert texts[name]["display_name"]
        page = (ROOT / "web" / "docs" / name / f"{language}.md").read_text(encoding="utf-8")
        for key, given in {**info[name]["input"]["required"], **info[name]["input"].get("optional", {})}.items():
            if isinstance(given[0], list) and key not in ("ems_name", "scheduler"):  # files, and the host's own
                words = [choice for choice in given[0] if not choice.replace(".", "").isdigit()]
                assert [choice for choice in words if f"`{choice}`" not in page] == [], (name, key)


def discrete_levels() -> torch.Tensor:
    """sigma of the host's 1000 time steps: betas linear in their square root from 0.00085 to 0.012."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    product = torch.cumprod(1 - betas, 0)
    return ((1 - product) / product).sqrt()


class Reference:
    """The emoji denoiser as the host runs it, without the host: rounded sigma, guidance from two evaluations."""

    def __init__(self, flow: bool, rounded: bool, cfg: float, label: int) -> None:
        self.net, self.flow, self.cfg, self.label = load_network(), flow, cfg, label
        self.levels = discrete_levels().float() if rounded else None

    def __call__(self, x: torch.Tensor, level: torch.Tensor, **_: Any) -> torch.Tensor:
        level = level.float()
        scale = torch.ones_like(x)
        if self.flow:
            time = level.clamp(1e-4, 0.9999)
            scale, level = (1 - time).reshape(-1, 1, 1, 1).expand_as(x), time / (1 - time)
        if self.levels is not None:
            nearest = (level[:, None].log() - self.levels.log()[None]).abs().argmin(1)
            factor = ((1 + self.levels[nearest] ** 2) / (1 + level**2)).sqrt().reshape(-1, 1, 1, 1)
            y, shown = x * factor, self.levels[nearest]
        else:
            y, shown = x / scale, level

        with torch.no_grad():
            labels = torch.tensor([self.label, NULL]).repeat_interleave(len(x))  # one batch, as the host makes it
            out = self.net(torch.cat([y, y]), torch.cat([shown, shown]), labels)
        if self.levels is not None:  # the network's eps at the rounded level, taken out at the level asked for
            eps = (torch.cat([y, y]) - out) / torch.cat([shown, shown]).reshape(-1, 1, 1, 1)
            out = torch.cat([x, x]) - torch.cat([level, level]).reshape(-1, 1, 1, 1) * eps
        with_label, free = out.chunk(2)
        return free + self.cfg * (with_label - free)


def noise(seed: int, shape: tuple[int, ...] = (2, 3, 32, 32)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed))


def nearest(sigma: float) -> float:
    levels = discrete_levels()
    return float(levels[(levels.log() - math.log(sigma)).abs().argmin()])


FLOW_LEVELS = [0.95, 0.8, 0.6, 0.4, 0.2, 0.0]
SIGMAS = [*(nearest(s) for s in (14.6, 7.0, 3.2, 1.4, 0.6, 0.2)), 0.0]
BETWEEN = [11.0, 6.5, 3.3, 1.3, 0.55, 0.21, 0.0]


def custom(prediction: str, sigmas: list[float], cfg: float = 4.0, **options: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The SAMPLER node on given sigmas."""
    chosen = {"order": "auto", "corrector": "auto", "predictor": "auto", "corrector_region": "auto"}
    chosen |= {"lower_order_final": "auto", "strength": "auto", **options}
    inputs = {
        "model": ["model", 0],
        "add_noise": True,
        "noise_seed": 5,
        "cfg": cfg,
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "sampler": ["sampler", 0],
        "sigmas": ["sigmas", 0],
        "latent_image": ["latent", 0],
    }
    return [
        *emoji(prediction),
        ("sampler", "DPMSolverV3_Sampler", {**chosen, "same_architecture": False}),
        ("sigmas", "Test_Sigmas", {"levels": ", ".join(map(repr, sigmas))}),
        ("sample", "SamplerCustom", inputs),
        save(),
    ]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Root mean square difference over root mean square; single elements may differ by ten times that (float32, guidance 4)."""
    assert a.shape == b.shape and bool(torch.isfinite(a).all())
    size = float(b.square().mean().sqrt())
    assert float((a - b).square().mean().sqrt()) <= tolerance * size
    assert float((a - b).abs().max()) <= 10 * tolerance * size


@pytest.mark.parametrize(
    ("prediction", "sigmas", "options"),
    [
        ("EPS", BETWEEN, {}),
        ("EPS", SIGMAS, {"order": "3", "corrector": "none", "predictor": "pseudo", "lower_order_final": "no"}),
        ("V_PREDICTION", SIGMAS, {"order": "2", "corrector": "true"}),
        ("EDM", BETWEEN, {"order": "1", "corrector": "none"}),
        ("V_PREDICTION_EDM", BETWEEN, {"corrector": "raised"}),
        ("FLOW", FLOW_LEVELS, {}),
        ("FLUX", FLOW_LEVELS, {"order": "3"}),
    ],
)
def test_the_sampler_node_gives_what_the_library_gives(
    server: Any, nodes: Any, prediction: str, sigmas: list[float], options: dict[str, Any]
) -> None:
    seen = server.latent(server.run(nodes(*custom(prediction, sigmas, **options))))
    flow = prediction in ("FLOW", "FLUX")
    model = Reference(flow=flow, rounded=prediction in ("EPS", "V_PREDICTION"), cfg=4.0, label=3)
    levels = torch.tensor(sigmas)
    scale = math.sqrt(1 + sigmas[0] ** 2) if not flow and sigmas[0] > 14.6 else sigmas[0]
    mine: dict[str, Any] = dict(options)
    if "order" in mine:
        mine["order"] = int(mine["order"])
    if "lower_order_final" in mine:
        mine["lower_order_final"] = mine["lower_order_final"] == "yes"
    space = Space.FLOW if flow else Space.SIGMA
    close(seen, sample_dpm_solver_v3(model, noise(5) * scale, levels, disable=True, space=space, guidance=4.0, **mine))


@pytest.mark.parametrize(("prediction", "scheduler"), [("EPS", "karras"), ("FLOW", "simple")])
def test_the_list_entry_gives_what_the_sampler_node_gives(any_server: Any, nodes: Any, prediction: str, scheduler: str) -> None:
    listed = any_server.latent(any_server.run(nodes(*emoji(prediction), ksampler(scheduler), save())))
    parts = [part for part in custom(prediction, [1.0]) if part[0] != "sigmas"]
    levels = {"model": ["model", 0], "scheduler": scheduler, "steps": 6, "denoise": 1.0}
    own = any_server.latent(any_server.run(nodes(*parts, ("sigmas", "BasicScheduler", levels))))
    close(listed, own, 1e-6)


def test_the_sampler_of_the_list_beats_one_step_and_nears_the_solution(server: Any, nodes: Any) -> None:
    def run(steps: int, sampler: str) -> torch.Tensor:
        workflow = nodes(*emoji("EPS"), ksampler("karras", steps, sampler_name=sampler), save())
        return server.latent(server.run(workflow))

    exact = run(60, "dpmpp_2m")
    few, euler = (run(8, name) for name in ("dpm_solver_v3", "euler"))
    assert float((few - exact).square().mean()) < 0.5 * float((euler - exact).square().mean())


def test_a_partial_run_an_empty_one_and_advanced_steps(server: Any, nodes: Any) -> None:
    whole = server.latent(server.run(nodes(*emoji("EPS"), ksampler("karras"), save())))
    inputs = {k: v for k, v in ksampler("karras")[2].items() if k not in ("seed", "denoise")}
    shared = {**inputs, "noise_seed": 5}
    first = {**shared, "add_noise": "enable", "start_at_step": 0, "end_at_step": 6, "return_with_leftover_noise": "disable"}
    advanced = server.latent(server.run(nodes(*emoji("EPS"), ("sample", "KSamplerAdvanced", first), save())))
    close(advanced, whole, 1e-6)

    half = {**first, "end_at_step": 3, "return_with_leftover_noise": "enable"}
    rest = {**half, "add_noise": "disable", "start_at_step": 3, "end_at_step": 6, "latent_image": ["half", 0]}
    parts = [("half", "KSamplerAdvanced", half), ("sample", "KSamplerAdvanced", rest)]
    split = server.latent(server.run(nodes(*emoji("EPS"), *parts, save())))
    assert torch.isfinite(split).all()
    assert float((split - whole).square().mean()) < 0.1 * float(whole.square().mean())

    for denoise in (0.4, 0.0):
        partial = server.latent(server.run(nodes(*emoji("EPS"), ksampler("karras", denoise=denoise), save())))
        assert torch.isfinite(partial).all()


def test_a_mask_keeps_what_it_covers(server: Any, nodes: Any) -> None:
    parts = emoji("EPS", shape="1,3,32,32")
    parts[-1] = ("latent", "Test_Latent", {"shape": "1,3,32,32", "value": 0.25})
    parts += [
        ("all", "SolidMask", {"value": 1.0, "width": 32, "height": 32}),
        ("none", "SolidMask", {"value": 0.0, "width": 16, "height": 32}),
        (
            "mask",
            "MaskComposite",
            {"destination": ["all", 0], "source": ["none", 0], "x": 0, "y": 0, "operation": "multiply"},
        ),
        ("masked", "SetLatentNoiseMask", {"samples": ["latent", 0], "mask": ["mask", 0]}),
        ksampler("karras", latent_image=["masked", 0]),
        save(),
    ]
    seen = server.latent(server.run(nodes(*parts)))
    close(seen[..., :16], torch.full((1, 3, 32, 16), 0.25), 1e-4)
    assert (seen[..., 16:] - 0.25).abs().mean() > 0.05


@pytest.mark.parametrize(
    ("prediction", "shape"),
    [("EPS", "1,4,16,16"), ("FLOW", "1,16,3,8,8"), ("EPS", "2,8,3,8,8"), ("V_PREDICTION_EDM", "1,6,40"), ("FLOW", "2,5,33")],
)
def test_latents_of_every_rank(any_server: Any, nodes: Any, prediction: str, shape: str) -> None:
    channels, axes = int(shape.split(",")[1]), shape.count(",") - 1
    parts = emoji(prediction, shape=shape)
    parts[0] = ("model", "Test_ToyModel", {"prediction": prediction, "channels": channels, "axes": axes})
    seen = any_server.latent(any_server.run(nodes(*parts, ksampler("simple", 20, 1.0), save())))
    assert list(seen.shape) == [int(n) for n in shape.split(",")]
    distance = ((seen - 0.3).abs() - 1).abs()  # every element of a sample lies near 0.3 + 1 or 0.3 - 1
    assert distance.mean() < 0.35


def test_the_tiny_sd3_of_the_core_loader(any_server: Any, nodes: Any) -> None:
    """Rectified flow through core's own loader, the shift patched, with cfg 1 and with a guider without one."""
    parts = [
        ("loaded", "UNETLoader", {"unet_name": "tiny_sd3.safetensors", "weight_dtype": "default"}),
        ("model", "ModelSamplingSD3", {"model": ["loaded", 0], "shift": 3.0}),
        ("positive", "Test_SD3Text", {"seed": 1}),
        ("negative", "Test_SD3Text", {"seed": 2}),
        ("latent", "EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 2}),
    ]
    one = any_server.latent(any_server.run(nodes(*parts, ksampler("simple", cfg=1.0), save())))
    assert one.shape == (2, 16, 8, 8) and torch.isfinite(one).all()
    guided = [
        ("guider", "BasicGuider", {"model": ["model", 0], "conditioning": ["positive", 0]}),
        ("noise", "RandomNoise", {"noise_seed": 5}),
        ("sampler", "KSamplerSelect", {"sampler_name": "dpm_solver_v3"}),
        ("sigmas", "BasicScheduler", {"model": ["model", 0], "scheduler": "simple", "steps": 6, "denoise": 1.0}),
        (
            "sample",
            "SamplerCustomAdvanced",
            {
                "noise": ["noise", 0],
                "guider": ["guider", 0],
                "sampler": ["sampler", 0],
                "sigmas": ["sigmas", 0],
                "latent_image": ["latent", 0],
            },
        ),
    ]
    close(any_server.latent(any_server.run(nodes(*parts, *guided, save()))), one, 1e-6)
    dual = {"model": ["model", 0], "cond1": ["positive", 0], "cond2": ["negative", 0], "negative": ["negative", 0]}
    guided[0] = ("guider", "DualCFGGuider", {**dual, "cfg_conds": 2.0, "cfg_cond2_negative": 3.0, "style": "regular"})
    assert torch.isfinite(any_server.latent(any_server.run(nodes(*parts, *guided, save())))).all()


@pytest.mark.parametrize("kind", ["x0", "v_prediction"])
def test_patched_model_sampling(server: Any, nodes: Any, kind: str) -> None:
    """The same denoiser said in other ways gives the same picture; zero terminal SNR runs through."""
    patched = ("model", "ModelSamplingDiscrete", {"model": ["plain", 0], "sampling": kind, "zsnr": False})
    parts = emoji("EPS")
    parts[0] = ("plain", "Test_EmojiModel", {"prediction": "EPS"})
    levels = ("sigmas", "Test_Sigmas", {"levels": ", ".join(map(repr, SIGMAS))})
    rest = [part for part in custom("EPS", SIGMAS) if part[0] not in ("model", "sigmas")]
    seen = server.latent(server.run(nodes(parts[0], patched, levels, *rest)))
    close(seen, server.latent(server.run(nodes(*custom("EPS", SIGMAS)))), 1e-4)
    zero = ("model", "ModelSamplingDiscrete", {"model": ["plain", 0], "sampling": kind, "zsnr": True})
    workflow = nodes(*parts, zero, ksampler("normal"), save())
    assert torch.isfinite(server.latent(server.run(workflow))).all()


@pytest.mark.parametrize("schedule", ["uniform lambda", "uniform time", "quadratic time", "Karras", "fitted"])
@pytest.mark.parametrize("prediction", ["EPS", "FLOW"])
def test_the_scheduler_node(server: Any, nodes: Any, schedule: str, prediction: str) -> None:
    def run(steps: int, denoise: float, end: str = "zero") -> torch.Tensor:
        chosen = {"model": ["model", 0], "schedule": schedule, "steps": steps, "denoise": denoise, "end": end}
        toy = ("model", "Test_ToyModel", {"prediction": prediction, "channels": 3, "axes": 2})
        parts = [part for part in custom(prediction, [1.0], 1.0, strength="0") if part[0] not in ("sigmas", "model")]
        return server.latent(server.run(nodes(toy, *parts, ("sigmas", "DPMSolverV3_Scheduler", chosen))))

    exact, few = run(100, 1.0), run(20, 1.0)
    assert float((few - exact).square().mean()) < 0.1 * float(exact.square().mean())
    assert torch.isfinite(run(4, 0.5)).all() and torch.isfinite(run(6, 1.0, "smallest sigma")).all()
    assert run(4, 0.0).shape == (2, 3, 32, 32)


BEGINS = """
import sys
sys.argv = ["main.py", "--cpu"]
from comfy import model_sampling as m
from dpm_solver_v3.nodes.model import level_table, start_of
table = m.ModelSamplingDiscrete
for bases in ((table, m.EPS), (table, m.V_PREDICTION), (m.ModelSamplingDiscreteFlow, m.CONST)):
    sampling = type("Sampling", bases, {})()
    print(float(sampling.sigmas[-1]), start_of(sampling, level_table(sampling)))
"""


def test_what_a_run_begins_with(server: Any) -> None:
    """At the noisiest level the host takes noise times sqrt(1 + sigma^2), of a flow noise times sigma; fits are for that."""
    places = [server.environment["PYTHONPATH"], os.environ.get("PYTHONPATH", "")]
    environment = {**server.environment, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(
        [sys.executable, "-c", BEGINS],
        cwd=server.tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (eps, eps_start), (_, v_start), (_, flow_start) = (map(float, line.split()) for line in done.stdout.splitlines()[-3:])
    assert eps_start == v_start == pytest.approx(math.sqrt(1 + eps**2) / eps, rel=1e-5)
    assert eps_start > 1.002 and flow_start == pytest.approx(1, abs=1e-5)
