"""Packages that are not installed, and the commands that install them."""

from __future__ import annotations

import importlib.util
import traceback

from . import s3prl_distribution

# import name -> name on PyPI, where they differ
PYPI = {"yaml": "pyyaml", "sklearn": "scikit-learn", "dtw": "dtw-python"}
OURS = (s3prl_distribution.MODULE, __package__.partition(".")[0])


def install_command(package: str) -> str:
    """The command that installs the package of an import name."""
    return f"pip install {PYPI.get(package, package)}"


def missing_package(error: ImportError) -> str:
    """What is missing and what to type, if s3prl or this package imported what is not installed.

    Returns:
        A sentence; empty if the package is installed or another program imported it.
    """
    package = (error.name or "").partition(".")[0]
    if package == s3prl_distribution.MODULE:
        return s3prl_distribution.missing_s3prl()
    importers = [
        frame.f_globals.get("__name__", "")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith("<frozen importlib")
    ]
    importer = importers[-1] if importers else ""
    if importer.partition(".")[0] not in OURS or not package or _is_installed(package):
        return ""
    return (
        f"{package}, which {importer} imports, is not installed; type: {install_command(package)}"
    )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a replacement in sys.modules without a spec
        return True
