"""The commands as a user types them: distil, resume, export, and what s3prl's scripts then see."""

import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import s3prl
import torch
from tensorboardX.proto import event_pb2

from s3prl_ekd.downstream.run import prepare
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.files.run_checkpoints import newest, read_run
from s3prl_ekd.launch import run_pretrain
from s3prl_ekd.pretrain.settings import load_model_config
from s3prl_ekd.student_file import load_student
from s3prl_ekd.workspace import experiments

from .conftest import REPO, command, write_configs

RUN = ("run_pretrain.py", "-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of all TensorBoard files of a run (length, crc, data, crc, again)."""
    found = {}
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, teachers, corpus):
    """A folder set up by `init`, with a finished run of 6 steps in it."""
    folder = tmp_path_factory.mktemp("work")
    command("init", ".", cwd=folder)
    write_configs(folder, teachers, corpus)
    done = command(*RUN, cwd=folder)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    return folder


def test_init_creates_keeps_and_never_overwrites(tmp_path):
    first = command("init", "a", cwd=tmp_path).stdout
    assert "created" in first and "kept" not in first
    expert = tmp_path / "a" / "pretrain" / "ekd" / "pretrain_expert.py"
    assert expert.is_file() and (tmp_path / "a/pretrain/ekd/config_model.yaml").is_file()
    assert (tmp_path / "a/downstream/asr/config.yaml").is_file()
    expert.write_text("# mine\n")
    second = command("init", "a", cwd=tmp_path).stdout
    assert "created" not in second and "kept" in second
    assert expert.read_text() == "# mine\n"


