"""`s3prl-ekd superb`: what it plans, what it refuses, and a run that is killed and goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd import cli
from s3prl_ekd.checkpoints import read_run
from s3prl_ekd.commands import superb as command_module
from s3prl_ekd.errors import DataError, SetupError
from s3prl_ekd.evaluate import superb
from s3prl_ekd.evaluate.probe import check_outputs
from s3prl_ekd.evaluate.superb_plan import (
    Upstream,
    noise_conditions,
    parse_upstream,
    steps_overrides,
)
from s3prl_ekd.evaluate.tasks import TASKS, choose_tasks

from .conftest import command

OPTIONS = {
    "tasks": ["sid", "er"],
    "recipes": "tiny",
    "recipe": [],
    "lr": [],
    "steps": [],
    "override": [],
    "seeds": [1337],
    "selection": "hidden_states",
    "noise": [],
    "snr": [],
    "jobs": 1,
    "gpus": 1,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workspace with SID and ER data: three speakers, each with an emotion of its own."""
    folder = tmp_path_factory.mktemp("superb")
    audio = folder / "audio"
    audio.mkdir()
    rng, lines = np.random.default_rng(1), ["path\tspeaker\temotion\tsplit\n"]
    for i, speaker in enumerate(("ann", "bob", "cy")):
        for j, split in enumerate(("train",) * 6 + ("dev",) * 2 + ("test",) * 2):
            time_axis = np.arange(7000 + 911 * j + 57 * i) / 16000
            sound = 0.2 * np.sin(2 * np.pi * (150 + 250 * i) * time_axis)
            sound += 0.02 * rng.standard_normal(len(time_axis))
            soundfile.write(audio / f"{speaker}{j}.wav", sound, 16000)
            lines.append(f"{speaker}{j}.wav\t{speaker}\t{('sad', 'glad')[i % 2]}\t{split}\n")
    (audio / "all.tsv").write_text("".join(lines))
    command("init", ".", cwd=folder)
    command("prepare", "sid", "audio/all.tsv", "-o", "data/sid", cwd=folder)
    command(
        *("prepare", "er", "audio/all.tsv", "-o", "data/er", "--fold-column", "speaker"),
        cwd=folder,
        check=False,
    )
    if not (folder / "data/er").is_dir():  # glad is bob alone: folds by split then
        command("prepare", "er", "audio/all.tsv", "-o", "data/er", cwd=folder)
    return folder


