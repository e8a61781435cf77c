"""Sharing and fetching: what is left out, what a card says, and a local server that speaks the Hub's endpoints used."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_solver_v3.ems_tools import cli
from dpm_solver_v3.ems_tools.cli.share import hashes_named
from dpm_solver_v3.ems_tools.embedded import SHAPE, load_denoiser
from dpm_solver_v3.ems_tools.embedded.denoiser import WEIGHTS
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import decode_ems_file, load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta
from dpm_solver_v3.ems_tools.share.hub import Hub, NotThere, within
from dpm_solver_v3.ems_tools.share.index import INDEX, Hashes, decode_index, encode_index, index_of
from dpm_solver_v3.ems_tools.share.publish import Labels, contribution, files_for_hub, push, shareable
from dpm_solver_v3.ems_tools.share.pull import install, pull
from dpm_solver_v3.sampler import EMSError, sample_dpm_solver_v3, uniform_lambda
from dpm_solver_v3.sampler import VPDiscrete as VP

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "stats" / "embedded-emoji.ems.safetensors"
REPO = "me/ems"
LABELS = Labels("somebody", "cc0-1.0")


def small(name: str = "model", **facts: object) -> EMSFile:
    lambdas = torch.linspace(-2, 3, 6, dtype=torch.float64)
    shape = (1, 6, 3)
    model: dict[str, Any] = {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **facts}
    meta = EMSMeta("sigma", 0.05, 7.4, model=model, date="2026-01-01")
    return EMSFile(lambdas, torch.ones(1).double(), torch.ones(shape), torch.zeros(shape), torch.zeros(shape), meta)


def hashes(name: str) -> Hashes:
    return Hashes(sha256=hashlib.sha256(name.encode()).hexdigest())


# --- What is published


def test_what_is_private_stays_at_home() -> None:
    foreign = {"modelspec.thumbnail": "data:...", "ss_output_name": "secret", "ss_training_comment": "/home/jane/x"}
    file = small(
        "C:\\Users\\jane\\models\\dream.v1",
        prompts="3, the first: my ex-wife on a horse",
        source="/home/jane/my_model.py:denoiser",
        architecture="SDXL",
        prediction="EPS",
        patches="style 0.8, 40 patched weights",
        workflow="{}",
    )
    estimate: dict[str, Any] = {"samples": (8,), "points": "trajectory", "source": "/home/jane/l.npz", "host": "jane-pc"}
    file = dataclasses.replace(file, meta=dataclasses.replace(file.meta, estimate=estimate, foreign=foreign))
    clean, left = shareable(file, LABELS)
    text = clean.encode().decode("latin-1")
    for private in ("jane", "ex-wife", "horse", "secret", "workflow", "thumbnail", "Users"):
        assert private not in text, private
    assert clean.meta.model["name"] == "dream.v1" and clean.meta.model["prompts"] == "3"
    assert clean.meta.estimate == {"samples": (8,), "points": "trajectory"}
    assert clean.meta.model["patches"] == "40 patched weights"
    named = " ".join(left)
    assert all(word in named for word in ("model.prompts", "model.source", "model.workflow", "estimate.host", "ss_output_name"))
    assert "horse" in str(shareable(file, LABELS, keep_prompts=True)[0].meta.model["prompts"])


def test_the_user_name_counts_as_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "jdoe")
    clean, left = shareable(small(classes="JDOE style 1", architecture="jdoefoo", patches="JDOE, face"), LABELS)
    assert not {"classes", "patches"} & set(clean.meta.model) and clean.meta.model["architecture"] == "jdoefoo"
    assert any("user name" in what for what in left)


def test_modelspec_and_kohya_keys() -> None:
    clean, _ = shareable(small(architecture="SDXL", prediction="V_PREDICTION"), Labels("me", "mit", "A title"))
    keys = dict(clean.meta.foreign)
    data = clean.encode()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    assert keys == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "SDXL/ems",
        "modelspec.implementation": "dpm-solver-v3",
        "modelspec.title": "A title",
        "modelspec.date": "2026-01-01",
        "modelspec.author": "me",
        "modelspec.license": "mit",
        "modelspec.prediction_type": "v",
        "modelspec.hash_sha256": "0x" + hashlib.sha256(tensors).hexdigest(),
        "ss_sd_model_name": "model",
        "ss_new_sd_model_hash": hashes("model").sha256,
    }


def test_sharing_what_was_shared_changes_nothing() -> None:
    once = contribution(load_ems_file(SHIPPED), LABELS, checkpoint=WEIGHTS)
    again = contribution(once.file, LABELS, checkpoint=WEIGHTS)
    assert again.data == once.data and not again.left_out


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"another model")
    with pytest.raises(EMSError, match="not the checkpoint"):
        shareable(load_ems_file(SHIPPED), LABELS, tmp_path / "other")


def test_a_file_that_contradicts_itself_is_not_shared() -> None:
    file = load_ems_file(SHIPPED)
    rows = tuple(dataclasses.replace(r, ems=9.0) for r in file.meta.evidence)
    with pytest.raises(EMSError, match="should not be shared"):
        contribution(dataclasses.replace(file, meta=dataclasses.replace(file.meta, evidence=rows)), LABELS)


def test_the_card_shows_plot_and_evidence_and_nothing_in_it_acts() -> None:
    item = contribution(load_ems_file(SHIPPED), LABELS, checkpoint=WEIGHTS)
    card = item.parts["embedded-emoji.md"].decode()
    assert "(<embedded-emoji.svg>)" in card and "better than without EMS" in card and item.entry.sha256 in card
    assert item.parts["embedded-emoji.svg"].startswith(b"<svg")
    hostile = contribution(small("x](http://bad) | <script>"), LABELS).parts
    table = next(data.decode() for name, data in hostile.items() if name.endswith(".md")).split("\n\n    ")[0]
    assert "<script>" not in table and "](http" not in table


# --- The index


def test_the_index_of_the_bundled_library_is_current() -> None:
    assert cli.main(["index", str(SHIPPED.parent), "--check"]) == 0
    (entry,) = (e for e in decode_index((SHIPPED.parent / INDEX).read_bytes()) if e.file == SHIPPED.name)
    whole = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert entry.checkpoint.sha256 == whole and entry.autov2 == whole[:10] and entry.checkpoint.content
    assert entry.licence and entry.author and entry.architecture and entry.cases > 0 and entry.guidance


def test_a_stale_index_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small().save(tmp_path / "a.ems.safetensors")
    assert cli.main(["index", str(tmp_path), "--author", "me"]) == 0
    assert cli.main(["index", str(tmp_path), "--check"]) == 0  # what was stated by hand is kept
    assert decode_index((tmp_path / INDEX).read_bytes())[0].author == "me"
    small("b").save(tmp_path / "b.ems.safetensors")
    assert cli.main(["index", str(tmp_path), "--check"]) == 1
    assert "not current" in capsys.readouterr().err


def test_an_index_comes_back_as_it_was() -> None:
    entries = index_of(SHIPPED.parent)
    assert decode_index(encode_index(entries)) == entries


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (Hashes("ab" * 32), Hashes("ab" * 32), True),
        (Hashes("ab" * 32), Hashes("ab" * 5), True),  # AutoV2
        (Hashes("ab" * 32, "cd" * 16), Hashes("ff" * 32, "cd" * 16), False),  # the surest decides
        (Hashes("", "cd" * 16), Hashes("ab" * 32, "cd" * 16), True),
        (Hashes("", "", "ee" * 16), Hashes("", "", "ee" * 16), True),
        (Hashes(), Hashes(), False),
        (Hashes("ab"), Hashes("ab" * 32), False),  # too short to mean anything
    ],
)
def test_hashes(a: Hashes, b: Hashes, same: bool) -> None:
    assert a.match(b) is same and b.match(a) is same


def test_hashes_that_users_type() -> None:
    assert hashes_named(" 0x" + "AB" * 32).sha256 == "ab" * 32
    assert hashes_named("ab" * 16).content == "ab" * 16
    for bad in ("", "xyz", "ab" * 6, "../" * 3, "g" * 64):
        with pytest.raises(EMSError, match="is no hash"):
            hashes_named(bad)


# --- A local Hub


class LocalHub(ThreadingHTTPServer):
    """What huggingface_hub asks of the Hub for one file, one commit and one repository. `fault` makes it misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.fault = ""
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit_of(self, repo: str) -> str:
        parts = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(self.repos[repo].items())]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()

    def add(self, *files: EMSFile, repo: str = REPO) -> None:
        content = self.repos.setdefault(repo, {})
        entries = decode_index(content[INDEX]) if INDEX in content else []
        for file in files:
            item = contribution(file, LABELS)
            content.update(item.parts)
            entries.append(item.entry)
        content[INDEX] = encode_index(entries)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up are part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        fault = self.server.fault
        if fault == "500":
            return self._answer(500, b"broken")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":  # /api/models/me/ems/revision/main
            repo = "/".join(parts[2:4])
            if repo not in self.server.repos:
                return self._answer(404, X_Error_Code="RepoNotFound")
            return self._json({"id": repo, "sha": self.server.commit_of(repo), "siblings": [], "private": False})
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        if repo not in self.server.repos:
            return self._answer(404, X_Error_Code="RepoNotFound")
        data = self.server.repos[repo].get(name)
        if data is None or fault == "404":
            return self._answer(404, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": self.server.commit_of(repo)}
        if fault == "huge" and name != INDEX:
            headers["Content_Length"] = str(2**33)
        if self.command == "HEAD" or name == INDEX or not fault:
            return self._answer(200, data, **headers)
        if fault == "wrong":
            return self._answer(200, bytes(len(data)), **headers)
        self.send_response(200)
        for key, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if fault == "slow":
            for at in range(0, len(data), 256):
                self.wfile.write(data[at : at + 256])
                self.wfile.flush()
                time.sleep(0.02)
        elif fault in ("truncated", "stalled"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stalled":
                time.sleep(3)
            self.close_connection = True
        return None

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.fault == "500":
            return self._answer(500, b"broken")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[1] == "repos":
            plain = json.loads(body)
            repo = "/".join(filter(None, (plain.get("organization"), plain["name"])))
            repo = repo if "/" in repo else f"me/{repo}"
            status = 409 if repo in self.server.repos else 200
            self.server.repos.setdefault(repo, {})
            return self._json({"url": f"{self.server.address}/{repo}"}, status)
        if parts[1] == "validate-yaml":
            return self._json({"errors": [], "warnings": []})
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self._json({"files": files})
        lines = [json.loads(line) for line in body.decode().splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != self.server.commit_of(repo):
            return self._json({"error": "moved on"}, 412)
        for line in lines[1:]:
            value = line["value"]
            self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        oid = self.server.commit_of(repo)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{repo}/commit/{oid}"})
        return None


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    server = LocalHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(hub_server: LocalHub, tmp_path: Path) -> Hub:
    return Hub(REPO, hub_server.address, tmp_path / "cache")


def test_share_then_pull_then_sample(hub_server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    """The whole way, on the embedded model: statistics fetched by the checkpoint's hashes sample as those shared."""
    item = contribution(load_ems_file(SHIPPED), LABELS, checkpoint=WEIGHTS)
    assert hub_server.address in push(hub, item, LABELS)
    assert {"embedded-emoji.ems.safetensors", "embedded-emoji.md", "embedded-emoji.svg", INDEX, "README.md"} == set(
        hub_server.repos[REPO]
    )
    for wanted in (Hashes.of_checkpoint(WEIGHTS), hashes_named(item.entry.autov2)):
        done = pull(hub, wanted, tmp_path / "models" / "ems")
        assert done.path.read_bytes() == item.data
    assert not done.new  # the second time it was there
    sigmas = uniform_lambda(VP.linear(), 5)  # where the file uses its statistics
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * sigmas[0].item()
    model = load_denoiser(torch.tensor([3, 6]), 1.0)

    def sample(file: EMSFile | None) -> torch.Tensor:
        with torch.no_grad():
            return sample_dpm_solver_v3(model, noise, sigmas, disable=True, ems=file.at(1.0) if file else None)

    fetched = sample(load_ems_file(done.path))
    assert torch.equal(fetched, sample(load_ems_file(SHIPPED)))
    assert not torch.allclose(fetched, sample(None), atol=1e-3)


def test_a_second_contribution_joins_the_index_and_a_name_is_taken_once(hub_server: LocalHub, hub: Hub) -> None:
    for name in ("one", "two"):
        push(hub, contribution(small(name), LABELS), LABELS)
    push(hub, contribution(small("two"), LABELS), LABELS)  # the same again
    assert [e.file for e in decode_index(hub_server.repos[REPO][INDEX])] == ["one.ems.safetensors", "two.ems.safetensors"]
    other = contribution(small("three"), LABELS, name="two")
    with pytest.raises(EMSError, match="another file called two"):
        push(hub, other, LABELS)
    hub_server.repos[REPO][INDEX] = encode_index([])  # an index that lags behind
    with pytest.raises(EMSError, match="another file called two"):
        files_for_hub(hub, other, LABELS)


def test_two_who_publish_at_once_do_not_lose_a_file(hub_server: LocalHub, hub: Hub) -> None:
    push(hub, contribution(small("one"), LABELS), LABELS)
    parent = hub.head()
    hub_server.add(small("meanwhile"))
    with pytest.raises(EMSError, match="somebody else changed"):
        hub.put({"x.md": b"x"}, "late", parent)


def test_pull_by_another_checkpoint_finds_nothing(hub_server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    hub_server.add(small("one"))
    with pytest.raises(EMSError, match="no statistics for the checkpoint"):
        pull(hub, hashes("other"), tmp_path / "to")
    with pytest.raises(EMSError, match="nothing is known"):
        pull(hub, Hashes(), tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong", "not the file that the index describes"),
        ("truncated", "wrong\\.|Consistency|incomplete|not the file|cannot be reached|Error"),
        ("stalled", "cannot be reached|Error|[Tt]ime"),
        ("huge", "at most .* are downloaded"),
        ("404", "no such file or repository"),
        ("500", "problem of its own|cannot be reached|500"),
    ],
)
def test_what_goes_wrong_installs_nothing(
    hub_server: LocalHub, hub: Hub, tmp_path: Path, fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda s: None)
    hub_server.add(small("one"))
    hub_server.fault = fault
    began = time.monotonic()
    with pytest.raises(EMSError, match=message) as caught:
        pull(hub, hashes("one"), tmp_path / "to")
    assert REPO in str(caught.value)
    assert not (tmp_path / "to").exists() or not list((tmp_path / "to").iterdir())
    assert time.monotonic() - began < 60  # it gives up, some time
    hub_server.fault = ""
    if fault != "wrong":  # that one is in huggingface_hub's cache now, and stays refused
        assert pull(hub, hashes("one"), tmp_path / "to").new


def test_a_slow_server_is_waited_for(hub_server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    hub_server.add(small("one"))
    hub_server.fault = "slow"
    assert pull(hub, hashes("one"), tmp_path / "to").new


def test_offline_from_the_cache(hub_server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    hub_server.add(small("one"), small("two"))
    offline = dataclasses.replace(hub, offline=True)
    with pytest.raises(EMSError, match="not in the cache"):
        pull(offline, hashes("one"), tmp_path / "to")
    first = pull(hub, hashes("one"), tmp_path / "to")
    hub_server.asked.clear()
    assert pull(offline, hashes("one"), tmp_path / "elsewhere").path.read_bytes() == first.path.read_bytes()
    assert not hub_server.asked
    hub_server.fault = "500"  # a Hub that fails: the cache serves too, without being asked to
    assert pull(hub, hashes("one"), tmp_path / "third").new


def test_an_index_that_lies_is_caught(hub_server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    hub_server.add(small("one"))
    content = hub_server.repos[REPO]
    (entry,) = decode_index(content[INDEX])
    content[INDEX] = encode_index([dataclasses.replace(entry, checkpoint=hashes("famous"))])
    with pytest.raises(EMSError, match="for another checkpoint than the index says"):
        pull(hub, hashes("famous"), tmp_path / "to")
    content[INDEX] = b'{"format": "something else"}'
    with pytest.raises(EMSError, match="not of the format"):
        pull(hub, hashes("one"), tmp_path / "to")
    del content[INDEX]
    with pytest.raises(NotThere):
        pull(hub, hashes("one"), tmp_path / "to")


def test_a_different_file_is_never_overwritten(tmp_path: Path) -> None:
    a, b = small("a").encode(), small("b").encode()
    first, new = install(a, "x", tmp_path)
    assert new and install(a, "x", tmp_path) == (first, False)
    second, new = install(b, "x", tmp_path)
    assert new and second.name == "x_2.ems.safetensors" and first.read_bytes() == a and second.read_bytes() == b


@pytest.mark.parametrize("repo", ["", "a", "a/b/c", "../x", "a/..", "a/b?x", "http://a/b", "-a/b", "a/b c", "é/x"])
def test_names_that_are_no_repository(repo: str) -> None:
    with pytest.raises(EMSError, match="not the name of a Hub repository"):
        Hub(repo)


def test_without_huggingface_hub_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EMSError, match="pip install huggingface_hub"):
        Hub(REPO).fetch("x", 10)


def test_the_commands(hub_server: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ems(*arguments: object) -> tuple[int, str, str]:
        where = ("--endpoint", hub_server.address, "--cache", tmp_path / "cache")
        status = cli.main([str(a) for a in (*arguments, *where)])
        return status, *capsys.readouterr()

    share = ("share", SHIPPED, "--checkpoint", WEIGHTS, "--out", tmp_path / "shared", "--push", REPO)
    status, text, _ = ems(*share)
    assert status == 0 and "Would commit to me/ems" in text
    assert not hub_server.repos and not any(line.startswith("POST") for line in hub_server.asked)
    assert sorted(p.suffix for p in (tmp_path / "shared").iterdir()) == [".json", ".md", ".safetensors", ".svg"]
    assert "Published in me/ems" in ems(*share, "--yes")[1]
    status, text, _ = ems("pull", "--repo", REPO, "--checkpoint", WEIGHTS, "--to", tmp_path / "ems")
    assert status == 0 and "not tried on the model" in text
    decode_ems_file((tmp_path / "ems" / "shared" / SHIPPED.name).read_bytes())
    status, _, error = ems("pull", "--repo", "me/none", "--hash", "ab" * 32)
    assert status == 1 and error.count("\n") == 1 and "no such file or repository" in error


def test_hf_endpoint_is_obeyed(hub_server: LocalHub, tmp_path: Path) -> None:
    """The variable is read when huggingface_hub is imported, so this needs a process of its own."""
    hub_server.add(small("one"))
    environment = {**os.environ, "HF_ENDPOINT": hub_server.address, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "dpm_solver_v3.ems_tools.cli", "pull", "--repo", REPO, "--hash", hashes("one").autov2]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shared" / "one.ems.safetensors").is_file()


def test_what_an_index_claims_of_evidence_and_licence_is_not_passed_on(hub_server: LocalHub, tmp_path: Path) -> None:
    hub_server.add(small("one"))
    content = hub_server.repos[REPO]
    (entry,) = decode_index(content[INDEX])
    content[INDEX] = encode_index([dataclasses.replace(entry, cases=999, better=999, ratio=0.01, licence="mine")])
    done = pull(Hub(REPO, hub_server.address, tmp_path / "cache"), hashes("one"), tmp_path / "ems")
    assert (done.entry.cases, done.entry.ratio, done.entry.licence) == (0, None, "cc0-1.0")


def test_a_flipped_bit_in_the_cache_is_fetched_anew(hub_server: LocalHub, tmp_path: Path) -> None:
    hub_server.add(small("one"))
    hub = Hub(REPO, hub_server.address, tmp_path / "cache")
    pull(hub, hashes("one"), tmp_path / "ems")
    for blob in (tmp_path / "cache").rglob("blobs/*"):
        data = blob.read_bytes()
        if not data.startswith(b"{"):  # not the index
            blob.chmod(0o644)
            blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = pull(hub, hashes("one"), tmp_path / "ems")
    assert not again.new and again.path.is_file()


def test_a_download_has_a_deadline() -> None:
    stop = threading.Event()

    def slow() -> bytes:
        stop.wait(30)
        return b""

    with pytest.raises(EMSError, match="no answer within"):
        within(0.05, "here", slow)
    stop.set()
    assert within(5, "here", lambda: b"data") == b"data"
