"""Atomic writes: the previous file stays until the new one is complete."""

import errno
import io
import os
import subprocess
import sys

import pytest
import torch

from s3prl_ekd.errors import DataError, SetupError
from s3prl_ekd.files import atomic
from s3prl_ekd.files.atomic import patch_torch_save


def test_failed_save_keeps_the_previous_file(tmp_path):
    path = tmp_path / "states-1.ckpt"
    torch.save({"step": 1}, path)

    class Unsavable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    original = torch.save
    with pytest.raises(OSError, match="No space left"), patch_torch_save():
        torch.save({"tensor": torch.zeros(1000), "last": Unsavable()}, path)
    assert torch.save is original
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_torch_save_to_paths_and_file_objects(tmp_path):
    buffer = io.BytesIO()
    with patch_torch_save():
        torch.save({"a": 1}, str(tmp_path / "a.pt"))
        torch.save({"b": 2}, buffer)
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"a": 1}
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == {"b": 2}


def test_temporary_file_does_not_follow_a_symlink(tmp_path, monkeypatch):
    """Not even a symlink at its random name."""
    target = tmp_path / "target"
    target.write_text("original")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda count: "ab")
    os.symlink(target, tmp_path / ".x.json.ab.tmp")
    with pytest.raises(FileExistsError):
        atomic.write_text(tmp_path / "x.json", "new")
    assert target.read_text() == "original" and not (tmp_path / "x.json").exists()


def test_target_symlink_is_replaced_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("original")
    os.symlink(target, tmp_path / "x.json")
    atomic.write_text(tmp_path / "x.json", "new")
    assert target.read_text() == "original"
    assert (tmp_path / "x.json").read_text() == "new" and not (tmp_path / "x.json").is_symlink()


def test_permissions_follow_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        atomic.write_text(tmp_path / "x", "text")
    finally:
        os.umask(umask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


KILLED = """
import os, signal, sys
from pathlib import Path
from s3prl_ekd.files import atomic
out = Path(sys.argv[1])
with atomic.atomic_file(out / "x.json") as file, atomic.atomic_folder(out / "corpus") as folder:
    file.write(b"half"), file.flush()
    (folder / "half").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_killed_commands_are_removed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    for name in (".x.json.12.tmp", "x.json.345.tmp", ".corpus.67.partial", "corpus.old", "y.1.tmp"):
        (tmp_path / name).mkdir() if "corpus" in name else (tmp_path / name).touch()
    before = {path.name for path in tmp_path.iterdir()}

    def write():
        atomic.write_text(tmp_path / "x.json", "complete")
        with atomic.atomic_folder(tmp_path / "corpus") as folder:
            (folder / "a").write_text("complete")

    write()  # keeps the files of the running process, removes leftovers
    after = {path.name for path in tmp_path.iterdir()}
    assert before - after == {".x.json.12.tmp", "x.json.345.tmp", ".corpus.67.partial"}
    process.communicate("")  # it kills itself
    write()
    assert {path.name for path in tmp_path.iterdir()} == {
        "x.json",
        "corpus",
        "corpus.old",
        "y.1.tmp",
    }
    assert {path.name for path in (tmp_path / "corpus").iterdir()} == {"a"}


def test_failed_folder_keeps_the_previous_one(tmp_path):
    with atomic.atomic_folder(tmp_path / "x") as folder:
        (folder / "a").touch()
    with pytest.raises(ZeroDivisionError), atomic.atomic_folder(tmp_path / "x") as folder:
        (folder / "b").touch()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x/a").exists()
    with pytest.raises(DataError, match="x/y"):
        (tmp_path / "x/y").touch()
        with atomic.atomic_folder(tmp_path / "x/y/z", DataError):
            pass


def test_a_folder_is_in_place_before_the_previous_one_is_removed(tmp_path, monkeypatch):
    with atomic.atomic_folder(tmp_path / "x") as folder:
        (folder / "a").touch()
    removed, remove = [], atomic.shutil.rmtree

    def remove_watched(path, *args, **kwargs):
        if (path / "a").exists():
            removed.append((tmp_path / "x/b").exists())
        remove(path, *args, **kwargs)

    monkeypatch.setattr(atomic.shutil, "rmtree", remove_watched)
    with atomic.atomic_folder(tmp_path / "x") as folder:
        (folder / "b").touch()
    assert removed == [True] and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    """The next command finds the previous folder, whatever becomes of its own."""
    code = """
import os, pathlib, signal, sys
from s3prl_ekd.files import atomic
out = pathlib.Path(sys.argv[1])
with atomic.atomic_folder(out) as folder:
    (folder / "a").touch()
rename = pathlib.Path.rename
def kill_after(path, target):
    rename(path, target)
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.rename = kill_after
with atomic.atomic_folder(out) as folder:
    (folder / "b").touch()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
    with pytest.raises(ZeroDivisionError), atomic.atomic_folder(tmp_path / "x"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x/a").exists()


def test_a_folder_that_cannot_be_renamed_keeps_the_previous_one(tmp_path):
    with atomic.atomic_folder(tmp_path / "x") as folder:
        (folder / "a").touch()
    with pytest.raises(SetupError, match="cannot write"):
        with atomic.atomic_folder(tmp_path / "x") as folder:
            folder.rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x/a").exists()


def test_write_error_has_the_filename(tmp_path):
    with pytest.raises(OSError) as caught, atomic.atomic_file(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x") and not list(tmp_path.iterdir())


def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/null", tmp_path / "link")
    for name in ("pipe", "link"):
        with pytest.raises(OSError) as caught:
            atomic.write_text(tmp_path / name, "text")
        assert caught.value.errno == errno.EEXIST
        assert caught.value.filename == str(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link"}
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "pipe").is_file()


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "[a]*?"])
def test_long_and_unusual_names(tmp_path, name):
    atomic.write_text(tmp_path / name, "one")
    (tmp_path / f".{name[:50]}.{'0' * 16}.tmp").touch()  # left by a killed command
    atomic.write_text(tmp_path / name, "two")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "two"
