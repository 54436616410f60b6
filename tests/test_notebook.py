"""docs/first_student.ipynb: its cells are run in order, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPO

NOTEBOOK = REPO / "docs/first_student.ipynb"
# Runs the cells without Jupyter. A command after "!" must end with exit code 0.
RUN_CELLS = r"""
import json, re, subprocess, sys

def shell(command):
    print("!", command, flush=True)
    subprocess.run(["bash", "-c", command], check=True)

cells = json.load(open(sys.argv[1]))["cells"]
names = {"__name__": "__main__", "shell": shell}
for cell in cells:
    if cell["cell_type"] == "code":
        text = "".join(cell["source"])
        text = re.sub(r"^!((?:.*\\\n)*.*)$", lambda m: f"shell({m[1]!r})", text, flags=re.MULTILINE)
        exec(compile(text, cell["id"], "exec"), names)
print(json.dumps([len(names["states"]), *names["states"][-1].shape]))
"""


def test_it_is_a_short_notebook_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) == 10
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.slow
def test_the_cells_run_in_order(tmp_path):
    for package in ("espeakng_loader", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    programs = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", RUN_CELLS, str(NOTEBOOK)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    # the input of the two layers and their outputs, of width 192
    layers, batch, _, width = json.loads(done.stdout.splitlines()[-1])
    assert (layers, batch, width) == (3, 1, 192)
    folder = tmp_path / "first_student"
    for name in ("student_hf/model.safetensors", "student_superb/expert.py", "probe/probe.json"):
        assert (folder / name).is_file(), name
    assert "all checks passed" in done.stdout
