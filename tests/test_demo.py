"""The demo, short: every step of the way as a user starts it, and again when it was cut."""

import re

import pytest
import torch

from s3prl_ekd.evaluate.asr import error_rates

from .conftest import command

SHORT = ("--steps", "6", "--asr-steps", "8", "--utterances", "24")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("demo")
    done = command("demo", "d", *SHORT, cwd=folder)
    return folder / "d", done.stdout


def test_it_goes_all_the_way(demo):
    folder, said = demo
    assert "7/7 evaluate ASR" in said and "Traceback" not in said
    for name in ("student.pt", "distillation.png", "teachers/wavlm.pt", "data/corpus/corpus.json"):
        assert (folder / name).is_file(), name
    assert torch.load(folder / "student.pt", weights_only=True)["about"]["step"] == 6


def test_the_table_is_s3prls_number(demo):
    """The WER in the table, from the prediction files, and the one that s3prl's expert printed."""
    folder, said = demo
    (printed,) = re.findall(r"^test-clean wer: ([\d.]+)", said, re.M)
    rates = error_rates(folder / "result/downstream/demo_asr", "test-clean")
    assert rates.wer == pytest.approx(float(printed), abs=1e-6)
    assert rates.utterances == 40
    assert re.search(rf"test-clean \(40 utterances\) +{rates.wer:.1f} ", said)


def test_again_keeps_what_is_finished(demo):
    folder, _ = demo
    before = (folder / "data/corpus/corpus.json").stat().st_mtime_ns
    said = command("demo", "d", *SHORT, cwd=folder.parent).stdout
    assert "is at step 6 already" in said and "kept:" in said
    assert (folder / "data/corpus/corpus.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("value", ["0", "x", "-5"])
def test_a_wrong_number(tmp_path, value):
    done = command("demo", "d", f"--steps={value}", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "whole number of 4 or more" in done.stderr
    assert list(tmp_path.iterdir()) == []
