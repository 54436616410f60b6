"""Essence KD of ASR models: two tiny teachers, one student, evaluation by s3prl."""

import builtins
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import yaml

from s3prl_ekd import cli, launch
from s3prl_ekd.data.audio_files import AudioPart
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.downstream.metrics.error_counts import count_errors
from s3prl_ekd.downstream.metrics.predictions import read_pairs
from s3prl_ekd.errors import CheckpointError, EkdError
from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.prepare.asr import TranscribedUtterance, write_librispeech
from s3prl_ekd.prepare.common import PreparedAudio
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.student_file import contents
from s3prl_ekd.workspace import write_workspace

from .conftest import STUDENT, make_sound
from .kill_and_resume import flat_values, unequal

WORDS = ("A", "NO", "YES", "SEA", "TO")
YAML = ["-c", "downstream/asr/tiny.yaml"]
STEPS = (
    "config.runner.total_steps=4,,config.runner.log_step=2,,config.runner.eval_step=2"
    ",,config.runner.save_step=2,,config.downstream_expert.datarc.batch_size=4"
    ",,config.downstream_expert.modelrc.project_dim=16"
    ",,config.downstream_expert.modelrc.RNNs.dim=[16]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder. Commands run in this process, so that s3prl is imported once."""
    folder = tmp_path_factory.mktemp("essence")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    original = builtins.isinstance  # s3prl's script replaces it
    yield folder
    builtins.isinstance = original
    patch.undo()


@pytest.fixture(scope="module")
def workspace(folder, teachers):
    """Configs, a corpus of noise with transcripts, a student file and two trained teachers."""
    write_workspace(folder)
    utterances = []
    for i in range(12):
        sound = make_sound(0.9 + 0.05 * i, seed=i)
        (folder / "sound").mkdir(exist_ok=True)
        soundfile.write(folder / "sound" / f"u{i}.flac", sound, 16000)
        split = "train" if i < 8 else ("dev", "test")[i % 2]
        text = f"{WORDS[i % 5]} {WORDS[(i + 2) % 5]}"
        source = folder / "sound" / f"u{i}.flac"
        utterances.append(
            TranscribedUtterance(
                PreparedAudio(AudioPart(source), len(sound)), source.name, f"s{i % 2}", text, split
            )
        )
    write_librispeech(folder / "data" / "corpus", utterances)
    torch.manual_seed(0)
    student = Student(StudentSettings(**STUDENT))
    torch.save(contents(student, None, {}, {"step": 0}), folder / "student.pt")
    for name, upstream in (("hubert", "hubert_local"), ("wavlm", "wavlm_local")):
        run_downstream("-u", upstream, "-k", str(teachers[name]), "-n", name, "-o", STEPS)
    return folder


def run_downstream(*options):
    """``run_downstream.py -m train -d asr`` with the tiny recipe."""
    argv = sys.argv
    sys.argv = ["run_downstream.py", "-m", "train", "-d", "asr", *YAML, *options]
    try:
        assert launch.run_downstream() == 0
    finally:
        sys.argv = argv


def essence(name, *options, teachers=("hubert", "wavlm"), override=STEPS):
    runs = [f"result/downstream/{teacher}" for teacher in teachers]
    base = ["essence", "asr", "--teachers", *runs, "--student-ckpt", "student.pt", *YAML]
    return cli.main([*base, "-n", name, "-o", override, *options])


def states(name, step=4):
    return read_checkpoint(f"result/downstream/{name}/states-{step}.ckpt")


SETTINGS = ("--top-k", "4", "--alpha", "0.25")


@pytest.fixture(scope="module")
def distilled(workspace):
    assert essence("essence", *SETTINGS) == 0
    return workspace / "result" / "downstream" / "essence"


def test_the_checkpoint_has_s3prls_format(distilled):
    saved = states("essence")
    assert {"Optimizer", "Step", "Epoch", "Args", "Config", "Featurizer", "Downstream"} <= set(
        saved
    )
    assert saved["Step"] == 4 and saved["Args"].downstream == "asr"
    assert saved["Args"].upstream == "ekd_student" and saved["Args"].upstream_ckpt == "student.pt"
    settings = saved["Config"]["essence"]
    assert settings["alpha"] == 0.25 and settings["selection"]["top_k"] == 4
    assert len(settings["teachers"]) == 2
    assert list(distilled.glob("*.tmp")) == []


def test_tensorboard_has_the_terms_of_the_loss(distilled):
    scalars = read_scalars(distilled)
    tags = {"loss", "wer", "total_loss", "soft_loss", "classes_kept", "mass_kept", "frames_kept"}
    assert {f"asr/train-{tag}" for tag in tags} <= set(scalars)
    for step in (2, 4):
        values = {tag: scalars[f"asr/train-{tag}"][step] for tag in tags}
        # `loss` is s3prl's: the CTC loss
        total = 0.25 * values["loss"] + 0.75 * values["soft_loss"]
        assert values["total_loss"] == pytest.approx(total)
        assert values["classes_kept"] == 4 and values["frames_kept"] == 1
        assert 0 < values["mass_kept"] < 1


def test_s3prls_script_evaluates_it(distilled):
    """In a new process, as typed by a user."""
    result = subprocess.run(
        [sys.executable, "-m", "s3prl_ekd", "run_downstream.py", "-m", "evaluate"]
        + ["-t", "test-clean", "-e", "result/downstream/essence/states-4.ckpt"],
        cwd=distilled.parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    (printed,) = re.findall(r"^test-clean wer: ([\d.]+)", result.stdout, re.M)
    counts = {
        split: count_errors(read_pairs(*predictions(distilled, split)), "word")
        for split in ("dev-clean", "test-clean")
    }
    assert counts["test-clean"].value == pytest.approx(float(printed), abs=1e-6)
    assert len(counts["dev-clean"].names) == 2


def predictions(folder, split):
    """The files of hypotheses and references."""
    return [folder / f"{split}-noLM-{kind}.ark" for kind in ("hyp", "ref")]


def test_alpha_1_equals_s3prl_alone(workspace):
    run_downstream("-u", "ekd_student", "-k", "student.pt", "-n", "ctc_only", "-o", STEPS)
    essence("labels", "--alpha", "1")
    expected, result = states("ctc_only"), states("labels")
    for part in ("Featurizer", "Downstream"):
        for key, value in expected[part].items():
            assert value.equal(result[part][key]), (part, key)


@pytest.mark.parametrize(("alpha", "warps"), [("0.25", False), ("1", True)])
def test_teachers_turn_time_warp_off(workspace, caplog, alpha, warps):
    """It would shift the student's frames against the teachers'. The default recipe has it on."""
    caplog.set_level("INFO")
    recipe = yaml.safe_load((workspace / YAML[1]).read_text())
    recipe["specaug"] = {"apply_time_warp": True, "apply_time_mask": True}
    Path("warp.yaml").write_text(yaml.safe_dump(recipe))
    options = (f"warp{alpha}", "--alpha", alpha, "-c", "warp.yaml")
    assert essence(*options) == 0
    specaug = states(options[0])["Config"]["specaug"]
    assert specaug == {"apply_time_warp": warps, "apply_time_mask": True}
    assert ("apply_time_warp is off" in caplog.text) != warps
    assert essence(*options, "-a") == 0  # the same command again


def test_specaug_with_a_time_warp_alone(workspace, capsys):
    masks = (f"config.specaug.apply_{kind}_mask=False" for kind in ("time", "freq"))
    with pytest.raises(SystemExit):
        essence("warped", override=",,".join([STEPS, *masks]))
    assert "error: specaug has only a time warp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "models", "variable"),
    [
        (("--alpha", "0"), ("hubert", "wavlm"), r"alpha 0\.25 -> 0\.0"),
        (("--top-k", "3"), ("hubert", "wavlm"), r"selection\.top_k 4 -> 3"),
        (("--mass", "0.9"), ("hubert", "wavlm"), r"selection\.mass None -> 0\.9"),
        ((), ("hubert",), r"teachers\[1\]\.path '.*/wavlm/.*' -> \(not set\)"),
        ((), ("wavlm", "hubert"), r"teachers\[0\]\.path '.*/hubert/.*' -> '.*/wavlm/.*'"),
    ],
)
def test_a_resumed_run_with_other_settings(distilled, capsys, options, models, variable):
    """The checkpoint would have the new ones for all of the run."""
    longer = (*SETTINGS, "-a", "--steps", "6")
    with pytest.raises(SystemExit):
        essence("essence", *longer, *options, teachers=models)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "states-4.ckpt" in error and re.search(variable, error)
    assert not (distilled / "states-6.ckpt").exists()


def test_a_resumed_run_keeps_its_settings(distilled, workspace, capsys):
    longer = (*SETTINGS, "-a", "--steps", "6")
    runs = workspace / "result/downstream"
    shutil.copytree(distilled, runs / "longer")
    shutil.copytree(runs / "wavlm", runs / "moved")
    assert essence("longer", *longer, teachers=("hubert", "moved")) == 0  # the same files
    saved = states("longer", 6)
    assert saved["Step"] == 6 and saved["Config"]["essence"]["alpha"] == 0.25
    teacher = Path(saved["Config"]["essence"]["teachers"][0])
    size = teacher.stat().st_size
    with open(teacher, "ab") as file:
        file.write(b"changed")
    with pytest.raises(SystemExit):
        essence("longer", *longer, teachers=("hubert", "moved"))
    assert "teachers have changed since" in capsys.readouterr().err
    os.truncate(teacher, size)
    # of an earlier version
    del saved["Config"]["essence"]["sha256"]
    (runs / "earlier").mkdir()
    torch.save(saved, runs / "earlier/states-6.ckpt")
    assert essence("earlier", *longer, teachers=("hubert", "moved")) == 0
    with pytest.raises(SystemExit):
        essence("earlier", *longer, "--alpha", "0")
    assert "alpha 0.25 -> 0.0" in capsys.readouterr().err


def test_runs_with_and_without_teachers(distilled, workspace, capsys):
    """Neither command continues the other's run."""
    with pytest.raises(SystemExit):
        run_downstream("-u", "ekd_student", "-k", "student.pt", "-n", "essence", "-a", "-o", STEPS)
    assert "essence asr" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        essence("hubert", "-a", "--student-ckpt", str(states("hubert")["Args"].upstream_ckpt),
                "--student-upstream", "hubert_local")  # fmt: skip
    assert "run_downstream.py" in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_run_resumes_exactly(workspace):
    """After four of the five batches of the first epoch."""
    override = f"{STEPS},,config.runner.max_keep=9,,config.downstream_expert.datarc.batch_size=3"
    essence("whole", "--steps", "8", override=override)
    part = workspace / "result/downstream/part"
    part.mkdir()
    shutil.copy("result/downstream/whole/states-4.ckpt", part)
    essence("part", "-a", "--steps", "8", override=override)
    whole, resumed = states("whole", 8), states("part", 8)
    assert whole["Epoch"] == 1
    for saved in (whole, resumed):
        del saved["Args"]
    assert not unequal(dict(flat_values(whole)), dict(flat_values(resumed)))


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["essence", "asr", "--help"])
    assert stop.value.code == 0 and "example:\n  s3prl-ekd essence asr" in capsys.readouterr().out


