"""Segments of long recordings: the same batches, targets and features as of files cut out by hand.

``long`` is a corpus of two recordings with segments, ``short`` the same audio as a file for each.
"""

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from s3prl_ekd import cli
from s3prl_ekd.analysis.choice import choose_audio
from s3prl_ekd.analysis.sample import read_excerpt
from s3prl_ekd.data.audio import Recording, read_audio
from s3prl_ekd.data.audio_files import AudioPart
from s3prl_ekd.data.bad_audio import BadAudio
from s3prl_ekd.data.batches import train_loader
from s3prl_ekd.data.distortion.settings import DistortionSettings
from s3prl_ekd.data.tables import Utterance, read_table, read_tables
from s3prl_ekd.errors import DataError
from s3prl_ekd.hidden_states.store import TargetReader
from s3prl_ekd.probe.labels import read_labels
from s3prl_ekd.probe.tasks import choose_tasks

from .cache_cases import cache, configs
from .conftest import data_settings, make_sound

# recording, first sample, number of samples; out of order, touching and overlapping
SEGMENTS = [
    ("a", 20000, 9000),
    ("a", 0, 8000),
    ("a", 8000, 10001),
    ("b", 777, 12345),
    ("b", 5000, 7000),
    ("b", 30000, 10000),
]


def name_of(recording, start, count):
    return f"{recording}.flac@{start}+{count}"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("segments")
    for folder in ("long/audio", "long/tables", "short/audio", "short/tables"):
        (root / folder).mkdir(parents=True)
    waves = {}
    for seed, name in enumerate("ab"):
        waves[name] = (make_sound(2.5, seed=seed) * 32767).astype(np.int16)
        soundfile.write(root / f"long/audio/{name}.flac", waves[name], 16000)
    long, short = ["file_path,length,label,offset"], ["file_path,length,label"]
    for recording, start, count in SEGMENTS:
        file = f"{name_of(recording, start, count)}.flac"
        soundfile.write(root / "short/audio" / file, waves[recording][start : start + count], 16000)
        long.append(f"{recording}.flac,{count},,{start}")
        short.append(f"{file},{count},")
    (root / "long/tables/train.csv").write_text("\n".join(long) + "\n")
    (root / "short/tables/train.csv").write_text("\n".join(short) + "\n")
    return root


def loader(root, workers=0, distortion=None, seed=5, batch=2, **changes):
    data = data_settings(root / "audio", batch, root / "tables", num_workers=workers, **changes)
    return train_loader(data, ["train"], min_samples=400, seed=seed, distortion=distortion)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_files(corpora, workers):
    long, short = loader(corpora / "long", workers), loader(corpora / "short", workers)
    for _ in range(2):  # epochs
        pairs = list(zip(long, short, strict=True))
        assert len(pairs) == 3
        for batch, expected in pairs:
            assert not batch.problem and not expected.problem
            assert torch.equal(batch.waves, expected.waves)
            assert [f"{name}.flac" for name in batch.names] == expected.names
    long.close(), short.close()


def test_excerpts_are_parts_of_their_segments_and_differ_between_epochs(corpora):
    wave, _ = soundfile.read(corpora / "long/audio/a.flac", dtype="float32")
    one = loader(corpora / "long", batch=1, sequence_length=4000)
    starts = {}
    for epoch in range(3):
        for i in range(len(one.dataset)):
            batch = one.dataset[epoch, i]
            excerpt = batch.waves[0].numpy()
            recording, start, count = SEGMENTS[[name_of(*s) for s in SEGMENTS].index(*batch.names)]
            if recording == "a":
                windows = np.lib.stride_tricks.sliding_window_view(
                    wave[start : start + count], 4000
                )
                found = np.flatnonzero((windows == excerpt).all(1)).tolist()
                starts.setdefault(batch.names[0], set()).update(found)
                assert len(found) == 1
    assert len(starts) == 3 and all(len(values) > 1 for values in starts.values())


def test_segments_of_one_file_are_distorted_differently(corpora):
    distorted = loader(corpora / "long", distortion=DistortionSettings(setup="setup1", babble=True))
    plans = {
        name: distorted.dataset.distorter.plan(name, 0, "student")
        for name in (name_of(*segment) for segment in SEGMENTS)
    }
    assert len({plan.snr for plan in plans.values()}) == len(SEGMENTS)
    assert distorted.dataset.distorter.voices.names == [
        row.name for batch in distorted.dataset.batches for row in batch
    ]
    assert not any(batch.problem for batch in distorted)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_segments_at_other_rates(tmp_path, rate):
    """A segment is the part of the whole recording, resampled."""
    path = tmp_path / "x.wav"
    soundfile.write(path, make_sound(1.0, rate), rate)
    whole = read_audio(path)
    for start, count in ((0, 5000), (3001, 7000), (15000, 1000)):
        part = read_audio(AudioPart(path, start, count))
        assert len(part) == count
        assert torch.allclose(part, whole[start : start + count], atol=1e-5)
    with Recording(AudioPart(path, 3001, 7000)) as recording:
        assert recording.samples == 7000
        inner = recording.read(100, 500)
    assert torch.allclose(inner, whole[3101:3601], atol=1e-5)


