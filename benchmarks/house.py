"""The house counted: lines, longest modules and functions, `Any`, `type: ignore`, import arrows; and CONTRIBUTING.md's map.

    python benchmarks/house.py            prints the counts (with --tree FOLDER those of another checkout)
    python benchmarks/house.py --map      writes the map of the tree into CONTRIBUTING.md

tests/test_house.py holds the tree to the limits below.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from token import NAME

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("sampler", "ems_tools", "nodes", "webui", "pipelines")
"""The folders of the product; beside them it has `__init__.py`, `install.py` and what is in scripts/."""

LIMITS = {"lines of a module": 400, "lines of a function": 50, "lines that name Any": 40, "type: ignore": 5}
"""No count may rise above these."""

LAYERS: tuple[tuple[str, ...], ...] = (
    ("sampler",),
    ("ems_tools.embedded", "ems_tools.file"),
    ("ems_tools.estimate.moments",),
    ("ems_tools.estimate.job",),
    ("ems_tools.trajectory",),
    ("ems_tools.estimate", "ems_tools.show"),
    ("ems_tools.fit",),
    ("ems_tools.judge",),
    ("ems_tools.compute", "ems_tools.share"),
    ("ems_tools.hosting",),
    ("ems_tools.cli",),
    ("nodes", "webui", "pipelines"),
)
"""From the ground up. A module imports from its own part and from lower layers only."""

BEGIN, END = "<!-- map: python benchmarks/house.py --map -->", "<!-- end of map -->"


@dataclass(frozen=True)
class Arrow:
    """An import of one module by another, both as "ems_tools.file.contents"; `at_once`: when the first is imported."""

    source: str
    target: str
    at_once: bool


def product_files(root: Path = ROOT) -> list[Path]:
    """Every Python file that users run."""
    files = [root / "__init__.py", root / "install.py", *(root / "scripts").glob("*.py")]
    files += [file for part in PARTS for file in (root / part).rglob("*.py")]
    return sorted(file for file in files if file.is_file())


def functions_of(file: Path) -> Iterator[tuple[str, int]]:
    """Every function and method with its number of lines, without decorators and docstring."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            text = node.body[0] if ast.get_docstring(node) is not None else None
            yield node.name, lines - ((text.end_lineno or text.lineno) - text.lineno + 1 if text else 0)


def lines_that_name_any(files: list[Path]) -> int:
    """Number of lines of code that name `Any`; imports, texts and comments do not count."""
    found = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        rows = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if (t.type, t.string) == (NAME, "Any")}
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Import, ast.ImportFrom))]
        found += len(rows - {row for n in nodes for row in range(n.lineno, (n.end_lineno or n.lineno) + 1)})
    return found


def lines_ignored(files: list[Path]) -> int:
    """Number of lines that the type checker is told to ignore."""
    return sum(file.read_text(encoding="utf-8").count("# type: ignore") for file in files)


