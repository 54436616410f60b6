"""`s3prl-ekd superb`: what it plans, what it refuses, and a run that is killed and goes on."""

import atexit
import json
import logging
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd import cli, voxceleb1_cache
from s3prl_ekd.checkpoints import read_run
from s3prl_ekd.commands import superb as command_module
from s3prl_ekd.errors import DataError, SetupError
from s3prl_ekd.evaluate import superb, superb_plan
from s3prl_ekd.evaluate import warm as warm_module
from s3prl_ekd.evaluate.probe import check_outputs
from s3prl_ekd.evaluate.superb_call import run_command
from s3prl_ekd.evaluate.superb_plan import (
    Upstream,
    noise_conditions,
    noise_digest,
    parse_upstream,
    steps_overrides,
)
from s3prl_ekd.evaluate.tasks import TASKS, choose_tasks
from s3prl_ekd.feature_cache.counts import read_counts

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
    "cache_features": None,
    "cache_features_gb": "50",
    "keep_features": False,
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
    with pytest.raises(SetupError, match="holds a run of another checkpoint, recipe, setting or"):
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


def test_two_noises_of_one_name_are_refused(tmp_path, monkeypatch):
    """Their tests would lie in one folder: the second would be taken for done."""
    for name in ("a", "b"):
        (tmp_path / name / "rain").mkdir(parents=True)
        (tmp_path / name / "rain" / "1.flac").touch()
    a, b = str(tmp_path / "a/rain"), str(tmp_path / "b/rain")
    with pytest.raises(SetupError, match=r"b/rain at 5 dB have one name, rain_snr5; rename"):
        noise_conditions([a, b], [5.0])
    with pytest.raises(SetupError, match="rain_snr5"):
        noise_conditions([a], [5.0, 5.0])
    for snr in (float("nan"), float("inf")):
        with pytest.raises(SetupError, match="a number of dB is needed"):
            noise_conditions([a], [snr])
    monkeypatch.chdir(a)
    assert list(noise_conditions(["."], [5.0])) == ["rain_snr5"]  # as its folder will be called
    assert noise_digest(a) == noise_digest(b)
    (tmp_path / "b/rain/2.flac").touch()
    noise_digest.cache_clear()
    assert noise_digest(a) != noise_digest(b)


