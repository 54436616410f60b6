"""Draws of distortions: distributions, reproducibility, inputs of both models, and errors."""

import dataclasses
import logging
import random
import re

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.data.batches import DistillationDataset, train_loader
from s3prl_ekd.data.distortion.pipeline import Distorter
from s3prl_ekd.data.distortion.settings import DistortionSettings
from s3prl_ekd.data.distortion.sources import AudioPool
from s3prl_ekd.data.sampling import generator
from s3prl_ekd.data.tables import read_tables
from s3prl_ekd.errors import ConfigError, DataError
from s3prl_ekd.files.config import from_plain_data, to_plain_data

from .conftest import data_settings, make_sound
from .distortions import RATE, only


def test_kinds_are_drawn_in_proportion_to_their_weights(distortion_sources):
    settings = from_plain_data(
        DistortionSettings,
        {
            "noise": [*distortion_sources["noise"], *distortion_sources["noise"]],
            "babble": True,
            "additive_weights": {"noise": 2, "gaussian": 1, "babble": 0, "clean": 3},
            "convolutive_weights": {"reverb": 1, "pitch": 2, "band_reject": 4, "clean": 1},
        },
        "distortion",
    )
    distorter = Distorter(settings, 0, ".", ["a", "b"])
    plans = [distorter.plan(f"u{i}.flac", 0, "student") for i in range(2000)]
    for name, weights in {
        "additive": {"noise:0": 2, "noise:1": 2, "gaussian": 1, "babble": 0, "clean": 3},
        "convolutive": {"reverb": 1, "pitch": 2, "band_reject": 4, "clean": 1},
    }.items():
        drawn = [getattr(plan, name) for plan in plans]
        assert set(drawn) <= set(weights)
        for kind, weight in weights.items():
            # Three standard deviations of 2000 draws are below 0.035.
            assert drawn.count(kind) / 2000 == pytest.approx(weight / 8, abs=0.035)
    for name, low, high in (("snr", 10, 19), ("cents", -500, 500), ("width", 100, 1000)):
        values = [getattr(plan, name) for plan in plans]
        assert low <= min(values) and max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
    assert all(200 <= plan.centre <= 6000 and 0.2 <= plan.rt60 <= 0.8 for plan in plans)


def test_draws_depend_on_seed_epoch_utterance_and_role_only():
    settings = DistortionSettings(setup="setup2")
    one, two = Distorter(settings, seed=1), Distorter(settings, seed=1)
    torch.manual_seed(99)
    random.seed(99)
    wave = torch.from_numpy(make_sound(0.2))
    assert two.plan("b", 0, "student") == one.plan(
        "b", 0, "student"
    )  # the order of draws does not matter
    assert torch.equal(one(wave, "a", 3, "teacher"), two(wave, "a", 3, "teacher"))
    plans = [
        distorter.plan(*arguments)
        for distorter in (one, Distorter(settings, seed=2))
        for arguments in (
            ("a", 0, "student"),
            ("a", 1, "student"),
            ("b", 0, "student"),
            ("a", 0, "both"),
        )
    ]
    assert len({plan.snr for plan in plans}) == len(plans)
    # A constant, because draws must be the same in other processes, Pythons and platforms.
    assert generator(one.seed, 5, "a/ü.flac", "student").getrandbits(32) == 476592250


def test_turning_a_kind_off_does_not_change_other_values():
    with_noise = Distorter(DistortionSettings(), 3).plan("a", 0, "student")
    without = Distorter(DistortionSettings(gaussian=False), 3).plan("a", 0, "student")
    assert dataclasses.replace(with_noise, additive="clean") == without


def dataset(corpus, setup, length=0, seed=5, **settings):
    rows = read_tables(corpus / "tables", ["train"])
    distortion = DistortionSettings(setup=setup, **settings)
    data = data_settings(corpus / "audio", 4, sequence_length=length)
    return DistillationDataset(data, rows, 400, distortion, seed)


def test_the_inputs_of_student_and_teachers(corpus):
    clean = dataset(corpus, "clean")[1]
    assert clean.teacher_waves is None
    one, two, same = (dataset(corpus, setup)[(0, 1)] for setup in ("setup1", "setup2", "same"))
    for batch in (one, two, same):
        assert torch.equal(batch.lengths, clean.lengths) and batch.names == clean.names
        assert batch.waves.shape == clean.waves.shape and batch.waves.dtype == torch.float32
        assert not torch.equal(batch.waves, clean.waves)
        for wave, length in zip(batch.waves, batch.lengths, strict=True):
            assert wave[length:].abs().sum() == 0
    assert torch.equal(one.teacher_waves, clean.waves)
    assert torch.equal(two.waves, one.waves)  # the student's draws do not depend on the teachers'
    assert two.teacher_waves.shape == clean.waves.shape
    assert not torch.equal(two.teacher_waves, clean.waves)
    assert not torch.equal(two.teacher_waves, two.waves)
    assert same.teacher_waves is None


def test_teacher_and_student_get_the_same_excerpt(corpus):
    """With only clean kinds, the inputs could differ in their excerpts only."""
    clean = only("additive", "clean").convolutive_weights
    batch = dataset(corpus, "setup1", 4000, gaussian=False, convolutive_weights=clean)[(0, 0)]
    assert batch.waves.shape == (4, 4000) and torch.equal(batch.waves, batch.teacher_waves)


def loader_of(corpus, workers=0, **options):
    data = data_settings(
        corpus / "audio", 5, corpus / "tables", sequence_length=6000, num_workers=workers
    )
    return train_loader(data, ["train"], min_samples=400, **options)


def epochs(corpus, count, workers, **more):
    """``{name of the first utterance: batch}`` for each of the first epochs."""
    loader = loader_of(corpus, workers, **more)
    return [{batch.names[0]: batch for batch in loader} for _ in range(count)]


