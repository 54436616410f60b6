"""One run a folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from s3prl_ekd.errors import SetupError
from s3prl_ekd.launch import run_pretrain
from s3prl_ekd.system.lock import NAME, FolderLock
from s3prl_ekd.workspace import write_workspace

from .conftest import HOLD, write_configs


def test_a_second_process_is_told_who_is_there(tmp_path, lock_holder):
    process = lock_holder(tmp_path)
    with pytest.raises(SetupError) as caught, FolderLock(tmp_path):
        pass
    said = str(caught.value)
    assert f"{tmp_path} is in use: process {process.pid} on {socket.gethostname()}" in said
    assert "wait for it, stop it, or give this run another name" in said
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == process.pid  # still written there
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pid": "x"}', "no json", "\x00" * 2000])
def test_a_lock_file_may_hold_anything(tmp_path, lock_holder, text):
    lock_holder(tmp_path)
    (tmp_path / NAME).write_text(text)
    with pytest.raises(SetupError, match="in use: another process is writing"):
        FolderLock(tmp_path).__enter__()


def test_a_child_does_not_keep_the_lock(tmp_path):
    """As a DataLoader's workers, which outlive a killed run by some seconds."""
    code = HOLD.replace("time.sleep(100)", "os.fork() or time.sleep(30); os._exit(0)")
    done = subprocess.Popen(
        [sys.executable, "-c", "import os\n" + code, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert done.stdout.readline() == b"held\n"
    done.wait()
    with FolderLock(tmp_path):
        pass


def test_a_folder_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("s3prl_ekd.system.lock.fcntl.lockf", refuse)
    with FolderLock(tmp_path):
        assert "(No locks available): make sure that no second run" in caplog.text
    with pytest.raises(SetupError, match="cannot write into .*none: No such file"):
        FolderLock(tmp_path / "none").__enter__()


def test_two_runs_in_one_folder(tmp_path, teachers, corpus, monkeypatch, capfd, lock_holder):
    write_workspace(tmp_path)
    write_configs(tmp_path, teachers, corpus)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "result/pretrain/x"
    folder.mkdir(parents=True)

    def run(*words):
        words = ["-u", "ekd", "-n", "x", "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *words])
        with pytest.raises(SystemExit) as left:
            run_pretrain()
        assert left.value.code == 2
        return capfd.readouterr().err

    process = lock_holder(folder)
    new = ("-c", "runner.yaml", "-g", "model.yaml")
    assert f"result/pretrain/x is in use: process {process.pid} on" in run(*new)
    assert [path.name for path in folder.iterdir()] == [NAME]  # not even a config was written
    process.kill()
    process.wait()
    monkeypatch.setattr(sys, "argv", ["x", "-u", "ekd", "-n", "x", "--device", "cpu", *new])
    assert run_pretrain() == 0
    process = lock_holder(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert f"in use: process {process.pid} on" in run("-a", "-o", "config.runner.total_steps=9")
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["symlink", "dangling", "pipe", "folder"])
def test_a_lock_is_a_plain_file(tmp_path, kind):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    folder = tmp_path / "run"
    folder.mkdir()
    if kind == "symlink":
        os.symlink(precious, folder / NAME)
    elif kind == "dangling":
        os.symlink(tmp_path / "new", folder / NAME)
    elif kind == "pipe":
        os.mkfifo(folder / NAME)
    else:
        (folder / NAME).mkdir()
    with pytest.raises(SetupError, match=NAME if kind != "folder" else "run"):
        FolderLock(folder).__enter__()
    assert precious.read_text() == "kept" and not (tmp_path / "new").exists()


def test_waiting_for_a_process_that_is_on_its_way_out(tmp_path, lock_holder):
    process = lock_holder(tmp_path)
    threading.Timer(0.5, process.kill).start()
    with FolderLock(tmp_path, wait=60):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_lock_with_a_second_name_is_held_but_not_written_to(tmp_path, lock_holder):
    """As a backup by hard links leaves it, or somebody who wants a file of ours emptied."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "run").mkdir()
    os.link(precious, tmp_path / "run" / NAME)
    lock_holder(tmp_path / "run")
    with pytest.raises(SetupError, match="another process"):
        FolderLock(tmp_path / "run").__enter__()
    assert precious.read_text() == "kept"