def record_of(run, **changes):
    """As a finished run leaves it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    record = {"format": superb.FORMAT, "digest": run.digest, "model": run.upstream.digest}
    record |= {"finished": True, "tested": {"clean": "."}, "noises": {}}
    (run.folder / superb.RECORD).write_text(json.dumps(record | changes))


def test_a_test_under_other_noises_of_that_name_is_not_kept(here, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "rain").mkdir(parents=True)
        (tmp_path / name / "rain" / f"{name}.flac").touch()
    a, b = str(tmp_path / "a/rain"), str(tmp_path / "b/rain")
    words = {"tasks": ["sid"], "snr": [5.0]}
    (run,) = plan(tmp_path, "fbank", noise=[a], **words)
    record_of(run, noises={"rain_snr5": noise_digest(a)})
    superb.check_records([run])
    (run,) = plan(tmp_path, "fbank", noise=[b], **words)
    with pytest.raises(SetupError, match="tested under rain_snr5 with other noises than those"):
        superb.check_records([run])


def test_another_model_under_the_same_name_is_refused(here, tmp_path):
    """Of another task, too: the report would show the two as one."""
    (tmp_path / "s.pt").write_bytes(b"one")
    sid, er, *_ = plan(tmp_path, str(tmp_path / "s.pt"))
    record_of(sid)
    superb.check_records([er])
    (tmp_path / "s.pt").write_bytes(b"two, exported later")
    superb_plan._sha256.cache_clear()
    with pytest.raises(SetupError, match="is of another model than s is now; move"):
        superb.check_records([er])


def test_a_corpus_prepared_anew_makes_another_run(here, tmp_path):
    """Its files may have the same names: whole utterances, or a second of each."""
    (run,) = plan(tmp_path, "fbank", tasks=["sid"])
    before, table = run.digest, here / "data/sid/prepared.tsv"
    text = table.read_text()
    try:
        table.write_text(text.replace("\t", "\t ", 1))
        assert run.digest != before
    finally:
        table.write_text(text)
    assert run.digest == before


def test_a_second_process_in_a_runs_folder_is_told(here, tmp_path):
    (run,) = plan(tmp_path, "fbank", tasks=["sid"])
    run.folder.mkdir(parents=True)
    code = "import sys; from s3prl_ekd.training.lock import FolderLock\n"
    code += f"with FolderLock({str(run.folder)!r}): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        ((failed, reason),) = superb.run_all([run], warm=False)
        assert failed is run and "is in use: process" in reason
        assert not (run.folder / superb.RECORD).exists()
    finally:
        holder.communicate()


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
        (["fbank", "--tasks", "sid", "--keep-features"], "goes with --cache-features"),
        (["fbank", "--cache-features", "--gpus", "2"], "--cache-features is for --gpus 1"),
        (["fbank", "--cache-features", "audio/all.tsv"], "audio/all.tsv: this is a file; a folder"),
        (
            ["fbank", "--cache-features", "--cache-features-gb", "x"],
            "--cache-features-gb x: a number of gigabytes above 0",
        ),
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


# --- kept hidden states


def test_runs_on_kept_hidden_states_are_others(here, tmp_path, monkeypatch):
    (plain,) = plan(tmp_path, "fbank", tasks=["sid"])
    (ours,) = plan(tmp_path, "fbank", tasks=["sid"], cache_features="")
    (named,) = plan(tmp_path, "fbank", tasks=["sid"], cache_features="kept")
    assert plain.digest != ours.digest == named.digest
    assert plain.train_words() == [w for w in ours.train_words() if "cache" not in w]
    assert ours.train_words()[-1] == f"--cache-features={tmp_path}/out/.features/fbank"
    for words in (named.train_words(), named.test_words("x.ckpt", superb.CLEAN)):
        assert words[-1] == "--cache-features=kept"
    ours.folder.mkdir(parents=True)
    for first, second, hint in ((plain, ours, "without"), (ours, plain, "with")):
        record = {"format": superb.FORMAT, "digest": first.digest}
        record["features_alone"] = first is ours
        (ours.folder / superb.RECORD).write_text(json.dumps(record))
        superb.check_records([first])
        with pytest.raises(SetupError, match=f"[(]it ran {hint} --cache-features[)]"):
            superb.check_records([second])


def short(tmp_path, out, **changed):
    more = "sid=config.downstream_expert.datarc.train_batch_size=4"
    more += ",,config.downstream_expert.datarc.max_timestep=9000"
    return plan(
        tmp_path / out, "fbank_no_cmvn", tasks=["sid"], steps=["sid=8"], override=[more], **changed
    )


def _fail():
    raise SetupError("no luck")


def states(run):
    return read_run(run.folder / "states-8.ckpt")


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


# --- forked processes


@pytest.fixture(scope="module")
def server():
    """Whatever server another test has started in this process: the next is ours, with imports."""
    forkserver._forkserver._stop()
    yield warm_module.Processes(True)
    forkserver._forkserver._stop()


def _act(connection, *arguments):
    from s3prl_ekd import __main__

    parts = (_start_method, _leave_something, _speak, _compute)
    __main__.main = lambda: connection.send({part.__name__: part() for part in parts})
    warm_module._child(*arguments)


@pytest.fixture(scope="module")
def forked(server, tmp_path_factory):
    """A function of ours in place of a forked command, with two threads: what it gave, its log."""
    folder = tmp_path_factory.mktemp("forked")
    (folder / "tmp").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["TMPDIR"] = str(folder / "tmp")
    here, there = server._context.Pipe()
    arguments = ([], str(folder / "log.txt"), environment, str(folder), "fork", 2)
    child = server._context.Process(target=_act, args=(there, *arguments))
    child.start()
    try:
        there.close()
        assert here.poll(300), "no answer in five minutes"
        answer = here.recv()  # EOFError: see the log
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    return SimpleNamespace(folder=folder, log=(folder / "log.txt").read_text(), **answer)


def _start_method():
    return multiprocessing.get_start_method()


def test_a_forked_command_starts_its_workers_as_a_new_one_does(forked):
    """And not by fork servers of their own, each of which would import torch again."""
    assert forked._start_method == "fork"


_KEPT = []


def _leave_something():
    atexit.register(print, "at the end")
    _KEPT.append(voxceleb1_cache.FreshFolder())  # as s3prl's module keeps it
    folder = os.fspath(_KEPT[0])
    assert os.path.isdir(folder)
    return folder


def test_a_forked_command_cleans_up_as_a_new_one_does(forked):
    assert forked._leave_something.startswith(str(forked.folder / "tmp/s3prl_ekd_sid_"))
    assert not list(forked.folder.glob("tmp/s3prl_ekd_sid_*"))
    assert forked.log.endswith("at the end\n")


def _speak():
    print("on stdout", flush=True)
    handlers, strange = 0, []
    for reference in logging._handlerList:
        handler = reference()
        if type(handler) is logging.StreamHandler:  # made by the imports; s3prl has some thirty
            handler.handle(logging.LogRecord("x", logging.ERROR, "", 0, "by a handler", (), None))
            handlers += 1
            if handler.stream not in (sys.stdout, sys.stderr):
                strange.append(repr(handler))
    os.write(2, b"by descriptor\n")
    print("on stderr \udcff", file=sys.stderr)  # not flushed by us
    return strange, handlers, sys.stdin.read()


def test_all_that_a_forked_command_says_is_in_its_log(forked):
    strange, handlers, read = forked._speak
    assert not strange and handlers > 5 and read == ""
    assert forked.log.startswith("on stdout\n")
    assert "\nby descriptor\non stderr \\udcff\n" in forked.log
    assert forked.log.count("by a handler") == handlers


def _compute():
    a = torch.arange(400 * 400.0).view(400, 400).sin()
    sound = torch.nn.functional.conv1d(a[:1, None], a[:8, None, :9])
    value = (a @ a.T).abs().sum() + sound.abs().sum() + torch.cat([a] * 20).exp().sum()
    return torch.get_num_threads(), float(value)


def test_threads_after_the_fork(forked):
    """They are started there: waiting for those of the fork server would never end."""
    threads, value = forked._compute
    assert threads == 2 and value == pytest.approx(_compute()[1], rel=1e-5)


def test_how_many_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # 1 was read when torch was imported: conftest.py
    processes = warm_module.Processes(True)
    for wanted, threads in (("7", 1), ("3", 3), ("4,2", 4), ("", 1), ("many", 1), ("0", 1)):
        assert processes._threads_of({"OMP_NUM_THREADS": wanted}) == threads
    assert processes._threads_of({}) == 1


def test_the_fork_server_imports_all_that_a_run_needs():
    code = (
        "import os, sys, weakref; before = [os.fstat(i).st_ino for i in (1, 2)]\n"
        "from s3prl_ekd.evaluate import warm_imports as w\n"
        "assert [os.fstat(i).st_ino for i in (1, 2)] == before and sys.stderr is sys.__stderr__\n"
        "print([name for name in w._MODULES if name not in sys.modules])\n"
        "kinds = [type(f.peek()[0]).__name__ for f in list(weakref.finalize._registry)]\n"
        "print(kinds.count('TemporaryDirectory'))  # the first child would remove them\n"
        "import torch; print(torch.get_num_threads(), torch.cuda.is_initialized())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "0", "1 False"] and done.stderr == ""


@pytest.mark.parametrize(
    "version, private",
    [
        ((3, 10, 8), False),
        ((3, 10, 9), True),
        ((3, 11, 0), False),
        ((3, 11, 1), True),
        ((3, 13, 0), True),
    ],
)
def test_a_server_that_obeys_others_is_not_used(version, private):
    assert warm_module.has_private_server(version) == private


def test_a_process_that_has_gone_is_no_trouble_to_stop(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(warm_module, "_GRACE", 0.0)
    monkeypatch.setattr(warm_module, "_TO_SAVE", 0.0)
    processes = warm_module.Processes(False)
    processes._live.add(gone)
    processes.stop()


def test_a_process_that_ignores_ctrl_c_is_terminated(monkeypatch):
    monkeypatch.setattr(warm_module, "_GRACE", 0.1)
    monkeypatch.setattr(warm_module, "_TO_SAVE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', "
    child = subprocess.Popen(
        [sys.executable, "-c", code + "flush=True); time.sleep(600)"], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"deaf\n"
        processes = warm_module.Processes(False)
        processes._live.add(child)
        processes.stop()
        assert child.wait(timeout=10) == -signal.SIGTERM
    finally:
        child.kill()


def test_forked_processes_give_what_new_ones_give(here, tmp_path, monkeypatch, server):
    runs = [short(tmp_path, out)[0] for out in ("warm", "new")]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # torch's number here: conftest.py
    assert superb.run_all(runs[:1], warm=True) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert superb.run_all(runs[1:], warm=False) == []
    assert not list((tmp_path / "tmp").glob("s3prl_ekd_sid_*"))
    first, second = map(states, runs)
    for part in ("Featurizer", "Downstream", "Optimizer"):
        assert str(first[part]) == str(second[part])
    for key, value in first["Downstream"].items():
        assert torch.equal(value, second["Downstream"][key]), key
    for name in TASKS["sid"].files(None):
        assert (runs[0].folder / name).read_bytes() == (runs[1].folder / name).read_bytes()
    assert "test acc" in (runs[0].folder / "log.txt").read_text()


@pytest.mark.parametrize("warm", [True, False])
def test_how_a_command_ended_is_known(here, tmp_path, warm, server):
    (run,) = short(tmp_path, "out")
    run.folder.mkdir(parents=True)
    processes = warm_module.Processes(warm)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["run_downstream.py", "-m", "train", "-d", "nothing", "-n", "x"]
    with pytest.raises(SetupError, match="there is no configuration downstream/nothing"):
        run_command(run.folder, words, environment, processes)
    with pytest.raises(SetupError, match="unrecognized arguments"):
        run_command(run.folder, ["doctor", "--nonsense"], environment, processes)

    def end(how):
        deadline = time.monotonic() + 120
        log = run.folder / "log.txt"
        try:
            while not log.is_file() or "overall:" not in log.read_text():  # it trains
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:  # or the run would go on for ever
            how()

    long = [*run.train_words()[:-1], "config.runner.total_steps=1000000"]
    with ThreadPoolExecutor(1) as pool:
        (run.folder / "log.txt").unlink()
        pool.submit(end, lambda: [os.kill(c.pid, signal.SIGKILL) for c in processes._live])
        with pytest.raises(SetupError, match="ended by SIGKILL; the last line was: "):
            run_command(run.folder, long, environment, processes)
        (run.folder / "log.txt").unlink()
        pool.submit(end, processes.stop)
        with pytest.raises(SetupError, match="stopped by Ctrl-C"):
            run_command(run.folder, long, environment, processes)
    with pytest.raises(SetupError, match="stopped before it began"):
        run_command(run.folder, long, environment, processes)


def test_where_nothing_can_be_forked_commands_are_new_processes(
    tmp_path, monkeypatch, caplog, server
):
    forkserver._forkserver._stop()
    folder = tmp_path / ("x" * 120)  # longer than the path of a socket may be
    folder.mkdir()
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(folder))
    processes = warm_module.Processes(True)
    for log in ("a.txt", "b.txt"):
        words = ["doctor", "--nonsense"]
        assert processes.call(words, tmp_path / log, dict(os.environ)) == 2
        assert "unrecognized arguments: --nonsense" in (tmp_path / log).read_text()
    assert caplog.text.count("no command can be forked here") == 1
