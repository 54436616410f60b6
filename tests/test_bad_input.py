"""User errors in the real commands: one line on stderr, exit code 2, no traceback."""

import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.data.bad_audio import BadAudio
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.launch import run_pretrain

from .conftest import STUDENT, command, edit_yaml, write_librispeech_names

RUN = ("run_pretrain.py", "-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")


@pytest.fixture
def error(pretrain_folder, monkeypatch, capsys):
    """A function that changes the configs, runs in this process and returns the error message."""

    def error(change=lambda model, runner: None, argv=RUN):
        with edit_yaml("model.yaml") as model, edit_yaml("runner.yaml") as runner:
            change(model, runner)
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", list(argv))
        with pytest.raises(SystemExit) as exit_info:
            run_pretrain()
        assert exit_info.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    return error


def test_unknown_key(error):
    message = error(lambda model, runner: model.update(agregation="average"))
    assert re.search(r"model\.yaml.*'agregation'.*\baggregation\b", message)


def test_wrong_type(error):
    message = error(lambda model, runner: runner["runner"].update(total_steps="6"))
    assert re.search(r"runner\.yaml\.runner\.total_steps.*'6'", message)


def test_overrides_are_checked_too(error):
    message = error(argv=(*RUN, "-o", "config.runner.total_steps=2"))
    assert re.search(r"total_steps.*\b2\b.*log_step.*\b2\b", message)


def test_unknown_teacher(error):
    message = error(lambda model, runner: model["teachers"]["hubert"].update(model="hubrt_base"))
    assert re.search(r"teachers\.hubert\.model.*'hubrt_base'.*\bhubert_base\b", message)
    for name in ("hubert_base_robust_mgr", "wavlm_base_plus", "data2vec", "distilhubert"):
        assert name in message


def test_missing_checkpoint(error):
    message = error(lambda model, runner: model["teachers"]["wavlm"].update(model="no/such.pt"))
    assert re.search(r"teachers\.wavlm\.model.*no/such\.pt", message)


def test_unknown_checkpoint_format(error, tmp_path):
    torch.save({"an_odd_key": torch.zeros(3)}, tmp_path / "other.pt")
    message = error(lambda model, runner: model["teachers"]["wavlm"].update(model="other.pt"))
    assert re.search(r"other\.pt.*an_odd_key", message)


def test_teacher_checkpoint_with_code(error, tmp_path, teachers):
    state = torch.load(teachers["wavlm"], weights_only=True)
    state["cfg"]["conv_feature_layers"] = "__import__('os').mkdir('hacked') or [(32,10,5)]"
    torch.save(state, tmp_path / "evil.pt")
    message = error(lambda model, runner: model["teachers"]["wavlm"].update(model="evil.pt"))
    assert "conv_feature_layers" in message and "evil.pt" in message
    assert not (tmp_path / "hacked").exists()


def test_layer_that_the_teacher_does_not_have(error):
    message = error(lambda model, runner: model["teachers"]["robust"].update(layers=[2, 12]))
    assert re.search(r"teachers\.robust\.layers.*\b12\b.*\b0\b.*\b4\b", message)


def test_average_of_different_widths(error, teachers):
    def change(model, runner):
        model["aggregation"] = "average"
        model["teachers"]["robust"]["model"] = str(teachers["wide"])

    message = error(change)
    assert re.search(r"\bhubert\b.*\b48\b.*\brobust\b.*\b64\b", message)
    assert "aggregation: separate" in message


def test_init_teacher_with_other_shapes(error):
    student = {**STUDENT, "encoder_ffn_embed_dim": 96}
    message = error(lambda model, runner: model.update(student=student))
    assert re.search(r"init\.teacher.*encoder\.layers\.0\.fc1", message)


@pytest.mark.parametrize(
    ("table", "pattern"),
    [
        (None, r"s3prl-ekd [\w-]+ AUDIO_FOLDER -o TABLE_FOLDER"),
        ("", r"train\.csv.*\bfile_path\b"),
        ("file_path,length\n", r"train\.csv"),
        ("file_path,length\nu.flac,many\n", r"train\.csv.*\b2\b.*u\.flac.*many"),
    ],
)
def test_invalid_or_missing_length_table(error, tmp_path, table, pattern):
    def change(model, runner):
        runner["pretrain_expert"]["datarc"]["file_path"] = str(tmp_path)
        if table is not None:
            (tmp_path / "train.csv").write_text(table)

    assert re.search(pattern, error(change))


