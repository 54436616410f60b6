"""Commands and snippets of README, docs/ and cards are run as typed, page by page, in order."""

import importlib
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

import s3prl_ekd.commands
from s3prl_ekd import cli
from s3prl_ekd.files.config import merge, read_yaml
from s3prl_ekd.pretrain.settings import ModelFile, check_runner_config, load_model_config
from s3prl_ekd.request import DownstreamRequest, PretrainRequest, check_passthrough

from .conftest import REPO
from .documented import Machine, commands, snippets, write_repositories
from .hub_server import serve
from .test_predictions import write_all

PAGES = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"]
PAGES += [
    str(path.relative_to(REPO))
    for folder in ("docs", "s3prl_ekd/teachers/zoo/cards")
    for path in sorted((REPO / folder).glob("*.md"))
]

# Commands that are not run here, and why.
NOT_RUN = {
    "pip install -c constraints.txt .": "tests/test_packaging.py builds; .ci/run installs",
    "make demo": "minutes; its parts are in tests/test_demo.py",
    "make test": "it runs this test",
    "make test-all": "it runs this test",
    "make test-espnet": "it sets up another environment",
    "pip install -r requirements-espnet.txt": "make test-espnet installs so",
    "pip install --no-deps .": "make test-espnet installs so",
    "make setup": ".ci/run sets up",
    "make docs": "tests/test_docs.py builds the documents",
    "make fuzz": "hours; make test runs the same cases with fewer inputs",
    ".venv/bin/python -m pytest -n 0 tests/test_aggregation.py": "make test runs it",
    "python -m tools.bench.exports --seconds 2 5 15 --repeats 10": "minutes of timing",
    "cd /data/s3prl/s3prl": "needs a checkout of s3prl",
    "python run_pretrain.py -u ekd -n my_student": "needs a checkout of s3prl",
}
NOT_RUN_PREFIXES = {
    "s3prl-ekd recipe ekd960 --librispeech": "minutes or weeks; a tiny one in tests/test_recipe.py",
    "pip uninstall -y s3prl &&": "tests/test_s3prl_distribution.py has the steps",
    "docker run": "needs docker and an image",
    "torchrun --standalone --nproc_per_node=8": "8 GPUs; tests/test_processes.py runs 2 processes",
    "run_pretrain.py -u ekd -n dp_hubert_final": "25,000 steps; tests/test_prune.py runs a few",
    "python tools/gpu_check.py": "needs a GPU; a toy in test_gpu_check.py",
    "python tools/pruning_study.py": "an hour; tests/test_pruning_study.py tests its parts",
    "python -m tools.bench --size": "minutes of timing",
    "python -m tools.targets_speed": "minutes of timing",
    "python tools/frozen_study.py": "an hour; tests/test_frozen_study.py tests its parts",
    "python tools/precision_study.py": "an hour, and much more without bfloat16 in hardware",
    "python -m tools.bench.evaluation": "minutes; tests/test_bench_evaluation.py runs parts",
    "python tools/defaults_study.py": "an hour; tests/test_defaults_study.py tests its parts",
    "python tools/targets_study.py": "an hour; tests/test_targets_study.py tests its parts",
    "python tools/study.py": "hours; tests/test_study.py tests its parts",
    "s3prl-ekd doctor --teachers": "published sizes; tests/test_teacher_check.py has small ones",
    "s3prl-ekd prepare alignments": "noise cannot be aligned; tests/test_alignments.py has speech",
    "s3prl-ekd probe student.safetensors hubert_base --data data/aligned": "needs the alignments",
    "python tools/make_commands.py": "a minute; tests/test_make_commands.py",
    "python tools/make_voices.py": "minutes; tests/test_make_voices.py makes a few",
    "python tools/train_tiny_teachers.py": "hours; test_train_tiny_teachers.py trains briefly",
}
# Pages that are run elsewhere, because they need other packages.
RUN_ELSEWHERE = {"docs/espnet.md": "tests/test_espnet.py, by make test-espnet"}
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
    "docs/hub.md": STUDENT_RUN[:2],
    "docs/lhotse.md": STUDENT_RUN[:1],
    "docs/method.md": STUDENT_RUN[:1],
    "docs/speed.md": STUDENT_RUN[:2],
    "docs/students.md": STUDENT_RUN[:2],
    "docs/targets.md": STUDENT_RUN[:2],
}
# Pages that need a package which not every developer has installed.
NEED_PACKAGE = {"docs/lhotse.md": "lhotse"}
# Pages that start from a student file.
NEED_STUDENT = {"docs/hub.md", "docs/probe.md", "docs/students.md", "docs/superb.md"}


