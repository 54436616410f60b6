"""s3prl's downstream script replaces ``isinstance``; it is put back."""

from __future__ import annotations

import builtins
from collections import defaultdict
from types import SimpleNamespace

from s3prl_ekd.downstream import run as downstream_run
from s3prl_ekd.request import DownstreamRequest


def test_isinstance_is_pythons_after_a_downstream_run(monkeypatch):
    from s3prl import run_downstream

    before, inside = builtins.isinstance, []

    def main():
        run_downstream.hack_isinstance()  # as s3prl's main does
        inside.append(isinstance(defaultdict(list), dict))

    monkeypatch.setattr("sys.argv", ["run_downstream.py"])
    script = SimpleNamespace(Runner=run_downstream.Runner, main=main)
    for _ in range(2):
        downstream_run.run(script, DownstreamRequest())
        assert builtins.isinstance is before
    assert inside == [False, False]
    assert isinstance(defaultdict(list), dict)


def test_also_after_one_that_failed(monkeypatch):
    from s3prl import run_downstream

    before = builtins.isinstance

    def main():
        run_downstream.hack_isinstance()
        raise SystemExit(3)

    monkeypatch.setattr("sys.argv", ["run_downstream.py"])
    try:
        script = SimpleNamespace(Runner=run_downstream.Runner, main=main)
        downstream_run.run(script, DownstreamRequest())
    except SystemExit as left:
        assert left.code == 3
    assert builtins.isinstance is before
