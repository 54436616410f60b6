"""What ``s3prl-ekd doctor`` says, against what is known by other ways."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch

from s3prl_ekd import cli, compat
from s3prl_ekd.commands import doctor
from s3prl_ekd.downstream import requirements
from s3prl_ekd.downstream.tasks import TASKS, Task
from s3prl_ekd.errors import SetupError

ROOT = Path(__file__).resolve().parents[1]
ASR_YAML = """\
downstream_expert:
  datarc:
    libri_root: corpus
    bucket_file: corpus
    train: [words]
    dict_path: ./downstream/asr/char.dict
"""
CTC_YAML = """\
downstream_expert:
  corpus:
    path: corpus
    lexicon: [downstream/ctc/lexicon.txt, downstream/ctc/more.txt]
  text:
    vocab_file: downstream/ctc/vocab/phoneme.txt
"""


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def recipe(task: str) -> Task:
    return TASKS[task.lower()]


def reasons(problems: list[requirements.RequirementProblem]) -> list[str]:
    return [problem.reason for problem in problems]


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def report(empty) -> dict:
    """The report on an empty folder, from the command itself in a fresh interpreter."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "s3prl_ekd.cli", "doctor", str(empty), "--json"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    report = json.loads(done.stdout)  # nothing else may be on stdout
    assert done.returncode == (0 if report["ok"] else 1), done.stderr
    return report


# --- the report


@pytest.mark.parametrize(
    ("version", "holes"),
    [
        ("2.5.1+cu124", ["CVE-2025-32434", "CVE-2026-24747"]),
        ("2.9.1", ["CVE-2026-24747"]),
        ("2.10.0", []),
        ("2.13.0+cpu", []),
    ],
)
def test_an_old_torch_is_named_unsafe(monkeypatch, report, version, holes):
    monkeypatch.setattr(torch, "__version__", version)
    said = doctor._torch_load()
    assert re.findall(r"CVE-[\d-]+", said) == holes
    assert (version in said and "torch>=2.10" in said) == bool(holes)
    assert said in doctor.as_text({**report, "torch_load": said})


def test_versions_are_those_installed(report):
    for name in doctor.PACKAGES[1:]:  # torch has its build behind the version
        assert report["versions"][name] == metadata.version(name)
    assert report["versions"]["torch"].startswith(f"{torch.__version__} (")
    assert report["versions"]["s3prl"].startswith(metadata.version("s3prl"))
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_audio_names_libsndfile_and_reads_three_formats(report):
    assert soundfile.__libsndfile_version__ in report["audio"]["decoder"]
    assert report["audio"]["formats"] == {"FLAC": True, "WAV": True, "Opus": True}


def test_devices(report):
    assert report["devices"]["cpu"].endswith(" threads")
    assert ("cuda" in report["devices"]) is not torch.cuda.is_available()
    assert sum(d.startswith("cuda:") for d in report["devices"]) == torch.cuda.device_count()


def test_shims_are_reported_as_they_fired(report):
    fired = compat.apply()
    assert [shim["name"] for shim in report["shims"]] == [shim.name for shim in compat.SHIMS]
    for shim in report["shims"]:
        assert shim["state"] == ("fired" if shim["name"] in fired else "not needed")
        assert shim["since"] and shim["needed_by"]


def test_pretraining_and_asr_have_their_modules_here(report):
    assert report["ok"] and report["pretrain"] == {"ready": True, "problems": []}
    assert {r["task"]: r["downstream"] for r in report["recipes"]} == {
        "PR": "ctc",
        "SID": "voxceleb1",
        "ER": "emotion",
        "ASR": "asr",
    }
    assert [r["modules"] for r in report["recipes"] if r["task"] in ("ER", "ASR")] == [True, True]


def test_empty_folder_is_told_to_type_init(report, empty):
    init = f"s3prl-ekd init {empty}"
    assert report["folder"]["pretrain_ekd"] is False and report["folder"]["remedy"] == init
    for entry in report["recipes"]:
        assert entry["ready"] is False
        assert init in [problem["remedy"] for problem in entry["problems"]]


def test_text_has_every_fact_in_columns(report):
    lines = doctor.as_text({**report, "versions": {**report["versions"], "pandas": None}})
    rows = [line.split(None, 1) for line in lines.splitlines() if line.startswith("  ")]
    assert ["pandas", "MISSING"] in rows
    assert ["numpy", metadata.version("numpy")] in rows
    versions = lines.split("\n\n")[0].splitlines()[1:]
    starts = {len(line) - len(line[2:].split(None, 1)[1]) for line in versions}
    assert len(starts) == 1  # the second column is straight
    for shim in compat.SHIMS:
        assert any(row[0] == shim.name and shim.since in row[1] for row in rows)
        assert all(place in lines for place in shim.needed_by)
    for entry in report["recipes"]:
        assert f"{entry['task']} (-d {entry['downstream']})" in lines


# --- recipes