@pytest.mark.parametrize("name", ["missing.flac", "empty.flac", "text.flac"])
@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_audio(error, tmp_path, name, workers):
    (tmp_path / "empty.flac").write_bytes(b"")
    (tmp_path / "text.flac").write_text("this is text")

    def change(model, runner):
        (tmp_path / "train.csv").write_text(f"file_path,length\n{name},16000\n")
        runner["pretrain_expert"]["datarc"].update(
            libri_root=str(tmp_path), file_path=str(tmp_path), num_workers=workers
        )

    message = error(change)
    with pytest.raises(BadAudio) as bad:
        read_audio(tmp_path / name)
    assert f"{tmp_path / name}: {bad.value.reason}" in message


def test_stereo_and_other_rates_give_a_warning(pretrain_folder, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["file_path,length"]
    for name, rate, channels in (("a.wav", 16000, 2), ("b.wav", 8000, 1), ("c.wav", 44100, 2)):
        soundfile.write(tmp_path / name, 0.1 * rng.standard_normal((rate, channels)), rate)
        lines.append(f"{name},16000")
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    override = f"config.pretrain_expert.datarc.libri_root='{tmp_path}'"
    override += f",,config.pretrain_expert.datarc.file_path='{tmp_path}'"
    result = command(*RUN, "-o", override, cwd=tmp_path)
    for pattern in (r"\b2 channels\b", r"\b8000 Hz\b", r"\b44100 Hz\b"):
        assert re.search(pattern, result.stderr)
    assert read_checkpoint(newest_checkpoint(tmp_path / "result/pretrain/x"))["Step"] == 6


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (("run_pretrain.py", "-u", "ekd"), "-n NAME"),
        (("run_pretrain.py", "-n", "x"), "-u ekd"),
        (("run_pretrain.py", "-e", "none.ckpt"), "-e none.ckpt"),
        ((*RUN, "--multi_gpu"), "--multi_gpu"),
    ],
)
def test_arguments(error, argv, option):
    assert option in error(argv=argv)


def test_error_without_our_commands(pretrain_folder):
    """The excepthook prints the message: s3prl's script has no error handling."""
    code = (
        "import sys; sys.path[:0] = ['.']\n"
        "from pretrain.ekd.pretrain_expert import UpstreamPretrainExpert\n"
        "UpstreamPretrainExpert({}, {'teachers': {}})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=pretrain_folder, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert re.search(r"^error: .*\bteachers\b", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


def test_downstream_without_student_or_corpus(tmp_path):
    argv = ("run_downstream.py", "-m", "train", "-u", "ekd_student", "-d", "asr", "-n", "x")
    command("init", ".", cwd=tmp_path)
    (tmp_path / "bad.pt").write_bytes(b"x")
    corpus = "config.downstream_expert.datarc.libri_root='.'"
    corpus += ",,config.downstream_expert.datarc.bucket_file='.'"
    write_librispeech_names(tmp_path, "train-clean-100", "dev-clean")
    for options, pattern in (
        (("-k", "none.pt"), r"-k none\.pt"),
        (("-u", "fbank"), r"downstream_expert\.datarc\.libri_root.*\./data/librispeech"),
        (("-k", "bad.pt", "-o", corpus), r"\bbad\.pt\b"),
        (("-k", "bad.pt", "-c", "none.yaml"), r"\bnone\.yaml\b"),
        (("-u", "ekd_studen", "-o", corpus), r"\bekd_student\b"),
        (("-d", ""), r"-d asr"),
        (("-d", "ctc"), r"-c downstream/ctc/libriphone\.yaml"),
    ):
        result = command(*argv, *options, cwd=tmp_path, check=False)
        assert result.returncode == 2, result.stderr
        assert re.search(rf"^error: .*{pattern}", result.stderr, re.MULTILINE), result.stderr
        assert "Traceback" not in result.stderr
