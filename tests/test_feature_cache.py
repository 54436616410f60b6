"""`--cache-features`: the cached features equal s3prl's features of single utterances."""

import logging
import math
import os
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from s3prl.upstream.baseline.hubconf import fbank, fbank_no_cmvn
from s3prl.upstream.hubert.hubconf import hubert_local
from s3prl.upstream.interfaces import Featurizer
from safetensors.torch import load_file

from s3prl_ekd import cli
from s3prl_ekd.downstream.feature_cache import (
    CacheCounts,
    _output_digest,
    cached_runner,
    excerpt_length,
    folder_name,
    read_counts,
)
from s3prl_ekd.downstream.noise import find_noises, mix, noisy_runner
from s3prl_ekd.downstream.run import prepare
from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.files.states_file import to_storage_dtype, wave_key
from s3prl_ekd.hidden_states.feature_store import FeatureStore
from s3prl_ekd.request import CacheOptions, DownstreamRequest, NoisyTest

from .corpora import write_er_manifest

ARGS = {
    "upstream": "hubert_local",
    "upstream_ckpt": None,
    "upstream_model_config": None,
    "upstream_trainable": False,
    "selection": "hidden_states",
    "layer": None,
}


class Runner:
    """The attributes of s3prl's Runner in use: models of upstream, Featurizer, downstream."""

    def __init__(self, args, config):
        if args.upstream == "hubert_local":
            upstream = hubert_local(ckpt=args.upstream_ckpt).eval()
        else:
            upstream = {"fbank": fbank, "fbank_no_cmvn": fbank_no_cmvn}[args.upstream]().eval()
        featurizer = Featurizer(upstream, args.selection, "cpu", args.layer)
        self.upstream = Namespace(model=upstream)
        self.featurizer = Namespace(model=featurizer)
        self.downstream = Namespace(model=torch.nn.Identity().eval())

    @torch.no_grad()
    def features(self, waves):
        return self.featurizer.model(waves, self.upstream.model(waves))


def build(folder, *, config=None, gb=50.0, wrap=lambda runner: runner, **changed):
    args = Namespace(**{**ARGS, **changed})
    return wrap(cached_runner(Runner, CacheOptions(str(folder), gb)))(args, config or {})


def counts(runner) -> tuple[int, int, int]:
    counts = runner.upstream.model.counts
    return counts.hits, counts.misses, counts.excerpts


def files(folder) -> list:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- files


def test_write_and_read(tmp_path):
    store = FeatureStore(tmp_path, "a", 1.0)
    states = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    for key, stored in (
        ("00half", to_storage_dtype(states)),
        ("01single", to_storage_dtype(states * 1e5)),
        ("02nan", to_storage_dtype(states / states.new_tensor([1, 1, 1, 1, 0]))),
        ("03short", to_storage_dtype(states[:, :0])),
    ):
        store.write(key, stored)
        result = store.read(key)
        assert result.dtype == stored.dtype and result.shape == stored.shape
        torch.testing.assert_close(result, stored, rtol=0, atol=0, equal_nan=True)
    assert store.read("00half").dtype == torch.float16
    assert store.read("01single").dtype == store.read("02nan").dtype == torch.float32
    # by hand: 3 * 7 * 5 values of two bytes, and a header that names one tensor
    assert 210 < store.path("00half").stat().st_size < 210 + 512
    assert torch.equal(load_file(store.path("00half"))["states"], to_storage_dtype(states))
    assert store.read("04missing") is None
    assert store.written == sum(path.stat().st_size for path in files(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],  # in the header
        lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],  # in the values
        lambda data: data.replace(b"[2, 3, 4]", b"[4, 3, 2]"),
        lambda data: data.replace(b"F16", b"U16"),
        lambda data: data.replace(b"states", b"tensor"),
        lambda data: data[:8] + b"\xff" * 4 + data[12:],
        lambda data: b"PK\x03\x04" + data[4:],
    ],
)
def test_a_damaged_file_counts_as_missing(tmp_path, caplog, damage):
    store = FeatureStore(tmp_path, "a", 1.0)
    store.write("00key", torch.ones(2, 3, 4).half())
    path = store.path("00key")
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    assert store.read("00key") is None
    assert len(caplog.records) == 1 and str(path) in caplog.text


