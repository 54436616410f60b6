"""``builtins.isinstance``, which s3prl's downstream script replaces, is restored."""

from __future__ import annotations

import builtins
from collections import defaultdict
from types import SimpleNamespace

from s3prl_ekd.downstream import run as downstream_run
from s3prl_ekd.request import DownstreamRequest


def test_isinstance_is_restored_after_a_downstream_run(monkeypatch):
    from s3prl import run_downstream

    original, results = builtins.isinstance, []

    def main():
        run_downstream.hack_isinstance()  # as s3prl's main does
        results.append(isinstance(defaultdict(list), dict))

    monkeypatch.setattr("sys.argv", ["run_downstream.py"])
    script = SimpleNamespace(Runner=run_downstream.Runner, main=main)
    for _ in range(2):
        downstream_run.run(script, DownstreamRequest())
        assert builtins.isinstance is original
    assert results == [False, False]
    assert isinstance(defaultdict(list), dict)


def test_isinstance_is_restored_after_a_failed_run(monkeypatch):
    from s3prl import run_downstream

    original = builtins.isinstance

    def main():
        run_downstream.hack_isinstance()
        raise SystemExit(3)

    monkeypatch.setattr("sys.argv", ["run_downstream.py"])
    try:
        script = SimpleNamespace(Runner=run_downstream.Runner, main=main)
        downstream_run.run(script, DownstreamRequest())
    except SystemExit as error:
        assert error.code == 3
    assert builtins.isinstance is original
