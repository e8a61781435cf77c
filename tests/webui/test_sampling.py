"""The sampler inside the hosts: the library's result under their k-diffusion denoisers, statistics, options, records."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.rows import EMSMeta, FittedRow
from dpm_solver_v3.ems_tools.hosting import unfitted_steps
from dpm_solver_v3.ems_tools.share.identity import content_fingerprint
from dpm_solver_v3.sampler import EMS, FittedSteps, LevelTable, sample_dpm_solver_v3
from dpm_solver_v3.webui import find, model, options, sampling
from dpm_solver_v3.webui.host import HostError

NAME = "DPM-Solver-v3"
FITTED = f"{NAME} fitted"


def library_result(host: Any, p: Any, ems: EMS | None = None, **settings: Any) -> Tensor:
    """The library alone, under a new denoiser of the host's."""
    sampler = type(p.sampler)(None, host)
    denoiser = sampler.model_wrap_cfg
    denoiser.p, denoiser.step, denoiser.total_steps, sampler.sampler_extra_args = p, 0, p.steps, p.sampler.sampler_extra_args
    scale = p.hr_cfg if p.is_hr_pass and host.kind != "A1111" else p.cfg_scale
    arguments = {"ems": ems, "guidance": scale, **settings}
    return sample_dpm_solver_v3(denoiser, p.noise, p.used_sigmas, sampler.sampler_extra_args, disable=True, **arguments)


def write(host: Any, name: str, model: dict[str, str], channels: int = 4, shift: float = 0.0, folder: str = "ems") -> EMSFile:
    """Smooth statistics at guidance 2 and 4, into the host's folder."""
    lam = torch.linspace(-2.8, 3.6, 30, dtype=torch.float64)
    wave = torch.stack([torch.sin(lam + c + shift) for c in range(channels)], 1)
    l, s, b = [torch.stack([f(wave), f(1.1 * wave)]) for f in (lambda w: 0.6 + 0.3 * w, lambda w: 0.2 * w, lambda w: 0.1 * w)]
    meta = EMSMeta("sigma", 0.0292, 14.61, "LevelTable", model=model, date="2026-01-01")
    file = EMSFile(lam, torch.tensor([2.0, 4.0], dtype=torch.float64), l, s, b, meta)
    path = host.data / "models" / folder / f"{name}.ems.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save(path)
    return file


def recorded(p: Any) -> dict[str, Any]:
    return {k.removeprefix(f"{NAME} "): v for k, v in p.extra_generation_params.items() if k.startswith(NAME)}


