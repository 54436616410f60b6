"""`s3prl-ekd superb`: resuming a killed run, and cached hidden states."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from s3prl_ekd.downstream.feature_cache import read_counts
from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.superb import run as superb

from .superb_workspace import last_states, plan_runs, short_runs


def superb_argv(out):
    argv = ["superb", "fbank_no_cmvn", "--tasks", "sid", "--recipes", "tiny", "-o", str(out)]
    # SID draws its excerpts from Python's generator; batches of 4 make five steps an epoch
    override = "sid=config.downstream_expert.datarc.train_batch_size=4"
    override += ",,config.downstream_expert.datarc.max_timestep=4000"
    argv += ["--steps", "sid=16", "--override", override]
    return [sys.executable, "-m", "s3prl_ekd", *argv]


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_result(superb_workspace, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"cwd": superb_workspace, "env": env, "stdout": subprocess.DEVNULL}
    subprocess.run(superb_argv(tmp_path / "uninterrupted"), check=True, **quiet)
    process = subprocess.Popen(superb_argv(tmp_path / "killed"), start_new_session=True, **quiet)
    run = "fbank_no_cmvn/sid/lr0.003-seed1337"
    deadline = time.monotonic() + 120
    while not any((tmp_path / "killed" / run).glob("states-[48].ckpt")):  # within the second epoch
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    # the run's process, too: it would end itself only half a second later
    children = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    for pid in (process.pid, *map(int, "".join(children).split())):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    record = json.loads((tmp_path / "killed" / run / superb.RECORD).read_text())
    assert not record["finished"] and record["dev"] is None
    log = tmp_path / "killed" / run / "log.txt"
    offset = log.stat().st_size
    subprocess.run(superb_argv(tmp_path / "killed"), check=True, **quiet)
    # s3prl's own output, printed only when training resumes
    assert "Loading Optimizer weights from the previous experiment" in log.read_text()[offset:]

    outputs = ("uninterrupted", "killed")
    first, second = (read_checkpoint(tmp_path / out / run / "states-16.ckpt") for out in outputs)
    for key, value in first["Downstream"].items():
        assert torch.equal(value, second["Downstream"][key]), key
    for name in TASKS["sid"].files(None):
        expected, resumed = ((tmp_path / out / run / name).read_text() for out in outputs)
        assert expected == resumed
    records = [json.loads((tmp_path / out / run / superb.RECORD).read_text()) for out in outputs]
    assert records[0]["dev"] == records[1]["dev"] and records[1]["finished"]

    size = log.stat().st_size
    subprocess.run(
        superb_argv(tmp_path / "killed"), check=True, **quiet
    )  # finished: nothing is run
    assert log.stat().st_size == size

    (tmp_path / "killed" / run / TASKS["sid"].files(None)[0]).unlink()
    subprocess.run(superb_argv(tmp_path / "killed"), check=True, **quiet)  # tested again
    for name in TASKS["sid"].files(None):
        expected, again = ((tmp_path / out / run / name).read_text() for out in outputs)
        assert expected == again


def test_runs_with_and_without_cached_features_differ(in_superb_workspace, tmp_path, monkeypatch):
    (uncached,) = plan_runs(tmp_path, "fbank", tasks=["sid"])
    (cached,) = plan_runs(tmp_path, "fbank", tasks=["sid"], cache_features="")
    (named,) = plan_runs(tmp_path, "fbank", tasks=["sid"], cache_features="kept")
    assert uncached.digest != cached.digest == named.digest
    option = ["--cache-features", f"{tmp_path}/out/.features/fbank"]
    assert cached.training().command() == [*uncached.training().command(), *option]
    for request in (named.training(), named.checkpoint_test("x.ckpt")):
        assert request.command()[-2:] == ["--cache-features", "kept"]
    (default,) = plan_runs(tmp_path, "fbank", tasks=["sid"], cache_features=None)
    assert default == cached  # tiny recipes
    for changes in ({"recipes": "full", "recipe": ["downstream/voxceleb1/tiny.yaml"]}, {"gpus": 2}):
        (run,) = plan_runs(tmp_path, "fbank", tasks=["sid"], cache_features=None, **changes)
        assert run == uncached
    cached.folder.mkdir(parents=True)
    for first, second, option in (
        (uncached, cached, "--no-cache-features"),
        (cached, uncached, "--cache-features"),
    ):
        (cached.folder / superb.RECORD).write_text(json.dumps(vars(first.new_record())))
        superb.check_records([first])
        with pytest.raises(SetupError, match=f"add {option}"):
            superb.check_records([second])


def _fail():
    raise SetupError("failed")


def test_cached_features_are_removed_when_an_upstreams_runs_are_finished(
    in_superb_workspace, tmp_path, caplog
):
    caplog.set_level("INFO")
    first, second = runs = short_runs(tmp_path, "default", seeds=[1, 2], cache_features="")
    folder = tmp_path / "default/out/.features"
    file_counts = []

    def count_and_finish(runs, keep):
        file_counts.append(sum(path.is_file() for path in folder.rglob("*")))
        finish(runs, keep)

    finish = superb.finish_feature_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superb, "finish_feature_cache", count_and_finish)
        superb.run_plan(runs)
    # half of the 18 training utterances are longer than 9000 samples: random excerpts, not cached;
    # dev and test have 6 each
    assert file_counts == [9 + 6 + 6] and not folder.exists()
    logs = [read_counts((run.folder / "log.txt").read_text()) for run in runs]
    assert logs[0].misses == 21 and logs[1].misses == 0 < logs[1].hits
    total = logs[0] + logs[1]
    assert re.search(rf"\b{total.hits}\b.*\b21\b.*\b{total.excerpts}\b.*\.features", caplog.text)
    record = json.loads((first.folder / superb.RECORD).read_text())
    assert record["finished"] and record["features_alone"]

    (folder / "fbank_no_cmvn/00").mkdir(parents=True)  # left by a command that was killed
    superb.run_plan(runs, keep_features=True)
    assert folder.exists()
    superb.run_plan(runs)
    assert not folder.exists()
    (folder / "fbank_no_cmvn/00").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superb, "is_finished", lambda run: run is not first)
        patch.setattr(superb, "_run", lambda *arguments: _fail())
        with pytest.raises(SetupError, match="1 of 1 runs failed"):
            superb.run_plan(runs)
        assert folder.exists()

    (third,) = short_runs(tmp_path, "named", cache_features=str(tmp_path / "kept"), seeds=[1])
    superb.run_plan([third], keep_features=True)
    assert sum(path.is_file() for path in (tmp_path / "kept").rglob("*")) == 21
    for key, value in last_states(first)["Downstream"].items():
        assert torch.equal(value, last_states(third)["Downstream"][key]), key
