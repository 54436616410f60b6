"""The planning table: hours from a rate, worked out by hand."""

import pytest

from s3prl_ekd.evaluate.bench_plan import plan_table, projections


def test_hours_of_the_published_run():
    # 200,000 x 24 x 12.3 s = 59.04 M s; at 5,000 audio seconds a second 11,808 s = 3.28 h
    run, *passes = projections(5000.0)
    assert run.seconds == pytest.approx(59.04e6)
    assert run.hours == pytest.approx((3.28, 3.28 / 8, 3.28 / 32))
    # 960 h at 5,000: 0.192 h; 60,000 h at 5,000 on 32: 0.375 h
    assert [each.hours[0] for each in passes] == pytest.approx([0.192, 1.2, 12.0])
    assert passes[2].hours[2] == pytest.approx(0.375)


def test_the_table_says_what_it_is():
    stages = {"teacher forward": 1.0, "backward": 1.0}
    side = {"wall": [stages, stages], "audio": [20.0, 20.0], "memory": {"peak": 3 * 2**30}}
    result = {"about": {"device": "cpu"}, "sides": {"ours": side}}
    text = plan_table(result, "ours", devices=(1, 4))
    assert "| one pass over LibriSpeech 960 h | 96.0 | 24.0 |" in text
    assert "A projection, not a measurement: 10 audio seconds a second on one cpu, 3.0 GiB" in text
    assert "| 200,000 steps of 24 utterances | 1,640 | 410.0 |" in text