def test_the_end_of_a_segment(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, make_sound(1.0), 16000)
    assert len(read_audio(AudioPart(path, 10000, 14000))) == 6000  # 0.5 s after the file
    for part in (AudioPart(path, 10000, 14001), AudioPart(path, 16000, 100)):
        with pytest.raises(BadAudio, match=r"x\.wav@1"):
            read_audio(part)


def test_silence_is_that_of_the_segment(tmp_path):
    wave = make_sound(1.0)
    wave[:8000] = 0
    soundfile.write(tmp_path / "x.wav", wave, 16000)
    with pytest.raises(BadAudio, match="sound"):
        read_audio(AudioPart(tmp_path / "x.wav", 0, 8000), speech=True)
    with Recording(AudioPart(tmp_path / "x.wav", 1000, 9000)) as recording:
        assert not recording.read_speech(0, 2000).any()  # a pause


def test_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("file_path,length,offset\na.wav,100,\na.wav,100,0\na.wav,100,100.0\n")
    assert read_table(path) == [
        Utterance("a.wav", 100), Utterance("a.wav", 100, 0), Utterance("a.wav", 100, 100)
    ]  # fmt: skip
    (tmp_path / "u.csv").write_text("file_path,length,offset\na.wav,200,100\n")
    assert [row.length for row in read_tables(tmp_path, ["t", "u"])] == [200, 100, 100, 100]
    for cells, part in (
        ("a.wav,100,x", "line 3.*offset.*'x'"),
        ("a.wav,100,-1", "line 3.*offset"),
        ("a.wav,100,0.5", "line 3.*offset"),
        ("a.wav,100,0", r"line 3.*a\.wav@0\+100.*line 2"),
    ):
        path.write_text(f"file_path,length,offset\na.wav,100,0\n{cells}\n")
        with pytest.raises(DataError, match=part):
            read_table(path)


def test_cached_targets_are_those_of_files(corpora, teachers, tmp_path):
    readers = []
    for kind in ("long", "short"):
        folder = tmp_path / kind
        folder.mkdir()
        configs(folder, teachers, corpora / kind)
        assert cache(folder, folder / "cache") == 0
        readers.append(TargetReader(folder / "cache"))
    long, short = readers
    assert [f"{name}.flac" for name in long.index.utterances] == list(short.index.utterances)
    values = [reader.batch(reader.index.utterances).values for reader in readers]
    assert torch.equal(values[0].view(torch.int16), values[1].view(torch.int16))


def test_features_are_those_of_files(corpora, student_file, tmp_path):
    lines = ["path\toffset\tduration"]
    lines += [f"{name}.flac\t{start / 16000}\t{n / 16000}" for name, start, n in SEGMENTS]
    manifest = corpora / "long/audio/all.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    for source, out in ((manifest, "long"), (corpora / "short/audio", "short")):
        argv = ["features", student_file, source, "-o", tmp_path / out, "--layers", "last"]
        assert cli.main([str(word) for word in argv]) == 0
    long, short = load_file(tmp_path / "long"), load_file(tmp_path / "short")
    assert len(long) == len(SEGMENTS)
    for key, states in long.items():
        assert torch.equal(states, short[key.replace("#", ".flac#")])


def test_probes_and_layer_commands_read_segments(corpora):
    lines = ["path\toffset\tduration\tspeaker\tsplit"]
    lines += [
        f"{name}.flac\t{start / 16000}\t{n / 16000}\t{name}\t{split}"
        for name, start, n in SEGMENTS
        for split in ["test" if start in (0, 777) else "train"]
    ]
    manifest = corpora / "long/audio/speakers.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    (task,) = choose_tasks(read_labels(manifest))
    parts = {excerpt.utterance.part: excerpt.length for excerpt in task.excerpts}
    audio = corpora / "long/audio"
    assert parts == {AudioPart(audio / f"{n}.flac", a, c): c for n, a, c in SEGMENTS}

    chosen = choose_audio(corpora / "long/tables/train.csv", audio, 99)
    assert set(chosen) == set(parts)
    wave, _ = soundfile.read(audio / "b.flac", dtype="float32")
    assert np.array_equal(read_excerpt(AudioPart(audio / "b.flac", 777, 12345)), wave[777:13122])
