"""Our trainer: s3prl's numbers, and what it does when something goes wrong on the way."""

import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.distill.target_norm import Moments
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.files.run_checkpoints import newest, read_run
from s3prl_ekd.pretrain import interrupts as signals
from s3prl_ekd.pretrain.checkpoints import Progress
from s3prl_ekd.pretrain.distributed import ProcessGroup
from s3prl_ekd.pretrain.optim import OptimizerStep, not_finite_error
from s3prl_ekd.pretrain.resume import random_states, set_random_states
from s3prl_ekd.pretrain.tensorboard import read_scalars
from s3prl_ekd.workspace import write_workspace

from .conftest import write_configs
from .kill_and_resume import outcome, unequal

RUN = ("-u", "ekd", "-c", "runner.yaml", "-g", "model.yaml")


@pytest.fixture
def folder(tmp_path, teachers, corpus, monkeypatch):
    """A working folder; its run takes 6 steps and saves at 3 and 6."""
    write_workspace(tmp_path)
    write_configs(tmp_path, teachers, corpus)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, pretrain):
    """Run in this process with keys of the runner config changed; (code, stdout + stderr)."""

    def run(name, *words, **changes):
        config = yaml.safe_load((folder / "runner.yaml").read_text())
        for key, value in changes.items():
            part = config["runner"]
            if key in ("dev_sets", "num_workers", "sequence_length"):
                part = config["pretrain_expert"]["datarc"]
            elif key in ("optimizer", "scheduler"):
                part = config
            part[key] = value
        (folder / "runner.yaml").write_text(yaml.safe_dump(config))
        files = ("-c", "runner.yaml", "-g", "model.yaml")
        return pretrain(*files, "-n", name, "--device", "cpu", *words)

    return run


def saved(name, which=None):
    where = f"result/pretrain/{name}"
    return read_run(f"{where}/{which}" if which else newest(where))


ADAM = {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-3}
LINEAR = {"name": "linear_schedule_with_warmup", "num_warmup_steps": 2}


@pytest.mark.parametrize("changes", [{}, {"optimizer": ADAM, "scheduler": LINEAR}], ids=str)
def test_the_numbers_are_those_of_s3prls_runner(run, changes, monkeypatch):
    """The same config and seed: weights, optimizer and every scalar, bit for bit."""
    changes = {"gradient_accumulate_steps": 2, "log_step": 2, **changes}
    assert run("ours", **changes)[0] == 0
    classes = []

    def make(args, config, s3prl_runner, overridden):
        classes.append(s3prl_runner)
        return s3prl_runner(args, config)

    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.Trainer", make)
    assert run("theirs")[0] == 0
    assert [each.__module__ for each in classes] == ["s3prl.pretrain.runner"]
    one, two = saved("ours"), saved("theirs")
    assert "EKD_Run" in one and "EKD_Run" not in two and one["Step"] == two["Step"] == 6
    for part in ("student", "heads"):
        assert not unequal(one["EKD"][part], two["EKD"][part])
    for mine, other in zip(
        one["Optimizer"]["state"].values(), two["Optimizer"]["state"].values(), strict=True
    ):
        assert not unequal(mine, other)
    scalars = [read_scalars(f"result/pretrain/{name}") for name in ("ours", "theirs")]
    rates = [each.pop("ekd/train-lr") for each in scalars]
    assert scalars[0] == scalars[1]
    if not changes.get("scheduler"):  # of a schedule s3prl logs the rate that it starts from
        assert rates[0] == rates[1]