@pytest.fixture(autouse=True)
def quiet(forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are no model's: a trial of them would find that out (tests/ems_tools/hosting/test_trust.py)."""
    forget()
    monkeypatch.setattr("dpm_solver_v3.ems_tools.hosting.TrustBook.is_trusted", lambda *_: True)


def test_equals_the_library_without_ems(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    host.start()
    p = host.make(prompt=["a fox", "a boat"])
    assert torch.equal(p.latents, library_result(host, p))
    assert p.sampler.steps_seen == [0, 1, 2, 3, 4, 5] and len(p.sampler.model_wrap_cfg.seen) == 6
    assert recorded(p) == {"EMS": "none", "EMS choice": "automatic", "order": "auto", "corrector": "auto"}
    said = capsys.readouterr().out
    assert said.count("no EMS for pretty") == 1 and "sampling without statistics" in said and "tab EMS" in said
    host.make()
    assert "no EMS" not in capsys.readouterr().out  # said once


@pytest.mark.parametrize("by", ["sha256", "content", "name"])
def test_statistics_by_checkpoint(host: Any, by: str, capsys: pytest.CaptureFixture[str]) -> None:
    host.start()
    info = host.make_checkpoint("renamed" if by != "name" else "pretty", 1, hashed=by == "sha256")
    host.load(info)
    facts = {"sha256": {"sha256": str(info.sha256)}, "content": {"content": content_fingerprint(info.filename)}}
    write(host, "other", {"name": "other", "sha256": "0" * 64}, shift=1.0)
    mine = write(host, "mine", {"name": "pretty", **facts.get(by, {})})
    p = host.make()
    assert torch.equal(p.latents, library_result(host, p, mine.at(4.0)))
    assert not torch.equal(p.latents, library_result(host, p))
    mark = find.fingerprint(host.data / "models" / "ems" / "mine.ems.safetensors")
    assert recorded(p)["EMS"] == f"mine [{mark}]" and recorded(p)["strength"] != ""
    reason = "of a checkpoint with the same name" if by == "name" else "made for this checkpoint"
    said = capsys.readouterr().out
    assert f"EMS mine.ems.safetensors, {reason}" in said and "guidance 4" in said


def test_the_picture_does_not_name_the_users_folders(host: Any) -> None:
    host.start()
    write(host, "for anna/mine", {"name": "pretty"})
    page, p = host.accordion(), host.make()
    mark = find.fingerprint(host.data / "models" / "ems" / "for anna" / "mine.ems.safetensors")
    assert recorded(p)["EMS"] == f"mine [{mark}]"
    assert page.infotext_fields[0][1]({f"{NAME} EMS": f"mine [{mark}]"}) == f"for anna/mine [{mark}]"


def test_same_architecture_only_if_allowed(host: Any) -> None:
    host.start()
    identity = model.identity_of(model.running(cast("Any", type("D", (), {"inner_model": None, "p": None}))))
    write(host, "kin", {"name": "kin", "architecture": identity.architecture, "prediction": "EPS"})
    assert recorded(host.make())["EMS"] == "none"
    host.modules["modules.shared"].opts.data["dpm_solver_v3_same_architecture"] = True
    assert recorded(host.make())["EMS"].startswith("kin [")


def test_file_of_another_size_or_a_broken_one(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    host.start()
    write(host, "wide", {"name": "pretty"}, channels=16)
    folder = host.data / "models" / "ems"
    (folder / "broken.ems.safetensors").write_bytes(b"no statistics")
    p = host.make()
    assert torch.equal(p.latents, library_result(host, p))
    assert "1 unusable files, see the tab EMS: broken.ems.safetensors" in capsys.readouterr().out
    p = host.make(dpm_solver_v3_chosen={"ems": "wide"})
    assert torch.equal(p.latents, library_result(host, p)) and recorded(p)["EMS"] == "none"
    assert "wide.ems.safetensors does not fit" in capsys.readouterr().out


def test_img2img_and_hires(host: Any) -> None:
    host.start()
    mine = write(host, "mine", {"name": "pretty"})
    sigmas = host.make().used_sigmas
    p = host.make(sigmas=sigmas[3:])
    assert torch.equal(p.latents, library_result(host, p, mine.at(4.0))) and len(p.sampler.steps_seen) == 3
    scale = 4.0 if host.kind == "A1111" else 2.0  # A1111 has no scale of its own for the second pass
    p = host.make(is_hr_pass=True, sigmas=sigmas[2:], **({} if host.kind == "A1111" else {"hr_cfg": scale}))
    assert torch.equal(p.latents, library_result(host, p, mine.at(scale)))
    assert set(recorded(p)) == {f"hires {name}" for name in ("EMS", "order", "corrector", "strength")}
    p = host.make(sigmas=sigmas[:1])  # no step at all
    assert torch.equal(p.latents, p.noise)


def test_rectified_flow(host: Any) -> None:
    """Told by the predictor (Forge), the class of the model's sampling (reForge), a flag of the model (AUTOMATIC1111)."""
    host.start()
    if host.kind == "A1111":
        host.model.is_sd3 = True
    elif host.kind == "Forge":
        host.model.forge_objects.unet.model.predictor.prediction_type = "const"
    else:
        sampling_of = host.model.forge_objects.unet.model
        kind = type(sampling_of.model_sampling)
        sampling_of.model_sampling = type("ModelSampling", (kind, type("CONST", (), {})), {})(host.model.sigmas)
    p = host.make(sigmas=torch.tensor([1.0, 0.85, 0.6, 0.3, 0.0]))
    assert torch.equal(p.latents, library_result(host, p, space="flow"))
    assert not torch.equal(p.latents, library_result(host, p))


def test_settings_then_accordion_then_plot(host: Any) -> None:
    host.start()
    mine = write(host, "mine", {"name": "pretty"})
    stored = host.modules["modules.shared"].opts.data
    stored.update(dpm_solver_v3_order="3", dpm_solver_v3_corrector="none", dpm_solver_v3_strength="0.5")
    p = host.make()
    assert torch.equal(p.latents, library_result(host, p, mine.at(4.0), order=3, corrector="none", strength=0.5))
    assert recorded(p)["order"] == "3" and recorded(p)["strength"] == "0.5"
    page = host.accordion()
    p = host.make(script_values=[(page, ["automatic", "1", "as in Settings", "1"])])
    assert torch.equal(p.latents, library_result(host, p, mine.at(4.0), order=1, corrector="none", strength=1.0))
    axes = {o.label: o for o in host.grid.axis_options}
    q = axes[f"[{NAME}] Strength"].applied(p, 0.25)
    q = axes[f"[{NAME}] EMS"].applied(q, "mine")
    host.process_images(q)
    assert torch.equal(q.latents, library_result(host, q, mine.at(4.0), order=1, corrector="none", strength=0.25))
    assert not hasattr(p, "dpm_solver_v3_axes")
    host.process_images(axes[f"[{NAME}] EMS"].applied(p, "none"))
    stored.clear()


def test_picture_restores_its_options(host: Any) -> None:
    host.start()
    write(host, "mine", {"name": "pretty"})
    page = host.accordion()
    p = host.make(script_values=[(page, ["mine", "3", "raised", "0.3"])])
    infotext = {key: str(value) for key, value in p.extra_generation_params.items()}
    assert set(page.paste_field_names) == {*infotext, f"{NAME} EMS choice"}
    restored = [read(infotext) for _, read in page.infotext_fields]
    assert restored == [infotext[f"{NAME} EMS"], "3", "raised", "0.3"]
    again = host.make(script_values=[(page, restored)])
    assert torch.equal(again.latents, p.latents)
    assert [read({"Sampler": "Euler"}) for _, read in page.infotext_fields] == [None] * 4
    assert page.infotext_fields[0][1]({f"{NAME} EMS": "none"}) == "none"


def with_fit(host: Any, name: str, lambdas: tuple[float, ...], guidance: float = 4.0) -> EMSFile:
    """`name`.ems.safetensors with one fitted row."""
    n = len(lambdas)
    steps = FittedSteps(lambdas, (0.5,) * n, tuple(tuple(0.1 / (i + 1) for _ in range(i + 1)) for i in range(n)), 1.25)
    row = FittedRow(guidance, n, lambdas, steps, (1.0,) * 3, (2.0,) * 3, "karras", (0.5, 0.4, 0.6), 8)
    file = write(host, name, {"name": "pretty"})
    file = replace(file, meta=replace(file.meta, fitted=(row,)))
    file.save(host.data / "models" / "ems" / f"{name}.ems.safetensors")
    return file


LAMBDAS = (-2.3, -1.2, -0.4, 0.5, 1.6, 2.5)


def test_fitted_schedule_and_coefficients(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The schedule type gives the file's steps; their coefficients hold only while all options are "auto"."""
    host.start()
    ems = with_fit(host, "mine", LAMBDAS).at(4.0)
    p = host.make(scheduler=FITTED)
    assert (-p.used_sigmas[:-1].log()).tolist() == pytest.approx(LAMBDAS, abs=1e-5) and p.used_sigmas[-1] == 0
    assert "schedule fitted for 6 steps at cfg 4, from mine.ems.safetensors" in capsys.readouterr().out
    assert torch.equal(p.latents, library_result(host, p, ems))
    assert {name: recorded(p)[name] for name in ("order", "corrector", "strength")} == dict.fromkeys(
        ("order", "corrector", "strength"), "auto"
    )
    q = host.make(scheduler=FITTED, dpm_solver_v3_chosen={"order": "2"})
    assert torch.equal(q.latents, library_result(host, q, ems, order=2)) and recorded(q)["order"] == "2"
    assert not torch.allclose(p.latents, q.latents)
    capsys.readouterr()
    euler = host.make(sampler="Euler", scheduler=FITTED)  # does worse on these steps
    assert torch.allclose(euler.used_sigmas, unfitted(host, 6))
    said = capsys.readouterr().out
    assert "suit the sampler dpm_solver_v3 only, not Euler" in said and "steps instead" in said


def test_steps_for_image_to_image(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """They are taken where the host's schedule is the last part of ours; any other one is followed."""
    host.start()
    file, lambdas = with_fit(host, "mine", LAMBDAS), (0.45, 1.3, 2.6)
    steps = FittedSteps(lambdas, (0.5,) * 3, ((0.5,), (0.2, 0.3), (0.1, 0.2, 0.7)))
    row = FittedRow(4.0, 3, lambdas, steps, (1.0,) * 3, (2.0,) * 3, "karras", (0.5, 0.4, 0.6), 8)
    file = replace(file, meta=replace(file.meta, partial=(row,)))
    file.save(host.data / "models" / "ems" / "mine.ems.safetensors")
    whole = host.make(scheduler=FITTED).used_sigmas
    capsys.readouterr()
    p = host.make(scheduler=FITTED, sigmas=whole[3:])
    assert torch.equal(p.latents, library_result(host, p, file.at(4.0), image_to_image=True)) and len(p.sampler.steps_seen) == 3
    assert "image to image: 3 steps fitted for it, from sigma 0.607 on" in capsys.readouterr().out
    followed = whole[3:] * torch.tensor([1.0, 1.001, 1.0, 1.0])
    q = host.make(scheduler=FITTED, sigmas=followed)
    assert torch.equal(q.latents, library_result(host, q, file.at(4.0)))
    assert not torch.allclose(p.latents, q.latents, rtol=1e-2) and "image to image" not in capsys.readouterr().out
    r = host.make(scheduler=FITTED, sigmas=whole[3:], dpm_solver_v3_chosen={"order": "2"})
    assert torch.equal(r.latents, library_result(host, r, file.at(4.0), order=2))


def with_fewer_passes(host: Any) -> EMSFile:
    """Six guided steps, and seven in as many passes: c alone at the first and the last."""
    file = with_fit(host, "mine", LAMBDAS)
    lambdas, guided = (-2.4, *LAMBDAS[1:], 2.8), (False, True, True, True, True, True, False)
    rows = tuple(tuple(0.05 + 0.01 * k for k in range(known)) for known in (1, 3, 5, 7, 9, 11, 12))
    steps = FittedSteps(lambdas, (0.5,) * 7, rows, guided=guided)
    row = FittedRow(4.0, 7, lambdas, steps, (1.0,) * 3, (2.0,) * 3, "6 guided steps", (0.5, 0.4, 0.6), 8)
    file = replace(file, meta=replace(file.meta, passes=(row,)))
    file.save(host.data / "models" / "ems" / "mine.ems.safetensors")
    return file


def test_fewer_passes_in_forge(host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As many passes as six guided steps make, counted in the host's denoiser; the result is the library's."""
    host.start()
    file = with_fewer_passes(host)
    monkeypatch.setattr("dpm_solver_v3.ems_tools.hosting.TrustBook.is_ours", lambda *_: True)
    label = f"{NAME} fewer passes"
    assert (label in host.schedulers) == (host.kind == "Forge")
    if host.kind != "Forge":
        return
    p = host.make(scheduler=label)
    denoiser = p.sampler.model_wrap_cfg
    assert len(p.used_sigmas) == 8 and denoiser.passes == 12 and not denoiser.need_last_noise_uncond
    said = capsys.readouterr().out
    assert "7 steps in the passes of 6, 5 of them guided" in said and "12 passes of the network in 7 steps" in said

    def passes(x: Tensor, sigma: Tensor, guided: bool, **extra: Any) -> tuple[Tensor, ...]:
        c, u = (denoiser(x, sigma, **{**extra, "cond_scale": scale}) for scale in (1.0, 0.0))
        return (c, u + 4.0 * (c - u)) if guided else (c,)

    expected = library_result(host, p, file.at(4.0), passes=passes)
    assert torch.allclose(p.latents, expected, atol=1e-5)
    plain = host.make(scheduler=FITTED)
    assert len(plain.used_sigmas) == 7 and plain.sampler.model_wrap_cfg.passes == 12


def test_wrong_steps_in_fewer_passes_of_somebody_else(
    host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run finds out: that picture is made anew, and guided steps are taken from then on, with the reason."""
    host.start()
    monkeypatch.setattr("dpm_solver_v3.ems_tools.hosting.TrustBook.is_trusted", lambda *_: False)
    if host.kind != "Forge":
        pytest.skip("only Forge can make one pass alone")
    with_fewer_passes(host)
    label = f"{NAME} fewer passes"
    p = host.make(scheduler=label)
    assert len(p.used_sigmas) == 8 and p.sampler.model_wrap_cfg.passes > 2 * 2 * 7 and recorded(p)["EMS"] == "none"
    assert "are not taken: the first run with them" in capsys.readouterr().out
    p = host.make(scheduler=label)
    said = capsys.readouterr().out
    assert len(p.used_sigmas) == 7 and "schedule fitted for 6 steps" in said and "are not taken" in said


@pytest.mark.parametrize(
    ("what", "reason"), [("mask", "inpainting"), ("weight", "several prompts"), ("patch", "computed under plain guidance")]
)
def test_every_step_is_guided_where_something_else_wants_the_pass(
    host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, reason: str
) -> None:
    host.start()
    if host.kind != "Forge":
        pytest.skip("only Forge can make one pass alone")
    with_fewer_passes(host)
    monkeypatch.setattr("dpm_solver_v3.ems_tools.hosting.TrustBook.is_ours", lambda *_: True)
    for known in ("refusal", "guided_only"):  # by the test before
        monkeypatch.setattr(f"dpm_solver_v3.ems_tools.hosting.TrustBook.{known}", lambda *_: "")
    if what == "mask":
        monkeypatch.setattr(type(host.make().sampler.model_wrap_cfg), "masked", True)
    elif what == "weight":
        monkeypatch.setattr(type(host.make().conditions[0].batch[0][0]), "weight", 0.5)
    else:
        host.model.forge_objects.unet.model_options = {"sampler_post_cfg_function": [lambda args: args["denoised"]]}
    p = host.make(scheduler=f"{NAME} fewer passes")
    assert p.sampler.model_wrap_cfg.passes == 2 * (len(p.used_sigmas) - 1)
    assert reason in capsys.readouterr().out


def unfitted(host: Any, n: int) -> Tensor:
    """Where nothing was fitted: the schedule that was measured best for this family of models."""
    return unfitted_steps(LevelTable(host.model.sigmas.double()), n)[1].float()


@pytest.mark.parametrize("case", ["no file", "no fit", "none wanted", "other steps", "far scale", "broken host"])
def test_without_a_fit_the_schedule_is_the_best_unfitted_one(
    host: Any, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host.start()
    if case != "no file":
        with_fit(host, "mine", LAMBDAS)
    if case == "no fit":
        write(host, "mine", {"name": "pretty"})
    if case == "broken host":
        monkeypatch.setattr(sampling, "find_entry", lambda *_: 1 / 0)
    cases: dict[str, dict[str, Any]] = {
        "none wanted": {"dpm_solver_v3_chosen": {"ems": "none"}},
        "other steps": {"steps": 5},
    }
    values = cases.get(case, {})
    p = host.make(scheduler=FITTED, **{**values, **({"cfg_scale": 14.0} if case == "far scale" else {})})
    n = values.get("steps", 6)
    assert torch.allclose(p.used_sigmas, unfitted(host, n)) and len(p.used_sigmas) == n + 1
    assert "steps instead" in capsys.readouterr().out
    assert p.latents.isfinite().all()


def change_model_options(host: Any) -> None:
    def rescaled(arguments: Any) -> Any:
        """Stands for an extension that changes the guidance."""

    host.model.forge_objects.unet.model_options = {"sampler_cfg_function": rescaled}


@pytest.mark.parametrize("case", ["other channels", "other noise range", "other noise space", "other guidance"])
def test_fitted_steps_are_only_for_what_they_were_fitted_to(
    host: Any, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host.start()
    file = with_fit(host, "mine", LAMBDAS)
    path = host.data / "models" / "ems" / "mine.ems.safetensors"
    if case == "other channels":
        three = {name: getattr(file, name)[:, :, :3].contiguous() for name in "lsb"}
        replace(file, **three).save(path)
    if case == "other noise range":
        replace(file, meta=replace(file.meta, sigma_max=120.0)).save(path)
    if case == "other noise space":
        replace(file, meta=replace(file.meta, space="flow")).save(path)
    if case == "other guidance":
        if host.kind == "A1111":
            pytest.skip("AUTOMATIC1111 has no place where extensions change the guidance")
        change_model_options(host)
    p = host.make(scheduler=FITTED)
    assert torch.allclose(p.used_sigmas, unfitted(host, 6))
    said = capsys.readouterr().out
    words = {
        "other channels": "no EMS for pretty (SD15, 4 channels)" if host.kind == "A1111" else "4 channels",
        "other noise range": "noise up to sigma 120",
        "other noise space": "made for a rectified flow",
        "other guidance": "computed under plain guidance, this run has",
    }
    assert words[case] in said and "steps instead" in said


def test_flow_models_fall_back_to_steps_of_a_flow(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    host.start()
    t = torch.linspace(0.001, 1, 1000)
    flow = type("PredictionFlow", (), {"prediction_type": "const", "sigmas": t})()
    wrap = type("Wrap", (), {"sigmas": t, "inner_model": host.model, "predictor": flow, "get_sigmas": None})()
    levels = sampling.fitted_schedule(8, 0.001, 1.0, wrap, "cpu")
    assert levels[0] > 0.99 and levels[-1] == 0 and (levels.diff() < 0).all()
    assert levels[4] > 0.4  # Karras steps, as of a model of the other kind, would be at 0.09 there
    assert "steps instead" in capsys.readouterr().out


def title_of_mine() -> str:
    return next(title for title in find.titles() if title.startswith("mine ["))


def test_restoring_a_file_that_moved_or_changed(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    host.start()
    write(host, "mine", {"name": "pretty"})
    page, folder = host.accordion(), host.data / "models" / "ems"
    title = title_of_mine()
    read = page.infotext_fields[0][1]
    (folder / "mine.ems.safetensors").rename(folder / "moved.ems.safetensors")
    assert read({f"{NAME} EMS": title}) == title.replace("mine", "moved")  # told by its fingerprint
    (folder / "moved.ems.safetensors").unlink()
    write(host, "mine", {"name": "pretty"}, shift=2.0)
    assert read({f"{NAME} EMS": title}) == title_of_mine() != title
    assert f"the picture was made with the EMS {title}" in capsys.readouterr().out
    (folder / "mine.ems.safetensors").unlink()
    assert read({f"{NAME} EMS": title}) == "automatic"
    assert "cannot be restored" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["automatic", "pinned", "nothing found"])
def test_pasting_restores_the_choice_not_the_file_that_it_led_to(
    host: Any, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture made with "automatic" uses the loaded checkpoint's own file wherever it is pasted."""
    host.start()
    if kind != "nothing found":
        write(host, "mine", {"name": "pretty", "sha256": host.checkpoint.sha256})
    page = host.accordion()
    p = host.make(script_values=[(page, ["mine" if kind == "pinned" else "automatic", "auto", "auto", "auto"])])
    infotext = {key: str(value) for key, value in p.extra_generation_params.items()}
    restored = page.infotext_fields[0][1](infotext)
    assert restored == (title_of_mine() if kind == "pinned" else "automatic")
    other = host.make_checkpoint("other", 7)
    write(host, "theirs", {"name": "other", "sha256": other.sha256}, shift=1.0)
    host.load(other)
    capsys.readouterr()
    again = host.make(script_values=[(page, [restored, "auto", "auto", "auto"])])
    if kind == "pinned":
        assert recorded(again)["EMS"] == title_of_mine()
        assert "though it was made for another checkpoint (pretty); 'automatic' finds" in capsys.readouterr().out
    else:
        assert recorded(again)["EMS"].startswith("theirs [")
    host.load(host.checkpoint)


def test_strength_without_statistics_is_pasted_back(host: Any) -> None:
    host.start()
    page = host.accordion()
    p = host.make(script_values=[(page, ["none", "2", "none", "0.3"])])
    infotext = {key: str(value) for key, value in p.extra_generation_params.items()}
    assert [read(infotext) for _, read in page.infotext_fields] == ["none", "2", "none", "0.3"]


def test_last_line_of_the_log_is_what_holds_now(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    host.start()
    first = {"name": "pretty", "sha256": host.checkpoint.sha256}
    write(host, "mine", first)
    host.make()
    (host.data / "models" / "ems" / "mine.ems.safetensors").unlink()
    host.make()
    write(host, "mine", first)
    capsys.readouterr()
    host.make()
    assert "EMS mine.ems.safetensors, made for this checkpoint" in capsys.readouterr().out
    host.make()
    assert "EMS" not in capsys.readouterr().out  # but not twice


def test_without_a_file_the_log_says_once_how_long_computing_one_would_take(
    host: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    host.start()
    host.make()
    told = capsys.readouterr().out
    assert re.search(r"computing them in the tab EMS takes about \d+(\.\d)? (s|min|h) for one CFG scale", told)
    host.make()
    assert "takes about" not in capsys.readouterr().out


def test_log_shows_escapes_of_strangers_texts(
    host: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host.start()
    page = host.accordion()
    capsys.readouterr()
    page.infotext_fields[0][1]({f"{NAME} EMS": "\x1b]0;owned\x07\nmine"})
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and "\\x1b]0;owned" in said and said.count("\n") == 1
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    find.host.log("\u6a21\u578b")
    narrow.flush()
    assert b"\\u6a21" in narrow.buffer.getvalue()
    narrow.close()
    find.host.log("nobody reads this")  # and nothing fails: it is said in the midst of pictures and computations


@pytest.mark.parametrize(("field", "value"), [("order", "4"), ("order", "two"), ("corrector", "best"), ("strength", "-1")])
def test_bad_option_is_named(host: Any, field: str, value: str) -> None:
    host.start()
    with pytest.raises(HostError, match="DPM-Solver-v3 cannot use these options"):
        host.make(dpm_solver_v3_chosen={field: value})


def test_missing_file_samples_without(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    host.start()
    write(host, "mine", {"name": "pretty"})
    p = host.make(dpm_solver_v3_chosen={"ems": "gone"})
    assert torch.equal(p.latents, library_result(host, p)) and recorded(p)["EMS"] == "none"
    assert "there is no EMS file 'gone'" in capsys.readouterr().out


@pytest.mark.parametrize("switch_at", [0.0, 0.5, 5 / 6])
def test_refiner_goes_on_with_its_own_statistics(host: Any, switch_at: float) -> None:
    """From where it takes over, the library with the refiner's file gives the same; no evaluation is lost."""
    host.start()
    first = write(host, "mine", {"name": "pretty"})
    refiner = host.make_checkpoint("refiner", 2)
    second = write(host, "second", {"name": "refiner", "sha256": refiner.sha256}, shift=1.5)
    p = host.make(refiner=(refiner, 0.7), refiner_switch_at=switch_at)
    assert len(p.sampler.model_wrap_cfg.seen) == 6 and p.sampler.steps_seen == [0, 1, 2, 3, 4, 5]
    k = round(6 * switch_at)
    host.load(host.checkpoint)
    states: list[Tensor] = []
    library_result(host, p, first.at(4.0), callback=lambda state: states.append(state["x"].clone()))
    host.load(refiner, 0.7)
    p.noise, p.used_sigmas = states[k], p.used_sigmas[k:]
    assert torch.equal(p.latents, library_result(host, p, second.at(4.0)))
    assert recorded(p)["refiner EMS"].startswith("second [")
    host.load(host.checkpoint)


def test_plot_axes_check_their_values(host: Any) -> None:
    host.start()
    write(host, "mine", {"name": "pretty"})
    axes = {o.label: o for o in host.grid.axis_options}
    assert list(axes) == ["Nothing", "Steps", *(f"[{NAME}] {n}" for n in ("EMS", "Strength", "Order", "Corrector"))]
    ems = axes[f"[{NAME}] EMS"]
    assert ems.choices() == ["automatic", "none", *find.titles()]
    ems.confirm(None, ems.choices())
    with pytest.raises(HostError, match="no EMS file 'gone'"):
        ems.confirm(None, ["gone"])
    axes[f"[{NAME}] Strength"].confirm(None, [0.0, 0.3, 1.0])
    with pytest.raises(HostError, match="strength must lie"):
        axes[f"[{NAME}] Strength"].confirm(None, [3.0])


def test_looking_for_statistics_never_costs_the_picture(
    host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("a new release")

    host.start()
    monkeypatch.setattr(sampling, "find", fails)
    p = host.make()
    assert torch.equal(p.latents, library_result(host, p))
    assert "looking for EMS failed (RuntimeError: a new release)" in capsys.readouterr().out


def test_folders(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start()
    models, own = find.host.ems_folders()
    assert models == host.data / "models" / "ems" and own == Path(options.__file__).resolve().parents[1] / "stats"
    assert find.host.output_folder() == models and models.is_dir()
    monkeypatch.setattr(find.host.os, "access", lambda path, mode: Path(path) != models)
    assert find.host.output_folder() == own
