"""What the user can choose: Settings for all pictures, the accordion for one, and back again from a picture's record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..sampler import AUTO, DEFAULTS, Settings, SolverOptions
from ..sampler.settings import resolve_settings
from . import host
from .find import AUTOMATIC, NONE, named, title_of, titles
from .objects import Processing

__all__ = [
    "AS_SET",
    "AXES",
    "CHOSEN",
    "CORRECTORS",
    "ORDERS",
    "Choice",
    "add_settings",
    "chosen",
    "record",
    "script_class",
]

AS_SET = "as in Settings"
CHOSEN, AXES = "dpm_solver_v3_chosen", "dpm_solver_v3_axes"
"""Attributes of the processing object: the accordion's values, and those of the X/Y/Z plot (field of `Choice` -> value)."""

ORDERS = (AUTO, "1", "2", "3")
CORRECTORS = (AUTO, "none", "pseudo", "true", "raised")
_STRENGTHS = (AUTO, "0", "0.25", "0.5", "0.75", "1")
_RECORD, _CHOICE = "DPM-Solver-v3", "EMS choice"
_ABOUT = {
    "order": "Order of the predictor. 2 is the safe choice; 3 can win at low guidance.",
    "corrector": "Corrects each step with the next evaluation, at no extra cost. none: often best at high guidance and few "
    "steps; pseudo: the paper's; true: of the predictor's order; raised: one order more.",
    "strength": "How much of the EMS to use: 1 all, 0 none (data prediction).",
}


@dataclass(frozen=True)
class Choice:
    """How to sample; "auto" is what was measured best with the EMS, else the sampler's defaults.

    Args:
        ems: "automatic", "none", or a file by its title, name or fingerprint.
        order, corrector, strength: as in `Settings`, as text.
        same_architecture: use another checkpoint's EMS if this one has none.
    """

    ems: str = AUTOMATIC
    order: str = AUTO
    corrector: str = AUTO
    strength: str = AUTO
    same_architecture: bool = False

    def with_values(self, values: Mapping[str, object]) -> Choice:
        """The same with these fields, as text."""
        fields = {"ems": self.ems, "order": self.order, "corrector": self.corrector, "strength": self.strength}
        for name, value in values.items():
            fields[name] = str(value)
        return Choice(**fields, same_architecture=self.same_architecture)

    def solver(self) -> SolverOptions:
        """Keyword arguments for the sampler. Raises HostError for a value that it does not take."""
        values: SolverOptions = {"corrector": self.corrector}
        try:
            values["order"] = self.order if self.order == AUTO else int(self.order)
            values["strength"] = self.strength if self.strength == AUTO else float(self.strength)
            resolve_settings(DEFAULTS, None, values)
        except ValueError as error:
            raise host.HostError(f"DPM-Solver-v3 cannot use these options: {error}") from error
        return values


def chosen(p: Processing | None) -> Choice:
    """For one picture: Settings, then the accordion, then the X/Y/Z plot."""
    base = Choice(same_architecture=bool(host.option("dpm_solver_v3_same_architecture", False)))
    stored = {name: host.option(f"dpm_solver_v3_{name}", AUTO) for name in ("order", "corrector", "strength")}
    own = {name: value for name, value in getattr(p, CHOSEN, {}).items() if value not in (AS_SET, "", None)}
    return base.with_values({**stored, **own, **getattr(p, AXES, {})})


def record(p: Processing | None, choice: Choice, title: str, settings: Settings | None, part: str = "") -> None:
    """Write what was used into the picture's parameters; of a later part ("hires", "refiner") only what differs.

    Args:
        p: the picture.
        choice: what the user chose, so that pasting brings back the choice, not what it led to with this checkpoint.
        title: of the EMS file, or NONE.
        settings: of the solver; None for steps fitted to this very schedule, which are used where all options are "auto".
        part: of the picture.
    """
    parameters = getattr(p, "extra_generation_params", None)
    if not isinstance(parameters, dict):
        return
    title = title.rpartition("/")[2]  # pictures are shown to others, and the names of folders are private
    used = {"EMS": title, **{name: AUTO if settings is None else getattr(settings, name) for name in ("order", "corrector")}}
    if choice.ems == AUTOMATIC and not part:
        used[_CHOICE] = AUTOMATIC
    if title != NONE:
        used["strength"] = AUTO if settings is None else settings.strength
    elif choice.strength != AUTO:
        used["strength"] = float(choice.strength)
    for name, value in used.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if not part or parameters.get(f"{_RECORD} {name}") != text:
            parameters[f"{_RECORD} {part} {name}" if part else f"{_RECORD} {name}"] = text


