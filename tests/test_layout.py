"""The layout of the package: few modules at its root, and imports in one direction only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import s3prl_ekd

PACKAGE = Path(s3prl_ekd.__file__).parent
ROOT_MODULES = 9
# Each folder or root module imports only from earlier ones. `__init__` imports none of our modules
# at import time.
ORDER = """
    __init__ errors distill system compat files request student_file teachers data prepare
    hidden_states downstream essence pretrain pretrain_expert registration analysis superb probe
    export workspace launch recipe demo commands cli __main__
""".split()


def modules(package: Path) -> dict[str, Path]:
    """``{dotted name: file}`` of all modules below a folder."""
    result = {}
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return result


def imports(name: str, path: Path, package_modules: dict[str, Path]) -> set[str]:
    """The modules among ``package_modules`` that a file imports: at module level, in functions, for
    type checking, or by name with ``import_module``."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                targets.add(full if full in package_modules else ".".join(base))
        elif isinstance(node, ast.Constant) and node.value in package_modules:
            targets.add(node.value)
    return {target for target in targets if target in package_modules} - {name}


def graph(package: Path) -> dict[str, set[str]]:
    paths = modules(package)
    return {name: imports(name, path, paths) for name, path in paths.items()}


def unit(name: str) -> str:
    """The folder or root module that a module belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a later folder or root module in ORDER."""
    position = {name: number for number, name in enumerate(ORDER)}
    return [
        f"{name} imports {target}"
        for name, targets in edges.items()
        if unit(name) != "__init__"
        for target in sorted(targets)
        if position[unit(target)] > position[unit(name)]
    ]


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """An import cycle; empty if there is none."""
    visited: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in visited:
            return []
        for target in sorted(edges[name]):
            if not target.startswith(f"{name}.") and not name.startswith(f"{target}."):
                ring = visit(target, [*path, name])
                if ring:
                    return ring
        visited.add(name)
        return []

    return next((ring for name in edges if (ring := visit(name, []))), [])


def test_few_modules_at_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_MODULES


def test_order_is_complete():
    assert {unit(name) for name in modules(PACKAGE)} == set(ORDER)


def test_no_imports_from_later_folders():
    assert upward(graph(PACKAGE)) == []


def test_no_import_cycles():
    assert cycle(graph(PACKAGE)) == []


@pytest.mark.parametrize("block", ["", "def f():\n    ", "if TYPE_CHECKING:\n    "])
def test_the_checks_find_violations(tmp_path, block):
    """A forbidden import and a cycle: at module level, in a function, for type checking."""
    package = tmp_path / "s3prl_ekd"
    for folder in ("", "files", "data"):
        (package / folder).mkdir(exist_ok=True)
        (package / folder / "__init__.py").write_text("")
    (package / "data/audio.py").write_text(f"{block}from ..files import text\n")
    (package / "files/text.py").write_text("")
    assert upward(graph(package)) == [] and cycle(graph(package)) == []
    (package / "files/text.py").write_text(f"{block}from ..data.audio import read\n")
    assert upward(graph(package)) == ["s3prl_ekd.files.text imports s3prl_ekd.data.audio"]
    assert set(cycle(graph(package))) == {"s3prl_ekd.files.text", "s3prl_ekd.data.audio"}
