"""The plan of the house holds: imports only go left, no cycles, and the README's tree tells the truth."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "autoglm"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A part may import its own level's files and everything on a level before it.
LEVELS = {
    name: level
    for level, names in enumerate(
        [
            ["errors", "whole_file"],
            ["config", "actions"],
            ["kernels"],
            ["formats"],
            ["chat", "media"],
            ["model"],
            ["engine"],
            ["server"],
            ["cli"],
            ["__main__"],
        ]
    )
    for name in names
}
# These stand aside: what they know (up to that level), and who knows them. Only cli trains, packs and fetches.
ASIDE = {"deploy": (0, {"cli"}), "train": (LEVELS["media"], {"cli"}), "pack": (LEVELS["media"], {"cli", "train"})}
# Imports inside functions: subcommands load on use, public names when first asked for, and a start reads what only
# pictures and sounds need for a model that has an mmproj, and what has to do with text beside the weights.
LAZY_ALLOWED = {"autoglm", "autoglm.cli", "autoglm.cli.http_server", "autoglm.cli.loading"}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@dataclass(frozen=True)
class Import:
    """One import of ours: what, whether inside a function, whether only a type checker reads it."""

    name: str
    is_inside: bool
    is_for_types: bool


def imports_of(module: str, path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def children(kinds: tuple[type[ast.AST], ...], wanted: Callable[[Any], bool] = lambda node: True) -> set[int]:
        return {
            id(child) for node in ast.walk(tree) if isinstance(node, kinds) and wanted(node) for child in ast.walk(node)
        }

    inside = children((ast.FunctionDef, ast.AsyncFunctionDef))
    for_types = children((ast.If,), lambda node: isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    found: list[Import] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        found += [
            Import(name, id(node) in inside, id(node) in for_types) for name in names if name.split(".")[0] == "autoglm"
        ]
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_imports_only_go_left(module: str) -> None:
    part = part_of(module)
    for entry in imports_of(module, MODULES[module]):
        imported, other = entry.name, part_of(entry.name)
        assert not entry.is_inside or module in LAZY_ALLOWED, f"{module} imports {imported} inside a function"
        if other in ("", part) or imported == "autoglm.kernels._native":
            continue
        if other in ASIDE:
            assert part in ASIDE[other][1], f"{module} imports {imported}, which only {ASIDE[other][1]} may"
            continue
        level = ASIDE[part][0] if part in ASIDE else LEVELS[part]
        assert LEVELS[other] < level or (LEVELS[other] == level and part in ASIDE), f"{module} imports {imported}"


def test_no_cycles() -> None:
    """Over all imports that run, those inside functions too; a package's __init__ is a module of its own."""
    graph = {
        module: {entry.name for entry in imports_of(module, path) if not entry.is_for_types} & set(MODULES)
        for module, path in MODULES.items()
    }
    # The front door loads its public names on request, after everything behind it is there.
    graph["autoglm"] = set()
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "cycle: " + " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module] - {module}):
                visit(imported, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_torch_stays_in_train() -> None:
    """Serving never needs torch; nothing anywhere unpickles."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            banned = {"transformers", "pickle", "xgrammar"} | (set() if part_of(module) == "train" else {"torch"})
            assert not roots & banned, f"{module} imports {roots & banned}"


def caption(path: Path) -> str:
    """A file's first docstring or comment line, without its full stop."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
    else:
        line = next(line.lstrip("/*# ").strip() for line in text.splitlines() if line.strip() and line[:2] != "#!")
    return line.rstrip(".")


def tree_entries(readme: str) -> dict[str, str]:
    """path -> caption out of the README's tree: lines of `path/file.ext   caption`."""
    block = re.search(r"<!-- tree -->\s*```[a-z]*\n(.*?)```\s*<!-- /tree -->", readme, re.DOTALL)
    assert block is not None, "README.md has no tree between its markers"
    pairs = (line.split(None, 1) for line in block[1].splitlines() if line.strip())
    return {path: text.strip() for path, text in pairs}


def captioned_files() -> list[Path]:
    native = [path for path in (ROOT / "native").glob("*") if path.suffix in (".h", ".cpp")]
    return sorted(
        [path for path in MODULES.values() if path.name != "__init__.py" or path.parent.name in ("cli", "kernels")]
    ) + sorted(native)


def rendered_tree() -> str:
    """The README's tree as it has to be: `python tests/test_layout.py` prints it."""
    entries = {str(path.relative_to(ROOT)): caption(path) for path in captioned_files()}
    width = max(map(len, entries)) + 2
    return "".join(f"{path:<{width}}{text}\n" for path, text in entries.items())


def test_every_file_has_a_caption() -> None:
    for path in captioned_files():
        text = caption(path)
        assert 10 <= len(text) <= 160, f"{path.relative_to(ROOT)}: caption {text!r}"


def test_readme_tree_lists_every_file_with_its_caption() -> None:
    for name in ("README.md", "README.zh.md"):
        tree = tree_entries((ROOT / name).read_text(encoding="utf-8"))
        assert tree == tree_entries(f"<!-- tree -->\n```text\n{rendered_tree()}```\n<!-- /tree -->"), (
            f"{name}: the tree is old; mend: python tests/test_layout.py --write"
        )


def test_no_file_names_this_machine_or_a_registry() -> None:
    forbidden = re.compile(r"/work/(?!\*)|pypi\.org|registry\.npmjs|deb\.debian\.org|files\.pythonhosted")
    for folder in ("autoglm", "native", "tests", "scripts", "benchmarks", "docs", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if (
                path.suffix in (".py", ".md", ".sh", ".h", ".cpp", ".pyi", "")
                and path.is_file()
                and path != Path(__file__)
            ):
                text = path.read_bytes().decode("utf-8", "ignore")
                assert not forbidden.search(text), f"{path.relative_to(ROOT)} names {forbidden.search(text)}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for name in ("README.md", "README.zh.md"):
            readme = (ROOT / name).read_text(encoding="utf-8")
            new = f"<!-- tree -->\n```text\n{rendered_tree()}```\n<!-- /tree -->"
            readme = re.sub(r"<!-- tree -->.*?<!-- /tree -->", lambda _, new=new: new, readme, flags=re.DOTALL)
            (ROOT / name).write_text(readme, encoding="utf-8")
    else:
        print(rendered_tree(), end="")