def test_the_size_limit_is_kept(tmp_path, caplog):
    states = torch.ones(1, 10, 50).half()  # 1000 bytes and a header in a file
    store = FeatureStore(tmp_path, "a", 2.5e-6)
    for i in range(5):
        store.write(f"0{i}key", states)
    assert len(files(tmp_path)) == 2 and store.read("00key") is not None
    assert len(caplog.records) == 1 and "--cache-features-gb" in caplog.text
    other = FeatureStore(tmp_path, "b", 2.5e-6)  # the limit is for all upstreams together
    other.write("00key", states)
    assert len(files(tmp_path)) == 2


def test_an_unwritable_cache_only_warns(tmp_path, caplog):
    (tmp_path / "a").write_text("in the way")
    store = FeatureStore(tmp_path, "a", 1.0)
    store.write("00key", torch.ones(1, 2, 3).half())
    assert len(caplog.records) == 1 and str(store.path("00key")) in caplog.text
    assert store.written == 0


def test_free_disk_space_is_kept(tmp_path, caplog, monkeypatch):
    states = torch.ones(1, 10, 50).half()
    first = FeatureStore(tmp_path / "first", "a", 1.0)
    first.write("00key", states)
    usage = shutil.disk_usage(tmp_path)
    free = [2_000_000_000 + first.written]  # a file leaves exactly 2 GB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    store = FeatureStore(tmp_path / "new", "a", 1.0)
    store.write("00key", states)
    free[0] -= 512  # more than the header, which is not counted
    for i in range(1, 4):
        store.write(f"0{i}key", states)
    assert len(files(tmp_path / "new")) == 1 and store.written == first.written
    assert len(caplog.records) == 1 and re.search(r"\b2\.0 GB\b", caplog.text)


def test_a_folder_removed_by_another_run_is_created_again(tmp_path, caplog, monkeypatch):
    store, replace = FeatureStore(tmp_path / "root", "a", 1.0), os.replace
    removed = []

    def remove_first(source, target):
        if not removed:
            removed.append(shutil.rmtree(tmp_path / "root"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", remove_first)
    store.write("00key", torch.ones(1, 10, 50).half())
    assert removed and store.read("00key") is not None and not caplog.text
    (path,) = files(tmp_path)
    assert store.written == path.stat().st_size


def test_keys_differ_between_waveforms():
    wave = torch.arange(5.0)
    assert wave_key(wave) == wave_key(wave.clone()) == wave_key(torch.arange(0.0, 10.0)[:5])
    assert wave_key(wave) == wave_key(torch.arange(10.0).view(5, 2)[:, 0] / 2)  # strides
    assert wave_key(torch.zeros(5)) != wave_key(torch.zeros(6))
    changed = wave.clone()
    changed[3] += 1e-6
    assert wave_key(changed) != wave_key(wave)


# --- in s3prl's Runner


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"selection": "last_hidden_state"},
        {"layer": 2},
        {"upstream": "fbank"},  # normalises over time, padding included
    ],
)
def test_features_are_those_of_each_utterance_alone(tmp_path, teachers, waves, changed):
    changed = {"upstream_ckpt": str(teachers["hubert"]), **changed}
    uncached = Runner(Namespace(**{**ARGS, **changed}), {})
    expected_features = [uncached.features([wave])[0] for wave in waves]
    runner = build(tmp_path, **changed)
    for expected in ((0, 3, 0), (3, 3, 0)):  # computed, then read
        features = runner.features(waves)
        assert counts(runner) == expected
        for result, reference in zip(features, expected_features, strict=True):
            assert result.dtype == torch.float32 and result.shape == reference.shape
            torch.testing.assert_close(result, reference, rtol=2e-3, atol=2e-3)
    reordered = build(tmp_path, **changed).features(list(reversed(waves)))
    # not bitwise equal: the Featurizer's weighted sum may round differently
    for result, reference in zip(reversed(reordered), features, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-6)


def test_padded_batches_differ(teachers, waves):
    """What the cache avoids: padding changes the shorter utterances and adds a frame to them."""
    uncached = Runner(Namespace(**{**ARGS, "upstream_ckpt": str(teachers["hubert"])}), {})
    batch = uncached.features(waves)
    for wave, padded in zip(waves[1:], batch[1:], strict=True):
        single = uncached.features([wave])[0]
        # by hand: frames of 25 ms every 20 ms give floor((n - 400) / 320) + 1
        assert len(single) == (len(wave) - 400) // 320 + 1
        assert len(padded) == round(len(wave) / 320)
        assert not torch.allclose(padded[: len(single)], single[: len(padded)], atol=1e-2)


