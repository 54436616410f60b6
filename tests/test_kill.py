"""Killed and resumed, a run ends as if it had not been; ten kills and more: kill_and_resume.py."""

import subprocess
import sys

import pytest

from .conftest import REPO


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_ends_as_one_left_alone(workers):
    # In an interpreter of its own: it forks, and pytest's has threads by now.
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.kill_and_resume"),
            *("--kills", "3" if workers else "2", "--workers", str(workers)),
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "values compared; unequal: 0 []" in done.stdout
