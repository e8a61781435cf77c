"""Files from strangers and trouble on the disk: data only, bounded, inside their folders, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import textwrap
import time
import zlib
from base64 import b64encode
from pathlib import Path

import pytest
import torch

from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.layout import MAX_FILE_BYTES, SUFFIX
from dpm_solver_v3.ems_tools.file.reader import EMSFileError, decode_ems_file, load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta
from dpm_solver_v3.ems_tools.file.storage import write_atomic, write_new
from dpm_solver_v3.ems_tools.share.index import MAX_INDEX_BYTES, decode_index, encode_index, entry_of, index_of
from dpm_solver_v3.ems_tools.share.library import SHARED, Library
from dpm_solver_v3.ems_tools.share.pull import install
from dpm_solver_v3.ems_tools.share.workflow import KEY, MAX_EMBEDDED, embedded_files, pack, unpack, with_file
from dpm_solver_v3.sampler import EMSError
from loading import benchmark

ROOT = Path(__file__).resolve().parents[3]
EVIL = ["../out", "/etc/passwd", "a/../../b", "C:\\x", "a\\b", ".hidden", "con", "a\0b", "~/x", "", "a" * 300, "x\n"]


def small(name: str = "model") -> EMSFile:
    lambdas = torch.linspace(-2, 3, 6, dtype=torch.float64)
    shape = (1, 6, 3)
    meta = EMSMeta("sigma", 0.05, 7.4, model={"name": name, "sha256": "ab" * 32})
    return EMSFile(lambdas, torch.ones(1).double(), torch.ones(shape), torch.zeros(shape), torch.zeros(shape), meta)


# --- Data only


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    """A pickle that would make a file, alone, inside a zip, as a tensor's bytes, and as text in the metadata."""
    mark = tmp_path / "executed"
    code = pickle.dumps(_Bomb(str(mark)))
    assert not mark.exists()
    for data in (code, b"PK\3\4" + code, len(code).to_bytes(8, "little") + code):
        with pytest.raises(EMSFileError):
            decode_ems_file(data)
    text = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    file = dataclasses.replace(small(), meta=dataclasses.replace(small().meta, model={"name": text, "sha256": "ab" * 32}))
    back = decode_ems_file(file.encode())
    assert back.meta.model["name"] == text and not mark.exists()


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_readers_use_no_pickle_eval_or_exec() -> None:
    import ast

    banned = {"eval", "exec", "compile", "__import__"}
    for part in ("sampler", "ems_tools", "nodes"):
        for path in (ROOT / part).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            assert not called & banned and not imported & {"pickle", "marshal", "dill", "shelve"}, path


