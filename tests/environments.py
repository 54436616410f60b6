"""Virtual environments that have only the named packages of this one, and what these require."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement


def requirements(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions of these names and of all that they require, without extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    open_names = list(names)
    while open_names:
        name = open_names.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                open_names.append(requirement.name)
    return found


def make_environment(folder: Path, *names: str) -> Path:
    """Make a virtual environment of links to installed packages; returns its ``bin`` folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in requirements(names).values():
        for top in {path.parts[0] for path in distribution.files or ()}:
            source = Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and source.exists() and not (site / top).exists():
                os.symlink(source, site / top)
    return folder / "bin"


def typed(command: str, folder: Path, programs: Path, code: int = 0) -> str:
    """Run a command in a shell, with an environment's ``bin`` first; stdout and stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    output = result.stdout + result.stderr
    assert result.returncode == code, f"{command} -> {result.returncode}\n{output[-3000:]}"
    return output
