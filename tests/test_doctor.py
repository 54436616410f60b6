"""The report of ``s3prl-ekd doctor``, compared with other sources."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch

from s3prl_ekd import cli, compat
from s3prl_ekd.commands import doctor
from s3prl_ekd.data import throughput
from s3prl_ekd.data.batch import Batch
from s3prl_ekd.downstream import requirements
from s3prl_ekd.downstream.tasks import TASKS, Task
from s3prl_ekd.errors import DataError, SetupError
from s3prl_ekd.system import s3prl_distribution

from .conftest import edit_yaml, error_of

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
    """The command's report on an empty folder, from a new interpreter."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    argv = [sys.executable, "-m", "s3prl_ekd.cli", "doctor", str(empty), "--json"]
    process = subprocess.run(
        argv,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    report = json.loads(process.stdout)  # stdout has only the report
    assert process.returncode == (0 if report["ok"] else 1), process.stderr
    return report


# --- the report


@pytest.mark.parametrize(
    ("version", "cves"),
    [
        ("2.5.1+cu124", ["CVE-2025-32434", "CVE-2026-24747"]),
        ("2.9.1", ["CVE-2026-24747"]),
        ("2.10.0", []),
        ("2.13.0+cpu", []),
    ],
)
def test_an_old_torch_is_reported_as_unsafe(monkeypatch, report, version, cves):
    monkeypatch.setattr(torch, "__version__", version)
    text = doctor._torch_load()
    assert re.findall(r"CVE-[\d-]+", text) == cves
    assert (version in text and "torch>=2.10" in text) == bool(cves)
    assert text in doctor.as_text({**report, "torch_load": text})


def test_versions_are_those_installed(report):
    for name in doctor.PACKAGES[1:]:  # torch has its build after the version
        assert report["versions"][name] == metadata.version(name)
    assert report["versions"]["torch"].startswith(f"{torch.__version__} (")
    host = s3prl_distribution.installation().claims[0].name  # s3prl or espnet-s3prl
    assert report["versions"]["s3prl"].startswith(f"{host} {metadata.version(host)} (")
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_decoder_is_libsndfile_and_reads_three_formats(report):
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


def test_pretraining_and_asr_have_their_modules(report):
    assert report["ok"] and report["pretrain"] == {"ready": True, "problems": []}
    assert {r["task"]: r["downstream"] for r in report["recipes"]} == {
        "PR": "ctc",
        "SID": "voxceleb1",
        "ER": "emotion",
        "ASR": "asr",
        "KS": "speech_commands",
        "IC": "fluent_commands",
        "SF": "ctc",
        "ASV": "sv_voxceleb1",
        "QBE": "quesst14_dtw",
    }
    assert [r["modules"] for r in report["recipes"] if r["task"] in ("ER", "ASR")] == [True, True]


def test_the_remedy_for_an_empty_folder_is_init(report, empty):
    init = f"s3prl-ekd init {empty}"
    assert report["folder"]["pretrain_ekd"] is False and report["folder"]["remedy"] == init
    for entry in report["recipes"]:
        assert entry["ready"] is False
        assert init in [problem["remedy"] for problem in entry["problems"]]


def test_text_has_the_report_in_columns(report):
    text = doctor.as_text({**report, "versions": {**report["versions"], "pandas": None}})
    rows = [line.split(None, 1) for line in text.splitlines() if line.startswith("  ")]
    assert ["pandas", "MISSING"] in rows
    assert ["numpy", metadata.version("numpy")] in rows
    versions = text.split("\n\n")[0].splitlines()[1:]
    starts = {len(line) - len(line[2:].split(None, 1)[1]) for line in versions}
    assert len(starts) == 1  # the second column is aligned
    for shim in compat.SHIMS:
        assert any(row[0] == shim.name and shim.since in row[1] for row in rows)
        assert all(line in text for line in shim.needed_by)
    for entry in report["recipes"]:
        assert f"{entry['task']} (-d {entry['downstream']})" in text


# --- recipes


def test_asr_is_ready_when_its_files_exist(tmp_path):
    asr = recipe("ASR")
    status = requirements.check_recipe(asr, tmp_path)
    assert not status.ready and not status.modules
    (reason,) = reasons(status.files)
    assert str(tmp_path / asr.full) in reason

    write(tmp_path / asr.full, ASR_YAML)
    status = requirements.check_recipe(asr, tmp_path)
    (reason,) = reasons(status.files)
    assert "./downstream/asr/char.dict" in reason
    assert "downstream_expert.datarc.dict_path" in reason
    assert "libri_root" in status.note and "corpus" in status.note

    write(tmp_path / "downstream/asr/char.dict", "E 1\n")
    write(tmp_path / "corpus/words.csv", "file_path,length\nwords/1/2/1-2-0.flac,1\n")
    write(tmp_path / "corpus/words/1/2/1-2.trans.txt")
    status = requirements.check_recipe(asr, tmp_path)
    assert status.ready and "1-2-0.flac" in status.note
    write(tmp_path / "corpus/words/1/2/1-2-0.flac")
    status = requirements.check_recipe(asr, tmp_path)
    assert status.ready and status.note == ""


def test_every_file_of_a_list_is_checked(tmp_path):
    write(tmp_path / recipe("PR").full, CTC_YAML)
    write(tmp_path / "downstream/ctc/lexicon.txt")
    (tmp_path / "corpus").mkdir()
    status = requirements.check_recipe(recipe("PR"), tmp_path)
    assert "phoneme.txt" in " ".join(reasons(status.files))
    assert "more.txt" in status.note and "lexicon.txt" not in status.note


@pytest.mark.parametrize("task, module", [("PR", "libriphone"), ("SF", "snips")])
def test_ctc_has_corpus_modules_with_and_without_s3prls(task, module, tmp_path, monkeypatch):
    names = ("s3prl.downstream.ctc.corpus", f"s3prl.downstream.ctc.corpus.{module}")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # as if the installed s3prl had none
    assert requirements.check_recipe(recipe(task), tmp_path).modules == []
    assert sys.modules[names[1]].__name__ == f"s3prl_ekd.downstream.{module}"

    theirs = ModuleType(names[1])
    monkeypatch.setitem(sys.modules, names[1], theirs)
    assert requirements.check_recipe(recipe(task), tmp_path).modules == []
    assert sys.modules[names[1]] is theirs


@pytest.mark.parametrize(
    "task, module, package",
    [("ASR", "editdistance", "editdistance"), ("ASV", "sklearn", "scikit-learn")],
)
def test_the_remedy_for_a_missing_package_is_pip_install(
    task, module, package, tmp_path, monkeypatch
):
    prefix = f"s3prl.downstream.{recipe(task).downstream}."
    for name in [name for name in sys.modules if name.startswith((prefix, f"{module}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    (problem,) = requirements.check_recipe(recipe(task), tmp_path).modules
    assert module in problem.reason and problem.remedy == f"pip install {package}"


@pytest.mark.parametrize("task", ["SID", "ASV"])
def test_librosa_and_sox_are_not_needed(task, tmp_path, monkeypatch):
    prefix = f"s3prl.downstream.{recipe(task).downstream}"
    for name in [name for name in sys.modules if name.startswith(prefix)]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("librosa", "librosa.util", "sox"):
        monkeypatch.setitem(sys.modules, name, None)
    assert requirements.check_recipe(recipe(task), tmp_path).modules == []


def test_the_exception_of_an_import_is_reported(tmp_path, monkeypatch):
    write(tmp_path / "doctor_probe.py", "print('noise')\nraise ZeroDivisionError('inside')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = requirements.check_modules(("doctor_probe",))
    assert "doctor_probe" in problem.reason
    assert "ZeroDivisionError: inside" in problem.reason


@pytest.mark.parametrize("text, word", [("a: [", "YAML"), ("- a", "mapping")])
def test_an_invalid_config_is_reported(tmp_path, text, word):
    write(tmp_path / "downstream/emotion/config.yaml", text)
    (problem,) = requirements.check_recipe(recipe("ER"), tmp_path).files
    assert word in problem.reason and "config.yaml" in problem.reason


# --- the command


def test_exit_code_is_1_when_asr_cannot_import(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("s3prl.downstream.asr")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "editdistance", None)
    assert cli.main(["doctor", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "pip install editdistance" in printed


def test_exit_code_is_1_when_pretraining_cannot_import(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert cli.main(["doctor", str(tmp_path), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["pretrain"]["problems"]
    assert [p["remedy"] for p in problems] == ["pip install tensorboardX"]


def test_shims_that_cannot_be_applied_are_reported(monkeypatch):
    def fail():
        raise SetupError("no torchaudio")

    monkeypatch.setattr(compat, "apply_shims", fail)
    monkeypatch.setattr(compat, "_fired", [])
    states = {shim["state"] for shim in doctor._shims()}
    assert states == {"failed: no torchaudio"}


def test_a_folder_with_all_three_files_is_set_up(tmp_path):
    for name in ("config_runner.yaml", "config_model.yaml"):
        write(tmp_path / "pretrain/ekd" / name)
    assert doctor._folder(tmp_path)["missing"] == ["pretrain/ekd/pretrain_expert.py"]
    write(tmp_path / "pretrain/ekd/pretrain_expert.py")
    assert doctor._folder(tmp_path)["pretrain_ekd"] is True
    assert doctor._folder(tmp_path)["own_scripts"] is False


def test_a_missing_folder(tmp_path, capsys):
    missing = tmp_path / "missing"
    assert str(missing) in error_of(capsys, "doctor", missing)


# --- throughput


def test_throughput_is_audio_by_time(monkeypatch, capsys):
    """Batches of 5 s of audio and 3 s of padding, every 50 ms; the first one takes long."""

    class Loader(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.05 if started else 0.6)
                started.append(batch)
                yield batch

    monkeypatch.setattr(throughput, "SECONDS", 0.8)
    started = []
    batch = Batch(torch.zeros(2, 64000), torch.tensor([64000, 16000]), ["a", "b"])
    rates = throughput.measure_throughput(Loader([batch, batch._replace(bad=["c"])]))
    assert rates == {"worker": pytest.approx(100, rel=0.3)}
    assert throughput.workers_needed(5000, 840) == 6 and throughput.workers_needed(840, 840) == 1
    with pytest.raises(DataError, match="^no sound$"):
        throughput.measure_throughput(Loader([batch._replace(problem="no sound")]))
    with pytest.raises(DataError, match="libri_root"):
        throughput.measure_throughput(Loader([batch._replace(names=[])]))


def test_throughput_of_noise_without_a_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(throughput, "SECONDS", 0.3)
    monkeypatch.setattr(throughput, "NOISE_FILES", 9)
    assert cli.main(["doctor", "--throughput", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rate = report["audio_seconds_a_second"]["worker"]
    assert (report["corpus"], report["distortion"], report["rate"]) == ("noise", "clean", 5000)
    assert 20 < rate < 1e5 and report["workers"] == -(-5000 // rate)
    assert list(tmp_path.iterdir()) == []
    # a config whose corpus does not exist: noise, but an error if it is named
    assert cli.main(["init", "."]) == 0
    capsys.readouterr()
    assert cli.main(["doctor", "--throughput", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["corpus"] == "noise"
    text = error_of(capsys, "doctor", "--throughput", "-c", doctor.RUNNER)
    assert "libri_root" in text and "LibriSpeech" in text


def test_throughput_of_a_corpus_with_cached_targets(
    cache_folder, cached_targets, monkeypatch, capsys
):
    monkeypatch.setattr(throughput, "SECONDS", 0.3)
    monkeypatch.setattr(throughput, "usable_cores", lambda: 3)
    with edit_yaml(cache_folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"]["target_cache"] = str(cached_targets / "int8")
    with edit_yaml(cache_folder / "model.yaml") as config:
        config["distortion"] = {"setup": "setup1"}
    argv = ["doctor", "--throughput", "-c", "runner.yaml", "-g", "model.yaml"]
    assert cli.main([*argv, "--json", "--rate", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["distortion"] == "setup1" and report["workers"] == 1 and report["cores"] == 3
    assert report["audio_seconds_a_second"].keys() == {"worker", "targets"}
    assert cli.main([*argv, "--rate", "1"]) == 0
    assert "num_workers: 1" in (text := capsys.readouterr().out) and "enough" in text
    assert cli.main([*argv, "--rate", "1e7"]) == 0
    text = capsys.readouterr().out
    assert "10,000,000" in text and "too few" in text and "--dtype int8" in text


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["-c", "x.yaml"], ["--config", "--throughput"]),
        (["-g", "x.yaml"], ["--upstream-config", "--throughput"]),
        (["--rate", "3"], ["--rate", "--throughput"]),
        (["--throughput", "--rate", "0"], ["--rate", "0"]),
        (["--throughput", "--rate", "nan"], ["--rate", "nan"]),
        (["--throughput", "work folder"], ["cd 'work folder'"]),
        (["--throughput", "-c", "gone.yaml"], ["gone.yaml"]),
    ],
    ids=str,
)
def test_options_of_throughput_that_do_not_fit(tmp_path, monkeypatch, capsys, argv, parts):
    monkeypatch.chdir(tmp_path)
    text = error_of(capsys, "doctor", *argv)
    assert all(part in text for part in parts)


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert "s3prl-ekd doctor my_experiment --json" in capsys.readouterr().out


def test_report_without_torch(tmp_path, monkeypatch, capsys):
    blocked = [n for n in sys.modules if n.split(".")[0] in ("torch", "torchaudio", "s3prl")]
    for name in {*blocked, "torch", "torchaudio"}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(compat, "_fired", [])
    assert cli.main(["doctor", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["devices"] == {} and report["audio"]["decoder"] is None
    assert "torch" in report["shims"][0]["state"]
    assert all(not entry["ready"] for entry in report["recipes"])
