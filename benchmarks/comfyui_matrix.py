"""What a person gets who chooses "dpm_solver_v3" on "dpm_solver_v3_fitted" in ComfyUI, against every other pair in the lists.

    python benchmarks/comfyui_matrix.py [COMFYUI_FOLDER] [--models FLOW EPS V_PREDICTION] [--steps 4 8 20] [--cfg 1 4]

The embedded model as a flow (shift 3), as an EPS and as a v model, in the host's own sampling: mean squared distance of the
latent to the converged run, geometric mean over the batch. "no file" samples without statistics; "file" with the shipped ones,
on the two models that they were computed for. "linked cfg" takes the steps from BasicScheduler, which is not told the cfg.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from comfyui import load

ROOT = Path(__file__).resolve().parents[1]
RIVALS = ("dpmpp_2m", "euler", "uni_pc")
FITTED = "dpm_solver_v3_fitted"


class Bench:
    """One model in the host, from one noise."""

    def __init__(self, pack: Any, test_pack: Any, prediction: str, batch: int) -> None:
        import torch

        self.torch, self.model = torch, test_pack.build(test_pack.Emoji(), prediction)
        if prediction == "FLOW":
            import comfy_extras.nodes_model_advanced as advanced

            self.model = advanced.ModelSamplingSD3().patch(self.model, 3.0)[0]
        self.find = sys.modules[f"{pack.__name__}.nodes.find"]
        self.cond = [[[torch.full((1, 1, 1), float(k)), {}]] for k in (3, 9)]
        self.latent = torch.zeros((batch, 3, 32, 32))

    def attached(self, path: Path | None) -> Any:
        """The model with the statistics of this file, or with none."""
        load_file = sys.modules[f"{self.find.__name__.removesuffix('.nodes.find')}.ems_tools.file"].load_ems_file
        handle = None if path is None else self.find.Handle(load_file(path), path.name, path)
        return self.find.attach(self.model, self.find.Attached(handle))

    def sample(self, model: Any, steps: int, cfg: float, sampler: str, scheduler: str) -> Any:
        """What the KSampler node makes."""
        import comfy.sample

        noise = comfy.sample.prepare_noise(self.latent, 5)
        given = (steps, cfg, sampler, scheduler, self.cond[0], self.cond[1], self.latent)
        return comfy.sample.sample(model, noise, *given, disable_pbar=True, seed=5)

    def on_basic(self, model: Any, steps: int, cfg: float) -> Any:
        """The same where only the sampler knows the cfg."""
        import comfy.sample
        import comfy.samplers

        noise = comfy.sample.prepare_noise(self.latent, 5)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), FITTED, steps)
        sampler = comfy.samplers.sampler_object("dpm_solver_v3")
        given = (cfg, sampler, sigmas, self.cond[0], self.cond[1], self.latent)
        return comfy.sample.sample_custom(model, noise, *given, disable_pbar=True, seed=5)

    def error(self, x: Any, exact: Any) -> float:
        """Geometric mean over the batch."""
        return float((x - exact).double().square().flatten(1).mean(1).clamp(min=1e-30).log().mean().exp())


def measure(bench: Bench, args: argparse.Namespace, prediction: str) -> None:
    import comfy.samplers

    file = ROOT / "stats" / "embedded-emoji.ems.safetensors"
    bare, own = bench.attached(None), bench.attached(file if prediction != "FLOW" else None)
    others = [name for name in comfy.samplers.SCHEDULER_NAMES if name != FITTED]
    for cfg in args.cfg:
        exact = bench.sample(bare, 300, cfg, "dpmpp_2m", "karras" if prediction != "FLOW" else "beta")
        for steps in args.steps:
            rivals = {
                (sampler, scheduler): bench.error(bench.sample(bare, steps, cfg, sampler, scheduler), exact)
                for sampler in (*RIVALS, "dpm_solver_v3")
                for scheduler in others
            }
            pair, best = min(rivals.items(), key=lambda item: item[1])
            builtin = min(value for (sampler, _), value in rivals.items() if sampler in RIVALS)
            mine = {
                "no file": bench.error(bench.sample(bare, steps, cfg, "dpm_solver_v3", FITTED), exact),
                "linked cfg": bench.error(bench.on_basic(bare, steps, cfg), exact),
            }
            if prediction != "FLOW":
                mine["file"] = bench.error(bench.sample(own, steps, cfg, "dpm_solver_v3", FITTED), exact)
            words = ", ".join(f"{name} {value:.3g} ({value / best:.2f}; {value / builtin:.2f})" for name, value in mine.items())
            print(f"{prediction:13} cfg {cfg:<4g} {steps:3} steps: best other {best:.3g} {'/'.join(pair)}; {words}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", nargs="?", type=Path)
    parser.add_argument("--models", nargs="+", default=["FLOW", "EPS", "V_PREDICTION"])
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 8, 20])
    parser.add_argument("--cfg", nargs="+", type=float, default=[1.0, 4.0])
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    tree = (args.tree or sorted((ROOT / ".venv" / "comfyui").glob("0*"))[-1]).resolve()
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "site")]
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.samplers
    import folder_paths
    import torch

    import nodes

    assert comfy.samplers and nodes
    torch.set_num_threads(1)
    folder_paths.set_output_directory("/nonexistent")
    pack = load("dpm_v3_in_comfyui", ROOT / "__init__.py")
    test_pack = load("test_pack", ROOT / "tests" / "comfyui" / "pack" / "__init__.py")
    print("in brackets: over the best of all other pairs, ours on other schedulers included; over the best built-in pair")
    with torch.inference_mode():
        for prediction in args.models:
            measure(Bench(pack, test_pack, prediction, args.batch), args, prediction)


if __name__ == "__main__":
    main()
