"""Checks of a package's files, without importing or running them."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from .isolation import BLOCKED
from .outcome import STATIC_CHECKS, CheckFailed, CheckOutcome, CheckSkipped, CheckWarning

REQUIRED_FILES = ("expert.py", "model.pt")
SUBMISSION_FILES = ("requirements.txt", "README.md", "LICENSE", "cli.py")
PYTHON_VERSION = (3, 8)
MAX_BYTES = 8 << 20  # of a .py or a requirements.txt

# Names that torch 1.13 lacks -> the torch version that added them.
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


def read_checks(folder: Path) -> Iterator[CheckOutcome]:
    """Run the checks in :data:`.outcome.STATIC_CHECKS`."""
    checks: dict[str, Callable[[Path], str]] = {
        "files": _files,
        "submission": _submission,
        "syntax": _syntax,
        "torch 1.13": _torch,
        "requirements": _requirements,
    }
    for name in STATIC_CHECKS:
        try:
            yield CheckOutcome(name, "pass", checks[name](folder))
        except CheckFailed as error:
            yield CheckOutcome(name, "fail", str(error))
        except CheckWarning as error:
            yield CheckOutcome(name, "warn", str(error))
        except CheckSkipped as error:
            yield CheckOutcome(name, "skip", str(error))
        except (RecursionError, MemoryError):
            yield CheckOutcome(name, "fail", "a .py file is nested too deeply to be parsed")


def _files(folder: Path) -> str:
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise CheckFailed(f"no {' and '.join(missing)} in {folder}")
    return ", ".join(f"{name} {(folder / name).stat().st_size:,} bytes" for name in REQUIRED_FILES)


def _submission(folder: Path) -> str:
    missing = [name for name in SUBMISSION_FILES if not (folder / name).is_file()]
    if missing:
        raise CheckFailed(f"no {', '.join(missing)} in {folder}")
    return ", ".join(SUBMISSION_FILES)


def _syntax(folder: Path) -> str:
    count = 0
    for path, text in _sources(folder):
        name = path.relative_to(folder)
        try:
            tree = ast.parse(text, str(name), feature_version=PYTHON_VERSION)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            raise CheckFailed(
                f"{name} line {line}: {getattr(error, 'msg', None) or error}"
            ) from None
        for line, feature in _later_python(tree):
            raise CheckFailed(f"{name} line {line}: {feature} does not exist in Python 3.8")
        count += 1
    return f"{count} files, Python 3.8"


def _later_python(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find code that Python 3.8 parses but cannot run: ``(line, feature)``."""
    postponed = any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(name.name == "annotations" for name in node.names)
        for node in tree.body
    )
    without_future = "in an annotation without from __future__ import annotations"
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
                    yield part.lineno, f"X | Y {without_future}"
                elif isinstance(part, ast.Subscript) and getattr(part.value, "id", "") in _GENERIC:
                    yield part.lineno, f"{ast.unparse(part.value)}[...] {without_future}"


def _torch(folder: Path) -> str:
    for path, tree in _trees(folder):
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Attribute, ast.ImportFrom)):
                continue
            for name in _full_names(node):
                for later, version in _LATER_TORCH.items():
                    if f".{name}".endswith(f".{later}"):
                        raise CheckWarning(
                            f"{path.relative_to(folder)} line {node.lineno}: {later} needs torch "
                            f"{version}"
                        )
    return "no function that is known to need a later torch"


def _full_names(node: ast.Attribute | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [ast.unparse(node)]
    return [f"{node.module}.{name.name}" for name in node.names]


def _requirements(folder: Path) -> str:
    imported: dict[str, str] = {}
    _collect(folder, folder / "expert.py", imported, set())
    if not imported:
        return "expert.py imports only torch and the standard library"
    path = folder / "requirements.txt"
    listed = ""
    if path.is_file():
        _check_size(path, folder)
        listed = path.read_text(encoding="utf-8", errors="replace")
    required = {
        _normalise(match[0])
        for line in listed.splitlines()
        if (match := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line.strip()))
    }
    distributions = importlib.metadata.packages_distributions()
    for module, location in imported.items():
        names = {_normalise(name) for name in distributions.get(module, [])} | {_normalise(module)}
        if not names & required and module not in BLOCKED:
            raise CheckFailed(f"{location}: imports {module}, which requirements.txt does not name")
    return "imports " + ", ".join(imported)


def _collect(folder: Path, path: Path, imported: dict[str, str], visited: set[Path]) -> None:
    """Add the top-level modules that ``path`` imports, directly or through files of the package.

    ``imported`` maps a module to the place of the import, without torch and the standard library.
    """
    if path in visited or not path.is_file():
        return
    visited.add(path)
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
            for file in _package_files(folder, path.parent, name):
                _collect(folder, file, imported, visited)
            top = name.split(".")[0]
            local = getattr(node, "level", 0) or any(_package_files(folder, path.parent, top))
            builtin = top in sys.stdlib_module_names or top in ("torch", "__future__")
            if not local and not builtin and id(node) not in optional:
                imported.setdefault(top, f"{path.relative_to(folder)} line {node.lineno}")


def _package_files(folder: Path, parent: Path, name: str) -> Iterator[Path]:
    """Files in ``folder`` or ``parent`` that a dotted module name may refer to."""
    parts = [part for part in name.split(".") if part]
    for root in {folder, parent}:
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
            raise CheckFailed(f"cannot read {path.relative_to(folder)}: {error}") from None


def _check_size(path: Path, folder: Path) -> None:
    """Raise CheckFailed if a file is not regular (a named pipe may never end) or is too large."""
    if not path.is_file():
        raise CheckFailed(f"{path.relative_to(folder)} is not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise CheckFailed(f"{path.relative_to(folder)} is larger than {MAX_BYTES:,} bytes")


def _trees(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path, _ in _sources(folder):
        yield path, _tree(path)


def _tree(path: Path) -> ast.Module:
    try:
        with tokenize.open(path) as file:
            return ast.parse(file.read())
    except (SyntaxError, ValueError):
        raise CheckSkipped(f"cannot parse {path.name}: see syntax") from None


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
