"""Small corpora: manifests with audio, and the layouts of LibriSpeech, VoxCeleb1 and IEMOCAP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

from .conftest import make_sound


def write_audio(path: Path, wave: np.ndarray, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate)


def write_noise(
    path: Path, frames: int, rate: int = 16000, channels: int = 1, **options: str
) -> Path:
    """Write noise that depends on the number of frames only."""
    shape = frames if channels == 1 else (frames, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(frames).normal(0, 0.1, shape), rate, **options)
    return path


def tone(rng: np.random.Generator, hertz: float, samples: int, noise: float = 0.01) -> np.ndarray:
    """A sine with white noise, [samples] at 16 kHz."""
    wave = 0.2 * np.sin(2 * np.pi * hertz * np.arange(samples) / 16000)
    return wave + noise * rng.standard_normal(samples)


def write_manifest(
    path: Path, columns: Sequence[str], rows: Iterable[tuple[np.ndarray, Sequence[str]]]
) -> Path:
    """Write a manifest with the column path and ``columns``, and its audio beside it.

    Args:
        rows: waveform, and cells: the path and a cell for each of ``columns``.
    """
    lines = ["\t".join(["path", *columns])]
    for wave, cells in rows:
        write_audio(path.parent / cells[0], wave)
        lines.append("\t".join(cells))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


PITCH = {"low": 200, "mid": 700, "high": 1500}


def write_er_manifest(folder: Path, speakers=("s1", "s2", "s10")) -> Path:
    """Write three utterances of each label and speaker, one without a label; the label's pitch."""
    rng, rows = np.random.default_rng(0), []
    for speaker in speakers:
        for label in (*PITCH, ""):
            for number, split in enumerate(("train", "dev", "test") if label else ("train",)):
                wave = tone(rng, PITCH.get(label, 50), 8000 + 500 * number)
                name = f"{speaker}-{label}-{number}.flac"
                rows.append((wave, (name, speaker, label, f"g-{speaker}", split)))
    return write_manifest(folder / "er.tsv", ("speaker", "emotion", "group", "split"), rows)


def write_librispeech(folder: Path, texts: Mapping[str, Sequence[str]], seconds: float) -> Path:
    """An utterance for each text of each split: of ``seconds``, 0.1 s more, 0.2 s more ..."""
    for number, (split, sentences) in enumerate(texts.items()):
        chapter = folder / split / f"1{number}" / "200"
        lines = []
        for i, text in enumerate(sentences):
            name = f"1{number}-200-{i:04d}"
            write_audio(chapter / f"{name}.flac", make_sound(seconds + 0.1 * i, seed=i))
            lines.append(f"{name} {text}\n")
        (chapter / f"1{number}-200.trans.txt").write_text("".join(lines))
    return folder


def write_voxceleb1(
    folder: Path, split_file: Path, speakers: Mapping[str, str], samples: int
) -> None:
    """For each speaker, two utterances of train and one of dev and test, a sample longer each.

    Args:
        speakers: speaker -> ``dev`` or ``test``, the folder that has the speaker.
        samples: length of the first utterance.
    """
    lines = []
    for speaker, part in speakers.items():
        for i, split in enumerate((1, 1, 2, 3)):
            name = f"{speaker}/x-{i}_y/0000{i}.wav"
            write_audio(folder / part / "wav" / name, make_sound(1, seed=len(lines))[: samples + i])
            lines.append(f"{split} {name}\n")
    split_file.write_text("".join(lines))


def write_iemocap(
    folder: Path, dialogs: Sequence[str], labels: Sequence[str], samples: int
) -> Path:
    """Five sessions with the dialogs ``Ses0N`` + ``dialogs``, an utterance for each label.

    The label files have the lines of single annotators, too.
    """
    for session in range(1, 6):
        for dialog in (f"Ses0{session}{name}" for name in dialogs):
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"]
            for i, label in enumerate(labels):
                name = f"{dialog}_F{i:03d}"
                wav = folder / f"Session{session}/sentences/wav/{dialog}/{name}.wav"
                write_audio(wav, make_sound(1, seed=10 * session + i)[: samples + 100 * i])
                lines.append(f"[{i}.2901 - 9.2357]\t{name}\t{label}\t[2.5, 2.5000, 2.5000]\n")
                lines.append("C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n")
            file = folder / f"Session{session}/dialog/EmoEvaluation/{dialog}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(lines))
    return folder


def write_labelled_tones(folder: Path) -> list[dict[str, str]]:
    """Write labels.tsv and its audio; return its rows.

    Four speakers have pitches of their own, and six utterances each. An utterance has low and high
    phones of 0.4 s, each a second tone; emotions differ in loudness.
    """
    rng = np.random.default_rng(0)
    columns = ("path", "split", "speaker", "emotion", "segments")
    rows = []
    for s, pitch in enumerate((110, 150, 205, 280)):
        for i in range(6):
            phones = 3 * (("LOW", "HIGH") if i % 2 else ("HIGH", "LOW"))
            second = {"LOW": 900, "HIGH": 3000}
            parts = [tone(rng, pitch, 6400) + tone(rng, second[p], 6400) for p in phones]
            loud = i % 3 == 0
            name = f"s{s}-{i}.flac"
            write_audio(folder / name, np.concatenate(parts) * (0.4 if loud else 0.05))
            segments = " ".join(f"{p}:{40 * n}+40" for n, p in enumerate(phones))
            split = "test" if i >= 4 else "train"
            cells = (name, split, f"s{s}", "loud" if loud else "soft", segments)
            rows.append(dict(zip(columns, cells, strict=True)))
    lines = ["\t".join(row.values()) for row in rows]
    (folder / "labels.tsv").write_text("\n".join(["\t".join(columns), *lines]) + "\n")
    return rows


def write_speech_commands(folder: Path) -> None:
    """Write Speech Commands' two folders, with 60 recordings of one word, of 0.1 s each."""
    train, test = (folder / f"speech_commands_{n}v0.01" for n in ("", "test_set_"))
    for number in range(60):
        write_noise(train / f"yes/{number:08x}_nohash_0.wav", 1600)
    write_noise(train / "_background_noise_/hum.wav", 17_000)
    for name in ("yes", "_unknown_", "_silence_"):
        write_noise(test / f"{name}/0_nohash_0.wav", 1700)


def write_fluent_commands(folder: Path) -> None:
    """Write Fluent Speech Commands' tables and audio, one speaker and two utterances a table."""
    (folder / "data").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        lines = [",path,speakerId,transcription,action,object,location"]
        for number, thing in enumerate(("lights", "heat")):
            path = f"wavs/speakers/x/{split}{number}.wav"
            write_noise(folder / path, 8000 + number)
            lines.append(f'{number},{path},x,"on, please",activate,{thing},none')
        (folder / f"data/{split}_data.csv").write_text("\n".join(lines) + "\n")
