"""lhotse's Shar folders as training data."""

import gzip
import io
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.data.batches import train_loader
from s3prl_ekd.data.distortion.settings import DistortionSettings
from s3prl_ekd.data.sampling import generator
from s3prl_ekd.data.shar.shards import shar_digest
from s3prl_ekd.errors import DataError, SetupError

from .conftest import data_settings, edit_yaml, make_sound, saved_states

lhotse = pytest.importorskip("lhotse", reason="lhotse is not installed (extra lhotse)")

COUNT, SHARD = 48, 6  # cuts, and cuts in a shard


def write_shar(folder, count=COUNT, shard=SHARD, rate=16000, **cut_changes):
    """Cuts of 0.5 to 1.2 s as FLAC in shards; returns their waveforms by id."""
    source = folder.parent / f"{folder.name}_files"
    source.mkdir(parents=True)
    folder.mkdir(parents=True)
    waves, cuts = {}, []
    for i in range(count):
        wave = (make_sound(0.5 + 0.7 * (i * 7 % count) / count, rate, seed=i) * 32767).astype(
            np.int16
        )
        soundfile.write(source / f"u{i}.flac", wave, rate)
        cuts.append(lhotse.Recording.from_file(source / f"u{i}.flac").to_cut())
        cuts[-1].id = f"u{i}"
        waves[f"u{i}"] = wave.astype(np.float32) / 32768
    lhotse.CutSet.from_cuts(cuts).to_shar(folder, {"recording": "flac"}, shard_size=shard)
    return waves


@pytest.fixture(scope="module")
def shar(tmp_path_factory):
    root = tmp_path_factory.mktemp("shar")
    return root, write_shar(root / "train")


def loader(root, sets=("train",), batch=4, seed=5, distortion=None, **changes):
    changes = {"shar_streams": 4, **changes}
    data = data_settings(root, batch, root, **changes)
    return train_loader(data, sets, min_samples=400, seed=seed, distortion=distortion)


def read(train, epochs=1):
    batches = [batch for _ in range(epochs) for batch in train]
    train.close()
    assert not any(batch.problem for batch in batches)
    return batches


def same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.names == other.names and torch.equal(batch.waves, other.waves)
    return True


def test_batches_hold_the_audio_of_the_cuts(shar):
    root, waves = shar
    batches = read(loader(root))
    assert len(batches) == COUNT // 4 and all(len(batch.names) == 4 for batch in batches)
    seen = set()
    for batch in batches:
        seen.update(batch.names)
        for name, wave, length in zip(batch.names, batch.waves, batch.lengths, strict=True):
            assert np.array_equal(wave[:length], waves[name]) and not wave[length:].any()
    assert len(seen) >= COUNT * 0.6  # the streams of 12 hold 4 when the epoch ends


def test_the_order_does_not_depend_on_workers_processes_or_where_a_run_was_resumed(shar):
    root, _ = shar
    expected = read(loader(root), epochs=2)
    assert same(read(loader(root, num_workers=2), epochs=2), expected)
    for position, processes in ((0, 2), (5, 1), (15, 3)):
        for rank in range(processes):
            resumed = loader(root, num_workers=rank)
            resumed.sampler.seek(*divmod(position, len(resumed)), rank, processes)
            batches = read(resumed)  # to the end of the epoch
            assert same(batches, expected[position + rank :: processes][: len(batches)])
            assert len(batches) >= (len(resumed) - position % len(resumed)) // processes
    other = read(loader(root, seed=6))
    assert [batch.names for batch in other] != [batch.names for batch in expected[:12]]
    assert [b.names for b in expected[:12]] != [b.names for b in expected[12:]]


def test_excerpts(shar):
    root, waves = shar
    epochs = read(loader(root, sequence_length=6400, batch=1), epochs=2)
    starts = {}
    for number, batch in enumerate(epochs):
        (name,), wave = batch.names, batch.waves[0].numpy()
        epoch, full = number // COUNT, waves[name]
        expected = generator(5, epoch, name, "excerpt").randrange(max(1, len(full) - 6399))
        assert np.array_equal(wave, full[expected : expected + 6400])
        starts.setdefault(name, set()).add(expected)
    assert any(len(values) > 1 for values in starts.values())