# --- Bounded


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    with open(tmp_path / "a" / f"big{SUFFIX}", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(EMSFileError, match="MiB, more than"):
        load_ems_file(tmp_path / "a" / f"big{SUFFIX}")
    with pytest.raises(EMSFileError, match="MiB, more than"):
        index_of(tmp_path / "a")
    with pytest.raises(EMSError, match="more than the"):
        decode_index(b" " * (MAX_INDEX_BYTES + 1))
    with pytest.raises(EMSError, match=r"nested too deep|not valid JSON"):
        decode_index(b"[" * 100_000)


def test_a_small_text_cannot_unpack_to_a_large_file() -> None:
    bomb = b64encode(zlib.compress(bytes(50 * MAX_EMBEDDED), 9)).decode()
    with pytest.raises(EMSError, match="too large"):
        unpack({"name": "a", "data": bomb})


# --- Names


@pytest.mark.parametrize("name", EVIL)
def test_names_from_an_index_never_become_paths(name: str) -> None:
    good = encode_index([entry_of(small().encode(), f"fine{SUFFIX}")])
    import json

    plain = json.loads(good)
    plain["files"][0]["file"] = name + SUFFIX if not name.endswith("\n") else name
    with pytest.raises(EMSError):
        decode_index(json.dumps(plain).encode())


@pytest.mark.parametrize("name", EVIL)
def test_names_from_elsewhere_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "ems"
    path, _ = install(small().encode(), name, folder)
    assert path.parent == folder / SHARED and [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    workflow: dict[str, object] = {"extra": {KEY: [{"name": name, "data": pack("x", small())["data"]}]}}
    for key, value in embedded_files(workflow).items():
        assert unpack(value)[0] == key and "/" not in key and "\\" not in key and not key.startswith(".")


# --- Links


@pytest.fixture
def can_link(tmp_path: Path) -> None:
    try:
        (tmp_path / "try").symlink_to(tmp_path)
    except OSError:
        pytest.skip("this system makes no symbolic links for us")
    (tmp_path / "try").unlink()


def test_links_out_of_the_folders_are_refused(tmp_path: Path, can_link: None) -> None:
    inside, outside = tmp_path / "ems", tmp_path / "private"
    inside.mkdir(), outside.mkdir()
    small().save(outside / f"secret{SUFFIX}")
    small().save(inside / f"own{SUFFIX}")
    (inside / f"out{SUFFIX}").symlink_to(outside / f"secret{SUFFIX}")
    (inside / f"within{SUFFIX}").symlink_to(inside / f"own{SUFFIX}")
    (inside / f"loop{SUFFIX}").symlink_to(inside / f"loop{SUFFIX}")
    (inside / "folder").symlink_to(outside, target_is_directory=True)
    entries = {e.name.removesuffix(SUFFIX): e for e in Library([inside]).entries()}
    assert set(entries) == {"own", "out", "within", "loop"}  # folders behind links are not entered
    assert entries["out"].file is None and "leads out of the folders" in entries["out"].problem
    assert entries["loop"].file is None and entries["within"].file is not None


def test_files_of_others_do_not_follow_links(tmp_path: Path, can_link: None) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = tmp_path / "ems" / SHARED
    folder.mkdir(parents=True)
    for name, target in (("a", victim), ("b", tmp_path / "not there yet")):
        (folder / f"{name}{SUFFIX}").symlink_to(target)
        path, new = install(small().encode(), name, folder.parent)
        assert new and path.name == f"{name}_2{SUFFIX}" and not path.is_symlink()
    assert victim.read_bytes() == b"precious" and not (tmp_path / "not there yet").exists()


# --- Two writers


def test_two_processes_that_write_one_name_leave_one_whole_file(tmp_path: Path) -> None:
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from storage import write_atomic, write_new
        from pathlib import Path
        folder, letter, made = Path(sys.argv[2]), sys.argv[3].encode(), 0
        for k in range(100):
            write_atomic(folder / "same", letter * 200_000)
            try:
                write_new(folder / f"new{k}", letter * 1000)
                made += 1
            except FileExistsError:
                pass
        print(made)
    """
    where = str(ROOT / "ems_tools" / "file")  # the module alone: torch takes longer to import than this to run
    commands = [[sys.executable, "-c", textwrap.dedent(code), where, str(tmp_path), letter] for letter in "ab"]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    seen = set()
    while any(p.poll() is None for p in running):
        if (tmp_path / "same").exists():
            seen.add((tmp_path / "same").read_bytes())
    made = [int(p.communicate()[0]) for p in running]
    assert seen <= {b"a" * 200_000, b"b" * 200_000}
    assert sum(made) == 100  # each new name was given to one writer
    assert (tmp_path / "same").read_bytes() in (b"a" * 200_000, b"b" * 200_000)
    assert {len((tmp_path / f"new{k}").read_bytes()) for k in range(100)} == {1000}
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_a_name_that_is_taken_stays(tmp_path: Path) -> None:
    write_new(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


def test_without_hard_links_a_taken_name_stays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_new(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


# --- A full disk


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on file sizes")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """The system itself refuses: no file of the process may grow beyond 4 KiB."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = """
        import resource, signal, sys
        sys.path.insert(0, sys.argv[1])
        from storage import write_atomic
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_atomic(sys.argv[2], bytes(100_000))
        except OSError as error:
            print(error.errno)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(ROOT / "ems_tools" / "file"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "27", done.stderr  # EFBIG
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC from the system's own full device in place of the temporary file."""
    path = tmp_path / f"a{SUFFIX}"
    small("old").save(path)
    old = path.read_bytes()
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda name, mode="r", *a, **k: real("/dev/full", "wb") if mode == "xb" else real(name, mode, *a, **k)
    )
    with pytest.raises(OSError, match="No space left"):
        small("new").save(path)
    monkeypatch.undo()
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, young, other, foreign = ".a.123-0123abcd.tmp", ".a.124-0123abcd.tmp", ".b.125-0123abcd.tmp", ".a.mine.tmp"
    for name in (old, young, other, foreign):
        (tmp_path / name).write_bytes(b"x")
        if name != young:
            os.utime(tmp_path / name, (time.time() - 2 * 86400,) * 2)
    write_atomic(tmp_path / "a", b"whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", young, other, foreign])


# --- A file in a workflow


def test_a_file_travels_in_a_workflow() -> None:
    workflow: dict[str, object] = {"nodes": []}
    with_file(workflow, "one", small("one"))
    with_file(workflow, "two", small("two"))
    with_file(workflow, "one", small("one, again"))
    found = embedded_files(workflow)
    assert set(found) == {f"one{SUFFIX}", f"two{SUFFIX}"}
    assert unpack(found[f"one{SUFFIX}"])[1].meta.model["name"] == "one, again"


def test_the_shipped_file_fits_and_a_large_one_is_refused() -> None:
    packed = pack("x", load_ems_file(ROOT / "stats" / f"embedded-emoji{SUFFIX}"))
    assert len(str(packed["data"])) < 64 * 1024
    shape = (1, 6, 3, 64, 64)
    tables = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    large = dataclasses.replace(small(), **dict(zip("lsb", tables, strict=True)))
    with pytest.raises(EMSError, match="too much for a workflow"):
        pack("x", large)


@pytest.mark.parametrize(
    "workflow", [None, 3, [], {}, {"extra": 1}, {"extra": {KEY: 5}}, {"extra": {KEY: [1, {}, {"name": 3}]}}]
)
def test_workflows_without_a_file(workflow: object) -> None:
    assert embedded_files(workflow) == {}


@pytest.mark.parametrize("value", [None, {}, {"name": "a"}, {"name": "a", "data": "%%%"}, {"name": "a", "data": "AAAA"}])
def test_damaged_text_is_refused(value: object) -> None:
    with pytest.raises(EMSError, match=r"in the workflow|the workflow holds"):
        unpack(value)


# --- Fuzzing


def test_mutated_inputs_meet_nothing_but_clean_refusals() -> None:
    """benchmarks/fuzz.py tries far more."""
    fuzz = benchmark("fuzz")
    counts, failures = fuzz.run(1500, seed=1)
    assert not failures
    assert set(counts) == set(fuzz.KINDS) and all(count["refused"] or name == "name" for name, count in counts.items())
