"""Commands on a full disk, with closed or full standard streams, and in an ASCII locale."""

import os
import resource
import subprocess
import sys

import pytest

RUN = (sys.executable, "-m", "s3prl_ekd")


def run(*words, cwd, env=None, limit=None, redirect=""):
    """A command through a shell that redirects its streams; files may grow to ``limit`` bytes."""

    def limited():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *RUN, *words],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )


def only_sentence(done) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """The limit on the size of files stands for it: both are refusals of the system to write."""
    done = run("init", "work", cwd=tmp_path, limit=1000)
    assert "work" in only_sentence(done)
    files = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert all(0 < path.stat().st_size <= 1000 and ".tmp" not in path.name for path in files)
    (tmp_path / "work/pretrain/ekd").mkdir(parents=True, exist_ok=True)
    empty = tmp_path / "work/pretrain/ekd/config_model.yaml"
    empty.write_bytes(b"")  # as version 0.1 left it
    done = run("init", "work", cwd=tmp_path)
    assert done.returncode == 0 and empty.stat().st_size
    again = run("init", "work", cwd=tmp_path)
    assert again.returncode == 0 and "created" not in again.stdout


@pytest.mark.parametrize("words", [("init", "work"), ("init", "--list"), ("--help",)])
def test_a_full_output_is_a_sentence(tmp_path, words):
    done = run(*words, cwd=tmp_path, redirect=">/dev/full")
    if words == ("--help",) and done.returncode == 0:
        return  # argparse of some Pythons passes over it
    assert "standard output" in only_sentence(done)


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_borne(tmp_path, streams):
    done = run("init", "work", cwd=tmp_path, redirect=streams)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    # and nothing that was meant for the terminal is in a file
    assert "created" not in (tmp_path / "work/pretrain/ekd/config_model.yaml").read_text()
    bad = run("init", "work", "-x", "none", cwd=tmp_path, redirect=streams)
    assert bad.returncode == 2


def test_an_ascii_locale(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    folder = tmp_path / "grüße"
    done = run("init", os.fspath(folder), cwd=tmp_path, env=ascii_only)
    assert done.returncode == 0 and "gr" in done.stdout, done.stderr
    assert (folder / "pretrain/ekd/config_model.yaml").is_file()
    done = run("init", os.fspath(folder), "-x", "größe", cwd=tmp_path, env=ascii_only)
    only_sentence(done)


def test_a_closed_pipe(tmp_path):
    shown = subprocess.run(
        f"{sys.executable} -m s3prl_ekd init --list | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert not shown.stderr and len(shown.stdout.splitlines()) == 1