@pytest.fixture
def here(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    return prepared


def plan(tmp_path, *upstreams, **changed):
    options = {**OPTIONS, "output": tmp_path / "out", "upstreams": list(upstreams), **changed}
    return command_module.plan(SimpleNamespace(**options))


def fails(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["superb", *map(str, words)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error: ") == 1, error
    return error


def test_the_names_of_upstreams(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.pt").touch()
    assert parse_upstream("fbank") == Upstream("fbank", "fbank")
    assert parse_upstream("student.pt") == Upstream("student", "ekd_student", "student.pt")
    assert parse_upstream("a=student.pt").words == ["-u", "ekd_student", "-k", "student.pt"]
    hubert = parse_upstream("teacher=hubert_local:student.pt")
    assert hubert == Upstream("teacher", "hubert_local", "student.pt")
    heads = parse_upstream("student.pt", "hidden_states_and_heads")
    assert heads.words[-2:] == ["-s", "hidden_states_and_heads"]
    for wrong in ("nothing.pt", "a=hubert_local:nothing.pt", "../x=student.pt", ".x=student.pt"):
        with pytest.raises(SetupError):
            parse_upstream(wrong)


def test_a_checkpoint_counts_by_its_contents(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"one")
    (tmp_path / "b.pt").write_bytes(b"one")
    (tmp_path / "c.pt").write_bytes(b"two")
    a, b, c = (Upstream(n, "ekd_student", str(tmp_path / f"{n}.pt")).identity for n in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "steps, total, every", [(400, 400, 100), (10, 10, 2), (3, 3, 1), (7, 7, 1)]
)
def test_no_step_is_lost_at_the_end(steps, total, every):
    assert f"config.runner.total_steps={total}," in steps_overrides(steps)
    assert f"config.runner.eval_step={every}" in steps_overrides(steps)
    assert total % every == 0


def test_tasks_come_in_the_order_of_superb():
    assert [task.name for task in choose_tasks(["asr", "pr"])] == ["pr", "asr"]
    with pytest.raises(SetupError, match="unknown task 'ks'; known: pr, sid, er, asr"):
        choose_tasks(["ks"])


def test_the_plan_is_the_product_of_all(here, tmp_path):
    runs = plan(tmp_path, "fbank", "mfcc", lr=["sid=1e-3,5e-3"], seeds=[1, 2])
    sid = [run for run in runs if run.task.name == "sid"]
    assert len(sid) == 2 * 2 * 2
    assert {run.name for run in sid} == {
        "lr0.001-seed1", "lr0.001-seed2", "lr0.005-seed1", "lr0.005-seed2"
    }  # fmt: skip
    assert len({run.digest for run in runs}) == len(runs)
    assert len({run.folder for run in runs}) == len(runs)
    folds = len(list((here / "data/er/meta_data").glob("Session*")))
    er = [run for run in runs if run.task.name == "er"]
    assert len(er) == 2 * 2 * folds and {run.lr for run in er} == {1e-3}  # the recipe's
    assert all("test_fold='fold1'" in run.overrides for run in er if run.fold == "fold1")


def test_a_run_is_known_by_what_decides_its_result(here, tmp_path):
    (first,) = plan(tmp_path, "fbank", tasks=["sid"])
    (same,) = plan(tmp_path / "elsewhere", "fbank", tasks=["sid"])
    (other,) = plan(tmp_path, "fbank", tasks=["sid"], steps=["sid=8"])
    assert first.digest == same.digest != other.digest
    first.folder.mkdir(parents=True)
    record = {"format": superb.FORMAT, "digest": other.digest}
    (first.folder / superb.RECORD).write_text(json.dumps(record))
    with pytest.raises(SetupError, match="holds a run of another checkpoint, recipe or setting"):
        superb.check_records([first])
    (first.folder / superb.RECORD).write_text("[]")
    with pytest.raises(SetupError, match="is damaged; remove"):
        superb.check_records([first])


def test_noise_and_snr_belong_together(tmp_path):
    (tmp_path / "babble").mkdir()
    (tmp_path / "babble" / "a.flac").touch()
    folder = str(tmp_path / "babble")
    assert noise_conditions([folder], [5, -2.5]) == {
        "babble_snr5": (folder, 5.0),
        "babble_snr-2.5": (folder, -2.5),
    }
    assert noise_conditions([], []) == {}
    for folders, snrs in (([folder], []), ([], [5.0])):
        with pytest.raises(SetupError, match="--noise and --snr go together"):
            noise_conditions(folders, snrs)


def test_what_is_no_noise_is_said_before_any_training(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_split.tsv").write_text("path\ta.flac\n")
    (tmp_path / "no_test.tsv").write_text("path\tsplit\na.flac\ttrain\n")
    for name, said in (
        ("nowhere", "there is no such folder of noises"),
        ("empty", "has no audio"),
        ("no_split.tsv", "split"),
        ("no_test.tsv", "has no line in the split test"),
    ):
        with pytest.raises(DataError, match=said):
            noise_conditions([str(tmp_path / name)], [5.0])


def test_the_commands_can_be_given_to_a_queue(here, tmp_path, capsys):
    cli.main(["superb", "fbank", "--tasks", "sid", "--recipes", "tiny", "--dry-run", "--gpus", "4"])
    train, test = map(shlex.split, capsys.readouterr().out.splitlines())
    assert train[:3] == ["torchrun", "--standalone", "--nproc_per_node=4"]
    assert train[3:6] == ["-m", "s3prl_ekd", "run_downstream.py"] and "-a" in train
    assert test[:5] == ["run_downstream.py", "-m", "evaluate", "-t", "test"]
    assert test[-1].endswith("lr0.003-seed1337/dev-best.ckpt")


@pytest.mark.parametrize(
    "words, said",
    [
        (["fbank", "--tasks", "ks"], "unknown task 'ks'"),
        (["fbank", "fbank", "--tasks", "sid"], "two upstreams are called fbank"),
        (["nothing.pt"], "nothing.pt: there is no such file"),
        (["fbank", "--tasks", "asr"], "libri_root is ./data/corpus, which is not there"),
        (["fbank", "--tasks", "sid", "--lr", "sid=fast"], "--lr fast: a number above 0"),
        (["fbank", "--tasks", "sid", "--lr", "sdi=1"], "--lr sdi=1: unknown task 'sdi'"),
        (["fbank", "--tasks", "sid", "--seeds", "1", "1"], "--seeds names a seed twice"),
        (["fbank", "--tasks", "sid", "--jobs", "0"], "--jobs and --gpus must be 1 or more"),
        (["fbank", "--tasks", "sid", "--snr", "5"], "--noise and --snr go together"),
        (["no_such_model", "--tasks", "sid"], "s3prl has no such upstream"),
        (["fbank", "--tasks", "sid", "--recipe", "sid=x.yaml"], "there is no recipe x.yaml"),
    ],
)
def test_mistakes_are_a_sentence(here, capsys, words, said, tmp_path):
    assert said in fails(capsys, *words, "--recipes", "tiny", "-o", tmp_path / "out")


def test_an_upstream_that_the_recipes_cannot_use_is_named():
    state = torch.zeros(2, 49, 8)
    check_outputs({"hidden_states": [state, state]}, "hidden_states", "x")
    check_outputs({"hidden_states": (state, state)}, "hidden_states", "x")  # s3prl's own HuBERT
    for outputs, said in (
        ((state, state), "x returns a tuple; its forward must return a dict"),
        ({"last": state}, "gives no hidden_states; it gives: last"),
        ({"hidden_states": {"a": state}}, "as a dict"),
        ({"hidden_states": [state, state[:, :3]]}, "all must be tensors"),
        ({"hidden_states": [state[0]]}, "all must be tensors"),
        ({"hidden_states": [state / 0]}, "not finite"),
    ):
        with pytest.raises(SetupError, match=said):
            check_outputs(outputs, "hidden_states", "x")


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