def add_settings() -> None:
    """The page "DPM-Solver-v3" of Settings."""
    import gradio as gr

    for name, values in (("order", ORDERS), ("corrector", CORRECTORS), ("strength", _STRENGTHS)):
        label = f"Default {name}"
        choices = partial(dict[str, object], choices=list(values))
        host.add_option(f"dpm_solver_v3_{name}", AUTO, label, gr.Radio, choices, _ABOUT[name])
    about = "if there is none for the checkpoint itself. Better than nothing, or worse: compare with an X/Y/Z plot."
    label = "Use same-architecture EMS"
    host.add_option("dpm_solver_v3_same_architecture", False, label, gr.Checkbox, dict, about)


def script_class() -> type:
    """The accordion of txt2img and img2img, as a subclass of the host's Script."""
    import gradio as gr

    scripts: Any = host.module("modules.scripts")

    class Accordion(scripts.Script):
        """DPM-Solver-v3's options for one picture."""

        def title(self) -> str:
            """By which the host's API knows it."""
            return "DPM-Solver-v3"

        def show(self, is_img2img: bool) -> object:
            """On both tabs, always."""
            return scripts.AlwaysVisible

        def ui(self, is_img2img: bool) -> list[object]:
            """The four values that the API takes too: EMS, order, corrector, strength."""

            def identify(name: str) -> dict[str, str]:
                return {"elem_id": f"dpm_solver_v3_{'img2img' if is_img2img else 'txt2img'}_{name}"}

            def menu(label: str, choices: list[str], name: str) -> object:
                return gr.Dropdown(choices, value=choices[0], label=label, allow_custom_value=True, **identify(name))

            with gr.Accordion("DPM-Solver-v3", open=False, **identify("accordion")):
                with gr.Row():
                    ems = menu("EMS (statistics of the checkpoint)", _ems_choices(), "ems")
                    host.refresh_button(ems, lambda: {"choices": _ems_choices()}, identify("refresh")["elem_id"])
                with gr.Row():
                    order = menu("Order", [AS_SET, *ORDERS], "order")
                    corrector = menu("Corrector", [AS_SET, *CORRECTORS], "corrector")
                    strength = menu("Strength of the EMS", [AS_SET, *_STRENGTHS], "strength")
            found = {"EMS": ems, "order": order, "corrector": corrector, "strength": strength}
            self.infotext_fields = [(component, _reader(name)) for name, component in found.items()]
            self.paste_field_names = [f"{_RECORD} {name}" for name in (*found, _CHOICE)]
            return list(found.values())

        def before_process(self, p: object, *values: object) -> None:
            """Where the sampler finds them."""
            setattr(p, CHOSEN, dict(zip(("ems", "order", "corrector", "strength"), values)))

    return Accordion


def _ems_choices() -> list[str]:
    return [AUTOMATIC, NONE, *titles()]


def _reader(name: str) -> Callable[[dict[str, str]], str | None]:
    """Parameters of a picture -> the accordion's value, or None where the picture says nothing."""

    def read(parameters: dict[str, str]) -> str | None:
        value = parameters.get(f"{_RECORD} {name}")
        if value is None or name != "EMS":
            return value
        return _ems_of_picture(value, parameters.get(f"{_RECORD} {_CHOICE}") == AUTOMATIC)

    return read


def _ems_of_picture(value: str, automatic: bool) -> str:
    """What the menu of files shows for a picture made with the file `value`, chosen by the user or found by the checkpoint."""
    if value == NONE:
        return AUTOMATIC if automatic else NONE
    try:
        title = title_of(named(value))
    except (host.HostError, OSError) as error:
        host.log(f"{error}: the picture's EMS cannot be restored, the checkpoint's own are used")
        return AUTOMATIC
    if title != value:
        host.log(f"the picture was made with the EMS {value}; here is {title}")
    return AUTOMATIC if automatic else title