def test_features_do_not_depend_on_the_contents_of_the_cache(tmp_path, teachers, waves):
    """Computed, read, or half of each: bitwise equal."""
    changed = {"upstream_ckpt": str(teachers["robust"])}
    first = build(tmp_path / "a", **changed).features(waves)
    half = build(tmp_path / "b", **changed)
    half.features(waves[:1])
    second = half.features(waves)
    assert counts(half) == (1, 3, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_damaged_file_is_computed_again(tmp_path, teachers, waves, caplog):
    changed = {"upstream_ckpt": str(teachers["hubert"])}
    before = build(tmp_path, **changed).features(waves)
    path = files(tmp_path)[0]
    data = path.read_bytes()
    path.write_bytes(data[:100])
    runner = build(tmp_path, **changed)
    after = runner.features(waves)
    assert counts(runner) == (2, 1, 0) and path.read_bytes() == data
    assert caplog.text.count(str(path)) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_folder_name_identifies_the_upstream(tmp_path, teachers):
    def name(selection="hidden_states", **changed):
        args = Namespace(**{**ARGS, **changed})
        upstream = Runner(args, {}).upstream.model
        return folder_name(args, upstream, selection)

    shutil.copy(teachers["hubert"], tmp_path / "copy.pt")
    (tmp_path / "config.yaml").write_text("a: 1\n")
    hubert = {"upstream_ckpt": str(teachers["hubert"])}
    hubert_name = name(**hubert)
    assert hubert_name == name(upstream_ckpt=str(tmp_path / "copy.pt"))
    names = {
        hubert_name,
        name(upstream_ckpt=str(teachers["robust"])),
        name("last_hidden_state", **hubert),
        name(**hubert, upstream_model_config=str(tmp_path / "config.yaml")),
        name(upstream="fbank"),
        name(upstream="fbank_no_cmvn"),
    }
    assert len(names) == 6


def test_changed_weights_change_the_folder_name(teachers):
    """As with a hub name without a checkpoint, or a URL whose file changes."""
    args = Namespace(**{**ARGS, "upstream_ckpt": str(teachers["hubert"])})
    upstream = Runner(args, {}).upstream.model
    args.upstream_ckpt = "https://example.org/model.pt"
    before = folder_name(args, upstream, "hidden_states")
    next(upstream.parameters()).data[0] += 1e-3
    assert folder_name(args, upstream, "hidden_states") != before


def hugging_face_folder(folder, **changed):
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    conv = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (40, 8)}
    conv |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
    config = HubertConfig(
        **sizes, **conv, num_attention_heads=2, num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer", conv_bias=True,
    )  # fmt: skip
    HubertModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(**changed).save_pretrained(folder)
    return folder


def test_the_folder_name_depends_on_hugging_face_settings(tmp_path):
    """preprocessor_config.json, next to the weights, changes the input of the model."""
    from s3prl.upstream.hf_hubert.hubconf import hf_hubert_custom

    def name(folder, ckpt=None):
        upstream = hf_hubert_custom(str(folder)).eval()
        args = Namespace(**{**ARGS, "upstream": "hf_hubert_custom"})
        args.upstream_ckpt = ckpt or str(folder)
        return folder_name(args, upstream, "hidden_states")

    first = hugging_face_folder(tmp_path / "first", do_normalize=True)
    other = hugging_face_folder(tmp_path / "other", do_normalize=False)
    same = shutil.copytree(first, tmp_path / "same")
    assert name(first) == name(same) != name(other)
    # an identifier of the hub does not identify its contents; the output digest does
    assert name(first, "a/b") == name(same, "a/b") != name(other, "a/b") != name(other)
    (same / "config.json").write_text((same / "config.json").read_text() + "\n")
    assert name(first) != name(same) and name(first, "a/b") == name(same, "a/b")


def test_the_output_digest_is_coarse_and_draws_no_random_numbers(teachers):
    args = Namespace(**{**ARGS, "upstream_ckpt": str(teachers["hubert"])})
    upstream = Runner(args, {})
    upstream = upstream.upstream.model.train()  # dropout, and a layer drop that uses NumPy
    before, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    names = {folder_name(args, upstream, "hidden_states") for _ in range(2)}
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], drawn) and len(names) == 1
    scaled = {
        _output_digest(Scaled(upstream, factor), "hidden_states", "cpu")
        for factor in (1, 1 + 1e-7, 1.5)
    }
    assert len(scaled) == 2


class Scaled(torch.nn.Module):
    def __init__(self, upstream, factor):
        super().__init__()
        self.upstream, self.factor = upstream, factor

    def forward(self, waves):
        return {"hidden_states": [x * self.factor for x in self.upstream(waves)["hidden_states"]]}


