"""Child processes with a new interpreter, by spawn or a fork server, get our patches too."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from s3prl_ekd import compat
from s3prl_ekd import registration as plugin
from s3prl_ekd.compat.child_processes import repeat_in_children
from s3prl_ekd.downstream import requirements
from s3prl_ekd.workspace import write_workspace

from .conftest import REPO, make_sound, write_configs
from .phone_corpus import CMUDICT
from .preparing import prepare

_called: list[str] = []


def record(text):
    _called.append(text)


@pytest.fixture
def own_config(monkeypatch):
    """Undo :func:`repeat_in_children` after the test."""
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_config", dict(process._config))
    monkeypatch.delitem(process._config, "s3prl_ekd", raising=False)


def report(connection, method, depth):
    """Send the state of this process, then of a child, ``depth`` levels deep."""
    connection.send((_called, compat.fired()))
    if depth:
        start(connection, method, depth - 1)


def start(connection, method, depth=0):
    context = multiprocessing.get_context(method)
    child = context.Process(target=report, args=(connection, method, depth))
    child.start()
    child.join(120)
    assert child.exitcode == 0


METHODS = [name for name in multiprocessing.get_all_start_methods() if name != "fork"]


@pytest.mark.parametrize("method", METHODS)
def test_children_and_grandchildren_repeat_the_calls_in_order(own_config, method):
    repeat_in_children(record, "replaced")
    compat.apply()
    repeat_in_children(record, "first")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    start(sender, method, depth=1)
    for _ in range(2):
        assert receiver.poll(10)
        called, fired = receiver.recv()
        assert called == ["first"] and fired == compat.fired()


def report_names(connection):
    imported = "s3prl.hub" in sys.modules
    from s3prl import hub
    from s3prl.downstream.ctc.corpus.libriphone import LibriPhoneDataset  # noqa: F401

    guarded = vars(sys.modules["s3prl.upstream.distiller.model"]).get("eval")
    connection.send([imported, hasattr(hub, "ekd_student"), guarded.__module__])


def test_spawned_child_has_our_upstream_when_it_imports_the_hub(own_config):
    plugin.register()
    repeat_in_children(
        requirements.provide_ctc_corpus, Path.cwd()
    )  # an earlier test may have done it
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=report_names, args=(sender,))
    child.start()
    sender.close()
    assert receiver.recv() == [False, True, "s3prl_ekd.compat.no_eval"]
    child.join()


RECIPES = """
import multiprocessing, sys
from s3prl_ekd.launch import run_downstream

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    for line in open("runs.txt"):
        sys.argv[1:] = line.rstrip("\\n").split("\\t")
        task = sys.argv[-1]
        assert run_downstream() == 0
        print("done", task, flush=True)
"""
RUNS = {  # task (-d) -> settings of its data loaders
    "ctc": {
        "corpus.num_workers": 1,
        "corpus.path": "data/pr",
        "corpus.lexicon": ["data/pr/lexicon.txt"],
    },
    "asr": {"datarc.num_workers": 1, "datarc.libri_root": "data/asr"},
    "voxceleb1": {"datarc.num_workers": 1, "datarc.train_batch_size": 4},
    "emotion": {"datarc.num_workers": 1},
}
RUNS["asr"]["datarc.bucket_file"] = "data/asr/len_for_bucket"
RUNS["voxceleb1"].update({"datarc.file_path": "data/sid/audio"})
RUNS["voxceleb1"].update({"datarc.meta_data": "data/sid/split.txt"})
RUNS["emotion"].update({"datarc.root": "data/er/audio", "datarc.meta_data": "data/er/meta_data"})


@pytest.fixture
def recipes(tmp_path, monkeypatch, capsys):
    """A folder with data for all four recipes, and ``runs.txt``: arguments of a one-step run of
    each."""
    monkeypatch.chdir(tmp_path)
    write_workspace(tmp_path)
    Path("audio").mkdir()
    lines = ["path\tspeaker\temotion\ttext\tsplit\n"]
    for i in range(12):
        soundfile.write(f"audio/{i}.wav", make_sound(0.5 + 0.02 * i, seed=i), 16000)
        split = ("train", "train", "dev", "test")[i % 4]
        lines.append(
            f"{i}.wav\t{'ab'[i // 4 % 2]}\t{('sad', 'glad')[i // 4 % 2]}\tA CAT\t{split}\n"
        )
    Path("audio/all.tsv").write_text("".join(lines))
    Path("cmudict.txt").write_text(CMUDICT)
    for task in ("pr", "asr", "sid", "er"):
        lexicon = ("--lexicon", "cmudict.txt") if task == "pr" else ()
        assert prepare(task, "audio/all.tsv", "-o", f"data/{task}", *lexicon) == 0
    capsys.readouterr()
    steps = {"total_steps": 1, "log_step": 1, "save_step": 1, "eval_step": 100}
    with open("runs.txt", "w") as file:
        for task, settings in RUNS.items():
            options = [f"config.runner.{key}={value}" for key, value in steps.items()]
            options += [f"config.downstream_expert.{k}={v!r}" for k, v in settings.items()]
            argv = ("-m", "train", "-u", "fbank_no_cmvn", "-c", f"downstream/{task}/tiny.yaml")
            argv = (*argv, "-o", ",,".join(options), "-d", task, "-n", task)
            file.write("\t".join(argv) + "\n")
    return tmp_path


def test_workers_of_all_four_recipes(recipes):
    (recipes / "script.py").write_text(RECIPES)  # spawned children import __main__
    out = subprocess.run(
        [sys.executable, "script.py"],
        cwd=recipes,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert [line for line in out.stdout.splitlines() if line.startswith("done")] == [
        f"done {task}" for task in RUNS
    ]


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_pretraining(pretrain_folder, teachers, corpus, pretrain, method):
    write_configs(pretrain_folder, teachers, corpus, distortion={"setup": "setup1"})
    argv = ("-c", "runner.yaml", "-g", "model.yaml", "-n", "a", "-o")
    options = "config.pretrain_expert.datarc.num_workers=1,,config.runner.total_steps=2"
    options += ",,config.runner.save_step=1,,config.runner.log_step=1"
    previous = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        code, out = pretrain(*argv, options)
    finally:
        multiprocessing.set_start_method(previous, force=True)
    assert code == 0, out
