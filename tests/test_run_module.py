"""``python -m s3prl_ekd MODULE ...`` runs a module as ``python -m MODULE ...`` does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from s3prl_ekd.__main__ import main

from .conftest import run_python

# Prints what a program can see of its start; with a student, what S3PRLUpstream makes of it, here
# and in a spawned process.
TOOL = """
import json, multiprocessing, sys

def width(path):
    from s3prl.nn import S3PRLUpstream
    assert "ekd_student" in S3PRLUpstream.available_names()
    return S3PRLUpstream("ekd_student", path_or_url=path).hidden_sizes

if __name__ == "__main__":
    print(json.dumps([sys.argv[1:], sys.argv[0], __name__, __spec__.name]))
    if sys.argv[1:2] == ["fail"]:
        raise ZeroDivisionError
    if sys.argv[1:2] == ["exit"]:
        sys.exit(3)
    if sys.argv[1:2] == ["student"]:
        here = width(sys.argv[2])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(json.dumps([here, pool.apply(width, sys.argv[2:3])]))
        sys.stdout.close()  # as json.tool does
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with the module ``app.tool``, ``app`` and ``tool``."""
    (tmp_path / "app").mkdir()
    for name in ("app/tool.py", "app/__main__.py", "tool.py"):
        (tmp_path / name).write_text(TOOL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    return tmp_path


def run(monkeypatch, *argv: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["s3prl_ekd", *argv])
    return main()


@pytest.mark.parametrize(
    "argv",
    [["app.tool", "--a", "b c"], ["-m", "app.tool"], ["-m", "tool", "-m", "x"], ["-m", "app"]],
    ids=" ".join,
)
def test_the_module_sees_what_it_sees_without_this_package(folder, monkeypatch, capsys, argv):
    plain = subprocess.run(
        [sys.executable, "-m", *argv[argv[0] == "-m" :]], capture_output=True, text=True
    )
    assert run(monkeypatch, *argv) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(plain.stdout)


def test_upstreams_are_registered_here_and_in_spawned_processes(folder, student_file):
    code = "from s3prl_ekd.__main__ import process; process()"
    out = run_python(code, "app.tool", "student", str(student_file))
    assert json.loads(out) == [[48, 48, 48]] * 2


def test_exits_and_exceptions_are_those_of_the_module(folder, monkeypatch, capfd):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "app.tool", "exit")
    assert stop.value.code == 3
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, "app.tool", "fail")


@pytest.mark.parametrize(
    "argv",
    [
        ["app/tool.py"],
        ["-m", "lib.bare"],
        ["missing.module"],
        ["app.missing"],
        ["-m", "missing"],
        ["app.tool", "student", "x.pt"],
    ],
)
def test_mistakes_are_one_sentence(folder, monkeypatch, capsys, argv):
    (folder / "lib/bare").mkdir(parents=True)
    (folder / "lib/bare/__init__.py").touch()  # a package that cannot be run
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *argv)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ")
    assert next(word for word in reversed(argv) if "." in word or word == "missing") in last


def test_an_import_error_within_the_module_keeps_its_traceback(folder, monkeypatch):
    (folder / "app/broken.py").write_text("import not_installed\n")
    (folder / "broken").mkdir()
    (folder / "broken/__init__.py").write_text("import not_installed\n")
    (folder / "broken/tool.py").touch()
    for name in ("app.broken", "broken.tool"):
        with pytest.raises(ModuleNotFoundError, match="not_installed"):
            run(monkeypatch, name)


def test_commands_come_first(folder, monkeypatch, capsys):
    """A module called like a command needs ``-m``; so does one without a dot."""
    (folder / "doctor.py").write_text("print('module')\n")
    assert run(monkeypatch, "-m", "doctor") == 0
    assert capsys.readouterr().out == "module\n"
    for name in ("tool", "init"):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, name, "--help" if name == "init" else "x")
        assert stop.value.code == (0 if name == "init" else 2)