def test_noise_comes_before_the_cache(tmp_path, waves, noise_folder):
    clean_runner = build(tmp_path, upstream="fbank_no_cmvn")
    clean = clean_runner.features(waves)
    test = NoisyTest(str(noise_folder), 5.0, seed=2)
    changed = {"upstream": "fbank_no_cmvn", "wrap": lambda runner: noisy_runner(runner, test)}
    runner = build(tmp_path, **changed)
    features = runner.features(waves)
    assert counts(runner) == (0, 3, 0)  # noisy waveforms have different keys
    uncached = Runner(Namespace(**{**ARGS, "upstream": "fbank_no_cmvn"}), {})
    for wave, result, clean_result in zip(waves, features, clean, strict=True):
        by_hand = uncached.features([mix(wave, find_noises(noise_folder), 5.0, seed=2)])[0]
        torch.testing.assert_close(result, by_hand, rtol=2e-3, atol=2e-3)
        assert not torch.allclose(result, clean_result, atol=0.1)
    second = build(tmp_path, **changed)
    second.features(waves)
    clean_runner.features(waves)
    assert counts(second) == (3, 0, 0) and counts(clean_runner) == (3, 3, 0)


def test_full_utterances_are_cached_and_random_excerpts_are_not(tmp_path, teachers, waves):
    config = {"downstream_expert": {"datarc": {"max_timestep": 8000}}}
    ckpt = str(teachers["hubert"])
    runner = build(tmp_path, config=config, upstream_ckpt=ckpt)
    runner.downstream.model.train()
    batch = [waves[0][:8000], waves[2], waves[1][300:8300]]  # excerpt, short utterance, excerpt
    features = runner.features(batch)
    assert counts(runner) == (0, 1, 2) and len(files(tmp_path)) == 1
    uncached = Runner(Namespace(**{**ARGS, "upstream_ckpt": ckpt}), {})
    for wave, result in zip(batch, features, strict=True):
        torch.testing.assert_close(result, uncached.features([wave])[0], rtol=2e-3, atol=2e-3)
    runner.downstream.model.eval()  # now a waveform of that length is a full utterance
    runner.features(batch)
    assert counts(runner) == (1, 3, 2) and len(files(tmp_path)) == 3
    assert excerpt_length(config) == 8000
    assert excerpt_length({}) is excerpt_length({"downstream_expert": {"datarc": None}}) is None


def test_a_changing_number_of_layers_is_rejected(tmp_path, waves):
    runner = build(tmp_path, upstream="fbank")
    inner, layers = runner.upstream.model.upstream, iter((4, 3))
    inner.forward = lambda waves: {"hidden_states": [torch.ones(1, 9, 5)] * next(layers)}
    with pytest.raises(SetupError, match=r"\b4 layers\b.*\b3\b"):
        runner.upstream.model(waves[:2])
    inner.forward = lambda waves: {"hidden_states": [torch.ones(1, 9, 5), torch.ones(1, 4, 5)]}
    with pytest.raises(SetupError, match=r"\(1, 9, 5\), \(1, 4, 5\)"):
        runner.upstream.model(waves[2:])


def test_a_trained_upstream_is_rejected(tmp_path, waves):
    with pytest.raises(SetupError, match="--upstream_trainable"):
        build(tmp_path, upstream="fbank", upstream_trainable=True)
    runner = build(tmp_path, upstream="fbank")
    runner.upstream.model.train()
    with pytest.raises(SetupError, match="--cache-features"):
        runner.features(waves)


# --- options


def test_arguments_round_trip():
    options = CacheOptions("-odd", 2.5)
    parse = DownstreamRequest.parse
    assert parse(["-m", "train", *options.argv()]) == DownstreamRequest(mode="train", cache=options)
    assert parse(["-n", "x", "-o", "a=-1"]).cache is None
    assert parse(["--cache-features", "d"]).cache == CacheOptions("d", 50.0)


