"""Target caches: equal to s3prl's hidden states of single utterances, and the same loss."""

import dataclasses
import hashlib
import json
import re
import shutil
from collections import defaultdict

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.data.batches import DistillationDataset, train_loader
from s3prl_ekd.errors import ConfigError, DataError
from s3prl_ekd.hidden_states.store import (
    RECORD,
    TargetBlock,
    TargetReader,
    frame_width,
    loudness,
    pack_targets,
    read_index,
    same_loudness,
    select_targets,
    unpack_targets,
    vectors_per_frame,
    write_index,
)

from .cache_cases import (
    adapter,
    cache,
    configs,
    experts,
    hidden_states,
)
from .conftest import data_settings, edit_yaml

# Contents of a cache


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_targets_equal_s3prls_hidden_states(cached_targets, teachers, corpus, dtype):
    """Up to the rounding of the dtype, and with that rounding."""
    reader, names = TargetReader(cached_targets / dtype), [f"u{i}.flac" for i in (0, 5, 11)]
    cached = reader.batch(names).on("cpu")
    targets, frames = cached.values, cached.frames
    assert list(targets) == ["hubert", "robust", "wavlm"]
    for name, expert in experts(teachers).items():
        for i, file in enumerate(names):
            sound, _ = soundfile.read(corpus / "audio" / file, dtype="float32")
            reader.check(file, torch.from_numpy(sound))
            expected = hidden_states(expert, sound)
            assert frames[i] == expected.shape[1]
            result = targets[name][i, :, : frames[i]]
            if dtype == "int8":
                bound = expected.abs().amax((1, 2), keepdim=True) / 254 * 1.0001 + 1e-7
            else:
                bound = expected.abs() * (2**-11 if dtype == "float16" else 2**-8) + 2**-24
            assert ((result - expected).abs() <= bound).all()
            assert (result != expected).any()
            assert not targets[name][i, :, frames[i] :].any()


def test_an_excerpt_is_the_same_in_every_epoch_and_for_every_seed(cache_folder, teachers, corpus):
    configs(cache_folder, teachers, corpus, {"sequence_length": 9000}, teacher_backend="s3prl")
    assert cache(cache_folder, "cache", "--seed", "3") == 0
    reader = TargetReader("cache")
    data = data_settings(corpus / "audio", 3, corpus / "tables", sequence_length=9000)
    rows = train_loader(data, ["train"], min_samples=400).dataset
    rows = [row for batch in rows.batches for row in batch]
    datasets = [DistillationDataset(data, rows, 400, seed=seed, targets=reader) for seed in (3, 4)]
    first = datasets[0][0, 1]
    assert torch.equal(first.waves, datasets[0][8, 1].waves)
    assert torch.equal(first.waves, datasets[1][8, 1].waves)
    without = DistillationDataset(data, rows, 400, seed=3)
    assert torch.equal(first.waves, without[0, 1].waves)
    assert not torch.equal(first.waves, without[8, 1].waves)
    cached = first.targets.on("cpu")
    targets, frames = cached.values, cached.frames
    for name, expert in experts(teachers).items():
        for i, wave in enumerate(first.waves):
            expected = hidden_states(expert, wave[: first.lengths[i]].numpy())
            assert torch.allclose(
                targets[name][i, :, : frames[i]], expected, rtol=2**-10, atol=1e-6
            )


def test_targets_beyond_float16_are_rejected(cache_folder, capfd, monkeypatch):
    from s3prl_ekd.pretrain.target_cache import build

    make = build.make_target_fn

    def make_large(*args):
        compute = make(*args)
        return lambda waves: {name: 1e5 * target for name, target in compute(waves).items()}

    monkeypatch.setattr(build, "make_target_fn", make_large)
    assert cache(cache_folder, "cache") == 2
    error = capfd.readouterr().err
    for text in ("float16", "--dtype bfloat16", "u11.flac"):
        assert text in error
    assert cache(cache_folder, "other", "--dtype", "bfloat16") == 0


# Training


