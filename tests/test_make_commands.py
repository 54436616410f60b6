"""tools/make_commands.py: the corpora have their files, and are the same each time."""

from __future__ import annotations

import hashlib

import make_commands
import pytest

from s3prl_ekd.data.manifest import read_manifest

from .preparing import prepare

pytestmark = pytest.mark.slow  # of the developers' tools


def test_corpora_are_the_same_each_time_and_prepared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_commands, "VOICES", {"train": 2, "dev": 2, "test": 2})
    monkeypatch.setattr(make_commands, "OBJECTS", ("lights", "heat"))
    digests = []
    for name in ("a", "b"):
        assert make_commands.main([str(tmp_path / name)]) == 0
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in files])
    assert digests[0] == digests[1]
    words = read_manifest(tmp_path / "a/ks.tsv", columns=("path", "split", "word")).entries
    assert len(words) == 6 * 17 and {e.cells["word"] for e in words} >= {"yes", "dog"}
    options = ("--noise", tmp_path / "a/noise", "-o", tmp_path / "ks")
    assert prepare("ks", tmp_path / "a/ks.tsv", *options) == 0
    assert prepare("ic", tmp_path / "a/ic.tsv", "-o", tmp_path / "ic") == 0
    for task, manifest in (("sf", "sf"), ("asv", "speakers"), ("sd", "speakers"), ("qbe", "qbe")):
        assert prepare(task, tmp_path / f"a/{manifest}.tsv", "-o", tmp_path / task) == 0
    assert make_commands.main([str(tmp_path / "a")]) == 2
    assert "exists" in capsys.readouterr().err