def test_batches_of_seconds_have_cuts_of_similar_length(shar):
    root, _ = shar
    batches = read(loader(root, batch=16, max_seconds=4.0))
    assert all(batch.waves.numel() <= 4.6 * 16000 for batch in batches)  # the width of a bucket
    assert np.mean([batch.waves.numel() for batch in batches]) > 2.5 * 16000


def test_other_rates_are_resampled_and_distorted(tmp_path):
    write_shar(tmp_path / "train", 8, 4, rate=8000)
    distortion = DistortionSettings(setup="setup1")
    for batch in read(loader(tmp_path, distortion=distortion)):
        assert batch.waves.shape == batch.teacher_waves.shape
        assert not torch.equal(batch.waves, batch.teacher_waves)
        assert batch.lengths.min() >= 7900
    with pytest.raises(DataError, match="babble"):
        loader(tmp_path, distortion=DistortionSettings(setup="setup1", babble=True))


def rewrite(path, change):
    """Change the cuts of a shard, each as JSON data."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    cuts = [json.loads(line) for line in lines]
    for cut in cuts:
        change(cut)
    path.write_bytes(gzip.compress("".join(json.dumps(cut) + "\n" for cut in cuts).encode()))


@pytest.mark.parametrize("kind", ["missing", "mixed"])
def test_commands_in_cuts_are_not_executed(tmp_path, kind):
    """lhotse would run the command of a cut whose audio is missing in the tar file, or of a track
    of a mixed cut."""
    write_shar(tmp_path / "train", 8, 8)
    touched = tmp_path / "touched"

    def change(cut):
        source = {"type": "command", "channels": [0], "source": f"touch {touched}"}
        cut["recording"]["sources"] = [source]
        if kind == "mixed":
            track = {"cut": {**cut}, "type": "MonoCut", "offset": 0.0, "snr": None}
            name = cut["id"]
            cut.clear()
            cut.update({"id": name, "type": "MixedCut", "tracks": [track]})

    rewrite(tmp_path / "train/cuts.000000.jsonl.gz", change)
    if kind == "mixed":
        (batch,) = [b for b in loader(tmp_path, on_bad_audio="skip", batch=8)]
        assert not batch.names and not touched.exists()
        return
    with tarfile.open(tmp_path / "train/recording.000000.tar", "w") as tar:
        for i in range(8):
            for suffix in ("nodata", "nometa"):
                tar.addfile(tarfile.TarInfo(f"u{i}.{suffix}"))
    (batch,) = [b for b in loader(tmp_path, on_bad_audio="skip", batch=8)]
    assert not batch.names and {bad.kind for bad in batch.bad} == {"not in the shard"}
    assert not touched.exists()


def test_short_cuts_are_left_out(tmp_path):
    waves = write_shar(tmp_path / "train", 8, 8)
    data = data_settings(tmp_path, 8, tmp_path, shar_streams=4)
    names = [name for batch in read(train_loader(data, ["train"], min_samples=12_800))
             for name in batch.names]  # fmt: skip
    assert set(names) == {name for name, wave in waves.items() if len(wave) >= 12_800}
    assert 0 < len(set(names)) < 8


def test_bad_audio_is_left_out(tmp_path):
    write_shar(tmp_path / "train", 8, 8)
    path = tmp_path / "train/recording.000000.tar"
    members = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            members[member.name] = tar.extractfile(member).read()
    members["u1.flac"] = b"no audio"
    silent = tmp_path / "silent.flac"
    soundfile.write(silent, np.zeros(16000), 16000)
    members["u2.flac"] = silent.read_bytes()
    with tarfile.open(path, "w") as tar:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    (batch,) = [b for b in loader(tmp_path, on_bad_audio="skip", batch=8)]
    assert len(batch.names) == 6 and {bad.path for bad in batch.bad} == {"u1", "u2"}
    (batch,) = [b for b in loader(tmp_path, batch=8)]
    assert "on_bad_audio" in batch.problem


@pytest.mark.parametrize("damage", ["short", "truncated", "other", "cuts"])
def test_damaged_shards_are_errors(tmp_path, damage):
    write_shar(tmp_path / "train", 12, 6)
    tar, cuts = tmp_path / "train/recording.000001.tar", tmp_path / "train/cuts.000001.jsonl.gz"
    if damage == "short":  # whole members are missing
        with tarfile.open(tar) as file:
            members = [(member, file.extractfile(member).read()) for member in file.getmembers()]
        with tarfile.open(tar, "w") as file:
            for member, contents in members[:6]:
                file.addfile(member, io.BytesIO(contents))
    elif damage == "truncated":
        tar.write_bytes(tar.read_bytes()[:20000])
    elif damage == "other":
        tar.write_bytes((tmp_path / "train/recording.000000.tar").read_bytes())
    else:
        data = gzip.decompress(cuts.read_bytes())
        cuts.write_bytes(gzip.compress(data.replace(b'"id"', b'"no"', 1)))
    problems = [batch.problem for batch in loader(tmp_path, on_bad_audio="skip", shar_streams=1)]
    assert any(".000001." in problem and "write" in problem for problem in problems), problems


def test_folders_that_are_refused(tmp_path, shar, monkeypatch):
    write_shar(tmp_path / "a", 4, 4)
    (tmp_path / "t.csv").write_text("file_path,length\nx.wav,16000\n")
    with pytest.raises(DataError, match=r"\ba\b.*\bt\b"):
        loader(tmp_path, ["a", "t"])
    data = data_settings(tmp_path, 4, tmp_path)
    with pytest.raises(DataError, match="dev_sets"):
        train_loader(data, ["a"], min_samples=400, shuffle=False)
    with pytest.raises(DataError, match="target_cache"):
        train_loader(data, ["a"], min_samples=400, targets=object())
    with pytest.raises(DataError, match="max_timestep"):
        loader(tmp_path, ["a"], max_timestep=-1_000_000)
    (tmp_path / "a/recording.000000.tar").rename(tmp_path / "a/other.tar")
    with pytest.raises(DataError, match=r"recording\.000000\.tar"):
        loader(tmp_path, ["a"])
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with pytest.raises(SetupError, match=r"pip install 'lhotse"):
        loader(shar[0])


def test_the_digest_changes_with_the_shards(tmp_path):
    write_shar(tmp_path / "a", 8, 4)
    before = shar_digest(tmp_path / "a")
    assert shar_digest(tmp_path / "a") == before
    for path in (tmp_path / "a").glob("*.000001.*"):
        path.unlink()
    assert shar_digest(tmp_path / "a") != before


def test_a_resumed_run_ends_with_the_same_weights(pretrain_folder, shar, pretrain, caplog):
    root, _ = shar
    with edit_yaml(pretrain_folder / "runner.yaml") as config:
        config["runner"] |= {"total_steps": 6, "save_step": 3}
        datarc = config["pretrain_expert"]["datarc"]
        datarc |= {"libri_root": str(root), "file_path": str(root), "sequence_length": 8000}
        datarc |= {"shar_streams": 3, "train_batch_size": 4}
    with edit_yaml(pretrain_folder / "model.yaml") as config:
        config["teachers"] = {"hubert": config["teachers"]["hubert"]}
    files = ("-c", "runner.yaml", "-g", "model.yaml", "--device", "cpu")
    assert pretrain(*files, "-n", "whole")[0] == 0
    half = pretrain_folder / "result/pretrain/half"
    shutil.copytree(pretrain_folder / "result/pretrain/whole", half)
    for path in half.glob("*.ckpt"):
        if path.name != "states-3.ckpt":
            path.unlink()
    code, output = pretrain("-n", "half", "-a", "-o", "config.pretrain_expert.datarc.num_workers=1")
    assert code == 0 and "states-3.ckpt" in output, output
    code, output = pretrain(
        "-n", "half", "-a", "-o",
        "config.pretrain_expert.datarc.shar_streams=2,,config.runner.total_steps=7",
    )  # fmt: skip
    assert code == 0 and "starting a new epoch" in caplog.text, output
    whole = saved_states("whole")["EKD"]["student"]
    half = saved_states("half", "states-6.ckpt")["EKD"]["student"]
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[name], half[name]) for name in whole)
