"""tools/bench/evaluation.py: figures by hand, CPU seconds of processes, a small run."""

import sys

import pytest

from tools.bench.evaluation import commands, cpu_seconds, main, table

pytestmark = pytest.mark.slow  # of the developers' tools

BUSY = "import time\nwhile time.process_time() < 0.5: pass\n"


def test_the_time_of_a_process_that_outlives_its_parent_counts(tmp_path):
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BUSY!r}])"
    assert 0.5 <= cpu_seconds([sys.executable, "-c", start], tmp_path) < 2


def test_ratios_are_medians_over_turns():
    turns = [
        {"s3prl": 10.0, "cold": 8.0, "superb": 30.0, "superb, other": 90.0},
        {"s3prl": 20.0, "cold": 12.0, "superb": 30.0, "superb, other": 60.0},
        {"s3prl": 10.0, "cold": 5.0, "superb": 30.0, "superb, other": 75.0},
    ]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(turns).splitlines()]
    assert rows[2:] == [
        ["s3prl", "10.0", "", ""],
        ["cold", "8.0", "s3prl", "0.60 (0.55 to 0.70)"],
        ["superb", "30.0", "superb, other", "0.40 (0.37 to 0.45)"],
        ["superb, other", "75.0", "", ""],
    ]


def test_a_small_run(capsys):
    argv = ["--turns", "1", "--steps", "4", "--utterances", "40"]
    assert main([*argv, "--only", "s3prl", "cold", "warm"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["s3prl", "cold", "warm"]
    assert commands(0, 4, "python")["superb, other, cached"][0] == "python"
    with pytest.raises(SystemExit) as raised:
        main([*argv, "--only", "hot"])
    assert raised.value.code == 2 and "superb, uncached" in capsys.readouterr().err
