"""Buckets with a limit on samples: full batches of similar lengths, with little padding."""

import random
import re

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


def test_batches_are_as_large_as_the_limit_allows():
    batches = bucket(rows(9, 7, 7, 6, 5, 2, 2, 2, 2, 1), 100, 14 * SECOND)
    # 9 alone (2 x 9 > 14); 7 7; 6 5 (3 x 6 > 14); 2 2 2 2 1 is 5 x 2
    assert seconds(batches) == [[9], [7, 7], [6, 5], [2, 2, 2, 2, 1]]
    assert seconds(bucket(rows(9, 7, 7, 6, 5, 2, 2, 2, 2, 1), 3, 14 * SECOND)) == [
        [9],
        [7, 7],
        [6, 5],
        [2, 2, 2],
        [2, 1],
    ]
    assert seconds(bucket(rows(30, 1), 100, 14 * SECOND)) == [[30], [1]]


def test_excerpts_count_with_their_own_length():
    batches = bucket(rows(40, 30, 20, 3, 3), 100, 15 * SECOND, max_length=5 * SECOND)
    assert seconds(batches) == [[40, 30, 20], [3, 3]]
    # 3 x 5 s and 2 x 3 s, without padding
    assert padding_share(batches, 5 * SECOND) == 0
    # without excerpts 3 x 40 - 90 = 30 s of padding in 3 x 40 + 2 x 3 = 126 s
    assert padding_share(batches) == pytest.approx(30 / 126)


def librispeech_like(count, seed=0):
    """Lengths distributed as in LibriSpeech's training sets: most of them 12 to 16 s, some shorter,
    12.3 s on average, 1.3 to 24.5 s."""
    rng = random.Random(seed)
    distributions = [lambda: rng.uniform(1.3, 12), lambda: rng.gauss(14.5, 1.2)]
    lengths = [min(24.5, max(1.3, distributions[rng.random() < 0.62]())) for _ in range(count)]
    assert 11 < sum(lengths) / count < 13
    return rows(*lengths)


def test_padding_in_a_corpus_like_librispeech():
    corpus = librispeech_like(28000)
    by_samples = bucket(corpus, 500, 360 * SECOND, max_length=250000)
    by_utterances = bucket(corpus, 24)
    assert padding_share(by_samples, 250000) < 0.05
    shuffled = corpus[:]
    random.Random(1).shuffle(shuffled)
    assert padding_share(bucket(shuffled, 24)) > 0.3  # unsorted: much more padding
    audio = [len(batch) * min(batch[0].length, 250000) / SECOND for batch in by_samples[:-1]]
    assert min(audio) > 0.93 * 360 and max(audio) <= 360
    # with a fixed number of utterances, batches of short ones leave a GPU half empty
    audio = [sum(row.length for row in batch) / SECOND for batch in by_utterances[:-1]]
    assert min(audio) < 0.2 * max(audio)


def test_a_loader_with_a_limit_on_samples(corpus, caplog):
    caplog.set_level("INFO")
    data = data_settings(
        corpus / "audio", 100, corpus / "tables", sequence_length=8000, max_seconds=1.5
    )
    loader = train_loader(data, ["train"], min_samples=400)
    sizes = [tuple(batch.waves.shape) for batch in loader]
    assert all(count * samples <= 1.5 * SECOND for count, samples in sizes)
    assert sum(count for count, _ in sizes) == sum(map(len, loader.dataset.batches)) > 5
    (message,) = [message for message in caplog.messages if "batches" in message]
    number, smallest, largest, padding = re.findall(r"[\d.]+", message)
    assert (number, smallest, largest) == (str(len(sizes)), "3", "3") and 0 <= float(padding) < 100


@pytest.mark.parametrize("limit", [-1, 0.4])
def test_a_limit_too_small_for_one_excerpt(tmp_path, teachers, corpus, limit):
    write_configs(tmp_path, teachers, corpus)
    with pytest.raises(ConfigError, match="max_seconds"):
        load_runner_config(
            tmp_path / "runner.yaml", f"config.pretrain_expert.datarc.max_seconds={limit}"
        )
