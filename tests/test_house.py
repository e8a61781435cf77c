"""The house keeps its order: imports go down, no circles, modules and functions stay short, the map equals the tree.

`python benchmarks/house.py` prints what is counted here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loading import benchmark

ROOT = Path(__file__).resolve().parents[1]


house = benchmark("house")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small product: `ems_tools.fit.run` imports `file.contents` at once, which imports it back in a function."""
    for place, text in {
        "ems_tools/__init__.py": '"""Face."""\n',
        "ems_tools/file/__init__.py": "",
        "ems_tools/file/contents.py": '"""Contents. X."""\nfrom typing import Any\ndef f(x: Any):\n    from ..fit import run\n',
        "ems_tools/fit/__init__.py": "",
        "ems_tools/fit/run.py": "from ..file.contents import f\nfrom ..file import contents\n",
        "sampler/__init__.py": "",
    }.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    return tmp_path


def test_an_arrow_up_is_seen_also_in_a_function(tree: Path) -> None:
    arrows = house.arrows_of(tree)
    assert [(a.source, a.target, a.at_once) for a in arrows] == [
        ("ems_tools.file.contents", "ems_tools.fit.run", False),
        ("ems_tools.fit.run", "ems_tools.file.contents", True),
    ]
    assert house.upward(arrows) == arrows[:1]
    assert house.circle(arrows) == []  # the import in the function runs later


def test_a_circle_is_seen(tree: Path) -> None:
    (tree / "ems_tools" / "file" / "contents.py").write_text("if True:\n    from ..fit import run\n")
    assert house.circle(house.arrows_of(tree)) == ["ems_tools.file.contents", "ems_tools.fit.run"]
    (tree / "ems_tools" / "file" / "contents.py").write_text("if TYPE_CHECKING:\n    from ..fit import run\n")
    assert house.circle(house.arrows_of(tree)) == []


def test_counts_see_what_is_there(tree: Path) -> None:
    (tree / "sampler" / "long.py").write_text("def f():\n" + "    x = 1  # type: ignore\n" * 60)
    counted = house.counts(tree)
    assert counted == {"lines of a module": 61, "lines of a function": 61, "lines that name Any": 1, "type: ignore": 60}


def test_map_of_a_tree(tree: Path) -> None:
    lines = dict(line.split(maxsplit=1) for line in house.map_of(tree).splitlines() if " " in line.strip())
    assert lines["ems_tools/"] == "Face" and lines["ems_tools/file/contents.py"] == "Contents"


def test_no_import_goes_up() -> None:
    assert [f"{a.source} -> {a.target}" for a in house.upward(house.arrows_of())] == []


def test_no_circle() -> None:
    assert house.circle(house.arrows_of()) == []


def test_the_map_in_contributing_is_the_tree() -> None:
    """Mend it with `python benchmarks/house.py --map`."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert house.paths_of_map(page) == house.paths_of_map(f"{house.BEGIN}\n{house.map_of()}\n{house.END}")


def test_lengths_and_exceptions_stay_within_the_limits() -> None:
    over = {name: value for name, value in house.counts().items() if value > house.LIMITS[name]}
    assert over == {}
