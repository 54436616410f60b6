"""Essence KD of ASR models: two tiny teachers, one student, s3prl's own evaluation of it."""

import builtins
import re
import subprocess
import sys

import pytest
import soundfile
import torch

from s3prl_ekd import cli, launch
from s3prl_ekd.distill.settings import StudentSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.files.run_checkpoints import read_run
from s3prl_ekd.prepare.asr import Utterance, write_librispeech
from s3prl_ekd.pretrain.tensorboard import read_scalars
from s3prl_ekd.student_file import contents
from s3prl_ekd.superb.metrics import count_errors, read_pairs
from s3prl_ekd.workspace import write_workspace

from .conftest import STUDENT, make_sound

WORDS = ("A", "NO", "YES", "SEA", "TO")
YAML = ["-c", "downstream/asr/tiny.yaml"]
STEPS = (
    "config.runner.total_steps=4,,config.runner.log_step=2,,config.runner.eval_step=2"
    ",,config.runner.save_step=2,,config.downstream_expert.datarc.batch_size=4"
    ",,config.downstream_expert.modelrc.project_dim=16"
    ",,config.downstream_expert.modelrc.RNNs.dim=[16]"
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The working folder. Commands run in this process: s3prl's imports are paid for once."""
    folder = tmp_path_factory.mktemp("essence")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    before = builtins.isinstance  # s3prl's script replaces it for good
    yield folder
    builtins.isinstance = before
    patch.undo()


@pytest.fixture(scope="module")
def workspace(here, teachers):
    """Configs, a corpus of noise with transcripts, a student file, two trained teachers."""
    write_workspace(here)
    utterances = []
    for i in range(12):
        sound = make_sound(0.9 + 0.05 * i, seed=i)
        (here / "sound").mkdir(exist_ok=True)
        soundfile.write(here / "sound" / f"u{i}.flac", sound, 16000)
        split = "train" if i < 8 else ("dev", "test")[i % 2]
        text = f"{WORDS[i % 5]} {WORDS[(i + 2) % 5]}"
        source = here / "sound" / f"u{i}.flac"
        utterances.append(Utterance(source, source.name, f"s{i % 2}", text, split, len(sound)))
    write_librispeech(here / "data" / "corpus", utterances)
    torch.manual_seed(0)
    student = Student(StudentSettings(**STUDENT))
    torch.save(contents(student, None, {}, {"step": 0}), here / "student.pt")
    for name, upstream in (("hubert", "hubert_local"), ("wavlm", "wavlm_local")):
        run_downstream("-u", upstream, "-k", str(teachers[name]), "-n", name, "-o", STEPS)
    return here


def run_downstream(*words):
    """``run_downstream.py -m train -d asr`` of the tiny recipe."""
    argv = sys.argv
    sys.argv = ["run_downstream.py", "-m", "train", "-d", "asr", *YAML, *words]
    try:
        assert launch.run_downstream() == 0
    finally:
        sys.argv = argv


def essence(name, *words, teachers=("hubert", "wavlm"), override=STEPS):
    runs = [f"result/downstream/{teacher}" for teacher in teachers]
    base = ["essence", "asr", "--teachers", *runs, "--student-ckpt", "student.pt", *YAML]
    return cli.main([*base, "-n", name, "-o", override, *words])


def states(name, step=4):
    return read_run(f"result/downstream/{name}/states-{step}.ckpt")


@pytest.fixture(scope="module")
def distilled(workspace):
    assert essence("essence", "--top-k", "4", "--alpha", "0.25") == 0
    return workspace / "result" / "downstream" / "essence"


def test_the_checkpoint_is_s3prls(distilled):
    saved = states("essence")
    assert {"Optimizer", "Step", "Epoch", "Args", "Config", "Featurizer", "Downstream"} <= set(
        saved
    )
    assert saved["Step"] == 4 and saved["Args"].downstream == "asr"
    assert saved["Args"].upstream == "ekd_student" and saved["Args"].upstream_ckpt == "student.pt"
    kept = saved["Config"]["essence"]
    assert kept["alpha"] == 0.25 and kept["selection"]["top_k"] == 4 and len(kept["teachers"]) == 2
    assert list(distilled.glob("*.tmp")) == []


def test_tensorboard_has_the_parts_of_the_loss(distilled):
    scalars = read_scalars(distilled)
    tags = {"loss", "wer", "total_loss", "soft_loss", "classes_kept", "mass_kept", "frames_kept"}
    assert {f"asr/train-{tag}" for tag in tags} <= set(scalars)
    for step in (2, 4):
        at = {tag: scalars[f"asr/train-{tag}"][step] for tag in tags}
        # `loss` stays s3prl's: the CTC loss alone
        assert at["total_loss"] == pytest.approx(0.25 * at["loss"] + 0.75 * at["soft_loss"])
        assert at["classes_kept"] == 4 and at["frames_kept"] == 1 and 0 < at["mass_kept"] < 1


def test_s3prls_script_evaluates_it(distilled):
    """As a user types it, in a process that knows nothing of this one."""
    done = subprocess.run(
        [sys.executable, "-m", "s3prl_ekd", "run_downstream.py", "-m", "evaluate"]
        + ["-t", "test-clean", "-e", "result/downstream/essence/states-4.ckpt"],
        cwd=distilled.parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (printed,) = re.findall(r"^test-clean wer: ([\d.]+)", done.stdout, re.M)
    counts = {
        split: count_errors(read_pairs(*predictions(distilled, split)), labels=False)
        for split in ("dev-clean", "test-clean")
    }
    assert counts["test-clean"].rate == pytest.approx(float(printed), abs=1e-6)
    assert len(counts["dev-clean"].names) == 2


def predictions(folder, split):
    """The files with what was recognised, and with what was said."""
    return [folder / f"{split}-noLM-{kind}.ark" for kind in ("hyp", "ref")]


def test_alpha_1_is_the_run_of_s3prl_alone(workspace):
    run_downstream("-u", "ekd_student", "-k", "student.pt", "-n", "plain", "-o", STEPS)
    essence("labels", "--alpha", "1")
    plain, ours = states("plain"), states("labels")
    for part in ("Featurizer", "Downstream"):
        for key, value in plain[part].items():
            assert value.equal(ours[part][key]), (part, key)


def test_it_goes_on(distilled):
    essence("essence", "-a", "--steps", "6", "--alpha", "0")
    saved = states("essence", 6)
    assert saved["Step"] == 6 and saved["Config"]["essence"]["alpha"] == 0


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["essence", "asr", "--help"])
    assert stop.value.code == 0 and "example:\n  s3prl-ekd essence asr" in capsys.readouterr().out


def test_another_dictionary(workspace, capsys):
    lines = (workspace / "downstream/asr/char.dict").read_text().splitlines()
    (workspace / "other.dict").write_text("\n".join(lines[:-1]) + "\n")
    other = f"{STEPS},,config.downstream_expert.datarc.dict_path='other.dict'"
    with pytest.raises(SystemExit) as stop:
        essence("other", override=other)
    assert stop.value.code == 2
    assert "the student has another dictionary" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--alpha", "1.5"), "alpha is 1.5; 0"),
        (("--top-k", "0"), "top_k is 0"),
        (("--steps", "1"), "is above runner.total_steps"),
        (("--steps", "0"), "--steps is 0"),
        (("-c", "none.yaml"), "there is no configuration none.yaml"),
        (("--student-ckpt", "none.pt"), "-k none.pt: there is no such file"),
        (("--teachers", "student.pt"), "student.pt is no checkpoint of a run"),
        (("--teachers", "none.ckpt"), "there is no such file"),
        (("--teachers", "data"), "there are no checkpoints"),
    ],
)
def test_mistakes_are_sentences(workspace, capsys, words, sentence):
    with pytest.raises(SystemExit) as stop:
        essence("wrong", *words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def bent(workspace, change):
    """A teacher's checkpoint with something changed in it."""
    saved = states("hubert")
    change(saved)
    torch.save(saved, workspace / "bent.ckpt")
    return str(workspace / "bent.ckpt")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: setattr(s["Args"], "downstream", "ctc"), "is no checkpoint of run_downstream"),
        (lambda s: s.pop("Featurizer"), "is no checkpoint of run_downstream"),
        (lambda s: setattr(s["Args"], "upstream", "nobody"), "has no upstream nobody"),
        (lambda s: setattr(s["Args"], "upstream_ckpt", "gone.pt"), "read from gone.pt"),
        (
            lambda s: s["Config"]["downstream_expert"]["modelrc"].update(select="print(1)"),
            "modelrc.select is 'print(1)'",
        ),
        (
            lambda s: s["Config"]["downstream_expert"]["datarc"].update(dict_path="gone.dict"),
            "its dictionary is gone.dict",
        ),
        (lambda s: s["Downstream"].pop("projector.bias"), "cannot be rebuilt"),
        (lambda s: s.update(Config=None), "has no configuration"),
        (lambda s: s["Args"].__dict__.clear(), "is no checkpoint of run_downstream"),
    ],
)
def test_checkpoints_that_are_no_teachers(workspace, change, sentence):
    from s3prl_ekd.essence.asr import load_asr_teacher

    launch.import_script("run_downstream")
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        load_asr_teacher(bent(workspace, change))
