"""What a person gets who chooses "dpm_solver_v3" on "dpm_solver_v3_fitted" in ComfyUI, against every other pair in the lists.

    python benchmarks/comfyui_matrix.py [COMFYUI_FOLDER] [--models FLOW EPS V_PREDICTION] [--steps 4 8 20] [--cfg 1 4]

The embedded model as a flow (shift 3), as an EPS and as a v model, in the host's own sampling: mean squared distance of the
latent to the converged run, geometric mean over the batch. "no file" samples without statistics; "file" with those that the
node Compute EMS makes here first (other start noise, other prompts among them); "shipped" with the repository's, on the two
models that they were computed for. "linked" takes the steps from BasicScheduler, which is not told the cfg. The other pairs of
a row sample with the same file.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfyui import load

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "stats" / "embedded-emoji.ems.safetensors"
OURS, FITTED = "dpm_solver_v3", "dpm_solver_v3_fitted"
OWN_SCHEDULES = (FITTED, "dpm_solver_v3_fewer_passes")
RIVALS = ("dpmpp_2m", "euler", "uni_pc")
TARGETS = {"no file": 1.1, "linked, no file": 1.1, "file": 1.05, "linked, file": 1.05, "shipped": 1.05}


class Bench:
    """One model in the host, from one start noise and one label."""

    def __init__(self, pack: Any, test_pack: Any, prediction: str, batch: int, seed: int, labels: list[int]) -> None:
        import torch

        self.bare = test_pack.build(test_pack.Emoji(), prediction)
        if prediction == "FLOW":
            import comfy_extras.nodes_model_advanced as advanced

            self.bare = advanced.ModelSamplingSD3().patch(self.bare, 3.0)[0]
        self.pack, self.find, self.clip = pack, sys.modules[f"{pack.__name__}.nodes.find"], test_pack.Clip()
        *self.positives, self.negative = ([[torch.full((1, 1, 1), float(k)), {}]] for k in (*labels, 9))
        self.latent = torch.zeros((batch, 3, 32, 32))
        self.seed = seed

    def computed(self, scales: list[float], steps: list[int], effort: str, prediction: str) -> Any:
        """Statistics as the node computes them for this model."""
        node = self.pack.NODE_CLASS_MAPPINGS["DPMSolverV3_ComputeEMS"]()
        words = {"guidance_scales": ", ".join(map(str, scales)), "steps": ", ".join(map(str, steps)), "effort": effort}
        wires = {"model": self.bare, "positive": self.positives[0], "negative": self.negative, "clip": self.clip}
        latent = {"samples": self.latent[:1]}
        return node.compute(
            **wires, latent_size=latent, **words, name=prediction, batch_size=8, start_seed=0, keep_moments=False
        )["result"][0]

    def shipped(self) -> Any:
        """The repository's statistics."""
        read = importlib.import_module(f"{self.pack.__name__}.ems_tools.file").load_ems_file
        return self.find.Handle(read(SHIPPED), SHIPPED.name, SHIPPED)

    def attached(self, handle: Any) -> Any:
        """The model with these statistics, or with none."""
        return self.find.attach(self.bare, self.find.Attached(handle))

    def sample(self, model: Any, steps: int, scale: float, sampler: str, scheduler: str) -> Any:
        """What the KSampler node makes."""
        import comfy.sample

        def run(noise: Any, positive: Any) -> Any:
            given = (steps, scale, sampler, scheduler, positive, self.negative, self.latent)
            return comfy.sample.sample(model, noise, *given, disable_pbar=True, seed=self.seed)

        return self.over_labels(run)

    def on_basic(self, model: Any, steps: int, scale: float) -> Any:
        """The same where only the sampler knows the cfg: the scheduler finds none in the variables of its callers."""
        import comfy.sample
        import comfy.samplers

        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), FITTED, steps)

        def run(noise: Any, positive: Any) -> Any:
            given = (scale, comfy.samplers.sampler_object(OURS), sigmas, positive, self.negative, self.latent)
            return comfy.sample.sample_custom(model, noise, *given, disable_pbar=True, seed=self.seed)

        return self.over_labels(run)

    def over_labels(self, run: Callable[[Any, Any], Any]) -> Any:
        """`run(noise, positive)` for each label from the same start noise, in one batch."""
        import comfy.sample
        import torch

        noise = comfy.sample.prepare_noise(self.latent, self.seed)
        return torch.cat([run(noise, positive) for positive in self.positives])


