"""A run that is killed and resumed equals an uninterrupted one; see kill_and_resume.py."""

import subprocess
import sys

import pytest

from .conftest import REPO


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "more"),
    [
        (0, ()),
        (2, ()),
        pytest.param(2, ("--pruned",), id="pruned"),
        pytest.param(2, ("--shared",), id="shared"),
    ],
)
def test_a_killed_run_equals_an_uninterrupted_one(workers, more):
    # In another interpreter: it forks, and this one has threads.
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.kill_and_resume"),
            *("--kills", "3" if workers else "2", "--workers", str(workers)),
            *more,
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "values compared; unequal: 0 []" in done.stdout