def test_asr_is_ready_once_its_files_are_there(tmp_path):
    asr = recipe("ASR")
    state = requirements.check_recipe(asr, tmp_path)
    assert not state.ready and not state.modules
    assert reasons(state.files) == [f"{tmp_path / asr.full} is not there"]

    write(tmp_path / asr.full, ASR_YAML)
    state = requirements.check_recipe(asr, tmp_path)
    assert reasons(state.files) == [
        "./downstream/asr/char.dict (downstream_expert.datarc.dict_path) is not there"
    ]
    assert "libri_root" in state.note and "corpus" in state.note

    write(tmp_path / "downstream/asr/char.dict", "E 1\n")
    write(tmp_path / "corpus/words.csv", "file_path,length\nwords/1/2/1-2-0.flac,1\n")
    write(tmp_path / "corpus/words/1/2/1-2.trans.txt")
    state = requirements.check_recipe(asr, tmp_path)
    assert state.ready and "1-2-0.flac" in state.note
    write(tmp_path / "corpus/words/1/2/1-2-0.flac")
    state = requirements.check_recipe(asr, tmp_path)
    assert state.ready and state.note == ""


def test_every_file_of_a_list_is_looked_for(tmp_path):
    write(tmp_path / recipe("PR").full, CTC_YAML)
    write(tmp_path / "downstream/ctc/lexicon.txt")
    (tmp_path / "corpus").mkdir()
    state = requirements.check_recipe(recipe("PR"), tmp_path)
    assert "phoneme.txt" in " ".join(reasons(state.files))
    assert "more.txt" in state.note and "lexicon.txt" not in state.note


def test_pr_has_its_corpus_module_whatever_s3prl_brings(tmp_path, monkeypatch):
    names = ("s3prl.downstream.ctc.corpus", "s3prl.downstream.ctc.corpus.libriphone")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # as if the installed one had none
    assert requirements.check_recipe(recipe("PR"), tmp_path).modules == []
    assert sys.modules[names[1]].__name__ == "s3prl_ekd.downstream.libriphone"

    theirs = ModuleType(names[1])
    monkeypatch.setitem(sys.modules, names[1], theirs)
    assert requirements.check_recipe(recipe("PR"), tmp_path).modules == []
    assert sys.modules[names[1]] is theirs


def test_missing_package_is_named_with_what_to_type(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("s3prl.downstream.asr.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "editdistance", None)
    state = requirements.check_recipe(recipe("ASR"), tmp_path)
    wanted = requirements.RequirementProblem(
        "editdistance is not installed", "pip install editdistance"
    )
    assert state.modules == [wanted]


def test_sid_does_without_librosa(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("s3prl.downstream.voxceleb1")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("librosa", "librosa.util"):
        monkeypatch.setitem(sys.modules, name, None)
    assert requirements.check_recipe(recipe("SID"), tmp_path).modules == []


def test_module_that_fails_otherwise_is_quoted(tmp_path, monkeypatch):
    write(tmp_path / "doctor_probe.py", "print('noise')\nraise ZeroDivisionError('inside')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = requirements.check_modules(("doctor_probe",))
    assert problem.reason == "doctor_probe does not import: ZeroDivisionError: inside"


@pytest.mark.parametrize("text, said", [("a: [", "is not YAML"), ("- a", "not a YAML mapping")])
def test_broken_config_is_a_problem_and_no_traceback(tmp_path, text, said):
    write(tmp_path / "downstream/emotion/config.yaml", text)
    (problem,) = requirements.check_recipe(recipe("ER"), tmp_path).files
    assert said in problem.reason and "config.yaml" in problem.reason


# --- the command


def test_exit_code_is_1_when_asr_cannot_import(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("s3prl.downstream.asr")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "editdistance", None)
    assert cli.main(["doctor", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "editdistance is not installed; type: pip install editdistance" in printed


def test_exit_code_is_1_when_pretraining_cannot_import(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert cli.main(["doctor", str(tmp_path), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["pretrain"]["problems"]
    assert [p["remedy"] for p in problems] == ["pip install tensorboardX"]


def test_shims_that_cannot_be_applied_are_reported(monkeypatch):
    def fail():
        raise SetupError("torchaudio does not import")

    monkeypatch.setattr(compat, "apply", fail)
    monkeypatch.setattr(compat, "_fired", [])
    states = {shim["state"] for shim in doctor._shims()}
    assert states == {"failed: torchaudio does not import"}


def test_folder_is_set_up_when_all_three_files_are_there(tmp_path):
    for name in ("config_runner.yaml", "config_model.yaml"):
        write(tmp_path / "pretrain/ekd" / name)
    assert doctor._folder(tmp_path)["missing"] == ["pretrain/ekd/pretrain_expert.py"]
    write(tmp_path / "pretrain/ekd/pretrain_expert.py")
    assert doctor._folder(tmp_path)["pretrain_ekd"] is True
    assert doctor._folder(tmp_path)["own_scripts"] is False


def test_folder_that_is_not_there_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'} is not a folder\n"


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert "s3prl-ekd doctor my_experiment --json" in capsys.readouterr().out


def test_report_without_torch_says_so_and_does_not_stop(tmp_path, monkeypatch, capsys):
    blocked = [n for n in sys.modules if n.split(".")[0] in ("torch", "torchaudio", "s3prl")]
    for name in {*blocked, "torch", "torchaudio"}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(compat, "_fired", [])
    assert cli.main(["doctor", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["devices"] == {} and report["audio"]["decoder"] is None
    assert "torch" in report["shims"][0]["state"]
    assert all(not entry["ready"] for entry in report["recipes"])