def test_epochs_differ_and_workers_do_not_matter(corpus):
    distortion = DistortionSettings(setup="setup2", babble=True)
    torch.manual_seed(1)
    first = epochs(corpus, 2, 0, distortion=distortion, seed=7)
    torch.manual_seed(2)  # must not matter
    second = epochs(corpus, 2, 2, distortion=distortion, seed=7)
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys() and len(one) == 3
        for name, batch in one.items():
            assert torch.equal(batch.waves, two[name].waves)
            assert torch.equal(batch.teacher_waves, two[name].teacher_waves)
    other = epochs(corpus, 1, 0, distortion=distortion, seed=8)
    for name, batch in first[0].items():
        assert not torch.equal(batch.waves, first[1][name].waves)
        assert not torch.equal(batch.waves, other[0][name].waves)


def test_an_epoch_can_be_set_on_resume(corpus):
    distortion = DistortionSettings(setup="same")
    _, expected = epochs(corpus, 2, 0, distortion=distortion)
    loader = loader_of(corpus, distortion=distortion)
    loader.sampler.epoch = 1
    for batch in loader:
        assert torch.equal(batch.waves, expected[batch.names[0]].waves)


@pytest.mark.parametrize("distortion", [None, DistortionSettings()])
def test_clean_batches_equal_those_without_distortion(corpus, distortion):
    loader = loader_of(corpus, distortion=distortion)
    batches = list(loader)
    rows = read_tables(corpus / "tables", ["train"])
    data = data_settings(corpus / "audio", 5, sequence_length=6000)
    clean = DistillationDataset(data, rows, 400)
    order = [(0, index) for index in loader.sampler.order(0)]
    assert sorted(index for _, index in order) == list(range(len(clean)))
    for batch, item in zip(batches, order, strict=True):
        expected = clean[item]
        assert batch.names == expected.names and torch.equal(batch.waves, expected.waves)
        assert batch.teacher_waves is None and batch.problem == ""


def test_silent_noise_is_skipped_with_a_warning(distortion_sources, caplog):
    pool = AudioPool.of_folder("distortion.noise", distortion_sources["noise"][0])
    with caplog.at_level(logging.WARNING):
        lengths = {len(pool.draw(random.Random(seed))) for seed in range(30)}
    assert lengths == {48000, 4800}
    (warning,) = caplog.messages
    assert "zero.wav" in warning and re.search(r"\b1\b", warning)


def test_folders_that_cannot_be_used(tmp_path):
    def check(pattern, corpus=(), **settings):
        with pytest.raises(DataError, match=pattern):
            Distorter(DistortionSettings(setup="setup1", **settings), corpus=corpus)

    (tmp_path / "empty").mkdir()
    (tmp_path / "zeros").mkdir()
    soundfile.write(tmp_path / "zeros" / "a.wav", np.zeros(800), RATE)
    check("distortion.noise.*gone", noise=(str(tmp_path / "gone"),))
    check("distortion.noise.*empty", noise=(str(tmp_path / "empty"),))
    check("distortion.impulses.*gone", impulses=(str(tmp_path / "gone"),))
    check("distortion.babble", babble=True, corpus=["a"])
    zeros = Distorter(only("additive", "noise", noise=[str(tmp_path / "zeros")]))
    with pytest.raises(DataError, match="distortion.noise.*zeros"):
        zeros(torch.ones(800), "u", 0, "student")


def test_a_bad_noise_file_gives_a_batch_with_an_error_message(corpus, tmp_path):
    (tmp_path / "bad.wav").write_text("no audio")
    settings = only("additive", "noise", noise=[str(tmp_path)])
    rows = read_tables(corpus / "tables", ["train"])
    batch = DistillationDataset(data_settings(corpus / "audio", 4), rows, 400, settings)[0]
    assert "bad.wav" in batch.problem and len(batch.waves) == 0


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"snr_min": 20}, ["snr_min", "20.0", "snr_max", "19.0"]),
        ({"snr_max": 200}, ["snr_max", "200.0", "-60", "100"]),
        ({"rt60_min": 2}, ["rt60_min", "2.0", "rt60_max", "0.8"]),
        ({"rt60_min": 0}, ["rt60_min", "0.0", "0.01", "10"]),
        ({"band_high": 9000}, ["band_high", "9000.0", "20", "7900"]),
        ({"band_width_min": 0}, ["band_width_min", "0.0", "20", "4000"]),
        ({"pitch_cents": -1}, ["pitch_cents", "-1.0", "20", "2400"]),
        ({"babble_voices": 0}, ["babble_voices", "0", "1", "64"]),
        ({"additive_weights": {"clean": -1}}, ["d.additive_weights", "clean", "-1.0"]),
        ({"gaussian": False, "additive_weights": {"clean": 0}}, ["additive_weights"]),
        ({"setup": "setup3"}, ["d.setup", "'setup3'", "clean", "setup1"]),
        ({"noise": "folder"}, ["d.noise"]),
        ({"snr": 3}, ["'snr'"]),
    ],
)
def test_bad_settings(settings, parts):
    with pytest.raises(ConfigError, match=r"\bd\b") as error:
        from_plain_data(DistortionSettings, settings, "d")
    assert "\n" not in str(error.value)
    for part in parts:
        assert re.search(rf"(?<![\w.]){re.escape(part)}(?!\w)", str(error.value)), part


def test_settings_survive_a_checkpoint():
    settings = DistortionSettings(setup="setup2", noise=("a",), babble=True)
    assert from_plain_data(DistortionSettings, to_plain_data(settings), "d") == settings
    assert DistortionSettings().setup == "clean"
