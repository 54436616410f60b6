"""Every command and snippet of README and docs/ is run as typed, page by page, top to bottom."""

import shutil
import sys

import pytest
import yaml

from s3prl_ekd.files.config import merge, read_yaml
from s3prl_ekd.pretrain.settings import ModelFile, check_runner_config, load_model_config

from .conftest import REPO
from .documented import Machine, commands, snippets
from .test_predictions import write_all

PAGES = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"]
PAGES += sorted(str(path.relative_to(REPO)) for path in (REPO / "docs").glob("*.md"))

# Commands that are not run here, and why.
NOT_RUN = {
    "pip install -c constraints.txt .": "tests/test_packaging.py builds; .ci/run installs",
    "make demo": "minutes; its parts are in tests/test_demo.py",
    "make test": "it runs this test",
    "make setup": ".ci/run sets up",
    "make docs": "tests/test_docs.py builds the documents",
    "make fuzz": "hours; make test runs the same cases with fewer inputs",
    ".venv/bin/python -m pytest -n 0 tests/test_aggregation.py": "make test runs it",
    "python tools/export_speed.py --seconds 2 5 15 --repeats 10": "minutes of timing",
    "python -m tools.bench --size base --variant ekd ekd-cached": "minutes of timing",
    "cd /data/s3prl/s3prl": "needs a checkout of s3prl",
    "python run_pretrain.py -u ekd -n my_student": "needs a checkout of s3prl",
}
NOT_RUN_PREFIXES = {
    "docker run": "needs docker and an image",
    "torchrun --standalone --nproc_per_node=8": "8 GPUs; tests/test_processes.py runs 2 processes",
    "python tools/study.py": "hours; tests/test_study_run.py runs a small study",
}
# Commands of which --dry-run is run: it checks all options and prints every command.
DRY_RUN = "s3prl-ekd superb"
# Pages that go on from another one: the commands of that one which they need.
STUDENT_RUN = (
    "s3prl-ekd init . --librispeech /data/LibriSpeech",
    "s3prl-ekd prepare librispeech /data/LibriSpeech -o data/librispeech",
    "run_pretrain.py -u ekd -n my_student",
)
TYPED_BEFORE = {
    "docs/configuration.md": STUDENT_RUN[:2],
    "docs/export.md": STUDENT_RUN,
    "docs/speed.md": STUDENT_RUN[:2],
}
# Pages that start from a student file.
NEED_STUDENT = {"docs/students.md", "docs/superb.md"}


def reason(command):
    """Why a command is not run, or None."""
    by_prefix = (why for start, why in NOT_RUN_PREFIXES.items() if command.startswith(start))
    return NOT_RUN.get(command) or next(by_prefix, None)


def page_commands(page):
    return [c for s in snippets(page) if s.language == "sh" for c in commands(s.text)]


RUN = [page for page in PAGES if any(reason(command) is None for command in page_commands(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_of_a_page(page, tmp_path):
    machine, typed = Machine(tmp_path), set()
    if page in NEED_STUDENT:
        machine.write_student()
    for command in TYPED_BEFORE.get(page, ()):
        machine.type(command)
    for snippet in snippets(page):
        if snippet.language == "yaml":
            put_into_config(machine, snippet.text)
        if snippet.language == "python":
            machine.type(f"{sys.executable} - <<'END'\n{snippet.text}END")
        if snippet.language != "sh":
            continue
        for command in commands(snippet.text):
            if reason(command) is None and command not in typed:
                typed.add(command)
                if command.startswith("s3prl-ekd report"):
                    write_all(machine.folder / "result/superb")  # as `superb` writes results
                dry = command.startswith(DRY_RUN)
                machine.type(f"{command} --dry-run" if dry else command)


def put_into_config(machine: Machine, text: str) -> None:
    """Check a YAML snippet, and merge it into the config of the working folder that it belongs to.

    A snippet with ``extends`` is a config of its own.
    """
    values = yaml.safe_load(machine.local(text))
    if "extends" in values:
        path = machine.root / "configs/experiments/snippet.yaml"
        shutil.copytree(REPO / "pretrain_configs", machine.root / "configs", dirs_exist_ok=True)
        path.write_text(text)
        load_model_config(path)
        return
    kind = "model" if values.keys() <= ModelFile.__dataclass_fields__.keys() else "runner"
    path = machine.folder / f"pretrain/ekd/config_{kind}.yaml"
    shipped = REPO / f"pretrain_configs/config_{kind}.yaml"
    merged = merge(read_yaml(path if path.is_file() else shipped), values)
    if kind == "model":
        load_model_config(merged)
    else:
        check_runner_config(merged, "the snippet")
    if path.is_file():
        path.write_text(yaml.safe_dump(merged, sort_keys=False))


def test_no_reason_is_stale():
    """Every entry of NOT_RUN and NOT_RUN_PREFIXES is a command of some page."""
    typed = {command for page in PAGES for command in page_commands(page)}
    assert set(NOT_RUN) <= typed
    assert all(any(c.startswith(start) for c in typed) for start in NOT_RUN_PREFIXES)
