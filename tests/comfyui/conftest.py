"""A real ComfyUI as a server, with this checkout among its custom nodes, driven as its front end drives it.

`install.py --test` puts ComfyUI's trees into `.venv/comfyui`. COMFYUI_PATH=/a/ComfyUI adds more (separated as in PATH).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import pytest
from processes import end

ROOT = Path(__file__).resolve().parents[2]
TREES = ROOT / ".venv" / "comfyui"
PACK_NAME = "dpm v3 (odd).name"
START_SECONDS, RUN_SECONDS = 300, 400


def _version(tree: Path) -> str:
    """As "0.3.75"; releases of early 2025 do not say theirs."""
    file = tree / "comfyui_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text.split('"')[-2] if text.count('"') >= 2 else "0.3"


def _trees() -> dict[str, Path]:
    """ComfyUI trees by version, newest first."""
    given = [Path(p) for p in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if p]
    found = {_version(p): p for p in [*TREES.glob("*"), *given] if (p / "main.py").is_file()}
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])], reverse=True))


class ComfyServer:
    """One ComfyUI with a base directory of its own; `start` again after `kill` or `stop`."""

    def __init__(self, tree: Path, base: Path, name: str = PACK_NAME) -> None:
        options = (tree / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        self.tree, self.base, self.options = tree, base, ["--disable-auto-launch", "--preview-method", "latent2rgb"]
        if '"--base-directory"' in options:
            self.options += ["--base-directory", str(base)]
        else:  # early 2025: its folders lie beside its code
            shutil.copytree(tree, base, dirs_exist_ok=True, ignore=shutil.ignore_patterns("custom_nodes", "site"))
            self.tree = base
        if '"--database-url"' in options:  # the default database lies in the tree, which all servers share
            self.options += ["--database-url", "sqlite:///:memory:"]
        self.log_path = base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.client = uuid.uuid4().hex
        self.events: list[Any] = []
        self.socket: Any = None
        for folder in (
            "custom_nodes",
            "models/ems",
            "models/diffusion_models",
            "models/checkpoints",
            "output",
            "input",
            "user",
        ):
            (base / folder).mkdir(parents=True, exist_ok=True)
        # Early 2025 cannot import a pack with a dot in its name, whatever the pack.
        dots = "_x_" in (tree / "nodes.py").read_text(encoding="utf-8")
        own = name if dots else name.replace(".", " ")
        for link_name, target in ((own, ROOT), ("test_pack", ROOT / "tests" / "comfyui" / "pack")):
            link = base / "custom_nodes" / link_name
            if not link.exists():
                _link(target, link)

    # --- the process

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the packages that this very version asks for (front end, templates, ...) in its `site`."""
        return {**os.environ, "PYTHONPATH": str(self.tree / "site")}

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "main.py", "--cpu", "--port", str(self.port), *self.options]
        environment = {**self.environment, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.tree, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"ComfyUI ended with status {self.process.returncode}:\n{self.log()[-4000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                break
            assert time.monotonic() < deadline, f"ComfyUI does not answer:\n{self.log()[-4000:]}"
            time.sleep(0.2)
        self._listen()

    def kill(self) -> None:
        """As the system does when memory runs out: no chance to save anything."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        end(self.process)

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    # --- the interface of the front end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, data: Any) -> Any:
        body = json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return {"status": error.code, **json.loads(error.read() or b"{}")}

    def _listen(self) -> None:
        import websocket

        self.socket = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}", timeout=None)

        def read(connection: Any = self.socket) -> None:
            with contextlib.suppress(Exception):
                while True:
                    message = connection.recv()
                    if not message:
                        return
                    self.events.append(json.loads(message) if isinstance(message, str) else bytes(message))

        threading.Thread(target=read, daemon=True).start()

    def texts(self) -> str:
        """Every status text that nodes showed, a line each (binary message 3: 4 bytes type, 4 bytes length of id, id, text)."""
        binary = [e for e in list(self.events) if isinstance(e, bytes) and int.from_bytes(e[:4], "big") == 3]
        texts = [e[8 + int.from_bytes(e[4:8], "big") :].decode("utf-8", "replace") for e in binary]
        return "\n".join(" ".join(text.split("\n")) for text in texts)

    def progress(self) -> list[dict[str, Any]]:
        return [e["data"] for e in list(self.events) if isinstance(e, dict) and e.get("type") == "progress"]

    def queue(self, workflow: dict[str, Any]) -> str:
        answer = self.post("/prompt", {"prompt": workflow, "client_id": self.client})
        assert "prompt_id" in answer, answer
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """The history entry, once the prompt has ended in whichever way."""
        deadline = time.monotonic() + RUN_SECONDS
        while True:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return dict(entry)
            assert self.process is not None and self.process.poll() is None, self.log()[-4000:]
            assert time.monotonic() < deadline, f"no end after {RUN_SECONDS} s:\n{self.log()[-4000:]}"
            time.sleep(0.05)

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Outputs by node id. Fails with the server's log."""
        entry = self.wait(self.queue(workflow))
        said = [m[1] for m in entry["status"]["messages"] if "exception_message" in m[1]]
        told = "\n".join([m["exception_type"] + ": " + m["exception_message"] + "".join(m["traceback"][-4:]) for m in said])
        assert entry["status"]["status_str"] == "success", told
        return dict(entry["outputs"])

    def run_refused(self, workflow: dict[str, Any]) -> str:
        """The message of a prompt that must fail, at the check or while running."""
        answer = self.post("/prompt", {"prompt": workflow, "client_id": self.client})
        if "prompt_id" not in answer:
            return json.dumps(answer)
        status = self.wait(answer["prompt_id"])["status"]
        assert status["status_str"] == "error", status
        return "\n".join(m[1].get("exception_message", "") for m in status["messages"])

    @property
    def lists_schedulers(self) -> bool:
        """Whether a pack can add to the scheduler list, as from 2025 on."""
        return "SCHEDULER_HANDLERS" in (self.tree / "comfy" / "samplers.py").read_text(encoding="utf-8")

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def latent(self, outputs: dict[str, Any], node: str = "save") -> Any:
        """What the core node SaveLatent wrote."""
        from safetensors.torch import load_file

        saved = outputs[node]["latents"][0]
        return load_file(self.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]

    def image(self, outputs: dict[str, Any], node: str, number: int = 0) -> Path:
        """What the core nodes SaveImage and PreviewImage wrote."""
        saved = outputs[node]["images"][number]
        return self.base / saved["type"] / saved["subfolder"] / saved["filename"]

    def wait_for(self, condition: Any, what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen:\n{self.log()[-3000:]}"
            time.sleep(0.02)


def _link(target: Path, link: Path) -> None:
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`any_server` tests run on every version that is at hand."""
    if "any_server" in metafunc.fixturenames:
        metafunc.parametrize("any_server", list(_trees()) or ["none"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    running: dict[tuple[str, str], ComfyServer] = {}

    def get(version: str, name: str = PACK_NAME) -> ComfyServer:
        missing = [m for m in ("aiohttp", "websocket", "transformers", "torchaudio") if importlib.util.find_spec(m) is None]
        if version not in _trees() or missing:
            pytest.skip("no ComfyUI here: `python install.py --test` brings it (Python 3.11 or newer), or set COMFYUI_PATH")
        if (version, name) not in running:
            server = ComfyServer(_trees()[version], tmp_path_factory.mktemp(f"comfyui {version}"), name)
            _models(server)
            server.start()
            running[version, name] = server
        return running[version, name]

    yield get
    for server in running.values():
        server.stop()
        shutil.rmtree(server.base, ignore_errors=True)


@pytest.fixture(scope="session")
def server(_servers: Any) -> ComfyServer:
    """The newest ComfyUI."""
    return _servers(next(iter(_trees()), "none"))


@pytest.fixture(scope="session")
def plain_server(_servers: Any) -> ComfyServer:
    """The newest ComfyUI with the pack under the name that the registry gives it.

    ComfyUI serves no example workflows of a pack with spaces in its name: aiohttp quotes the route and not the request.
    """
    return _servers(next(iter(_trees()), "none"), "comfyui-dpm-solver-v3")


@pytest.fixture(scope="session")
def any_server(request: pytest.FixtureRequest, _servers: Any) -> ComfyServer:
    return _servers(request.param)


def _models(server: ComfyServer) -> None:
    """Tiny models for core's loaders, made in a process of its own."""
    script = [sys.executable, str(ROOT / "tests" / "comfyui" / "make_models.py"), str(server.tree), str(server.base / "models")]
    done = subprocess.run(script, capture_output=True, text=True, env=server.environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def nodes() -> Any:
    """Builds workflows in the API's format: n(id, class_type, **inputs); a link is [id, output]."""

    def workflow(*parts: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
        return {name: {"class_type": kind, "inputs": inputs} for name, kind, inputs in parts}

    return workflow