def test_init_writes_chosen_experiments(tmp_path):
    listed = command("init", "--list", cwd=tmp_path).stdout
    assert "experiments/three_average\n    The three teachers: layerwise average" in listed
    command("init", ".", "-x", "experiments/three_average", cwd=tmp_path)
    folder = tmp_path / "pretrain/ekd/experiments"
    assert [path.name for path in folder.iterdir()] == ["three_average.yaml"]
    assert load_model_config(folder / "three_average.yaml").aggregation == "average"
    command("init", ".", "-x", "three_concat", "-x", "three_average", "--tiny", cwd=tmp_path)
    tiny = sorted((tmp_path / "pretrain/ekd/tiny").iterdir())
    assert [path.name for path in tiny] == ["three_average.yaml", "three_concat.yaml"]
    done = command("init", ".", "-x", "tree_average", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "did you mean experiments/three_average?" in done.stderr


@pytest.mark.slow
def test_every_tiny_experiment_takes_two_steps(tmp_path, corpus, monkeypatch, capfd):
    """All of the tiny matrix, in this process: s3prl's Runner, two steps each."""
    command("init", ".", "-x", "all", "--tiny", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    override = f"config.pretrain_expert.datarc.libri_root='{corpus}/audio'"
    override += f",,config.pretrain_expert.datarc.file_path='{corpus}/tables'"
    override += ",,config.pretrain_expert.datarc.sets=['train'],,config.runner.total_steps=2"
    override += ",,config.pretrain_expert.datarc.num_workers=0,,config.runner.log_step=1"
    override += ",,config.runner.save_step=1,,config.pretrain_expert.datarc.sequence_length=8000"
    names = [name for name in experiments() if name.startswith("tiny/")]
    shipped = {path.stem for path in (REPO / "pretrain_configs/experiments").glob("*.yaml")}
    assert {name.removeprefix("tiny/") for name in names} == shipped and len(names) >= 25
    for name in names:
        words = ["-u", "ekd", "-n", name, "-c", "pretrain/ekd/tiny_runner.yaml", "-o", override]
        words += ["-g", f"pretrain/ekd/{name}.yaml", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *words])
        assert run_pretrain() == 0, name
        states = read_run(newest(tmp_path / "result/pretrain" / name))
        assert states["Step"] == 2, name
        assert all(torch.isfinite(value).all() for value in states["EKD"]["student"].values())


def test_the_run_says_what_it_is(workspace):
    log = (workspace / "log.txt").read_text()
    assert re.search(
        r"teacher wavlm: .*wavlm.pt, layer2 layer4 of 4 layers, width 48.*eval mode", log
    )
    assert "aggregation separate; prediction heads: hubert (2 layers of 48), robust" in log
    assert "starts from hubert; device cpu" in log or torch.cuda.is_available()
    assert "s3prl-ekd export student" in log
    assert "Traceback" not in log


def test_tensorboard_has_every_teacher_and_layer(workspace):
    logged = scalars(workspace / "result/pretrain/x")
    for teacher in ("hubert", "robust", "wavlm"):
        for layer in (2, 4):
            for term in ("l1", "cosine"):
                values = logged[f"ekd/train-{teacher}/{term}_layer{layer}"]
                assert [step for step, _ in values] == [2, 4, 6]
                assert all(value > 0 for _, value in values)
    assert logged["ekd/train-loss_mean"][-1][1] < logged["ekd/train-loss_mean"][0][1]


def test_the_checkpoint_keeps_s3prls_keys(workspace):
    run = workspace / "result/pretrain/x"
    states = read_run(newest(run))
    assert {"Optimizer", "Step", "Args", "Config", "Upstream_Config"} <= states.keys()
    assert states["Config"]["runner"]["total_steps"] == 6  # not overwritten by the model's
    assert states["Upstream_Config"]["teachers"]["wavlm"]["layers"] == [2, 4]
    assert states["Step"] == 6 and newest(run).name.startswith("states-")
    # No teacher among what is optimised: the optimizer has one state a trained tensor.
    trained = len(states["EKD"]["student"]) + len(states["EKD"]["heads"])
    assert 0 < len(states["Optimizer"]["state"]) <= trained


def test_resume_goes_on_from_the_newest(workspace, tmp_path):
    run = tmp_path / "result/pretrain/x"
    shutil.copytree(workspace / "pretrain", tmp_path / "pretrain")
    shutil.copytree(workspace / "result", tmp_path / "result")
    (run / "states-9.ckpt").write_bytes(b"half written")
    more = ("-o", "config.runner.total_steps=8,,config.runner.save_step=2")
    done = command("run_pretrain.py", "-u", "ekd", "-n", "x", "-a", *more, cwd=tmp_path)
    assert "passed over: the checkpoint" in done.stderr
    assert "at step 6" in done.stderr and "Training for 8 steps" in done.stdout
    (run / "states-9.ckpt").unlink()
    assert read_run(newest(run))["Step"] == 8
    steps = [step for step, _ in scalars(run)["ekd/train-loss"]]
    assert steps[-1] == 8 and steps.count(6) == 1


def test_a_resumed_run_starts_with_the_saved_weights(workspace, tmp_path):
    """Resumed at learning rate 0 (the schedule is over), a step leaves the student as it was."""
    shutil.copytree(workspace / "pretrain", tmp_path / "pretrain")
    saved = newest(workspace / "result/pretrain/x")
    more = f"config.runner.total_steps=7,,args.expdir='{tmp_path}/again'"
    command("run_pretrain.py", "-e", saved, "-o", more, cwd=tmp_path)
    before, after = (load_student(path) for path in (saved, newest(tmp_path / "again")))
    assert after.about["step"] == 7
    for key, value in before.student.state_dict().items():
        # s3prl's weight decay is scaled by the learning rate, so not even that moves them
        assert torch.equal(after.student.state_dict()[key], value), key


def test_export_student(workspace, tmp_path):
    run = workspace / "result/pretrain/x"
    out = command("export", "student", run, "-o", tmp_path / "s.pt", cwd=tmp_path).stdout
    assert "heads kept" in out and "step 6" in out
    from_run, exported = load_student(newest(run)), load_student(tmp_path / "s.pt")
    for key, value in from_run.student.state_dict().items():
        assert torch.equal(exported.student.state_dict()[key], value)
    torch.load(tmp_path / "s.pt", weights_only=True)
    again = command("export", "student", run, "-o", "s.pt", cwd=tmp_path, check=False)
    assert again.returncode == 2 and "add --force" in again.stderr


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_downstream.py"])
def test_help_shows_our_names(tmp_path, script):
    done = command(script, "-h", cwd=tmp_path)
    assert ("{ekd}" if script == "run_pretrain.py" else "'ekd_student'") in done.stdout
    assert "s3prl-ekd init ." in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run_pretrain.py", "-u", "ekd", "-n", "x"), "s3prl-ekd init ."),
        (
            ("run_downstream.py", "-m", "train", "-u", "fbank", "-d", "asr", "-n", "x"),
            "there is no configuration downstream/asr/config.yaml in this folder; type: s3prl-ekd",
        ),
    ],
)
def test_where_nothing_is_set_up_they_say_what_to_type(tmp_path, words, said):
    done = command(*words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_commands_on_the_path(tmp_path):
    for name in ("run_pretrain.py", "run_downstream.py", "s3prl-ekd"):
        script = Path(sys.executable).parent / name
        if not script.is_file():
            pytest.skip("the package is not installed here, only on the path")
        done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "usage:" in done.stdout


def fake_checkout(folder: Path) -> None:
    """The files of an s3prl checkout that the scripts touch, linked from the installed package:
    a folder with run_pretrain.py, hub.py, pretrain/ and the modules it imports by bare names."""
    source = Path(s3prl.__file__).parent
    for name in ("run_pretrain.py", "hub.py", "optimizers.py", "schedulers.py"):
        shutil.copy(source / name, folder / name)
    shutil.copytree(source / "utility", folder / "utility")
    shutil.copytree(source / "pretrain", folder / "pretrain")


@pytest.mark.parametrize("plain", [True, False], ids=["plain python", "our command"])
def test_in_a_checkout(tmp_path, teachers, corpus, plain):
    fake_checkout(tmp_path)
    command("init", ".", cwd=tmp_path)
    write_configs(tmp_path, teachers, corpus)
    words = [*RUN[1:], "--device", "cpu"]
    if plain:
        done = subprocess.run(
            [sys.executable, "run_pretrain.py", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    else:
        # prove that the checkout's script is the one that runs
        script = tmp_path / "run_pretrain.py"
        script.write_text(script.read_text() + "\nprint('the script of the checkout')\n")
        done = command("run_pretrain.py", *words, cwd=tmp_path)
        assert "the script of the checkout" in done.stdout
    path = newest(tmp_path / "result/pretrain/x")
    assert load_student(path).about["step"] == 6
    # and it is resumed by our command, whatever name the schedule's class had in that process
    more = ("-o", "config.runner.total_steps=7")
    command("run_pretrain.py", "-u", "ekd", "-n", "x", "-a", *more, cwd=tmp_path)
    assert read_run(newest(tmp_path / "result/pretrain/x"))["Step"] == 7


@pytest.mark.parametrize(
    ("words", "env", "wanted"),
    [
        ([], {"LOCAL_RANK": "1"}, ["--local_rank", "1"]),
        (["--local-rank=1"], {"LOCAL_RANK": "1"}, ["--local_rank", "1"]),
        (["--local_rank", "0"], {"LOCAL_RANK": "1"}, ["--local_rank", "0"]),
        ([], {}, []),
    ],
)
def test_torchruns_rank_reaches_s3prls_script(tmp_path, monkeypatch, words, env, wanted):
    """torchrun tells it by the environment, torch.distributed.launch with a dash."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    base = ["-u", "fbank", "--device", "cpu"]
    argv = prepare([*base, *words]).argv()
    assert sorted(argv) == sorted([*base, *wanted]) and " ".join(wanted) in " ".join(argv)


def test_a_pipe_that_closes(tmp_path):
    code = f"{sys.executable} -m s3prl_ekd teachers list | head -n 1"
    done = subprocess.run(code, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "tiny teachers" in done.stdout


def test_newest_is_by_step_and_not_by_name(tmp_path):
    for name, step in (("states-epoch-2.ckpt", 50), ("states-40.ckpt", 40)):
        torch.save({"Step": step, "Args": Namespace(), "Config": {}}, tmp_path / name)
    assert newest(tmp_path).name == "states-epoch-2.ckpt"
    (tmp_path / "sub").mkdir()
    assert newest(tmp_path / "sub") is None
    (tmp_path / "sub" / "states-1.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        newest(tmp_path / "sub")