def reason(command):
    """Why a command is not run, or None."""
    by_prefix = (why for start, why in NOT_RUN_PREFIXES.items() if command.startswith(start))
    return NOT_RUN.get(command) or next(by_prefix, None)


def page_commands(page):
    return [c for s in snippets(page) if s.language == "sh" for c in commands(s.text)]


RUN = [page for page in PAGES if any(reason(command) is None for command in page_commands(page))]


@pytest.fixture
def hub(page, tmp_path_factory, monkeypatch):
    """A stand-in of the Hugging Face Hub for the commands that are typed."""
    with serve() as hub:
        if page == "docs/hub.md":
            hub.repos = write_repositories(tmp_path_factory.mktemp("hub"))
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_reader")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # its uploads go to servers of its own
        yield hub


@pytest.mark.parametrize(
    "page",
    [
        page if page == "README.md" else pytest.param(page, marks=pytest.mark.slow)
        for page in RUN
        if page not in RUN_ELSEWHERE
    ],
)
def test_commands_of_a_page(page, hub, tmp_path):
    if page in NEED_PACKAGE:
        package = NEED_PACKAGE[page]
        pytest.importorskip(package, reason=f"{package} is not installed")
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


def test_scripts_of_clusters_are_valid():
    """SLURM scripts cannot be run here; bash reads them."""
    scripts = [s for page in PAGES for s in snippets(page) if s.language == "bash"]
    assert len(scripts) == 5
    for script in scripts:
        result = subprocess.run(["bash", "-n"], input=script.text, text=True, capture_output=True)
        assert result.returncode == 0 and not result.stderr, (script.line, result.stderr)


def examples(text):
    """The commands below `example:` in a help text."""
    block = re.sub(r"\\\n\s*", "", text.partition("example:")[2])
    lines = (line.strip().partition("  #")[0] for line in block.splitlines())
    pattern = r"s3prl-ekd |run_pretrain\.py |run_downstream\.py "
    return [part for line in lines for part in line.split(" && ") if re.match(pattern, part)]


HELP = [
    f"s3prl_ekd.commands.{module.name}"
    for module in pkgutil.iter_modules(s3prl_ekd.commands.__path__)
    if not module.ispkg
]
HELP += [f"s3prl_ekd.commands.export.{kind}" for kind in ("student", "superb", "hf", "onnx")]


@pytest.mark.parametrize("module", HELP)
def test_examples_of_help_texts_are_accepted(module, monkeypatch):
    found = examples(importlib.import_module(module).__doc__)
    assert found, module
    check_options(found, monkeypatch)


@pytest.mark.parametrize("page", RUN)
def test_commands_of_a_page_are_accepted(page, monkeypatch):
    """The quick half of :func:`test_commands_of_a_page`."""
    typed = "\n".join(page_commands(page))
    check_options(examples(f"example:\n{typed}"), monkeypatch)


def check_options(found, monkeypatch):
    """The options of commands exist and have valid values; the commands themselves are not run."""
    for example in found:
        script, *argv = shlex.split(example.partition(" > ")[0])
        if script == "run_pretrain.py":
            assert PretrainRequest.parse(argv).passthrough == ()
        elif script == "run_downstream.py":
            check_passthrough(DownstreamRequest.parse(argv))
        else:
            name = argv[0].replace("-", "_")
            command = importlib.import_module(f"s3prl_ekd.commands.{name}")
            monkeypatch.setattr(command, "main", lambda args: 0)
            try:
                assert cli.main(argv) == 0
            except SystemExit as stop:  # --help
                assert stop.code == 0


def test_no_reason_is_stale():
    """Every entry of NOT_RUN and NOT_RUN_PREFIXES is a command of some page."""
    typed = {command for page in PAGES for command in page_commands(page)}
    assert set(NOT_RUN) <= typed
    assert all(any(c.startswith(start) for c in typed) for start in NOT_RUN_PREFIXES)
