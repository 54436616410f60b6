"""A package that is not installed: what is missing, who needs it, and what to type."""

import sys

import pytest

from s3prl_ekd.system.packages import install_command
from s3prl_ekd.system.terminal import show_errors


def run_as(name, code):
    """Run code as the module ``name``, within the context that shows a command's errors."""
    with show_errors(script=True):
        exec(compile(code, f"{name}.py", "exec"), {"__name__": name})


@pytest.mark.parametrize("name", ["s3prl.downstream.some_task.expert", "s3prl_ekd.downstream.run"])
def test_a_package_that_s3prl_imports(name, capsys):
    with pytest.raises(SystemExit) as stop:
        run_as(name, "from not_installed.part import function")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert "not_installed" in line and name in line and "pip install not_installed" in line


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("someones.program", "import not_installed"),  # not ours to explain
        ("s3prl.hub", "import json.no_such_part"),  # its package is installed
        ("s3prl.hub", "from json import no_such_name"),
        ("s3prl.hub", "raise ImportError('a reason of its own')"),
    ],
)
def test_other_import_errors_keep_their_traceback(name, code):
    with pytest.raises(ImportError):
        run_as(name, code)


def test_a_replacement_without_a_spec_counts_as_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "replaced_package", type(sys)("replaced_package"))
    with pytest.raises(ImportError):
        run_as("s3prl.hub", "import replaced_package.part")


def test_names_on_pypi():
    assert install_command("sklearn") == "pip install scikit-learn"
    assert install_command("joblib") == "pip install joblib"
