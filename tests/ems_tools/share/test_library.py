"""The library of statistics files: listing, refusing, and choosing the file for a model."""

import gc
import os

import pytest
import torch

from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.layout import SUFFIX
from dpm_solver_v3.ems_tools.file.reader import EMSFileError
from dpm_solver_v3.ems_tools.file.rows import EMSMeta
from dpm_solver_v3.ems_tools.share.identity import ModelIdentity
from dpm_solver_v3.ems_tools.share.library import Library, safe_name


def save(folder, file_name, channels=3, date="2026-01-01", **model):
    lambdas = torch.linspace(-2, 3, 6, dtype=torch.float64)
    shape = (1, 6, channels)
    meta = EMSMeta(space="sigma", sigma_min=0.05, sigma_max=7.4, model=model, date=date)
    file = EMSFile(lambdas, torch.ones(1, dtype=torch.float64), torch.ones(shape), torch.zeros(shape), torch.zeros(shape), meta)
    path = folder / f"{file_name}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save(path)
    return path


def test_lists_files_of_all_folders_and_the_refused_with_their_problem(tmp_path):
    save(tmp_path / "a", "one")
    save(tmp_path / "a", "sub/two")
    save(tmp_path / "b", "one", channels=4)
    save(tmp_path / "b", ".hidden/three")
    bad = tmp_path / "b" / f"bad{SUFFIX}"
    bad.write_bytes(b"nonsense")
    (tmp_path / "b" / "other.safetensors").write_bytes(b"")
    library = Library([tmp_path / "a", tmp_path / "b", tmp_path / "absent"])
    entries = {e.name: e for e in library.entries()}
    assert set(entries) == {f"one{SUFFIX}", f"sub/two{SUFFIX}", f"bad{SUFFIX}"}
    assert entries[f"one{SUFFIX}"].file.channels == 3  # the earlier folder's
    assert entries[f"bad{SUFFIX}"].file is None and entries[f"bad{SUFFIX}"].problem
    with pytest.raises(EMSFileError, match="bad"):
        library.get(f"bad{SUFFIX}")
    with pytest.raises(EMSFileError, match="no such"):
        library.get("../secret")


def test_a_changed_file_is_read_again(tmp_path):
    path = save(tmp_path, "one", name="before")
    library = Library([tmp_path])
    assert library.get(path.name).identity.name == "before"
    assert library.get(path.name) is library.get(path.name)
    save(tmp_path, "one", name="after, longer")
    os.utime(path, (1, 1))
    assert library.get(path.name).identity.name == "after, longer"
    path.write_bytes(b"broken")
    with pytest.raises(EMSFileError):
        library.get(path.name)


def test_finds_the_checkpoints_own_then_its_name_then_its_kind(tmp_path):
    kind = {"architecture": "SDXL", "prediction": "EPS"}
    save(tmp_path, "own", content="c1", name="renamed since", **kind)
    save(tmp_path, "name", content="c2", name="model", **kind)
    save(tmp_path, "kind", content="c3", name="else", **kind)
    save(tmp_path, "wide", channels=16, content="c1", name="model", **kind)
    library = Library([tmp_path])

    def how(same_architecture=False, channels=3, **known):
        found = library.find(ModelIdentity(**known), channels=channels, same_architecture=same_architecture)
        return (found.how, found.entry.name.removesuffix(SUFFIX)) if found else None

    assert how(content="c1", name="model", **kind) == ("exact", "own")
    assert how(content="new", name="Model", **kind) == ("name", "name")
    assert how(content="new", name="new", **kind) is None
    assert how(True, content="new", name="new", **kind)[0] == "architecture"
    assert how(True, content="new", name="new", architecture="SDXL", prediction="V_PREDICTION") is None
    assert how(True, channels=8, content="c1", name="model", **kind) is None
    assert how() is None


def test_the_newest_of_equals_wins(tmp_path):
    save(tmp_path, "old", content="c", date="2026-01-01")
    save(tmp_path, "new", content="c", date="2026-03-01")
    assert Library([tmp_path]).find(ModelIdentity(content="c")).entry.name == f"new{SUFFIX}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model", "model"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("C:\\x\\y", "C__x_y"),
        ("a\0b\nc", "a_b_c"),
        ("", "ems"),
        (" . ", "ems"),
        ("CON", "ems_CON"),
        ("com1.x", "ems_com1.x"),
        ("模型 v2", "模型 v2"),
        ("x" * 300, "x" * 100),
        (f"done{SUFFIX}", "done"),
    ],
)
def test_safe_name(text, name):
    assert safe_name(text) == name + SUFFIX


@pytest.mark.parametrize("name", ["con .x", "COM\u00b9", "lpt\u00b2.a", "com0"])
def test_safe_name_of_windows_devices(name):
    assert safe_name(name).startswith("ems_")


def test_safe_name_counts_bytes():
    name = safe_name("\u6a21" * 100)
    assert len(f".{name}.partial.1234567-00000000.tmp".encode()) <= 255


def test_the_users_own_file_outranks_a_shared_one_whatever_its_date(tmp_path):
    save(tmp_path, "mine", date="2026-01-01", sha256="ab" * 32)
    save(tmp_path, "shared/theirs", date="2026-06-01", sha256="ab" * 32)
    save(tmp_path, "shared/liar", date="zzzz", sha256="ab" * 32)
    save(tmp_path, "shared/future", date="9999-12-31", sha256="ab" * 32)
    library = Library([tmp_path])
    assert library.find(ModelIdentity(sha256="ab" * 32)).entry.name == f"mine{SUFFIX}"
    (tmp_path / f"mine{SUFFIX}").unlink()
    assert library.find(ModelIdentity(sha256="ab" * 32)).entry.name == f"shared/theirs{SUFFIX}"


def test_a_malformed_date_is_the_oldest(tmp_path):
    save(tmp_path, "good", date="2026-01-01", sha256="ab" * 32)
    save(tmp_path, "bad", date="zzzz", sha256="ab" * 32)
    assert Library([tmp_path]).find(ModelIdentity(sha256="ab" * 32)).entry.name == f"good{SUFFIX}"


def test_contents_of_files_not_in_use_are_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr("dpm_solver_v3.ems_tools.share.library._KEPT_BYTES", 6000)
    for k in range(12):
        save(tmp_path, f"m{k}", name=f"m{k}")
    library = Library([tmp_path])
    library.find(ModelIdentity(name="m3"))
    gc.collect()
    alive = [o for o in gc.get_objects() if isinstance(o, EMSFile) and str(o.meta.model.get("name", "")).startswith("m")]
    assert len(alive) < 6
    assert library.find(ModelIdentity(name="m3")).entry.file.meta.model["name"] == "m3"
