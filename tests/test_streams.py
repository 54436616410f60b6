"""Commands on a full disk, with closed or full standard streams, and in an ASCII locale."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile

RUN = (sys.executable, "-m", "s3prl_ekd")


def run(*argv, cwd, env=None, limit=None, redirect=""):
    """Run a command in a shell that redirects its streams; ``limit``: largest file in bytes."""

    def limit_file_size():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *RUN, *argv],
        cwd=cwd,
        # no bytecode files: a file size limit would truncate them, for all later processes
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
    )


def error_line(result) -> str:
    """The only line on standard error of a command that failed with exit code 2."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_full_disk_leaves_no_partial_file(tmp_path):
    """A limit on the file size simulates it: in both cases a write fails."""
    result = run("init", "work", cwd=tmp_path, limit=1000)
    assert "work" in error_line(result)
    files = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert all(0 < path.stat().st_size <= 1000 and ".tmp" not in path.name for path in files)
    (tmp_path / "work/pretrain/ekd").mkdir(parents=True, exist_ok=True)
    empty = tmp_path / "work/pretrain/ekd/config_model.yaml"
    empty.write_bytes(b"")  # as version 0.1 may have left it
    result = run("init", "work", cwd=tmp_path)
    assert result.returncode == 0 and empty.stat().st_size
    again = run("init", "work", cwd=tmp_path)
    assert again.returncode == 0 and "created" not in again.stdout


def test_a_disk_that_is_full_of_converted_audio(tmp_path):
    wave = 0.1 * np.random.default_rng(0).normal(size=80_000)
    soundfile.write(tmp_path / "a.wav", wave, 8000)
    manifest = tmp_path / "m.tsv"
    manifest.write_text("path\tspeaker\ttext\tsplit\na.wav\tann\tHELLO\ttrain\n")
    result = run("prepare", "asr", "m.tsv", "-o", "out", "--convert", cwd=tmp_path, limit=100_000)
    assert result.returncode == 2 and result.stderr.endswith("cannot write out: File too large\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "m.tsv"]


@pytest.mark.parametrize("argv", [("init", "work"), ("init", "--list"), ("--help",)])
def test_a_full_standard_output_is_an_error(tmp_path, argv):
    result = run(*argv, cwd=tmp_path, redirect=">/dev/full")
    if argv == ("--help",) and result.returncode == 0:
        return  # argparse of some Python versions ignores the error
    assert "standard output" in error_line(result)


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, streams):
    result = run("init", "work", cwd=tmp_path, redirect=streams)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    # no output for the terminal is written into a file
    assert "created" not in (tmp_path / "work/pretrain/ekd/config_model.yaml").read_text()
    bad = run("init", "work", "-x", "none", cwd=tmp_path, redirect=streams)
    assert bad.returncode == 2


def test_an_ascii_locale(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    folder = tmp_path / "grüße"
    result = run("init", os.fspath(folder), cwd=tmp_path, env=ascii_only)
    assert result.returncode == 0 and "gr" in result.stdout, result.stderr
    assert (folder / "pretrain/ekd/config_model.yaml").is_file()
    result = run("init", os.fspath(folder), "-x", "größe", cwd=tmp_path, env=ascii_only)
    error_line(result)


def test_a_closed_pipe(tmp_path):
    result = subprocess.run(
        f"{sys.executable} -m s3prl_ekd init --list | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert not result.stderr and len(result.stdout.splitlines()) == 1
