"""What can be said of a package by reading it; nothing is imported or run here."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from .isolation import BLOCKED
from .outcome import READ, Failed, Outcome, Skipped, Warned

NEEDED = ("expert.py", "model.pt")
SUBMITTED = ("requirements.txt", "README.md", "LICENSE", "cli.py")
PYTHON = (3, 8)
LARGEST = 8 << 20  # bytes of a .py or a requirements.txt

# Names that torch 1.13 lacks, as they are written.
_LATER_TORCH = {
    "scaled_dot_product_attention": "2.0",
    "torch.compile": "2.0",
    "torch.export": "2.1",
    "torch.nn.attention": "2.2",
    "nn.attention": "2.2",
    "parametrizations.weight_norm": "2.0",
    "nn.RMSNorm": "2.4",
}
_GENERIC = {"list", "dict", "tuple", "set", "frozenset", "type"}


def read_checks(folder: Path) -> Iterator[Outcome]:
    """The outcomes of :data:`.outcome.READ`."""
    checks: dict[str, Callable[[Path], str]] = {
        "files": _files,
        "submission": _submission,
        "syntax": _syntax,
        "torch 1.13": _torch,
        "requirements": _requirements,
    }
    for name in READ:
        try:
            yield Outcome(name, "pass", checks[name](folder))
        except Failed as error:
            yield Outcome(name, "fail", str(error))
        except Warned as error:
            yield Outcome(name, "warn", str(error))
        except Skipped as error:
            yield Outcome(name, "skip", str(error))
        except (RecursionError, MemoryError):
            yield Outcome(name, "fail", "a .py is nested too deeply to be read")


def _files(folder: Path) -> str:
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise Failed(f"{' and '.join(missing)} missing in {folder}")
    return ", ".join(f"{name} {(folder / name).stat().st_size:,} bytes" for name in NEEDED)


def _submission(folder: Path) -> str:
    missing = [name for name in SUBMITTED if not (folder / name).is_file()]
    if missing:
        raise Failed(f"{', '.join(missing)} missing in {folder}")
    return ", ".join(SUBMITTED)


def _syntax(folder: Path) -> str:
    count = 0
    for path, text in _sources(folder):
        where = path.relative_to(folder)
        try:
            tree = ast.parse(text, str(where), feature_version=PYTHON)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            raise Failed(f"{where} line {line}: {getattr(error, 'msg', None) or error}") from None
        for line, what in _later_python(tree):
            raise Failed(f"{where} line {line}: {what}, which Python 3.8 does not have")
        count += 1
    return f"{count} files, Python 3.8"


def _later_python(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What is good syntax and fails all the same when Python 3.8 runs it."""
    postponed = any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(name.name == "annotations" for name in node.names)
        for node in tree.body
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip":
            if any(keyword.arg == "strict" for keyword in node.keywords):
                yield node.lineno, "zip(strict=...)"
        if isinstance(node, ast.Attribute) and node.attr in ("removeprefix", "removesuffix"):
            yield node.lineno, f".{node.attr}()"
        if postponed:
            continue
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            for part in ast.walk(annotation) if isinstance(annotation, ast.AST) else ():
                if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr):
                    yield part.lineno, "X | Y in an annotation (from __future__ import annotations)"
                elif isinstance(part, ast.Subscript) and getattr(part.value, "id", "") in _GENERIC:
                    name = ast.unparse(part.value)
                    yield part.lineno, f"{name}[...] in an annotation (from __future__ import ...)"


def _torch(folder: Path) -> str:
    for path, tree in _trees(folder):
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Attribute, ast.ImportFrom)):
                continue
            for name in _written(node):
                for later, version in _LATER_TORCH.items():
                    if f".{name}".endswith(f".{later}"):
                        raise Warned(
                            f"{path.relative_to(folder)} line {node.lineno} has {later}, which "
                            f"came with torch {version}"
                        )
    return "none of those that we know"


def _written(node: ast.Attribute | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [ast.unparse(node)]
    return [f"{node.module}.{name.name}" for name in node.names]


def _requirements(folder: Path) -> str:
    imported: dict[str, str] = {}
    _collect(folder, folder / "expert.py", imported, set())
    if not imported:
        return "expert.py imports torch and Python's own modules only"
    path = folder / "requirements.txt"
    listed = ""
    if path.is_file():
        _check_size(path, folder)
        listed = path.read_text(encoding="utf-8", errors="replace")
    named = {
        _normal(match[0])
        for line in listed.splitlines()
        if (match := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line.strip()))
    }
    distributions = importlib.metadata.packages_distributions()
    for module, where in imported.items():
        names = {_normal(name) for name in distributions.get(module, [])} | {_normal(module)}
        if not names & named and module not in BLOCKED:
            raise Failed(f"{where} imports {module}, which requirements.txt does not name")
    return "imports " + ", ".join(imported)


def _collect(folder: Path, path: Path, imported: dict[str, str], seen: set[Path]) -> None:
    """Top modules that ``path`` and its neighbours import, without Python's own and torch."""
    if path in seen or not path.is_file():
        return
    seen.add(path)
    tree = _tree(path)
    optional = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [base] if not node.level else [f"{base}.{n.name}" for n in node.names]
        else:
            continue
        for name in names:
            for near in _near(folder, path.parent, name):
                _collect(folder, near, imported, seen)
            top = name.split(".")[0]
            local = getattr(node, "level", 0) or any(_near(folder, path.parent, top))
            known = top in sys.stdlib_module_names or top in ("torch", "__future__")
            if not local and not known and id(node) not in optional:
                imported.setdefault(top, f"{path.relative_to(folder)} line {node.lineno}")


def _near(folder: Path, beside: Path, name: str) -> Iterator[Path]:
    """Files of the package that a dotted name may mean."""
    parts = [part for part in name.split(".") if part]
    for root in {folder, beside}:
        for count in range(len(parts), 0, -1):
            base = root.joinpath(*parts[:count])
            yield from (p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file())


def _sources(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.py")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        _check_size(path, folder)
        try:
            with tokenize.open(path) as file:
                yield path, file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            raise Failed(f"{path.relative_to(folder)} cannot be read: {error}") from None


def _check_size(path: Path, folder: Path) -> None:
    """Raise Failed where reading it could go on for ever."""
    if not path.is_file():
        raise Failed(f"{path.relative_to(folder)} is no file")
    if path.stat().st_size > LARGEST:
        raise Failed(f"{path.relative_to(folder)} has more than {LARGEST:,} bytes")


def _trees(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path, _ in _sources(folder):
        yield path, _tree(path)


def _tree(path: Path) -> ast.Module:
    try:
        with tokenize.open(path) as file:
            return ast.parse(file.read())
    except (SyntaxError, ValueError):
        raise Skipped(f"{path.name} cannot be parsed; see syntax") from None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
