"""Locks on folders: one run at a time."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from s3prl_ekd.errors import SetupError
from s3prl_ekd.system.lock import LOCK_FILE, FolderLock

from .conftest import HOLD


def test_second_process_gets_an_error_that_names_the_first(tmp_path, lock_holder):
    process = lock_holder(tmp_path)
    with pytest.raises(SetupError) as caught, FolderLock(tmp_path):
        pass
    message = str(caught.value)
    assert str(tmp_path) in message and socket.gethostname() in message
    assert re.search(rf"\b{process.pid}\b", message)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == process.pid  # still in the file
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pid": "x"}', "no json", "\x00" * 2000])
def test_lock_file_with_damaged_contents(tmp_path, lock_holder, text):
    lock_holder(tmp_path)
    (tmp_path / LOCK_FILE).write_text(text)
    with pytest.raises(SetupError, match=re.escape(str(tmp_path))):
        FolderLock(tmp_path).__enter__()


def test_child_does_not_inherit_the_lock(tmp_path):
    """DataLoader workers outlive a killed run by some seconds."""
    code = HOLD.replace("time.sleep(100)", "os.fork() or time.sleep(30); os._exit(0)")
    process = subprocess.Popen(
        [sys.executable, "-c", "import os\n" + code, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    process.wait()
    with FolderLock(tmp_path):
        pass


def test_warning_on_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("s3prl_ekd.system.lock.fcntl.lockf", refuse)
    with FolderLock(tmp_path):
        assert str(tmp_path) in caplog.text and "No locks available" in caplog.text


def test_missing_folder(tmp_path):
    with pytest.raises(SetupError, match="none: No such file"):
        FolderLock(tmp_path / "none").__enter__()


def test_two_runs_in_one_folder(pretrain_folder, pretrain, lock_holder):
    folder = pretrain_folder / "result/pretrain/x"
    folder.mkdir(parents=True)

    def error(*options):
        code, output = pretrain("-n", "x", "--device", "cpu", *options)
        assert code == 2
        return output

    process = lock_holder(folder)
    new = ("-c", "runner.yaml", "-g", "model.yaml")
    assert re.search(rf"result/pretrain/x\b.*\b{process.pid}\b", error(*new))
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]  # not even a config is written
    process.kill()
    process.wait()
    assert pretrain("-n", "x", "--device", "cpu", *new)[0] == 0
    process = lock_holder(folder)
    before = sorted(path.name for path in folder.iterdir())
    resume = ("-a", "-o", "config.runner.total_steps=9")
    assert re.search(rf"result/pretrain/x\b.*\b{process.pid}\b", error(*resume))
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["symlink", "dangling", "pipe", "folder"])
def test_lock_file_must_be_a_regular_file(tmp_path, kind):
    target = tmp_path / "target"
    target.write_text("original")
    folder = tmp_path / "run"
    folder.mkdir()
    if kind == "symlink":
        os.symlink(target, folder / LOCK_FILE)
    elif kind == "dangling":
        os.symlink(tmp_path / "new", folder / LOCK_FILE)
    elif kind == "pipe":
        os.mkfifo(folder / LOCK_FILE)
    else:
        (folder / LOCK_FILE).mkdir()
    with pytest.raises(SetupError, match=LOCK_FILE if kind != "folder" else "run"):
        FolderLock(folder).__enter__()
    assert target.read_text() == "original" and not (tmp_path / "new").exists()


def test_waiting_for_a_process_that_ends(tmp_path, lock_holder):
    process = lock_holder(tmp_path)
    threading.Timer(0.5, process.kill).start()
    with FolderLock(tmp_path, wait=60):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_hard_linked_lock_file_is_locked_but_not_written(tmp_path, lock_holder):
    """A backup may hard-link it, and an attacker may link another file under its name."""
    target = tmp_path / "target"
    target.write_text("original")
    (tmp_path / "run").mkdir()
    os.link(target, tmp_path / "run" / LOCK_FILE)
    lock_holder(tmp_path / "run")
    with pytest.raises(SetupError, match=re.escape(str(tmp_path / "run"))):
        FolderLock(tmp_path / "run").__enter__()
    assert target.read_text() == "original"