def error_of(x: Any, exact: Any) -> float:
    """Geometric mean over the batch; infinite where a run diverged."""
    value = float((x - exact).double().square().flatten(1).mean(1).clamp(min=1e-30).log().mean().exp())
    return value if math.isfinite(value) else math.inf


def said(handle: Any, scale: float, steps: int) -> str:
    """What the file claims for its fitted steps."""
    found = [] if handle is None else [r for r in handle.file.meta.fitted if (r.guidance, r.steps) == (scale, steps)]
    return f" (says {found[0].ratio[0]:.2f})" if found else ""


def measure(bench: Bench, args: argparse.Namespace, prediction: str) -> list[tuple[str, float]]:
    """Print every row of one model; (kind of row, ratio to the best other pair) of each."""
    import comfy.samplers

    files = {"no file": None}
    if args.effort != "none":
        files["file"] = bench.computed(args.cfg, args.steps, args.effort, prediction)
    if prediction != "FLOW":
        files["shipped"] = bench.shipped()
    models = {name: bench.attached(handle) for name, handle in files.items()}
    schedules = [name for name in comfy.samplers.SCHEDULER_NAMES if name not in OWN_SCHEDULES]
    rows = []
    for scale in args.cfg:
        exact = bench.sample(models["no file"], 300, scale, "dpmpp_2m", "karras" if prediction != "FLOW" else "beta")
        for steps in args.steps:
            # None of the built-in samplers looks at a file.
            built_in = {
                (sampler, schedule): error_of(bench.sample(bench.bare, steps, scale, sampler, schedule), exact)
                for sampler in RIVALS
                for schedule in schedules
            }
            for name, model in models.items():
                usual = {(OURS, s): error_of(bench.sample(model, steps, scale, OURS, s), exact) for s in schedules}
                pair, best = min((built_in | usual).items(), key=lambda item: item[1])
                mine = {name: error_of(bench.sample(model, steps, scale, OURS, FITTED), exact)}
                if name != "shipped":
                    mine[f"linked, {name}"] = error_of(bench.on_basic(model, steps, scale), exact)
                for kind, value in mine.items():
                    rows.append((kind, value / best))
                    start = f"{prediction:12} cfg {scale:<4g} {steps:3} steps, {kind + ':':16} {value:8.3g}"
                    over = f"{value / best:6.2f} of {'/'.join(pair)} {best:.3g}{said(files[name], scale, steps)}"
                    print(f"{start} = {over}; {value / min(built_in.values()):.2f} of the host's best", flush=True)
    return rows


def host_modules(tree: Path, folder: str) -> tuple[Any, Any]:
    """The pack and the pack of the tests in this ComfyUI, whose own folders are not written to."""
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "site")]
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.samplers
    import folder_paths

    import nodes

    assert comfy.samplers and nodes
    folder_paths.set_output_directory(folder)
    folder_paths.set_user_directory(folder)
    return load("dpm_v3_in_comfyui", ROOT / "__init__.py"), load(
        "test_pack", ROOT / "tests" / "comfyui" / "pack" / "__init__.py"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", nargs="?", type=Path)
    parser.add_argument("--models", nargs="+", default=["FLOW", "EPS", "V_PREDICTION"])
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 8, 20])
    parser.add_argument("--cfg", nargs="+", type=float, default=[1.0, 4.0])
    parser.add_argument("--batch", type=int, default=3, help="pictures of each label")
    parser.add_argument("--seed", type=int, default=5, help="of the start noise that is judged on")
    parser.add_argument("--labels", nargs="+", type=int, default=[3, 6], help="of the pictures that are judged on")
    parser.add_argument("--effort", default="quick", help="of the files that are computed first, none to compute none")
    args = parser.parse_args()
    tree = (args.tree or sorted((ROOT / ".venv" / "comfyui").glob("0*"))[-1]).resolve()
    rows: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        pack, test_pack = host_modules(tree, folder)
        import torch

        torch.set_num_threads(1)
        with torch.inference_mode():
            for prediction in args.models:
                bench = Bench(pack, test_pack, prediction, args.batch, args.seed, args.labels)
                rows += measure(bench, args, prediction)
    for kind, target in TARGETS.items():
        found = sorted(ratio for name, ratio in rows if name == kind)
        if found:
            words = f"median {found[len(found) // 2]:.2f}, largest {found[-1]:.2f}"
            print(f"{kind}: {sum(r > target for r in found)} of {len(found)} rows above {target}; {words}")


if __name__ == "__main__":
    main()