def test_a_different_dictionary(workspace, capsys):
    lines = (workspace / "downstream/asr/char.dict").read_text().splitlines()
    (workspace / "shorter.dict").write_text("\n".join(lines[:-1]) + "\n")
    override = f"{STEPS},,config.downstream_expert.datarc.dict_path='shorter.dict'"
    with pytest.raises(SystemExit) as stop:
        essence("shorter", override=override)
    assert stop.value.code == 2
    assert re.search(r"student .*result/downstream/hubert.*dict_path", capsys.readouterr().err)


@pytest.mark.parametrize(
    "options, variable",
    [
        (("--alpha", "1.5"), r"alpha\b.*\b1\.5"),
        (("--top-k", "0"), r"top_k\b.*\b0\b"),
        (("--steps", "1"), r"runner\.eval_step\b.*\b2\b.*runner\.total_steps\b.*\b1\b"),
        (("--steps", "0"), r"--steps\b.*\b0\b"),
        (("-c", "none.yaml"), r"none\.yaml"),
        (("--student-ckpt", "none.pt"), r"-k none\.pt"),
        (("--teachers", "student.pt"), r"student\.pt\b.*\bStep\b"),
        (("--teachers", "none.ckpt"), r"none\.ckpt"),
        (("--teachers", "data"), r"states-\*\.ckpt.*\bdata\b"),
    ],
)
def test_wrong_options_are_one_line_errors(workspace, capsys, options, variable):
    with pytest.raises(SystemExit) as stop:
        essence("wrong", *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(variable, error) and "Traceback" not in error


def changed_checkpoint(workspace, change):
    """A teacher's checkpoint with a changed entry."""
    saved = states("hubert")
    change(saved)
    torch.save(saved, workspace / "changed.ckpt")
    return str(workspace / "changed.ckpt")


@pytest.mark.parametrize("source", ["folder", "org/name", f"org/name@{'0' * 40}"])
def test_a_teacher_on_an_upstream_that_is_no_file(workspace, source, monkeypatch):
    """A Hugging Face folder, or an id of the Hub: what fails comes later, as neither is a model."""
    from s3prl_ekd.essence.asr import load_asr_teacher

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    launch.import_script("run_downstream")
    (workspace / "folder").mkdir(exist_ok=True)
    path = changed_checkpoint(workspace, lambda s: setattr(s["Args"], "upstream_ckpt", source))
    with pytest.raises(EkdError) as error:
        load_asr_teacher(path)
    assert "start from the folder" not in str(error.value)


@pytest.mark.parametrize(
    "change, variable",
    [
        (lambda s: setattr(s["Args"], "downstream", "ctc"), "run_downstream.py -d asr"),
        (lambda s: s.pop("Featurizer"), "run_downstream.py -d asr"),
        (lambda s: setattr(s["Args"], "upstream", "unknown_name"), "unknown_name"),
        (lambda s: setattr(s["Args"], "upstream_ckpt", "gone.pt"), "gone.pt"),
        (
            lambda s: s["Config"]["downstream_expert"]["modelrc"].update(select="print(1)"),
            "'print(1)'",
        ),
        (
            lambda s: s["Config"]["downstream_expert"]["datarc"].update(dict_path="gone.dict"),
            "gone.dict",
        ),
        (lambda s: s["Downstream"].pop("projector.bias"), "changed.ckpt: Error(s) in loading"),
        (lambda s: s.update(Config=None), "changed.ckpt"),
        (lambda s: s["Args"].__dict__.clear(), "run_downstream.py -d asr"),
    ],
)
def test_checkpoints_that_are_not_teachers(workspace, change, variable):
    from s3prl_ekd.essence.asr import load_asr_teacher

    launch.import_script("run_downstream")
    with pytest.raises(CheckpointError, match=re.escape(variable)):
        load_asr_teacher(changed_checkpoint(workspace, change))
