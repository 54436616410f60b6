"""A user's mistakes, through the real commands: one sentence, exit code 2, no traceback."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import yaml

from s3prl_ekd.files.run_checkpoints import newest, read_run
from s3prl_ekd.launch import run_pretrain

from .conftest import STUDENT, command, write_configs, write_librispeech_names

RUN = ("run_pretrain.py", "-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    command("init", ".", cwd=folder)
    return folder


@pytest.fixture
def refused(base, tmp_path, teachers, corpus, monkeypatch, capsys):
    """Change a config, run in this process, return the sentence on stderr."""
    shutil.copytree(base / "pretrain", tmp_path / "pretrain")
    monkeypatch.chdir(tmp_path)
    write_configs(tmp_path, teachers, corpus)

    def refused(change=lambda model, runner: None, words=RUN):
        model = yaml.safe_load((tmp_path / "model.yaml").read_text())
        runner = yaml.safe_load((tmp_path / "runner.yaml").read_text())
        change(model, runner)
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
        (tmp_path / "runner.yaml").write_text(yaml.safe_dump(runner))
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", list(words))
        with pytest.raises(SystemExit) as left:
            run_pretrain()
        assert left.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1
        return said[0]

    return refused


def test_an_unknown_key(refused):
    said = refused(lambda model, runner: model.update(agregation="average"))
    assert "model.yaml: unknown key 'agregation' (did you mean aggregation?)" in said


def test_a_wrong_type(refused):
    said = refused(lambda model, runner: runner["runner"].update(total_steps="6"))
    assert "runner.yaml.runner.total_steps: a whole number is expected, not '6'" in said


def test_an_override_is_checked_too(refused):
    words = (*RUN, "-o", "config.runner.total_steps=2")
    assert "total_steps (2) must be greater than log_step (2)" in refused(words=words)


def test_an_unknown_teacher_lists_the_known(refused):
    said = refused(lambda model, runner: model["teachers"]["hubert"].update(model="hubrt_base"))
    assert "teachers.hubert.model: unknown teacher 'hubrt_base' (did you mean hubert_base?)" in said
    for name in ("hubert_base_robust_mgr", "wavlm_base_plus", "data2vec", "distilhubert"):
        assert name in said


def test_a_missing_checkpoint(refused):
    said = refused(lambda model, runner: model["teachers"]["wavlm"].update(model="no/such.pt"))
    assert "teachers.wavlm.model: there is no checkpoint no/such.pt" in said


def test_a_checkpoint_of_another_kind(refused, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    said = refused(lambda model, runner: model["teachers"]["wavlm"].update(model="other.pt"))
    assert "other.pt is no teacher checkpoint that is known here (s3prl's HuBERT, WavLM" in said
    assert said.endswith("its keys are: weights")


def test_a_teacher_checkpoint_that_would_run_code(refused, tmp_path, teachers):
    state = torch.load(teachers["wavlm"], weights_only=True)
    state["cfg"]["conv_feature_layers"] = "__import__('os').mkdir('hacked') or [(32,10,5)]"
    torch.save(state, tmp_path / "evil.pt")
    said = refused(lambda model, runner: model["teachers"]["wavlm"].update(model="evil.pt"))
    assert "conv_feature_layers in evil.pt" in said
    assert not (tmp_path / "hacked").exists()


def test_a_layer_the_teacher_has_not(refused):
    said = refused(lambda model, runner: model["teachers"]["robust"].update(layers=[2, 12]))
    assert "teachers.robust.layers: there is no layer 12; robust has layers 0 to 4" in said


def test_widths_that_differ_under_average(refused, teachers):
    def change(model, runner):
        model["aggregation"] = "average"
        model["teachers"]["robust"]["model"] = str(teachers["wide"])

    said = refused(change)
    assert "hubert has 48, robust has 64" in said and "use aggregation: separate" in said


def test_an_init_teacher_that_does_not_fit(refused):
    student = {**STUDENT, "encoder_ffn_embed_dim": 96}
    said = refused(lambda model, runner: model.update(student=student))
    assert "init.teacher does not fit the student: encoder.layers.0.fc1" in said


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (None, "s3prl-ekd lengths AUDIO_FOLDER -o TABLE_FOLDER"),
        ("", "has no column file_path"),
        ("file_path,length\n", "has no rows"),
        ("file_path,length\nu.flac,many\n", "line 2: 'u.flac' with length 'many'"),
    ],
)
def test_an_empty_or_missing_table(refused, tmp_path, table, said):
    def change(model, runner):
        runner["pretrain_expert"]["datarc"]["file_path"] = str(tmp_path)
        if table is not None:
            (tmp_path / "train.csv").write_text(table)

    assert said in refused(change)


@pytest.mark.parametrize(
    ("name", "said"),
    [("gone.flac", "there is no such file"), ("empty.flac", "it is empty"), ("text.flac", "text")],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_audio(refused, tmp_path, name, said, workers):
    (tmp_path / "empty.flac").write_bytes(b"")
    (tmp_path / "text.flac").write_text("this is text")

    def change(model, runner):
        (tmp_path / "train.csv").write_text(f"file_path,length\n{name},16000\n")
        runner["pretrain_expert"]["datarc"].update(
            libri_root=str(tmp_path), file_path=str(tmp_path), num_workers=workers
        )

    sentence = refused(change)
    assert f"{name}: " in sentence and said in sentence


def test_stereo_and_other_rates_are_taken_with_a_warning(base, tmp_path, teachers, corpus):
    shutil.copytree(base / "pretrain", tmp_path / "pretrain")
    write_configs(tmp_path, teachers, corpus)
    rng = np.random.default_rng(0)
    lines = ["file_path,length"]
    for name, rate, channels in (("a.wav", 16000, 2), ("b.wav", 8000, 1), ("c.wav", 44100, 2)):
        soundfile.write(tmp_path / name, 0.1 * rng.standard_normal((rate, channels)), rate)
        lines.append(f"{name},16000")
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    override = f"config.pretrain_expert.datarc.libri_root='{tmp_path}'"
    override += f",,config.pretrain_expert.datarc.file_path='{tmp_path}'"
    done = command(*RUN, "-o", override, cwd=tmp_path)
    for said in ("2 channels: averaged", "8000 Hz: resampled", "44100 Hz: resampled"):
        assert said in done.stderr
    assert read_run(newest(tmp_path / "result/pretrain/x"))["Step"] == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run_pretrain.py", "-u", "ekd"), "name the run: add -n NAME"),
        (("run_pretrain.py", "-n", "x"), "name the method"),
        (("run_pretrain.py", "-e", "none.ckpt"), "-e none.ckpt: there is no such checkpoint"),
        ((*RUN, "--multi_gpu"), "--multi_gpu (DataParallel) does not work with ekd"),
    ],
)
def test_arguments(refused, words, said):
    assert said in refused(words=words)


def test_plain_python_shows_the_sentence_too(base, tmp_path, teachers, corpus):
    """The adapter's hook: s3prl's script has no error handling of its own."""
    code = (
        "import sys; sys.path[:0] = ['.']\n"
        "from pretrain.ekd.pretrain_expert import UpstreamPretrainExpert\n"
        "UpstreamPretrainExpert({}, {'teachers': {}})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=base, capture_output=True, text=True)
    assert done.returncode == 2
    assert "teachers is empty" in done.stderr and "Traceback" not in done.stderr


def test_downstream_without_student_or_corpus(tmp_path):
    words = ("run_downstream.py", "-m", "train", "-u", "ekd_student", "-d", "asr", "-n", "x")
    command("init", ".", cwd=tmp_path)
    (tmp_path / "bad.pt").write_bytes(b"x")
    here = "config.downstream_expert.datarc.libri_root='.'"
    here += ",,config.downstream_expert.datarc.bucket_file='.'"
    write_librispeech_names(tmp_path, "train-clean-100", "dev-clean")
    for more, said in (
        (("-k", "none.pt"), "-k none.pt: there is no such file"),
        (
            ("-k", "bad.pt"),
            "downstream_expert.datarc.libri_root is ./data/librispeech",
        ),
        (("-k", "bad.pt", "-o", here), "damaged or no torch file"),
        (("-k", "bad.pt", "-c", "none.yaml"), "there is no configuration none.yaml"),
        (("-u", "ekd_studen", "-o", here), "no such upstream; did you mean ekd_student"),
        (("-d", ""), "name the task: add -d asr"),
        (("-d", "ctc"), "config.yaml in this folder; add -c downstream/ctc/libriphone.yaml"),
    ):
        done = command(*words, *more, cwd=tmp_path, check=False)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