def module_name(file: Path, root: Path = ROOT) -> str:
    """`ems_tools/file/contents.py` as "ems_tools.file.contents", a package's `__init__.py` as the package."""
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def arrows_of(root: Path = ROOT) -> list[Arrow]:
    """Every import inside the product, of the deepest module that it names."""
    files = {module_name(file, root): file for part in PARTS for file in (root / part).rglob("*.py")}
    arrows: set[Arrow] = set()
    for name, file in files.items():
        package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        tree = ast.parse(file.read_text(encoding="utf-8"))
        at_once = set(_imports_at_once(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
                for alias in node.names:
                    named = [".".join(filter(None, parts)) for parts in ([*base, alias.name], base)]
                    target = next((t for t in named if t in files), name)
                    if target != name:
                        arrows.add(Arrow(name, target, node in at_once))
    return sorted(arrows, key=lambda a: (a.source, a.target, a.at_once))


def _imports_at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """The imports that run when the module is imported: not in functions, nor for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _imports_at_once(node)


def layer_of(module: str) -> int:
    """The number of the layer that a module belongs to; -1 for the face of ems_tools, which anybody may import."""
    for k, parts in enumerate(LAYERS):
        if any(module == part or module.startswith(part + ".") for part in parts):
            return k
    return -1


def part_of(module: str) -> str:
    """The part of `LAYERS` that a module belongs to."""
    return next((p for parts in LAYERS for p in parts if module == p or module.startswith(p + ".")), module)


def upward(arrows: list[Arrow]) -> list[Arrow]:
    """The arrows that go up, or sideways from one part into another of the same layer."""
    return [a for a in arrows if part_of(a.source) != part_of(a.target) and layer_of(a.target) >= layer_of(a.source)]


def circle(arrows: list[Arrow]) -> list[str]:
    """The modules of one circle of imports that run at once; empty where there is none."""
    targets: dict[str, list[str]] = {}
    for arrow in arrows:
        if arrow.at_once:
            targets.setdefault(arrow.source, []).append(arrow.target)
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for target in targets.get(module, []):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in targets if (found := walk(module, []))), [])


def map_of(root: Path = ROOT) -> str:
    """The tree: every folder and module of the product with the first sentence of its docstring."""
    files = [file for file in product_files(root) if file.name != "__init__.py" or file.parent != root]
    lines = []
    for part in ("install.py", "scripts", *PARTS):
        for file in (f for f in files if f.relative_to(root).parts[0] == part):
            place = file.relative_to(root)
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            sentence = re.split(r"(?<=[.])\s", text.replace("\n", " ") + " ", maxsplit=1)[0].strip(" .:")
            if len(sentence) > 95:
                sentence = sentence.partition(": ")[0].partition("; ")[0]
            shown = f"{place.parent.as_posix()}/" if file.name == "__init__.py" else place.as_posix()
            lines.append(f"{shown:<32} {sentence}")
    return "\n".join(lines)


def paths_of_map(text: str) -> list[str]:
    """The paths that the map in a page names."""
    inside = text.partition(BEGIN)[2].partition(END)[0]
    return [line.split()[0] for line in inside.splitlines() if line.strip() and not line.startswith("```")]


def counts(root: Path = ROOT) -> dict[str, int]:
    """The four counted things of `LIMITS`, at their worst."""
    files = product_files(root)
    return {
        "lines of a module": max(len(file.read_text(encoding="utf-8").splitlines()) for file in files),
        "lines of a function": max(length for file in files for _, length in functions_of(file)),
        "lines that name Any": lines_that_name_any(files),
        "type: ignore": lines_ignored(files),
    }


def report(root: Path) -> None:
    """Print every count of a checkout."""
    files = product_files(root)
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    print(f"{len(files)} files, {sum(lengths.values())} lines")
    for part in ("install.py", "scripts", *PARTS):
        mine = [file for file in files if file.relative_to(root).parts[0] == part]
        named = lines_that_name_any(mine)
        print(f"  {part:<12} {sum(lengths[file] for file in mine):6} lines, {len(mine):3} files, {named:3} lines name Any")
    for name, value in counts(root).items():
        print(f"{name}: {value} (at most {LIMITS[name]})")
    modules = sorted(((n, module_name(f, root)) for f, n in lengths.items()), reverse=True)
    print("longest modules: " + ", ".join(f"{name} {n}" for n, name in modules[:6]))
    functions = sorted(((n, f"{module_name(f, root)}.{name}") for f in files for name, n in functions_of(f)), reverse=True)
    print("longest functions: " + ", ".join(f"{name} {n}" for n, name in functions[:8]))
    arrows = arrows_of(root)
    print(
        f"import arrows: {len(arrows)}, of them upwards or sideways {len(upward(arrows))}; circle: {circle(arrows) or 'none'}"
    )
    for arrow in upward(arrows):
        print(f"  {arrow.source} -> {arrow.target}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", action="store_true", help="write the map into CONTRIBUTING.md")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to count (default: this one)")
    args = parser.parse_args()
    root = args.tree.resolve()
    if args.map:
        page = root / "CONTRIBUTING.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n```\n{map_of(root)}\n```\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    report(root)


if __name__ == "__main__":
    main()
