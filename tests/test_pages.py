"""The pages: links and pictures are there, figures name commands that exist, code runs, README fits one screen."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from dpm_solver_v3.ems_tools.cli.main import COMMANDS
from dpm_solver_v3.ems_tools.cli.plugs import plugs

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "ems_tools").rglob("*.md")])


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere, and links out of the checkout."""
    bad = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        inside = target.is_relative_to(page.parents[len(page.relative_to(ROOT).parts) - 1]) if ROOT in page.parents else True
        if not inside or not target.exists() or (anchor and anchor not in anchors_of(target)):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    good, bad = "[b](#a-title-too) [d](page.md#a-title-too)", "[a](none.md) [c](#other) ![e](no.png)"
    page.write_text(f"# A title, too\n{good} {bad}\n```\n[x](y)\n```\n")
    assert broken_links(page) == ["none.md", "#other", "no.png"]


def test_every_picture_of_docs_is_shown_somewhere() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [p.name for p in (ROOT / "docs").glob("*.png") if p.name not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_that_pages_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    programs = set(re.findall(r"\b((?:benchmarks|tests)/[\w/]+\.py)", text))
    assert [p for p in programs if not (ROOT / p).is_file()] == []


def test_every_section_of_numbers_names_its_command() -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(sections) > 5
    nameless = [s.splitlines()[0] for s in sections if not re.search(r"python (benchmarks|install)|no command here", s)]
    assert nameless == []


def test_cli_page_has_every_command() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    adds = (*COMMANDS, *(add for plug in plugs() for add in plug.COMMANDS))
    names = {re.sub(r"^_?add_", "", add.__name__) for add in adds}
    assert names == set(re.findall(r"^\| `ems (\w+)", text, re.MULTILINE))


def test_library_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(encoding="utf-8"), re.DOTALL))
    names: dict[str, object] = {}
    exec(compile(code, "library.md", "exec"), names)
    assert tuple(names["x"].shape) == (1, 3, 32, 32)  # type: ignore[attr-defined]


def test_readme_fits_one_screen_and_opens_with_a_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 450
    picture = re.search(r"!\[.+\]\((.+\.png)\)", text)
    assert picture is not None and picture.start() < 600
    data = (ROOT / picture[1]).read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 800 and height <= width


NODES = sorted(p.name for p in (ROOT / "web" / "docs").iterdir())


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node", NODES)
def test_help_names_everything_as_the_node_shows_it(node: str, language: str) -> None:
    """Title and inputs as the front end shows them in that language; what is bold is one of these or another node."""
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    page = (ROOT / "web" / "docs" / node / f"{language}.md").read_text(encoding="utf-8")
    shown = {entry["name"] for entry in texts[node].get("inputs", {}).values()}
    titles = {entry["display_name"] for entry in texts.values()}
    bold = set(re.findall(r"\*\*(.+?)\*\*", page))
    assert page.startswith(f"# {texts[node]['display_name']}\n")
    assert shown - bold == set() and bold - shown - titles == set()


def test_chinese_texts_name_nodes_in_chinese() -> None:
    english = {name: entry["display_name"] for name, entry in _locale("en").items()}
    chinese = {name: entry["display_name"] for name, entry in _locale("zh").items()}
    renamed = [english[name] for name in english if chinese[name] != english[name] and "DPM" not in english[name]]
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "web" / "docs").glob("*/zh.md")]
    told = "".join([*pages, json.dumps(_locale("zh"), ensure_ascii=False)])
    assert len(renamed) > 5 and [title for title in renamed if title in told] == []


def _locale(language: str) -> dict[str, dict[str, str]]:
    return dict(json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")))