@pytest.mark.parametrize("changes", [{}, {"optimizer": ADAM, "scheduler": LINEAR}], ids=str)
def test_a_signal_saves_and_a_resume_loses_nothing(run, changes, monkeypatch, folder):
    number, code_of = (signal.SIGTERM, 143) if changes else (signal.SIGUSR1, 138)
    changes = {"gradient_accumulate_steps": 2, "save_step": 5, **changes}
    assert run("alone", **changes)[0] == 0
    forward = EnsembleDistiller.forward
    seen = []

    def signalled(self, *args, step=1, **kwargs):
        seen.append(step)
        if seen == [1, 1, 2]:  # in the middle of an accumulated batch
            os.kill(os.getpid(), number)
        return forward(self, *args, step=step, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", signalled)
    code, said = run("cut")
    assert code == code_of and seen == [1, 1, 2, 2]
    assert f"stopped by {number.name} at step 2 of 6, all saved; go on with: run_pre" in said
    assert "go on with: run_pretrain.py -u ekd -n cut -a" in said and "Traceback" not in said
    assert [path.name for path in folder.glob("result/pretrain/cut/*.ckpt")] == ["last.ckpt"]
    assert signal.getsignal(number) == signal.SIG_DFL
    code, said = run("cut", "-a")
    assert code == 0 and seen[4:] == [3, 3, 4, 4, 5, 5, 6, 6]
    shutil.copytree("result/pretrain/alone", "a/result/pretrain/x")
    shutil.copytree("result/pretrain/cut", "b/result/pretrain/x")
    one, two = _outcome(folder / "a"), _outcome(folder / "b")
    assert len(one) > 100 and not unequal(one, two)


def _outcome(folder):
    (folder / "result/pretrain/x/dev-best.ckpt").write_bytes(
        newest(folder / "result/pretrain/x").read_bytes()
    )
    return outcome(folder)


def test_ctrl_c_reaches_the_whole_group(folder):
    """As from a terminal: the workers get it too, and the run saves all the same."""
    more = "config.runner.total_steps=100000,,config.pretrain_expert.datarc.num_workers=2"
    with open(folder / "log.txt", "w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "s3prl_ekd", "run_pretrain.py", *RUN, "-n", "x", "-o", more],
            start_new_session=True,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while "states-3.ckpt" not in (folder / "log.txt").read_text(errors="replace"):
            assert running.poll() is None, (folder / "log.txt").read_text()
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(60) == 130
    said = (folder / "log.txt").read_text(errors="replace")
    assert "stopped by SIGINT at step " in said and "Traceback" not in said
    assert saved("x", "last.ckpt")["Step"] >= 3


def test_a_second_ctrl_c_leaves_at_once(run, monkeypatch):
    forward = EnsembleDistiller.forward

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", signalled)
    code, said = run("once")
    assert code == 130 and "stopped by SIGINT at step 1" in said  # the same key, twice
    monkeypatch.setattr(signals, "SAME_SIGNAL", -1.0)
    code, said = run("twice")
    assert code == 130 and "stopped by Ctrl-C; add -a" in said
    assert not os.path.exists("result/pretrain/twice/last.ckpt")


def spoiled(monkeypatch, how, steps):
    forward = EnsembleDistiller.forward

    def forward_spoiled(self, *args, step=1, **kwargs):
        loss, parts = forward(self, *args, step=step, **kwargs)
        if step in steps:
            if how == "loss":
                loss = loss * math.nan
            elif how == "gradient":
                loss.register_hook(lambda gradient: gradient * math.inf)
            else:
                raise how
        return loss, parts

    monkeypatch.setattr(EnsembleDistiller, "forward", forward_spoiled)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_what_is_not_finite_is_skipped_and_counted(run, monkeypatch, how, caplog):
    spoiled(monkeypatch, how, {2, 4})
    assert run("x", save_step=2, log_step=1)[0] == 0
    assert "2 updates of this run were skipped: not finite" in caplog.text
    assert "step 2 skipped (1 in a row): loss " in caplog.text
    assert "utterances u" in caplog.text
    one, three = saved("x", "states-2.ckpt"), saved("x")
    assert three["EKD_Run"]["skipped"] == 2 and three["EKD_Run"]["skipped_in_a_row"] == 0
    # The optimizer has counted 1 step of 2, and 4 of 6.
    assert {each["step"] for each in one["Optimizer"]["state"].values()} == {1}
    assert {each["step"] for each in three["Optimizer"]["state"].values()} == {4}
    assert all(torch.isfinite(value).all() for value in three["EKD"]["student"].values())
    scalars = read_scalars("result/pretrain/x")
    assert list(scalars["ekd/train-loss_mean"]) == [1, 3, 5, 6]  # means of what was learned from
    assert scalars["ekd/train-skipped"] == {2: 1, 3: 1, 4: 2, 5: 2, 6: 2}


def test_too_much_that_is_not_finite_stops_the_run(run, monkeypatch):
    spoiled(monkeypatch, "loss", {2, 3, 4, 5})
    code, said = run("x", max_nonfinite=3, save_step=1)
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and "not finite in 3 updates in a row, up to step 4" in error
    assert error.count(".flac") == 3 and "runner.max_nonfinite" in error
    assert newest("result/pretrain/x").name == "states-3.ckpt"


def test_many_utterances_are_not_all_named():
    names = [f"u{i}.flac" for i in range(100)]
    assert "u47.flac and 52 more)" in str(not_finite_error(5, 2, names, "go on"))


def test_one_nan_does_not_stay_in_the_statistics():
    moments, clean = Moments(1, 2, full=False), Moments(1, 2, full=False)
    frames = torch.randn(1, 1, 5, 2, generator=torch.Generator().manual_seed(0))
    clean.update(frames[:, :, :4], torch.ones(1, 4))
    frames[0, 0, 4, 1] = math.nan
    moments.update(frames, torch.ones(1, 5))
    assert torch.equal(moments.mean, clean.mean) and moments.count == clean.count == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_names_the_batchs_size(run, monkeypatch, error):
    spoiled(monkeypatch, error, {3})
    code, said = run("x", save_step=5, sequence_length=4000)
    assert code == 2 and "Traceback" not in said
    assert (
        "error: out of memory on cpu at step 3: the batch has 3 utterances, padded to 0.2 s each "
        "(1 s in all); lower train_batch_size" in said
    )
    # and what was learned before is not lost
    assert saved("x")["Step"] == 2 and newest("result/pretrain/x").name == "last.ckpt"


def test_another_error_is_rescued_and_shown_as_it_is(run, monkeypatch):
    spoiled(monkeypatch, RuntimeError("a defect"), {4})
    with pytest.raises(RuntimeError, match="a defect"):
        run("x", save_step=5)
    assert saved("x")["Step"] == 3


@pytest.mark.parametrize("exchange", range(6))
def test_a_step_is_saved_wherever_another_process_is_lost(run, monkeypatch, exchange):
    """Each exchange of step 3 with the other processes fails in turn, as when one was killed."""
    left = [None]
    ask = {
        name: getattr(ProcessGroup, name)
        for name in ("any", "sum", "all_gather", "first_not_none", "barrier")
    }

    def exchanging(name):
        def method(self, *values):
            if left[0] is not None:
                if left[0] == 0:
                    left[0] = None
                    raise RuntimeError("[gloo] Connection closed by peer")
                left[0] -= 1
            return ask[name](self, *values)

        return method

    for name in ask:
        monkeypatch.setattr(ProcessGroup, name, exchanging(name))
    begin = OptimizerStep.begin

    def third_step(self):
        begin(self)
        if seen.append(1) or len(seen) == 4:  # once when it is made
            left[0] = exchange

    seen = []
    monkeypatch.setattr(OptimizerStep, "begin", third_step)
    with pytest.raises(RuntimeError, match="Connection closed"):
        run("x", save_step=5, log_step=1)
    assert saved("x")["Step"] in (2, 3) and newest("result/pretrain/x").name == "last.ckpt"


def test_a_full_disk_is_a_sentence_and_takes_nothing_away(run, folder):
    assert run("x", total_steps=5)[0] == 0
    before = {path: path.read_bytes() for path in folder.glob("result/pretrain/x/*.ckpt")}
    assert len(before) == 3
    more = "config.runner.total_steps=9,,config.runner.save_step=6,,config.runner.max_keep=1"
    words = ["run_pretrain.py", "-u", "ekd", "-n", "x", "-a", "-o", more]

    def no_room():  # for a file of more than this
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-m", "s3prl_ekd", *words],
        preexec_fn=no_room,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    said = "error: cannot save result/pretrain/x/states-6.ckpt: File too large; the checkpoints "
    assert said in done.stderr and "make room, then go on with: run_pretrain.py -u" in done.stderr
    after = {path: path.read_bytes() for path in folder.glob("result/pretrain/x/*.ckpt*")}
    assert after == before


@pytest.mark.parametrize("rest", [1, 2])
def test_newest_and_last(run, folder, rest):
    code, said = run("x", total_steps=6, save_step=1, log_step=1, max_keep=rest)
    assert code == 0
    names = {path.name for path in folder.glob("result/pretrain/x/*.ckpt")}
    assert names == {"last.ckpt", *(f"states-{7 - i}.ckpt" for i in range(1, rest + 1))}
    assert os.path.samefile("result/pretrain/x/last.ckpt", "result/pretrain/x/states-6.ckpt")
    assert newest("result/pretrain/x").name == "states-6.ckpt"


def test_the_best_by_dev_loss(run, folder, corpus):
    assert run("without", log_step=1, save_step=5)[0] == 0
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    for name in ("train", "dev"):
        (folder / f"{name}.csv").write_text("\n".join(rows if name == "train" else rows[:5]) + "\n")
    here = f"config.pretrain_expert.datarc.file_path='{folder}'"
    code, said = run("with", "-o", here, dev_sets=["dev"], eval_step=1)
    assert code == 0, said
    losses = read_scalars("result/pretrain/with")["ekd/dev-loss"]
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    best = min(losses, key=losses.get)
    states = saved("with", "dev-best.ckpt")
    assert states["Step"] == best and states["EKD_Run"]["best_step"] == best
    assert states["EKD_Run"]["best_loss"] == pytest.approx(losses[best], rel=1e-6)
    # looking does not change what is looked at
    for part in ("student", "heads"):
        assert not unequal(saved("without")["EKD"][part], saved("with")["EKD"][part])


def test_last_by_the_clock(run, folder):
    code, said = run("x", last_minutes=1e-9, save_step=5, total_steps=6, log_step=1)
    assert code == 0 and saved("x", "last.ckpt")["Step"] == 6
    assert "states-5.ckpt" in said and "states-4.ckpt" not in said


def test_random_states_come_back():
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(1).item()

    random.gauss(0, 1), np.random.normal()  # each keeps a second number for the next call
    states = random_states()
    first = draw()
    assert draw() != first
    set_random_states(states)
    assert draw() == first
    with pytest.raises(ValueError, match="no states of random number generators"):
        set_random_states({**states, "torch": torch.zeros(3)})


@pytest.mark.parametrize(
    "change",
    [
        {"version": 7},
        {"epoch": "1"},
        {"batch": -1},
        {"records": {"a": 3}},
        {"tables": 3},
        {"random": None},
        None,
    ],
    ids=str,
)
def test_a_run_state_that_is_none(change):
    data = Progress().state_dict([{}])
    assert Progress.from_state_dict(data, "x") == Progress()
    with pytest.raises(CheckpointError, match="^x "):
        Progress.from_state_dict(None if change is None else {**data, **change}, "x")


def test_s3prls_runner_is_itself_again_afterwards(run):
    import s3prl.run_pretrain as script

    before = script.Runner, script.get_pretrain_args, script.override
    assert run("x", total_steps=3, save_step=1, log_step=1)[0] == 0
    assert (script.Runner, script.get_pretrain_args, script.override) == before
    assert script.Runner.__module__ == "s3prl.pretrain.runner"
