"""The demo's summary of its scores."""

from types import SimpleNamespace

import pytest

from s3prl_ekd.demo.run import PAIRS, STUDENTS, UPSTREAMS, compare_upstreams, score_table, verdict
from s3prl_ekd.superb.report import Difference


@pytest.mark.parametrize(
    ("low", "value", "high", "higher", "expected"),
    [
        (1.0, 2.0, 3.0, True, "better"),
        (1.0, 2.0, 3.0, False, "worse"),
        (-3.0, -2.0, -1.0, True, "worse"),
        (-3.0, -2.0, -1.0, False, "better"),
        (-0.1, 2.0, 3.0, True, "not significant"),
        (0.0, 2.0, 3.0, False, "not significant"),
        (0.0, 0.0, 0.0, True, "not significant"),
    ],
)
def test_verdict(low, value, high, higher, expected):
    assert verdict(Difference(value, low, high, 0.5), higher=higher) == expected


class Report:
    """A report of two upstreams on PR (lower is better), ASR and SID; ``b`` has no SID."""

    upstreams, columns = ("a", "b"), ("pr", "sid", "asr")
    metrics = {
        ("a", "pr", "clean"): SimpleNamespace(value=50.04, interval=(48.0, 52.06)),
        ("a", "sid", "clean"): SimpleNamespace(value=90.0, interval=(80.0, 100.0)),
        ("a", "asr", "clean"): SimpleNamespace(value=99.0, interval=(98.0, 100.0)),
        ("b", "pr", "clean"): SimpleNamespace(value=60.0, interval=(58.0, 62.0)),
        ("b", "asr", "clean"): SimpleNamespace(value=98.5, interval=(97.0, 99.0)),
    }

    def difference(self, upstream, baseline, task, condition):
        assert condition == "clean"
        differences = {
            ("a", "b", "pr"): (-9.96, -11.0, -9.0),
            ("a", "b", "asr"): (0.5, -0.2, 1.3),
        }
        difference = differences.get((upstream, baseline, task))
        return difference and Difference(*difference, 0.5)


def test_comparison_and_table():
    assert compare_upstreams(Report(), [("a", "b"), ("a", "c")]) == [
        "a against b: better on PR (-10.0); not significant on ASR (+0.5)"
    ]
    assert score_table(Report(), ("b", "c", "a")) == [
        ("", "PR PER ↓", "SID ACC ↑", "ASR WER ↓"),
        ("b", "60.0 [58.0, 62.0]", "", "98.5 [97.0, 99.0]"),
        ("a", "50.0 [48.0, 52.1]", "90.0 [80.0, 100.0]", "99.0 [98.0, 100.0]"),
    ]


def test_compared_upstreams_are_evaluated():
    assert set(STUDENTS) < set(UPSTREAMS) and len(set(UPSTREAMS)) == len(UPSTREAMS) == 7
    assert {name for pair in PAIRS for name in pair} < set(UPSTREAMS)