def losses(expert, step=50):
    """Loss and scalars of each batch of epoch 0, in the table's order."""
    expert.eval()
    results = []
    for i in range(len(expert.dataloader.dataset)):
        records = defaultdict(list)
        with torch.no_grad():
            batch = expert.dataloader.dataset[i]
            loss, _ = expert(batch, records, global_step=step, log_step=50)
        results.append((loss.item(), {name: v[0].item() for name, v in records.items()}))
    return results


def layer_scalars(scalars):
    return [name for name in scalars if "_layer" in name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_batch_of_one_has_the_loss_without_a_cache(cache_folder, cached_targets, dtype):
    """L1 changes by at most the mean rounding, -log sigmoid of the cosine by at most the change of
    the angle; two terms for each of three target sets."""
    cached = adapter(cache_folder, train_batch_size=1, target_cache=str(cached_targets / dtype))
    for teacher in cached.distiller.teachers.values():
        assert not list(teacher.parameters())  # no teacher is loaded
    live = adapter(cache_folder, train_batch_size=1)
    rounding = 2**-11 if dtype == "float16" else 2**-8
    pairs = zip(losses(cached), losses(live), strict=True)
    for (cached_loss, cached_scalars), (live_loss, live_scalars) in pairs:
        assert cached_scalars.keys() == live_scalars.keys()
        assert len(layer_scalars(cached_scalars)) == 3 * 2 * 3
        size = max(value for name, value in live_scalars.items() if "target_abs" in name)
        assert abs(cached_loss - live_loss) <= 3 * rounding * (size + 2) + 1e-5
        for name in cached_scalars:
            difference = abs(cached_scalars[name] - live_scalars[name])
            assert difference <= rounding * (size + 2) + 1e-5, name


def test_padding_frames_do_not_count(cache_folder, cached_targets):
    """The loss of a padded batch equals that computed for each utterance without padding."""
    expert = adapter(
        cache_folder, train_batch_size=12, target_cache=str(cached_targets / "float16")
    )
    expert.eval()
    batch = expert.dataloader.dataset[0]
    with torch.no_grad():
        loss, _ = expert(batch, defaultdict(list), global_step=1)
        out = expert.distiller.student(batch.waves, batch.lengths)
        predictions = expert.distiller.heads(out)
    cached = batch.targets.on("cpu")
    targets, frames = cached.values, cached.frames
    expected = 0.0
    for name, prediction in predictions.items():
        l1, cosine, count = 0.0, 0.0, 0
        for i in range(12):
            n = min(int(frames[i]), int(out.mask[i].sum()))
            p, t = prediction[i, :, :n], targets[name][i, :, :n]
            l1 += (p - t).abs().mean(-1).sum().item()
            similar = torch.cosine_similarity(p, t, dim=-1)
            cosine -= torch.nn.functional.logsigmoid(similar).sum().item()
            count += n * 2
        expected += (l1 + cosine) / count / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


AVERAGED = {
    "average": {"aggregation": "average"},
    "concat": {"aggregation": "concat"},
    "both": {"aggregation": "average", "heads": {"per_teacher": True}},
    "residual": {"heads": {"residual": True}},
}


@pytest.mark.parametrize("how", AVERAGED)
def test_an_aggregated_cache_equals_one_per_teacher(
    cache_folder, cached_targets, teachers, corpus, how
):
    configs(cache_folder, teachers, corpus, teacher_backend="s3prl", **AVERAGED[how])
    assert cache(cache_folder, "aggregated", "--aggregated") == 0
    one = losses(adapter(cache_folder, target_cache="aggregated"))
    other = losses(adapter(cache_folder, target_cache=str(cached_targets / "float16")))
    for (loss, scalars), (reference, reference_scalars) in zip(one, other, strict=True):
        assert loss == pytest.approx(reference, rel=2**-9)
        assert not layer_scalars(scalars) and len(layer_scalars(reference_scalars)) == 3 * 2 * 3


@pytest.mark.parametrize(
    "model",
    [
        {"target_norm": "mean_std"},
        {"targets": {"drop_teachers": 0.5}},
        {"aggregation": "average", "loss": {"agreement": 0.5}},
    ],
    ids=str,
)
def test_settings_that_change_the_targets_over_time(
    cache_folder, cached_targets, teachers, corpus, model
):
    configs(cache_folder, teachers, corpus, teacher_backend="s3prl", **model)
    losses = []
    for changes in ({"target_cache": str(cached_targets / "float16")}, {}):
        expert = adapter(cache_folder, train_batch_size=1, **changes)
        expert.train()
        torch.manual_seed(1)
        batch = expert.dataloader.dataset[2]
        losses.append(expert(batch, defaultdict(list), global_step=3)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_units_of_a_cached_layer(cache_folder, cached_targets, monkeypatch):
    from s3prl_ekd.essence.units import Units

    centroids = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    with edit_yaml(cache_folder / "model.yaml") as config:
        config["unit_loss"] = {"file": "units.safetensors"}
    monkeypatch.setattr(
        "s3prl_ekd.essence.units.load_units", lambda path: Units(centroids, "robust", 4)
    )
    one = losses(
        adapter(cache_folder, train_batch_size=1, target_cache=str(cached_targets / "float16"))
    )
    other = losses(adapter(cache_folder, train_batch_size=1))
    for (loss, scalars), (reference, reference_scalars) in zip(one, other, strict=True):
        assert scalars["unit_loss"] == pytest.approx(reference_scalars["unit_loss"], abs=0.05)
        assert loss == pytest.approx(reference, abs=0.05)
    monkeypatch.setattr(
        "s3prl_ekd.essence.units.load_units", lambda path: Units(centroids, "robust", 3)
    )
    with pytest.raises(ConfigError, match=r"unit_loss\[0\].file.*\b3\b.*\brobust\b"):
        adapter(cache_folder, target_cache=str(cached_targets / "float16"))


def test_fewer_teachers_and_layers_from_one_cache(cache_folder, cached_targets, teachers):
    """In another order too; int8, to check that the scales follow."""
    with edit_yaml(cache_folder / "model.yaml") as config:
        config["teachers"] = {
            "wavlm": {"model": str(teachers["wavlm"]), "layers": [4, 2]},
            "hubert": {"model": str(teachers["hubert"]), "layers": [4]},
        }
    expert = adapter(cache_folder, target_cache=str(cached_targets / "int8"))
    batch = expert.dataloader.dataset[1]
    subset = batch.targets.on("cpu").values
    full = TargetReader(cached_targets / "int8").batch(batch.names).on("cpu").values
    assert list(subset) == ["wavlm", "hubert"]
    assert torch.equal(subset["wavlm"], full["wavlm"].flip(1))
    assert torch.equal(subset["hubert"], full["hubert"][:, 1:])


def test_a_distorted_student_has_clean_targets(cache_folder, cached_targets):
    with edit_yaml(cache_folder / "model.yaml") as config:
        config["distortion"] = {"setup": "setup1"}
    dataset = adapter(cache_folder, target_cache=str(cached_targets / "float16")).dataloader.dataset
    one, two = dataset[0, 1], dataset[1, 1]
    assert not torch.equal(one.waves, two.waves)
    assert torch.equal(one.targets.values, two.targets.values)
    assert one.teacher_waves is None and one.names == two.names
    clean = TargetReader(cached_targets / "float16").batch(one.names)
    assert torch.equal(one.targets.values, clean.values)


# The layout


def test_join_and_split_blocks():
    layout = (TargetBlock("a", 2, 3), TargetBlock("b", 1, 4))
    targets = {"a": torch.arange(30.0).view(1, 2, 5, 3), "b": -torch.arange(20.0).view(1, 1, 5, 4)}
    assert (frame_width(layout), vectors_per_frame(layout)) == (10, 3)
    flat = pack_targets(targets, layout)
    assert flat[2].tolist() == [6, 7, 8, 21, 22, 23, -8, -9, -10, -11]
    result = unpack_targets(flat[None], None, layout)
    assert all(torch.equal(result[name], targets[name]) for name in targets)
    scaled = unpack_targets(flat[None], torch.tensor([[1.0, 2.0, 3.0]]), layout)
    assert torch.equal(scaled["a"][:, 1], 2 * targets["a"][:, 1])
    assert torch.equal(scaled["b"], 3 * targets["b"])
    part = select_targets(layout, {"b": [0], "a": [1]})
    assert part == ((TargetBlock("b", 1, 4), TargetBlock("a", 1, 3)), ((6, 10), (3, 6)), (2, 1))
    assert select_targets(layout, {"a": [0, 1], "b": [0]}).spans == ((0, 10),)


def test_write_and_read_an_index(tmp_path, cached_targets):
    index = read_index(cached_targets / "int8")
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    assert dataclasses.replace(index, complete=False) != index
    assert index.version == 2 and np.dtype(RECORD).itemsize == 44


def as_version_1(folder, copy):
    """A copy of a cache as version 0.1 wrote it, without the loudness of the audio."""
    shutil.copytree(folder, copy)
    path = copy / "utterances.bin"
    records = np.frombuffer(path.read_bytes(), RECORD)
    path.write_bytes(b"".join(r.tobytes()[:12] for r in records))
    index = json.loads((copy / "index.json").read_text())
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    (copy / "index.json").write_text(json.dumps(index | {"version": 1, "digest": digest}))
    return copy


def test_a_cache_of_version_1(tmp_path, cached_targets):
    """It has the same targets, and the audio is compared by its length only."""
    old = TargetReader(as_version_1(cached_targets / "int8", tmp_path / "old"))
    new = TargetReader(cached_targets / "int8")
    names = ["u0.flac", "u5.flac"]
    one, two = (reader.batch(names).on("cpu") for reader in (old, new))
    assert all(torch.equal(one.values[name], two.values[name]) for name in two.values)
    length = int(new.records["samples"][new.index.utterances.index("u0.flac")])
    old.check("u0.flac", torch.zeros(length))
    with pytest.raises(DataError, match=r"u0\.flac.*changed"):
        new.check("u0.flac", torch.zeros(length))


@pytest.mark.parametrize("longer, excerpt", [(0, 0), (1600, 9000), (0, 9000)])
def test_changed_audio_is_refused(cache_folder, teachers, corpus, capfd, longer, excerpt):
    """Other sound of the same length, or of which the excerpt has the same length."""
    root = shutil.copytree(corpus / "audio", cache_folder / "audio")
    data = {"libri_root": str(root), "sequence_length": excerpt, "num_workers": 0}
    configs(cache_folder, teachers, corpus, data)
    assert cache(cache_folder, "cache") == 0
    capfd.readouterr()
    for i in range(12):
        path = root / f"u{i}.flac"
        time = np.arange(soundfile.info(path).frames + longer)
        soundfile.write(path, 0.1 * np.sin(time / 9), 16000)
    assert cache(cache_folder, "cache") == 2  # complete, and compared with the audio
    assert re.search(r"u\d+\.flac: the audio has changed", capfd.readouterr().err)
    batches = adapter(cache_folder, target_cache="cache").dataloader.dataset
    assert re.search(r"u\d+\.flac: the audio has changed", batches[0].problem)


def test_the_same_audio_from_a_lossy_file_is_accepted():
    wave = torch.randn(16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    wave[:4000] *= 1e-3  # a pause
    stored = loudness(wave)
    assert stored == pytest.approx(
        [float(part.square().mean().sqrt()) for part in wave.split(2000)]
    )
    noise = torch.randn(16_000, generator=torch.Generator().manual_seed(1))
    assert same_loudness(stored, loudness(wave + 1e-5 * noise))
    assert not same_loudness(stored, loudness(wave * 1.02))
    assert not same_loudness(stored, loudness(wave + 1e-3 * noise))  # the pause is louder
    assert not same_loudness(stored, loudness(wave.roll(2000)))
