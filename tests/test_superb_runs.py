"""`s3prl-ekd superb`: a run that is killed and goes on, and kept hidden states."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from s3prl_ekd.downstream.feature_cache import read_counts
from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.run_checkpoints import read_run
from s3prl_ekd.superb import run as superb

from .superb_workspace import make_workspace, plan, short, states


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("superb"))


@pytest.fixture
def here(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    return prepared


def sweep(folder, out):
    words = ["superb", "fbank_no_cmvn", "--tasks", "sid", "--recipes", "tiny", "-o", out]
    # SID draws its excerpts from Python's generator; batches of 4 make five steps an epoch
    more = "sid=config.downstream_expert.datarc.train_batch_size=4"
    more += ",,config.downstream_expert.datarc.max_timestep=4000"
    words += ["--steps", "sid=16", "--override", more]
    return [sys.executable, "-m", "s3prl_ekd", *words]


def test_killed_in_the_middle_and_started_again_gives_the_same(prepared):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"cwd": prepared, "env": env, "stdout": subprocess.DEVNULL}
    subprocess.run(sweep(prepared, "whole"), check=True, **quiet)
    cut = subprocess.Popen(sweep(prepared, "cut"), start_new_session=True, **quiet)
    run = "fbank_no_cmvn/sid/lr0.003-seed1337"
    deadline = time.monotonic() + 120
    while not any((prepared / "cut" / run).glob("states-[48].ckpt")):  # within the second epoch
        assert time.monotonic() < deadline and cut.poll() is None
        time.sleep(0.02)
    os.killpg(cut.pid, signal.SIGKILL)
    cut.wait()
    record = json.loads((prepared / "cut" / run / superb.RECORD).read_text())
    assert not record["finished"] and record["dev"] is None
    subprocess.run(sweep(prepared, "cut"), check=True, **quiet)
    log = (prepared / "cut" / run / "log.txt").read_text()
    assert "going on after batch" in log

    first, second = (read_run(prepared / out / run / "states-16.ckpt") for out in ("whole", "cut"))
    for key, value in first["Downstream"].items():
        assert torch.equal(value, second["Downstream"][key]), key
    for name in TASKS["sid"].files(None):
        whole, resumed = ((prepared / out / run / name).read_text() for out in ("whole", "cut"))
        assert whole == resumed
    records = [
        json.loads((prepared / o / run / superb.RECORD).read_text()) for o in ("whole", "cut")
    ]
    assert records[0]["dev"] == records[1]["dev"] and records[1]["finished"]

    before = (prepared / "cut" / run / "log.txt").stat().st_size
    subprocess.run(sweep(prepared, "cut"), check=True, **quiet)  # finished: nothing is run
    assert (prepared / "cut" / run / "log.txt").stat().st_size == before


def test_runs_on_kept_hidden_states_are_others(here, tmp_path, monkeypatch):
    (plain,) = plan(tmp_path, "fbank", tasks=["sid"])
    (ours,) = plan(tmp_path, "fbank", tasks=["sid"], cache_features="")
    (named,) = plan(tmp_path, "fbank", tasks=["sid"], cache_features="kept")
    assert plain.digest != ours.digest == named.digest
    option = ["--cache-features", f"{tmp_path}/out/.features/fbank"]
    assert ours.training().command() == [*plain.training().command(), *option]
    for request in (named.training(), named.test("x.ckpt", superb.CLEAN)):
        assert request.command()[-2:] == ["--cache-features", "kept"]
    ours.folder.mkdir(parents=True)
    for first, second, hint in ((plain, ours, "without"), (ours, plain, "with")):
        record = {"format": superb.FORMAT, "digest": first.digest}
        record["features_alone"] = first is ours
        (ours.folder / superb.RECORD).write_text(json.dumps(record))
        superb.check_records([first])
        with pytest.raises(SetupError, match=f"[(]it ran {hint} --cache-features[)]"):
            superb.check_records([second])


def _fail():
    raise SetupError("no luck")


def test_hidden_states_are_kept_till_an_upstreams_runs_are_finished(here, tmp_path, caplog):
    caplog.set_level("INFO")
    first, second = runs = short(tmp_path, "default", seeds=[1, 2], cache_features="")
    folder = tmp_path / "default/out/.features"
    seen = []

    def watch(runs, keep):
        seen.append(sum(path.is_file() for path in folder.rglob("*")))
        close(runs, keep)

    close = superb.close_features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superb, "close_features", watch)
        assert superb.run_all(runs) == []
    # half of the 18 utterances to train on are longer than 9000 samples; 6 each of dev and test
    assert seen == [9 + 6 + 6] and not folder.exists()
    logs = [read_counts((run.folder / "log.txt").read_text()) for run in runs]
    assert logs[0].misses == 21 and logs[1].misses == 0 < logs[1].hits
    total = logs[0] + logs[1]
    said = f"found {total.hits} times, computed 21 times, and for {total.excerpts} random excerpts"
    assert said in caplog.text and "removed now" in caplog.text
    record = json.loads((first.folder / superb.RECORD).read_text())
    assert record["finished"] and record["features_alone"]

    (folder / "fbank_no_cmvn/00").mkdir(parents=True)  # as if cut before it was removed
    assert superb.run_all(runs, keep_features=True) == [] and folder.exists()
    assert superb.run_all(runs) == [] and not folder.exists()
    (folder / "fbank_no_cmvn/00").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superb, "is_finished", lambda run: run is not first)
        patch.setattr(superb, "_run", lambda *arguments: _fail())
        assert len(superb.run_all(runs)) == 1 and folder.exists()

    (third,) = short(tmp_path, "named", cache_features=str(tmp_path / "kept"), seeds=[1])
    assert superb.run_all([third], keep_features=True) == []
    assert sum(path.is_file() for path in (tmp_path / "kept").rglob("*")) == 21
    for key, value in states(first)["Downstream"].items():
        assert torch.equal(value, states(third)["Downstream"][key]), key
