"""Batches by a budget of audio: full, of neighbours, with little padding."""

import random

import pytest

from s3prl_ekd.data.batches import train_loader
from s3prl_ekd.data.sampling import bucket, padding_share
from s3prl_ekd.data.tables import Utterance
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.pretrain.settings import load_runner_config

from .conftest import data_settings, write_configs

SECOND = 16000


def rows(*seconds):
    lengths = sorted((round(s * SECOND) for s in seconds), reverse=True)
    return [Utterance(f"u{i}.flac", length) for i, length in enumerate(lengths)]


def seconds(batches):
    return [[row.length / SECOND for row in batch] for batch in batches]


def test_as_many_as_the_budget_holds():
    found = bucket(rows(9, 7, 7, 6, 5, 2, 2, 2, 2, 1), 100, 14 * SECOND)
    # 9 alone (2 x 9 > 14); 7 7; 6 5 (3 x 6 > 14); 2 2 2 2 1 is 5 x 2
    assert seconds(found) == [[9], [7, 7], [6, 5], [2, 2, 2, 2, 1]]
    assert seconds(bucket(rows(9, 7, 7, 6, 5, 2, 2, 2, 2, 1), 3, 14 * SECOND)) == [
        [9],
        [7, 7],
        [6, 5],
        [2, 2, 2],
        [2, 1],
    ]
    assert seconds(bucket(rows(30, 1), 100, 14 * SECOND)) == [[30], [1]]


def test_an_excerpt_counts_as_what_it_is():
    found = bucket(rows(40, 30, 20, 3, 3), 100, 15 * SECOND, max_length=5 * SECOND)
    assert seconds(found) == [[40, 30, 20], [3, 3]]
    # 3 x 5 s and 2 x 3 s, without padding
    assert padding_share(found, 5 * SECOND) == 0
    # 3 x 40 - 90 and nothing: 30 of 126 s
    assert padding_share(found) == pytest.approx(30 / 126)


def librispeech_like(count, seed=0):
    """Lengths like those of LibriSpeech's training sets: most from 12 to 16 s, a tail of short
    ones, 12.3 s on average, 1.3 to 24.5 s."""
    draw = random.Random(seed)
    kinds = [lambda: draw.uniform(1.3, 12), lambda: draw.gauss(14.5, 1.2)]
    lengths = [min(24.5, max(1.3, kinds[draw.random() < 0.62]())) for _ in range(count)]
    assert 11 < sum(lengths) / count < 13
    return rows(*lengths)


def test_padding_of_a_corpus():
    corpus = librispeech_like(28000)
    by_budget = bucket(corpus, 500, 360 * SECOND, max_length=250000)
    by_number = bucket(corpus, 24)
    assert padding_share(by_budget, 250000) < 0.05
    shuffled = corpus[:]
    random.Random(1).shuffle(shuffled)
    assert padding_share(bucket(shuffled, 24)) > 0.3  # what is saved
    audio = [len(batch) * min(batch[0].length, 250000) / SECOND for batch in by_budget[:-1]]
    assert min(audio) > 0.93 * 360 and max(audio) <= 360
    # by number a batch of short utterances leaves a GPU half empty
    small = [sum(row.length for row in batch) / SECOND for batch in by_number[:-1]]
    assert min(small) < 0.2 * max(small)


def test_a_loader_with_a_budget(corpus, caplog):
    caplog.set_level("INFO")
    data = data_settings(
        corpus / "audio", 100, corpus / "tables", sequence_length=8000, max_seconds=1.5
    )
    loader = train_loader(data, ["train"], min_samples=400)
    sizes = [tuple(batch.waves.shape) for batch in loader]
    assert all(count * samples <= 1.5 * SECOND for count, samples in sizes)
    assert sum(count for count, _ in sizes) == sum(map(len, loader.dataset.batches)) > 5
    said = f"data: {len(sizes)} batches of 3 to 3 utterances, "
    assert said in caplog.text and "of their samples are padding" in caplog.text


@pytest.mark.parametrize("limit", [-1, 0.4])
def test_a_budget_that_holds_nothing(tmp_path, teachers, corpus, limit):
    write_configs(tmp_path, teachers, corpus)
    with pytest.raises(ConfigError, match="sequence_length has 0.5 s, and so much must fit"):
        load_runner_config(
            tmp_path / "runner.yaml", f"config.pretrain_expert.datarc.max_seconds={limit}"
        )