@pytest.mark.parametrize(
    "options, variables",
    [
        (("--cache-features",), "--cache-features result/features"),
        (("--cache-features-gb", "3"), "--cache-features result/features"),
        (("--cache-features", "d", "--cache-features-gb", "much"), "--cache-features-gb much"),
        (("--cache-features", "d", "--cache-features-gb", "nan"), "--cache-features-gb nan"),
        (("--cache-features", "d", "--cache-features-gb", "0"), "--cache-features-gb 0"),
        (("--cache-features", "a.pt"), "--cache-features a.pt"),
        (("--cache-features", "d", "--local_rank", "0"), "torchrun"),
    ],
)
def test_wrong_options_are_one_line_errors(tmp_path, monkeypatch, options, variables):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").touch()
    with pytest.raises(SetupError) as raised:
        prepare(["-m", "train", *options])
    message = str(raised.value)
    assert "\n" not in message
    for value in variables.split():
        start = r"(?<![\w.-])" if value[0] == "-" or len(value) == 1 else r"(?<!\w)"
        assert re.search(rf"{start}{re.escape(value)}(?![\w-])", message), (value, message)


def test_counts_are_read_from_a_log():
    first, second = CacheCounts(1, 2, 3, 4), CacheCounts(10, 20, 30, 40)
    log = f"test acc: 0.5\nINFO s3prl_ekd: {first}\nnonsense\nINFO s3prl_ekd: {second}\n"
    assert read_counts(log) == first + second == CacheCounts(11, 22, 33, 44)
    assert read_counts("") == CacheCounts()


# --- runs


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached_runs")
    manifest = write_er_manifest(folder / "corpus")
    cli.main(["init", str(folder / "work")])
    out = folder / "work/data/er"
    cli.main(["prepare", "er", str(manifest), "-o", str(out), "--fold-column", "group"])
    return folder / "work"


@pytest.fixture
def downstream(work, monkeypatch, caplog):
    """Run ``run_downstream.py ARGUMENTS`` in this process; return the counts in its log."""
    from s3prl_ekd.launch import run_downstream

    monkeypatch.chdir(work)
    caplog.set_level(logging.INFO)

    def run(*argv):
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["run_downstream.py", *argv, "--device", "cpu"])
        assert run_downstream() == 0
        return read_counts(caplog.text)

    return run


def train_argv(name, teachers, *options, batch=1, steps=12):
    rates = ",,".join(f"config.runner.{key}=6" for key in ("log_step", "eval_step", "save_step"))
    override = f"config.runner.total_steps={steps},,{rates},,config.runner.max_keep=9"
    override += f",,config.downstream_expert.datarc.train_batch_size={batch}"
    override += f",,config.downstream_expert.datarc.eval_batch_size={batch}"
    override += ",,config.optimizer.lr=0.01"
    argv = ["-m", "train", "-u", "hubert_local", "-k", str(teachers["hubert"]), "-d", "emotion"]
    return [*argv, "-c", "downstream/emotion/tiny.yaml", "-p", name, "-o", override, *options]


def test_with_batch_size_1_a_cached_run_equals_s3prls(downstream, teachers, work):
    downstream(*train_argv("plain", teachers))
    counts = downstream(*train_argv("cached", teachers, "--cache-features", "features"))
    assert counts.misses == len(files(work / "features")) > 0 and counts.hits > 0
    plain, cached = (
        read_checkpoint(work / name / "states-12.ckpt") for name in ("plain", "cached")
    )
    for part in ("Featurizer", "Downstream"):
        for key, value in plain[part].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(cached[part][key], value, rtol=0.02, atol=0.02)
    test = ("-m", "evaluate", "-t", "test", "-e")
    downstream(*test, "plain/states-12.ckpt")
    first = downstream(*test, "cached/states-12.ckpt", "--cache-features", "features")
    second = downstream(*test, "cached/states-12.ckpt", "--cache-features", "features")
    assert first.misses and second == CacheCounts(first.hits + first.misses)
    name = "test_fold1_predict.txt"
    assert (work / "plain" / name).read_text() == (work / "cached" / name).read_text()


def test_an_interrupted_cached_run_resumes_exactly(downstream, teachers, work):
    downstream(*train_argv("full", teachers, "--cache-features", "first", batch=4))
    (work / "resumed").mkdir()
    shutil.copy(work / "full/states-6.ckpt", work / "resumed")
    argv = ("-m", "train", "-e", "resumed/states-6.ckpt", "-o", "args.expdir='resumed'")
    counts = downstream(*argv, "--cache-features", "second")
    assert counts.misses  # the second cache was empty
    full, resumed = (
        read_checkpoint(work / name / "states-12.ckpt") for name in ("full", "resumed")
    )
    assert resumed["Step"] == 12
    assert math.isfinite(sum(v.sum() for v in resumed["Featurizer"].values()))
    for part in ("Featurizer", "Downstream"):
        for key, value in full[part].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(resumed[part][key], value), key
