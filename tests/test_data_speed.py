"""The comparison of the data of two checkouts."""

import re
import subprocess
import sys

import pytest

from .conftest import REPO

pytestmark = pytest.mark.slow  # of the developers' tools


def test_a_checkout_against_itself(tmp_path):
    argv = [sys.executable, "tools/data_speed.py", ".", ".", "--turns", "1", "--passes", "1"]
    argv += ["--folder", tmp_path]
    output = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert output.count("same bytes") == 2
    rates = re.findall(r"(?:a CPU s|worker only) +([\d.]+) +([\d.]+)", output)
    assert len(rates) == 11 and all(float(rate) > 1 for pair in rates for rate in pair)
    for name in ("targets float16: bytes", "targets int8: bytes", "features: bytes"):
        before, after = re.search(rf"{name} +([\d.]+) +([\d.]+) +1.000", output).groups()
        assert before == after and float(before) > 0
    # 24 utterances of float16 and int8 (with a scale for each layer): about two bytes to one
    sizes = [float(re.search(rf"{d}: bytes +(\d+)", output)[1]) for d in ("float16", "int8")]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=1e-3)
