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
from .outcome import CheckFailed, CheckOutcome, CheckWarning, run_check

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
    """Run the checks of the files; those that follow a failed ``syntax`` are skipped."""
    checks: dict[str, Callable[[Path], str]] = {
        "files": check_files,
        "submission": check_submission,
        "syntax": check_syntax,
        "torch 1.13": check_torch,
        "requirements": check_requirements,
    }
    parsed = True
    for name, check in checks.items():
        if not parsed:
            yield CheckOutcome(name, "skip", "not run: see syntax")
            continue
        try:
            outcome = run_check(name, check, folder)
        except (RecursionError, MemoryError):
            outcome = CheckOutcome(name, "fail", "a .py file is nested too deeply to be parsed")
        parsed = name != "syntax" or outcome.status == "pass"
        yield outcome


def check_files(folder: Path) -> str:
    """expert.py and model.pt exist."""
    _require_files(folder, REQUIRED_FILES)
    return ", ".join(f"{name} {(folder / name).stat().st_size:,} bytes" for name in REQUIRED_FILES)


def check_submission(folder: Path) -> str:
    """requirements.txt, README.md, LICENSE and cli.py exist."""
    _require_files(folder, SUBMISSION_FILES)
    return ", ".join(SUBMISSION_FILES)


def _require_files(folder: Path, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckFailed(f"no {', '.join(missing)} in {folder}")


def check_syntax(folder: Path) -> str:
    """Every .py is valid in Python 3.8."""
    paths = _python_files(folder)
    for path in paths:
        for line, feature in _later_python(_parse(folder, path, PYTHON_VERSION)):
            name = path.relative_to(folder)
            raise CheckFailed(f"{name} line {line}: {feature} does not exist in Python 3.8")
    return f"{len(paths)} files, Python 3.8"


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


def check_torch(folder: Path) -> str:
    """No function of a later torch than 1.13 is used."""
    for path in _python_files(folder):
        for node in ast.walk(_parse(folder, path)):
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name.name}" for name in node.names]
            else:
                continue
            for later, version in _LATER_TORCH.items():
                if any(f".{name}".endswith(f".{later}") for name in names):
                    place = f"{path.relative_to(folder)} line {node.lineno}"
                    raise CheckWarning(f"{place}: {later} needs torch {version}")
    return "no function that is known to need a later torch"


def check_requirements(folder: Path) -> str:
    """requirements.txt names what expert.py imports."""
    imported = _imported_modules(folder)
    if not imported:
        return "expert.py imports only torch and the standard library"
    path = folder / "requirements.txt"
    listed = ""
    if path.is_file():
        _check_size(folder, path)
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


def _imported_modules(folder: Path) -> dict[str, str]:
    """Top-level modules that expert.py imports, directly or through files of the package.

    Returns:
        module -> place of the import; without torch, the standard library and imports in a ``try``.
    """
    imported: dict[str, str] = {}
    paths = list(folder.glob("expert.py"))
    for path in paths:  # the loop adds to it
        tree = _parse(folder, path)
        tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
        optional = {inner for node in tries for part in node.body for inner in ast.walk(part)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                names = [base] if not node.level else [f"{base}.{n.name}" for n in node.names]
            else:
                continue
            for name in names:
                files = _package_files(folder, path.parent, name)
                paths += [file for file in files if file not in paths]
                top = name.split(".")[0]
                local = getattr(node, "level", 0) or any(_package_files(folder, path.parent, top))
                builtin = top in sys.stdlib_module_names or top in ("torch", "__future__")
                if not local and not builtin and node not in optional:
                    imported.setdefault(top, f"{path.relative_to(folder)} line {node.lineno}")
    return imported


def _package_files(folder: Path, parent: Path, name: str) -> Iterator[Path]:
    """Files in ``folder`` or ``parent`` that a dotted module name may refer to."""
    parts = [part for part in name.split(".") if part]
    for root in {folder, parent}:
        for count in range(len(parts), 0, -1):
            base = root.joinpath(*parts[:count])
            yield from (p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file())


def _python_files(folder: Path) -> list[Path]:
    """All .py files, except in hidden folders."""
    paths = sorted(folder.rglob("*.py"))
    return [path for path in paths if "/." not in f"/{path.relative_to(folder).as_posix()}"]


def _parse(folder: Path, path: Path, version: tuple[int, int] | None = None) -> ast.Module:
    """Parse a .py file. Raises CheckFailed."""
    _check_size(folder, path)
    try:
        with tokenize.open(path) as file:
            return ast.parse(file.read(), feature_version=version)
    except (SyntaxError, ValueError) as error:
        line, message = getattr(error, "lineno", None) or 1, getattr(error, "msg", None) or error
        raise CheckFailed(f"{path.relative_to(folder)} line {line}: {message}") from None


def _check_size(folder: Path, path: Path) -> None:
    """Raise CheckFailed if a file is not regular (a named pipe may never end) or is too large."""
    if not path.is_file():
        raise CheckFailed(f"{path.relative_to(folder)} is not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise CheckFailed(f"{path.relative_to(folder)} is larger than {MAX_BYTES:,} bytes")


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
