"""Fingerprints of checkpoints: what they survive, what they notice, and the cache beside the user's files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dpm_solver_v3.ems_tools.share import identity
from dpm_solver_v3.ems_tools.share.identity import FingerprintCache, ModelIdentity, content_fingerprint, weights_fingerprint


def weights(seed=0, tensors=300):
    generator = torch.Generator().manual_seed(seed)
    return {f"block.{k}.weight": torch.randn(40, 40, generator=generator) for k in range(tensors)}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(weights(), path, {"title": "first"})
    return path


def test_renaming_and_another_header_keep_the_fingerprint(tmp_path, checkpoint):
    before = content_fingerprint(checkpoint)
    other = tmp_path / "another name.safetensors"
    save_file(dict(reversed(weights().items())), other, {"title": "second", "comment": "x" * 5000})
    assert content_fingerprint(other) == before


@pytest.mark.parametrize("change", ["values", "name", "shape", "dtype", "missing"])
def test_another_model_has_another_fingerprint(tmp_path, checkpoint, change):
    state = weights(seed=1) if change == "values" else weights()
    first = next(iter(state))
    if change == "name":
        state["renamed"] = state.pop(first)
    elif change == "shape":
        state[first] = state[first].reshape(20, 80)
    elif change == "dtype":
        state = {name: value.half() for name, value in state.items()}
    elif change == "missing":
        del state[first]
    other = tmp_path / "other.safetensors"
    save_file(state, other)
    assert content_fingerprint(other) != content_fingerprint(checkpoint)


def test_any_other_file_is_told_by_size_and_content(tmp_path):
    contents = [b"", b"abc", b"abd", b"\xff" * 9000, b"{" * 9000, (5).to_bytes(8, "little") + b"{}[]]" + b"x" * 100]
    found = set()
    for k, content in enumerate(contents):
        path = tmp_path / f"{k}.ckpt"
        path.write_bytes(content)
        found.add(content_fingerprint(path))
    assert len(found) == len(contents)


def test_fingerprint_reads_little(tmp_path, monkeypatch):
    path = tmp_path / "big.safetensors"
    save_file({f"w{k}": torch.zeros(2**20 // 4) for k in range(64)}, path)  # 64 MiB
    read = []
    original = identity._safetensors

    class Counting:
        def __init__(self, file):
            self.file = file

        def read(self, n):
            read.append(n)
            return self.file.read(n)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr("builtins.open", lambda *a, _open=open, **k: _Context(Counting(_open(*a, **k))))
    monkeypatch.setattr(identity, "_safetensors", original)
    content_fingerprint(path)
    assert sum(read) < 2**20


class _Context:
    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self.file

    def __exit__(self, *_):
        self.file.file.close()


def test_weights_in_memory(checkpoint):
    state = weights()
    assert weights_fingerprint(state) == weights_fingerprint({n: v.clone() for n, v in state.items()})
    assert weights_fingerprint(state) != weights_fingerprint(weights(seed=1))
    assert weights_fingerprint({}) == weights_fingerprint({})


def test_cache_answers_for_an_unchanged_file_and_notices_a_changed_one(tmp_path, checkpoint, monkeypatch):
    cache = FingerprintCache(tmp_path / "user" / "cache.json")
    first = cache.fingerprint(checkpoint)
    calls = []
    monkeypatch.setattr(identity, "content_fingerprint", lambda path: calls.append(path) or "new")
    assert FingerprintCache(tmp_path / "user" / "cache.json").fingerprint(checkpoint) == first and not calls
    save_file(weights(seed=2, tensors=5), checkpoint)
    assert cache.fingerprint(checkpoint) == "new" and calls == [checkpoint]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"format": "other"}', '{"format": "dpm-solver-v3-fingerprints-1", "files": 3}']
)
def test_a_broken_cache_costs_time_only(tmp_path, checkpoint, content):
    path = tmp_path / "cache.json"
    path.write_text(content)
    assert FingerprintCache(path).fingerprint(checkpoint) == content_fingerprint(checkpoint)
    assert json.loads(path.read_text())["files"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, checkpoint):
    (tmp_path / "file").write_text("")
    assert FingerprintCache(tmp_path / "file" / "cache.json").fingerprint(checkpoint) == content_fingerprint(checkpoint)
    assert FingerprintCache(None).fingerprint(checkpoint) == content_fingerprint(checkpoint)


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ({"content": "a"}, {"content": "a"}, True),
        ({"content": "a"}, {"content": "b"}, False),
        ({"content": "a", "name": "x"}, {"name": "x"}, False),
        ({"sha256": "s", "content": "a"}, {"sha256": "s", "content": "b"}, True),
        ({"weights": "w", "content": "a"}, {"weights": "w"}, True),
        ({"patches": "lora", "content": "a"}, {"content": "a"}, True),
        ({}, {}, False),
    ],
)
def test_same_as(mine, theirs, same):
    assert ModelIdentity(**mine).same_as(ModelIdentity(**theirs)) is same


def test_facts_round_trip():
    facts = {"name": "x", "content": "c", "other": 3, "architecture": 7}
    assert ModelIdentity.from_facts(facts).facts() == {"name": "x", "content": "c"}
