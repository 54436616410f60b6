"""How much of this package ``run_pretrain.py -u ekd`` needs: calls to the loss, imported lines."""

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import s3prl_ekd
from s3prl_ekd.workspace import write_workspace

from .conftest import write_configs

PACKAGE = Path(s3prl_ekd.__file__).parent
CALLS = 7
LINES = 10_085  # of code in the imported modules; the goal is 6,000

# Runs, and writes to OUT this package's frames around the loss, and the paths of all modules.
PROBE = f"""
import json, sys
from s3prl_ekd.launch import run_pretrain

frames = []

def profile(frame, event, arg):
    if event == "call" and frame.f_code.co_name == "distillation_loss" and not frames:
        while frame is not None:
            if frame.f_code.co_filename.startswith({str(PACKAGE)!r}):
                frames.append(f"{{frame.f_code.co_filename}}: {{frame.f_code.co_name}}")
            frame = frame.f_back

out = sys.argv.pop(1)
sys.setprofile(profile)
code = run_pretrain()
sys.setprofile(None)
paths = [getattr(module, "__file__", None) for module in sys.modules.values()]
with open(out, "w") as file:
    json.dump({{"frames": frames, "paths": [path for path in paths if path]}}, file)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def probed(tmp_path_factory, teachers, corpus):
    folder = tmp_path_factory.mktemp("run")
    write_workspace(folder)
    write_configs(folder, teachers, corpus)
    argv = ["-u", "ekd", "-c", "runner.yaml", "-g", "model.yaml", "-n", "x", "--device", "cpu"]
    subprocess.run(
        [sys.executable, "-c", PROBE, "out.json", *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return json.loads((folder / "out.json").read_text())


def test_few_calls_from_the_command_to_the_loss(probed):
    """Calls in this package; those in s3prl and torch do not count."""
    frames = probed["frames"]
    names = [frame.rsplit(": ", 1)[1] for frame in frames]
    assert names[0] == "distillation_loss" and names[-1] == "run_pretrain"
    assert len(frames) <= CALLS, frames


def code_lines(source):
    """Number of lines with code: no blank lines, comments, or docstrings of any kind."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (*skipped, tokenize.ENDMARKER)
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_few_lines_are_imported(probed):
    paths = {Path(path) for path in probed["paths"]}
    lines = {
        str(path.relative_to(PACKAGE)): code_lines(path.read_text(encoding="utf-8"))
        for path in paths
        if path.is_relative_to(PACKAGE) and path.suffix == ".py"
    }
    assert "pretrain/trainer.py" in lines
    assert sum(lines.values()) <= LINES, sorted(lines.items(), key=lambda item: -item[1])
    for other in ("superb", "analysis", "export", "essence", "demo", "commands", "hidden_states"):
        assert not [path for path in lines if path.startswith(f"{other}/")], other
