"""The commands as a user types them: distil, resume, export; in a folder and in a checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import s3prl
import torch
from tensorboardX.proto import event_pb2

from s3prl_ekd.cli import main
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.launch import run_downstream, run_pretrain
from s3prl_ekd.pretrain.settings import load_model_config
from s3prl_ekd.request import DownstreamRequest
from s3prl_ekd.student_file import load_student
from s3prl_ekd.workspace import experiments

from .conftest import REPO, command, write_configs

RUN = ("run_pretrain.py", "-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> [(step, value)] of all TensorBoard files of a run.

    An event is stored as its length, a checksum, the event and a checksum.
    """
    results = {}
    for path in sorted(folder.glob("events.*")):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            size = int.from_bytes(data[offset : offset + 8], "little")
            event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + size])
            offset += size + 16
            for value in event.summary.value:
                results.setdefault(value.tag, []).append((event.step, value.simple_value))
    return results


def test_init_never_overwrites(tmp_path):
    command("init", "a", cwd=tmp_path)
    expert = tmp_path / "a" / "pretrain" / "ekd" / "pretrain_expert.py"
    assert expert.is_file() and (tmp_path / "a/pretrain/ekd/config_model.yaml").is_file()
    assert (tmp_path / "a/downstream/asr/config.yaml").is_file()
    expert.write_text("# mine\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "pretrain_expert.py" in command("init", "a", cwd=tmp_path).stdout
    assert expert.read_text() == "# mine\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_init_writes_selected_experiments(tmp_path):
    listed = command("init", "--list", cwd=tmp_path).stdout.splitlines()
    line = listed.index("experiments/three_average")
    assert listed[line + 1].startswith("    ")  # its description
    command("init", ".", "-x", "experiments/three_average", cwd=tmp_path)
    folder = tmp_path / "pretrain/ekd/experiments"
    assert [path.name for path in folder.iterdir()] == ["three_average.yaml"]
    assert load_model_config(folder / "three_average.yaml").aggregation == "average"
    command("init", ".", "-x", "three_concat", "-x", "three_average", "--tiny", cwd=tmp_path)
    tiny = sorted((tmp_path / "pretrain/ekd/tiny").iterdir())
    assert [path.name for path in tiny] == ["three_average.yaml", "three_concat.yaml"]
    result = command("init", ".", "-x", "tree_average", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "experiments/three_average" in result.stderr


def fit_units_of(model, corpus):
    """Run the `fit-units` commands in the comment of an experiment, with other audio."""
    text = re.sub(r" \\\n#\s+", " ", model.read_text())
    for line in re.findall(r"^# +s3prl-ekd (fit-units .*)", text, re.MULTILINE):
        argv = shlex.split(line)
        for option, value in {"--data": f"{corpus}/audio", "--clusters": "8"}.items():
            argv[argv.index(option) + 1] = value
        assert main(argv) == 0


@pytest.mark.slow
def test_every_tiny_experiment_takes_two_steps(tmp_path, corpus, monkeypatch, capfd):
    """All tiny experiments in this process, with s3prl's Runner."""
    command("init", ".", "-x", "all", "--tiny", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    override = f"config.pretrain_expert.datarc.libri_root='{corpus}/audio'"
    override += f",,config.pretrain_expert.datarc.file_path='{corpus}/tables'"
    override += ",,config.pretrain_expert.datarc.sets=['train'],,config.runner.total_steps=2"
    override += ",,config.pretrain_expert.datarc.num_workers=0,,config.runner.log_step=1"
    override += ",,config.runner.save_step=1,,config.pretrain_expert.datarc.sequence_length=8000"
    names = [name for name in experiments() if name.startswith("tiny/")]
    shipped = {path.stem for path in (REPO / "pretrain_configs/experiments").glob("*.yaml")}
    assert {name.removeprefix("tiny/") for name in names} == shipped and len(names) >= 32
    for name in names:
        model = f"pretrain/ekd/{name}.yaml"
        fit_units_of(Path(model), corpus)
        pruned = load_model_config(model).pruning is not None
        runner = f"pretrain/ekd/tiny_{'pruning_' * pruned}runner.yaml"
        argv = ["-u", "ekd", "-n", name, "-c", runner, "-o", override, "-g", model]
        argv += ["--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *argv])
        assert run_pretrain() == 0, name
        printed = capfd.readouterr().out
        assert (f"s3prl-ekd prune result/pretrain/{name} -o " in printed) == pruned, name
        assert (f"s3prl-ekd export student result/pretrain/{name} -o " in printed) != pruned, name
        states = read_checkpoint(newest_checkpoint(tmp_path / "result/pretrain" / name))
        assert states["Step"] == 2, name
        assert all(torch.isfinite(value).all() for value in states["EKD"]["student"].values())


def test_the_log_describes_the_run(finished_pretraining):
    log = (finished_pretraining / "log.txt").read_text()
    assert re.search(r"\bwavlm\b.*\bwavlm\.pt\b.*\blayer2\b.*\blayer4\b.*\b4\b.*\b48\b", log)
    assert re.search(r"\bseparate\b.*\bhubert\b.*\b2\b.*\b48\b.*\brobust\b", log)
    assert re.search(r"\bhubert\b.*\bcpu\b", log)
    assert "s3prl-ekd export student" in log
    assert "Traceback" not in log


def test_tensorboard_has_every_teacher_and_layer(finished_pretraining):
    logged = scalars(finished_pretraining / "result/pretrain/x")
    for teacher in ("hubert", "robust", "wavlm"):
        for layer in (2, 4):
            for term in ("l1", "cosine"):
                values = logged[f"ekd/train-{teacher}/{term}_layer{layer}"]
                assert [step for step, _ in values] == [1, 2, 3, 4, 5, 6]
                assert all(value > 0 for _, value in values)
    assert logged["ekd/train-loss_mean"][-1][1] < logged["ekd/train-loss_mean"][0][1]


def test_the_checkpoint_keeps_s3prls_keys(finished_pretraining):
    run = finished_pretraining / "result/pretrain/x"
    states = read_checkpoint(newest_checkpoint(run))
    assert {"Optimizer", "Step", "Args", "Config", "Upstream_Config"} <= states.keys()
    assert states["Config"]["runner"]["total_steps"] == 6  # not overwritten by the model's
    assert states["Upstream_Config"]["teachers"]["wavlm"]["layers"] == [2, 4]
    assert states["Step"] == 6 and newest_checkpoint(run).name.startswith("states-")
    # Teachers are not optimised: the optimizer has at most one state for each student tensor.
    trained = len(states["EKD"]["student"]) + len(states["EKD"]["heads"])
    assert 0 < len(states["Optimizer"]["state"]) <= trained


def test_resume_from_the_newest_valid_checkpoint(finished_pretraining, tmp_path):
    run = tmp_path / "result/pretrain/x"
    shutil.copytree(finished_pretraining / "pretrain", tmp_path / "pretrain")
    shutil.copytree(finished_pretraining / "result", tmp_path / "result")
    (run / "states-9.ckpt").write_bytes(b"half written")
    options = ("-o", "config.runner.total_steps=8,,config.runner.save_step=2")
    result = command("run_pretrain.py", "-u", "ekd", "-n", "x", "-a", *options, cwd=tmp_path)
    assert re.search(r"WARNING.*states-9\.ckpt", result.stderr)
    assert re.search(r"\bstep 6\b", result.stderr)
    assert "Training for 8 steps" in result.stdout  # s3prl's own message
    (run / "states-9.ckpt").unlink()
    assert read_checkpoint(newest_checkpoint(run))["Step"] == 8
    steps = [step for step, _ in scalars(run)["ekd/train-loss"]]
    assert steps[-1] == 8 and steps.count(6) == 1


def test_a_resumed_run_starts_with_the_saved_weights(finished_pretraining, tmp_path):
    """A step with learning rate 0 (the schedule is finished) does not change the student."""
    shutil.copytree(finished_pretraining / "pretrain", tmp_path / "pretrain")
    saved = newest_checkpoint(finished_pretraining / "result/pretrain/x")
    override = f"config.runner.total_steps=7,,args.expdir='{tmp_path}/again'"
    command("run_pretrain.py", "-e", saved, "-o", override, cwd=tmp_path)
    before, after = (load_student(path) for path in (saved, newest_checkpoint(tmp_path / "again")))
    assert after.about["step"] == 7
    for key, value in before.student.state_dict().items():
        # s3prl's weight decay is scaled by the learning rate, so it has no effect either
        assert torch.equal(after.student.state_dict()[key], value), key


def test_export_student(finished_pretraining, tmp_path):
    run = finished_pretraining / "result/pretrain/x"
    out = command("export", "student", run, "-o", tmp_path / "s.pt", cwd=tmp_path).stdout
    assert "s.pt" in out and re.search(r"\bstep 6\b", out)
    from_run, exported = load_student(newest_checkpoint(run)), load_student(tmp_path / "s.pt")
    assert exported.heads is not None
    for key, value in from_run.student.state_dict().items():
        assert torch.equal(exported.student.state_dict()[key], value)
    torch.load(tmp_path / "s.pt", weights_only=True)
    result = command("export", "student", run, "-o", "s.pt", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "--force" in result.stderr


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_downstream.py"])
def test_help_shows_our_names(tmp_path, script):
    result = command(script, "-h", cwd=tmp_path)
    assert ("{ekd}" if script == "run_pretrain.py" else "'ekd_student'") in result.stdout
    assert "s3prl-ekd init ." in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (("run_pretrain.py", "-u", "ekd", "-n", "x"), ""),
        (
            ("run_downstream.py", "-m", "train", "-u", "fbank", "-d", "asr", "-n", "x"),
            "downstream/asr/config.yaml",
        ),
    ],
)
def test_an_empty_folder_needs_init(tmp_path, argv, path):
    result = command(*argv, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert path in result.stderr and "s3prl-ekd init ." in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_commands_on_the_path(tmp_path):
    for name in ("run_pretrain.py", "run_downstream.py", "s3prl-ekd"):
        script = Path(sys.executable).parent / name
        if not script.is_file():
            pytest.skip("the package is not installed")
        result = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0 and "usage:" in result.stdout


def fake_checkout(folder: Path) -> None:
    """Copy the files of an s3prl checkout that run_pretrain.py uses from the installed package."""
    source = Path(s3prl.__file__).parent
    for name in ("run_pretrain.py", "hub.py", "optimizers.py", "schedulers.py"):
        shutil.copy(source / name, folder / name)
    shutil.copytree(source / "utility", folder / "utility")
    shutil.copytree(source / "pretrain", folder / "pretrain")


@pytest.mark.parametrize("s3prl_script", [True, False], ids=["s3prl script", "our command"])
def test_in_a_checkout(tmp_path, teachers, corpus, s3prl_script):
    fake_checkout(tmp_path)
    command("init", ".", cwd=tmp_path)
    write_configs(tmp_path, teachers, corpus)
    argv = [*RUN[1:], "--device", "cpu"]
    if s3prl_script:
        result = subprocess.run(
            [sys.executable, "run_pretrain.py", *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr
    else:
        # The script of the checkout is run, not the installed one.
        script = tmp_path / "run_pretrain.py"
        script.write_text(script.read_text() + "\nprint('the script of the checkout')\n")
        result = command("run_pretrain.py", *argv, cwd=tmp_path)
        assert "the script of the checkout" in result.stdout
    path = newest_checkpoint(tmp_path / "result/pretrain/x")
    assert load_student(path).about["step"] == 6
    # Our command resumes both: the schedule's class has another module name in the first.
    options = ("-o", "config.runner.total_steps=7")
    command("run_pretrain.py", "-u", "ekd", "-n", "x", "-a", *options, cwd=tmp_path)
    assert read_checkpoint(newest_checkpoint(tmp_path / "result/pretrain/x"))["Step"] == 7


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ([], {"LOCAL_RANK": "1"}, ["--local_rank", "1"]),
        (["--local-rank=1"], {"LOCAL_RANK": "1"}, ["--local_rank", "1"]),
        (["--local_rank", "0"], {"LOCAL_RANK": "1"}, ["--local_rank", "0"]),
        ([], {}, []),
    ],
)
def test_local_rank_reaches_s3prls_script(tmp_path, monkeypatch, options, environment, expected):
    """torchrun sets LOCAL_RANK, torch.distributed.launch gives --local-rank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    base = ["-u", "fbank", "--device", "cpu"]
    argv = DownstreamRequest.parse([*base, *options]).argv()
    assert sorted(argv) == sorted([*base, *expected]) and " ".join(expected) in " ".join(argv)


@pytest.mark.parametrize(
    "argv, hint",
    [
        ("-m train -n evaluate -u fbank -d asr", r"add -a to resume"),
        ("-m train -e runs/a/states-5.ckpt", r"-e runs/a$"),
        ("-m train -e runs/a", r"-e runs/a$"),
        ("-m evaluate -e runs/a/states-5.ckpt -t test", r"Ctrl-C$"),
    ],
)
def test_what_to_type_after_ctrl_c(argv, hint, tmp_path, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    (tmp_path / "runs/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s3prl_ekd.downstream.run.prepare", interrupted)
    monkeypatch.setattr(sys, "argv", ["run_downstream.py", *argv.split()])
    with pytest.raises(SystemExit) as stop:
        run_downstream()
    assert stop.value.code == 130
    assert re.search(hint, capsys.readouterr().err.strip())


def test_broken_pipe(tmp_path):
    shell = f"{sys.executable} -m s3prl_ekd teachers list | head -n 1"
    result = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout
    # the log may come before the pipe is found closed
    assert all(line.startswith("INFO ") for line in result.stderr.splitlines()), result.stderr


def test_newest_checkpoint_is_by_step_not_by_name(tmp_path):
    for name, step in (("states-epoch-2.ckpt", 50), ("states-40.ckpt", 40)):
        torch.save({"Step": step, "Args": Namespace(), "Config": {}}, tmp_path / name)
    assert newest_checkpoint(tmp_path).name == "states-epoch-2.ckpt"
    (tmp_path / "sub").mkdir()
    assert newest_checkpoint(tmp_path / "sub") is None
    (tmp_path / "sub" / "states-1.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\b1 checkpoints .*sub"):
        newest_checkpoint(tmp_path / "sub")
