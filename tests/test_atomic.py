"""Saving: the older file is there until the newer one is whole."""

import io
import os
import subprocess
import sys

import pytest
import torch

from s3prl_ekd.errors import DataError
from s3prl_ekd.files import atomic
from s3prl_ekd.files.atomic import patch_torch_save


def test_a_save_that_fails_leaves_the_older_file(tmp_path):
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


def test_paths_and_files(tmp_path):
    buffer = io.BytesIO()
    with patch_torch_save():
        torch.save({"a": 1}, str(tmp_path / "a.pt"))
        torch.save({"b": 2}, buffer)
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"a": 1}
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == {"b": 2}


def test_a_temporary_file_follows_no_link(tmp_path, monkeypatch):
    """Not even one that lies where its random name points."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda count: "ab")
    os.symlink(precious, tmp_path / ".x.json.ab.tmp")
    with pytest.raises(FileExistsError):
        atomic.write_text(tmp_path / "x.json", "new")
    assert precious.read_text() == "kept" and not (tmp_path / "x.json").exists()


def test_the_name_that_is_a_link_is_replaced_and_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    os.symlink(precious, tmp_path / "x.json")
    atomic.write_text(tmp_path / "x.json", "new")
    assert precious.read_text() == "kept"
    assert (tmp_path / "x.json").read_text() == "new" and not (tmp_path / "x.json").is_symlink()


def test_files_have_the_permissions_that_the_user_gives_files(tmp_path):
    before = os.umask(0o027)
    try:
        atomic.write_text(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


KILLED = """
import os, signal, sys
from pathlib import Path
from s3prl_ekd.files import atomic
out = Path(sys.argv[1])
with atomic.whole_file(out / "x.json") as file, atomic.whole_folder(out / "corpus") as folder:
    file.write(b"half"), file.flush()
    (folder / "half").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_command_left_goes_with_the_next_one(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    for name in (".x.json.12.tmp", "x.json.345.tmp", ".corpus.67.partial", "corpus.old", "y.1.tmp"):
        (tmp_path / name).mkdir() if "corpus" in name else (tmp_path / name).touch()
    running = {path.name for path in tmp_path.iterdir()}

    def write():
        atomic.write_text(tmp_path / "x.json", "whole")
        with atomic.whole_folder(tmp_path / "corpus") as folder:
            (folder / "a").write_text("whole")

    write()  # what another process is still writing stays, what earlier ones left does not
    left = {path.name for path in tmp_path.iterdir()}
    assert running - left == {".x.json.12.tmp", "x.json.345.tmp", ".corpus.67.partial"}
    process.communicate("")  # now it is killed
    write()
    assert {path.name for path in tmp_path.iterdir()} == {
        "x.json",
        "corpus",
        "corpus.old",
        "y.1.tmp",
    }
    assert {path.name for path in (tmp_path / "corpus").iterdir()} == {"a"}


def test_a_folder_that_fails_leaves_the_older_one(tmp_path):
    with atomic.whole_folder(tmp_path / "x") as folder:
        (folder / "a").touch()
    with pytest.raises(ZeroDivisionError), atomic.whole_folder(tmp_path / "x") as folder:
        (folder / "b").touch()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x/a").exists()
    with pytest.raises(DataError, match="x/y"):
        (tmp_path / "x/y").touch()
        with atomic.whole_folder(tmp_path / "x/y/z", DataError):
            pass


def test_a_refusal_to_write_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught, atomic.whole_file(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x") and not list(tmp_path.iterdir())


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/null", tmp_path / "link")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="plain file") as caught:
            atomic.write_text(tmp_path / name, "text")
        assert caught.value.filename == str(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link"}
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "pipe").is_file()


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "[a]*?"])
def test_any_name_that_the_system_takes(tmp_path, name):
    atomic.write_text(tmp_path / name, "one")
    (tmp_path / f".{name[:50]}.{'0' * 16}.tmp").touch()  # left by a command that was killed
    atomic.write_text(tmp_path / name, "two")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "two"
