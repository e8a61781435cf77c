"""From a model to a finished file by way of the command line: evidence, resuming, extending, merging, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_solver_v3.ems_tools import compute
from dpm_solver_v3.ems_tools.cli.main import main
from dpm_solver_v3.ems_tools.embedded.denoiser import WEIGHTS
from dpm_solver_v3.ems_tools.estimate.job import EstimateError, Job, JobState, uniform_grid
from dpm_solver_v3.ems_tools.estimate.run import estimate_moments
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta
from dpm_solver_v3.ems_tools.judge.calibrate import (
    CalibrationPlan,
    calibrate,
    evaluations_of_calibration,
    rows_of,
)
from dpm_solver_v3.ems_tools.judge.consistency import consistency_problems, evidence_problems
from dpm_solver_v3.sampler import EDM, EMS, karras, sample_dpm_solver_v3, settings_for, uniform_lambda

STATS = WEIGHTS.parents[2] / "stats"
TOY = """
import torch
calls = 0
def denoiser(guidance):
    def D(x, sigma):
        s = sigma.reshape(-1, 1, 1, 1)
        return torch.tanh(x / (1 + s)) * guidance / (1 + 0.3 * s)
    return D
def interrupted(guidance):
    inner = denoiser(guidance)
    def D(x, sigma):
        global calls
        calls += 1
        if calls == 60:
            raise KeyboardInterrupt
        return inner(x, sigma)
    return D
