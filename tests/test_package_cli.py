"""``cli.py`` of a hidden-set package, run in an environment that has torch alone."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch

from s3prl_ekd.cli import main

from .environments import make_environment, typed
from .test_fresh_process import shape_of_states
from .test_validate import BROKEN_FORWARD, BROKEN_SOURCE, SUBCLASS

OFFICIAL = {"forward", "lists", "rates", "frames"}
# Fault -> how expert.py is changed; faults that SUPERB's own checks find.
FAULTS = {
    name: lambda text, end=end: text + SUBCLASS.format(end)
    for name, (check, end) in BROKEN_FORWARD.items()
    if check in OFFICIAL
}
FAULTS["a float as rate"] = BROKEN_SOURCE["a float as rate"][1]
FAULTS["no layers"] = lambda text: text + SUBCLASS.format('return {"hidden_states": []}')
FAULTS["a syntax error"] = BROKEN_SOURCE["a syntax error"][1]
FAULTS["no class"] = lambda text: text.replace("class UpstreamExpert", "class Upstream")
FAULTS["no argument"] = lambda text: (
    text
    + SUBCLASS.format("return out").replace(
        "    def forward", "    def __init__(self):\n        pass\n\n    def forward"
    )
)
FAULTS["an error"] = lambda text: text + SUBCLASS.format("return states[99]")


# Runs cli.py of several folders in one process, because importing torch takes seconds.
RUN_ALL = """
import json, os, runpy, sys, torch

torch.set_num_threads(1)
sys.argv = ["cli.py", "validate"]
runpy.run_path({!r} + "/cli.py", run_name="__main__")
errors = []
for folder in {}:
    sys.modules.pop("expert", None)
    try:
        runpy.run_path(folder + "/cli.py", run_name="__main__")
        errors.append("")
    except SystemExit as stop:
        errors.append(stop.code)
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("torch") / "venv", "torch")


@pytest.fixture(scope="module")
def exported(student_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "package"
    assert main(["export", "superb", str(student_file), "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def package(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "package")


def test_the_card_and_validate(package, programs):
    assert shape_of_states(package / "README.md", programs) == [3, 2, 49, 48]
    output = typed("python cli.py validate", package, programs)
    # the shape for 2, 1.8 and 3.7 s: 3.7 s are 59,200 samples, 184 frames
    assert "3 of [3, 184, 48]" in output and "passed" in output.splitlines()[-1]
    student = torch.load(package / "model.pt", weights_only=True)["weights"]
    assert f"{sum(value.numel() for value in student.values()):,} parameters" in output
    assert "Warning" not in output


def test_validate_finds_what_the_organisers_would(package, programs):
    folders = {}
    for number, (name, change) in enumerate(FAULTS.items()):
        folders[name] = package.parent / str(number)
        shutil.copytree(package, folders[name])
        expert = folders[name] / "expert.py"
        expert.write_text(change(expert.read_text()))
    code = RUN_ALL.format(str(package), [*map(str, folders.values())])
    output = typed(f"python - 2>/dev/null <<'END'\n{code}END", package, programs)
    errors = json.loads(output.splitlines()[-1])
    for name, error in zip(FAULTS, errors, strict=True):
        assert error.startswith("error: ") and "\n" not in error, (name, error)


@pytest.mark.parametrize("name", ["model.pt", "README.md"])
def test_a_missing_file(package, programs, name):
    (package / name).unlink()
    assert f"error: the folder lacks {name}\n" in typed(
        "python cli.py validate", package, programs, code=1
    )


def git(folder, *argv):
    return subprocess.check_output(["git", "-C", str(folder), *argv], text=True).strip()


@pytest.fixture
def clone(package, tmp_path, monkeypatch):
    """A clone of an empty repository, with the package's files."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Ann")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "ann@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    subprocess.check_call(["git", "init", "-q", "--bare", str(tmp_path / "hub")])
    subprocess.check_call(["git", "clone", "-q", str(tmp_path / "hub"), str(tmp_path / "clone")])
    shutil.copytree(package, tmp_path / "clone", dirs_exist_ok=True)
    return tmp_path / "clone"


def test_upload_and_info(clone, programs):
    assert "error: nothing is committed" in typed("python cli.py info", clone, programs, code=1)
    (clone / "notes.txt").write_text("mine")
    git(clone, "add", "notes.txt")
    shown = typed("python cli.py upload 'it is \"good\"'", clone, programs)
    commit, hub = git(clone, "rev-parse", "HEAD"), clone.parent / "hub"
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert git(hub, "log", "--format=%H %s") == f'{commit} it is "good"'
    # all six files, and nothing else that happened to be staged
    assert len(git(hub, "ls-tree", "-r", "--name-only", "HEAD").split()) == 6
    assert commit in shown and str(hub) in shown
    git(clone, "remote", "set-url", "origin", "https://ann:sec@ret@example.org/ann/model")
    shown = typed("python cli.py info", clone, programs)
    assert "https://example.org/ann/model\n" in shown and commit in shown and "ret@" not in shown
    (clone / "README.md").write_text("changed")
    assert "error: not all is uploaded" in typed("python cli.py info", clone, programs, code=1)


def test_upload_refuses(clone, programs, package):
    assert "is not a clone" in typed("python cli.py info", package, programs, code=1)
    with (clone / "model.pt").open("r+b") as file:
        file.truncate(100)
    assert "error: " in typed("python cli.py upload broken", clone, programs, code=1)
    assert subprocess.call(["git", "-C", str(clone), "rev-parse", "-q", "--verify", "HEAD"])