not_a_function = 3
"""
SMALL = "--shape 2,4,4 --sigma-min 0.05 --sigma-max 20 --effort quick --samples 6 --intervals 12 --batch 2 --device cpu"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    return tmp_path


def run(options: str, model: str = "toy:denoiser") -> int:
    return main(["compute", "--model", model, *SMALL.split(), *options.split()])


def test_compute_writes_a_judged_file(folder, capsys) -> None:
    """The file is small, verifies, carries evidence for every case, and its EMS lead the sampler at "auto"."""
    assert run("--guidance 1,3 --out a.ems.safetensors") == 0
    said = capsys.readouterr().out
    assert "Plan: " in said and "denoiser evaluations" in said
    file = load_ems_file("a.ems.safetensors")
    assert (folder / "a.ems.safetensors").stat().st_size < 64 * 1024
    assert not list(folder.glob("*.partial"))
    assert evidence_problems(file) == []
    assert {(r.guidance, r.steps) for r in file.meta.fitted} == {(g, n) for g in (1.0, 3.0) for n in (4, 5, 6, 8, 10)}
    assert all(r.ratio[0] <= 1 and r.fitted[0] <= r.fixed[0] for r in file.meta.fitted)
    levels = uniform_lambda(EDM(0.05, 20.0), 8)
    auto = dict.fromkeys(("order", "predictor", "corrector", "corrector_below", "lower_order_final", "strength"), "auto")
    ems = file.at(3.0)  # nothing was measured on this schedule, so the statistics stay out of it
    assert settings_for(levels, file_space := _space(file), ems, auto).strength == 0 and file_space.value == "sigma"
    assert main(["verify", "a.ems.safetensors"]) == 0


def _space(file):
    from dpm_solver_v3.sampler import Space

    return Space(file.meta.space)


def test_same_command_same_bytes_and_resume(folder) -> None:
    """A job interrupted in the middle ends with the same file as one that was not; so does one run twice."""
    assert run("--out a.ems.safetensors --name toy") == 0
    assert run("--out b.ems.safetensors --name toy", "toy:interrupted") == 130
    assert (folder / "b.ems.safetensors.partial").exists()
    assert run("--out b.ems.safetensors --name toy", "toy:interrupted") == 0
    first, second = load_ems_file("a.ems.safetensors"), load_ems_file("b.ems.safetensors")
    for name in ("lambdas", "l", "s", "b"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.meta.evidence == second.meta.evidence and first.meta.recommendation == second.meta.recommendation
    assert run("--out c.ems.safetensors --name toy") == 0
    assert (folder / "a.ems.safetensors").read_bytes() == (folder / "c.ems.safetensors").read_bytes()


def test_another_models_job_is_not_continued(folder, capsys) -> None:
    assert run("--out b.ems.safetensors", "toy:interrupted") == 130
    capsys.readouterr()
    assert run("--out b.ems.safetensors") == 1
    assert "another model" in capsys.readouterr().err


def test_a_job_with_another_fit_is_not_continued() -> None:
    """Each field of the fit counts, the rounds of refinement among them."""
    source = Source({1.0: lambda x, sigma: x}, (2, 4, 4), EDM(0.05, 20.0), {})
    plan, state = compute.plan_for(source, compute.EFFORTS["standard"]), JobState()
    assert plan.fit is not None
    compute._check_same(state, source, plan)
    compute._check_same(state, source, plan)
    with pytest.raises(EstimateError, match="another fit"):
        compute._check_same(state, source, replace(plan, fit=replace(plan.fit, rounds=plan.fit.rounds + 1)))


def test_killed_job_resumes(folder) -> None:
    """SIGKILL in the middle of a real process (benchmarks/kill.py does this at twenty random moments)."""
    slow = TOY.replace("    def D(x, sigma):\n", "    def D(x, sigma):\n        import time; time.sleep(0.004)\n", 1)
    (folder / "toy.py").write_text(slow)
    command = [sys.executable, "-m", "dpm_solver_v3.ems_tools.cli.main", "compute", "--model", "toy:denoiser", *SMALL.split()]
    process = subprocess.Popen([*command, "--out", "k.ems.safetensors"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = folder / "k.ems.safetensors.partial"
    while process.poll() is None and not partial.exists():
        pass
    process.kill()
    process.wait()
    assert run("--out k.ems.safetensors") == 0 and run("--out alone.ems.safetensors") == 0
    assert (folder / "k.ems.safetensors").read_bytes() == (folder / "alone.ems.safetensors").read_bytes()


def test_merge_and_extend(folder, capsys) -> None:
    """Two seeds add up; the merged file can be extended and judged; repeats and foreign files are refused."""
    keep = "--keep-moments --no-evidence --name toy"
    assert run(f"--out a.ems.safetensors {keep}") == 0 and run(f"--out b.ems.safetensors {keep} --seed 1") == 0
    assert main(["merge", "a.ems.safetensors", "b.ems.safetensors", "--out", "ab.ems.safetensors"]) == 0
    merged = load_ems_file("ab.ems.safetensors")
    assert merged.meta.estimate["samples"] == (12,) and merged.meta.estimate["seeds"] == (0, 1)
    capsys.readouterr()
    assert main(["merge", "a.ems.safetensors", "a.ems.safetensors", "--out", "x.ems.safetensors"]) == 1
    assert "another --seed" in capsys.readouterr().err
    small = SMALL.replace("--samples 6", "--samples 14").split()
    extend = ["--extend", "ab.ems.safetensors", "--out", "abc.ems.safetensors", "--keep-moments"]
    assert main(["compute", "--model", "toy:denoiser", *small, *extend]) == 0
    extended = load_ems_file("abc.ems.safetensors")
    assert extended.meta.estimate["samples"] == (14,) and extended.meta.fitted
    assert run("--out n.ems.safetensors --no-evidence --name toy --seed 7") == 0
    assert main(["merge", "a.ems.safetensors", "n.ems.safetensors", "--out", "x.ems.safetensors"]) == 1
    assert "--keep-moments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nowhere:denoiser", "", "cannot be loaded"),
        ("toy:missing", "", "cannot be loaded"),
        ("toy:not_a_function", "", "not a function"),
        ("toy:denoiser", "--sigma-min 30", "below --sigma-max"),
        ("toy:denoiser", "--extend nothing.ems.safetensors", "no such file"),
        ("toy:denoiser", "--out no/such/folder/a.ems.safetensors", "No such file"),
    ],
)
def test_refusals_are_one_line(folder, capsys, model: str, options: str, message: str) -> None:
    assert run(options, model) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_model_needs_its_facts(folder, capsys) -> None:
    assert main(["compute", "--model", "toy:denoiser", "--shape", "2,4,4"]) == 1
    assert "--sigma-min, --sigma-max" in capsys.readouterr().err


def test_recommendation_never_loses_on_calibration_noise() -> None:
    """The guarantee, recomputed: with the stored settings, the error is at most that of the best setting without EMS."""
    job = Job((2, 4, 4), uniform_grid(0.05, 20.0, 16), samples=8)
    model = _toy_model()
    st = estimate_moments({1.0: model}, job, JobState())[0].statistics()
    bad = EMS(torch.tensor(job.lambdas, dtype=torch.float64), st.l + 1.0, st.s - 2.0, st.b + 1.0)  # worse than none
    plan = CalibrationPlan({"karras": lambda n: karras(EDM(0.05, 20.0), n, to_zero=True)}, (5, 8), 4, 4, reference_steps=60)
    calls: list[Any] = []
    state = JobState()
    rows = calibrate(model, bad, job, 1.0, plan, state, progress=calls.append)
    assert len(rows) == 2
    assert calls[-1].done == calls[-1].total == evaluations_of_calibration(plan, 1)
    for row in rows:
        chosen, report = row.evidence
        assert chosen.ems <= chosen.data_prediction < chosen.full_strength
        assert (chosen.split, report.split) == ("calibration", "report") and 0 < report.ems < report.full_strength
    assert list(rows_of(state).values()) == rows


def test_statistics_that_lose_to_no_file_are_not_recommended(monkeypatch) -> None:
    """Whatever they gain on the formulas: at "auto" a run without a file takes other steps than these."""
    job = Job((2, 4, 4), uniform_grid(0.05, 20.0, 16), samples=8)
    model = _toy_model()
    st = estimate_moments({1.0: model}, job, JobState())[0].statistics()
    good = EMS(torch.tensor(job.lambdas, dtype=torch.float64), st.l, st.s, st.b)
    plan = CalibrationPlan({"karras": lambda n: karras(EDM(0.05, 20.0), n, to_zero=True)}, (5,), 4, 4, reference_steps=60)
    for without, used in ((1e9, True), (0.0, False)):
        monkeypatch.setattr(sys.modules[CalibrationPlan.__module__], "_without_file", lambda *_, error=without: error)
        (row,) = calibrate(model, good, job, 1.0, plan, JobState())
        assert bool(row.advice.settings.strength) == used and (row.evidence[0].ems < row.evidence[0].data_prediction) == used
        meta = EMSMeta("sigma", 0.05, 20.0, evidence=row.evidence, recommendation=(row.advice,))
        scale = torch.ones(1, dtype=torch.float64)
        assert consistency_problems(EMSFile(good.lambdas, scale, good.l[None], good.s[None], good.b[None], meta)) == []


def _toy_model():
    namespace: dict[str, Any] = {}
    exec(TOY, namespace)
    return namespace["denoiser"](1.0)


def test_shipped_file_serves_the_embedded_model() -> None:
    """The file in stats/ is the embedded model's, fits its latents, and lowers the error of six steps."""
    import hashlib

    from dpm_solver_v3.ems_tools.embedded import load_denoiser
    from dpm_solver_v3.sampler import VPDiscrete

    file = load_ems_file(next(STATS.glob("*.ems.safetensors")))
    assert file.meta.model["sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert evidence_problems(file) == []
    denoiser = load_denoiser(torch.arange(9), 1.0)
    schedule = VPDiscrete.linear()
    x = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * schedule.level_at(torch.tensor(1.0)).item()
    converged = sample_dpm_solver_v3(denoiser, x, uniform_lambda(schedule, 60), order=3, corrector="none", disable=True)
    errors = []
    for ems in (None, file.at(1.0)):
        y = sample_dpm_solver_v3(denoiser, x, uniform_lambda(schedule, 6), ems=ems, disable=True)
        errors.append((y - converged).square().flatten(1).mean(1).log().mean())
    assert errors[1] < errors[0]


def test_efforts_are_what_they_claim() -> None:
    """Evaluations a guidance scale, and those of quick for one step count."""
    source = compute.Source({1.0: _toy_model()}, (2, 4, 4), EDM(0.05, 20.0), {"name": "toy"})
    for name, most in (("quick", 1500), ("standard", 12_000), ("thorough", 60_000)):
        effort = compute.EFFORTS[name]
        assert 0.75 * most < compute.evaluations(compute.job_for(source, effort), compute.plan_for(source, effort)) <= most
    effort = compute.EFFORTS["quick"]
    for n in range(4, 11):
        assert compute.evaluations(compute.job_for(source, effort, steps=(n,)), compute.plan_for(source, effort, (n,))) <= 700


def test_the_hosts_schedules_come_first_and_keep_their_names() -> None:
    """Ours of the same name would be calibrated in their place; every fit has to beat formulas on the host's schedules too."""
    mine = {name: lambda n: torch.linspace(10.0, 0.0, n + 1) for name in ("normal", "karras")}
    source = compute.Source({1.0: _toy_model()}, (2, 4, 4), EDM(0.05, 20.0), {"name": "toy"}, host_schedules=mine)
    quick, standard = (compute.plan_for(source, compute.EFFORTS[e]) for e in ("quick", "standard"))
    assert list(standard.schedules) == ["normal"] and not quick.schedules
    assert quick.fit is not None and dict(quick.fit.fixed) == mine


@pytest.mark.parametrize("name", ["two\nlines", "e\u200dmoji", "full\u3000width", "no\u00a0break"])
def test_what_a_file_cannot_hold_shows_before_the_first_evaluation(folder, name) -> None:
    """A name of a checkpoint or a prompt, as hosts give it, costs no computation."""
    assert (
        main(
            [
                "compute",
                "--model",
                "toy:denoiser",
                *SMALL.split(),
                "--no-evidence",
                "--name",
                name,
                "--out",
                "a.ems.safetensors",
            ]
        )
        == 0
    )
    assert str(load_ems_file("a.ems.safetensors").meta.model["name"]).isprintable()


@pytest.mark.parametrize("options", [f"--seed {2**63}", "--guidance " + ",".join(str(k) for k in range(1, 66))])
def test_a_request_that_no_file_can_hold_is_refused_at_once(folder, capsys, options) -> None:
    assert run(f"{options} --no-evidence --out a.ems.safetensors") == 1
    assert "not begun" in capsys.readouterr().err
    assert not list(folder.glob("*.partial"))


def test_a_finished_file_of_another_request_is_never_replaced(folder, capsys) -> None:
    assert run("--no-evidence --guidance 1 --name toy") == 0
    first = (folder / "toy.ems.safetensors").read_bytes()
    assert run("--no-evidence --guidance 4 --name toy") == 0
    assert (folder / "toy.ems.safetensors").read_bytes() == first and (folder / "toy_2.ems.safetensors").exists()
    assert run("--no-evidence --guidance 4 --out toy.ems.safetensors") == 1
    assert "holds another result" in capsys.readouterr().err
    assert run("--no-evidence --guidance 1 --name toy") == 0  # the same request is the same file
    assert (folder / "toy.ems.safetensors").read_bytes() == first and not (folder / "toy_3.ems.safetensors").exists()
