"""Small corpora: manifests with audio, and the layouts of LibriSpeech, VoxCeleb1 and IEMOCAP."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

from s3prl_ekd.prepare.sf import FOLDERS, SPEAKERS

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


def write_snips(folder: Path) -> Path:
    """Preprocessed Audio SNIPS with two utterances for each speaker."""
    lines = []
    for split, part in FOLDERS.items():
        for speaker in SPEAKERS[split]:
            for i in range(2):
                name = f"{speaker}-snips-{part}-{i}"
                write_noise(folder / part / f"{name}.wav", 4000 + i)
                text = f"{name} BOS PLAY B&B {'JAZZ ' * i}? EOS\tO O artist {'genre ' * i}O Music"
                lines.append(f"{text}\n")
    (folder / "all.iob.snips.txt").write_text("".join(lines))
    (folder / "slots.txt").write_text("O\nartist\ngenre")
    return folder


def write_libri2mix(folder: Path, rttm: Path) -> None:
    """Write Libri2Mix (wav16k/max, mix_both) of 0.9 s a mixture, and LibriSpeech's RTTM files."""
    top = folder / "wav16k/max"
    (top / "metadata").mkdir(parents=True)
    rttm.mkdir()
    turns = {"7": ((0.1, 0.4),), "8": ((0.2, 0.2), (0.5, 0.25))}
    subsets = {"train-100": "train_clean_100", "dev": "dev_clean", "test": "test_clean"}
    for subset, name in subsets.items():
        rows = ["mixture_ID,mixture_path,source_1_path,source_2_path,noise_path,length"]
        lines = []
        for number in range(1, 5 if subset == "train-100" else 3):
            mixture = f"7-70-{number:04d}_8-80-{number:04d}"
            file = f"wav16k/max/{subset}/mix_both/{mixture}.wav"
            write_noise(folder / file, 14400)
            rows.append(f"{mixture},/elsewhere/Libri2Mix/{file},1.wav,2.wav,noise.wav,14400")
            for speaker, own in turns.items():
                for begin, length in own:
                    times = f"1   {begin:.3f}   {length:.3f} <NA> <NA>"
                    lines.append(f"SPEAKER {speaker}0-{number:04d} {times} {speaker} <NA> <NA>")
        (top / f"metadata/mixture_{subset}_mix_both.csv").write_text("\n".join(rows) + "\n")
        (rttm / f"{name}.rttm").write_text("\n".join(lines) + "\n")


def write_quesst14(folder: Path) -> None:
    """Write QUESST 2014's folder: two documents and queries in English, and one each in Czech."""
    scoring = folder / "scoring"
    scoring.mkdir(parents=True)
    languages = ("nnenglish", "nnenglish", "czech")
    for split, audio in (("utterances", "Audio"), ("dev", "dev_queries"), ("eval", "eval_queries")):
        lines, truth = [], [";; a comment"]
        infix = "" if split == "utterances" else f"_{split}"
        for number, language in enumerate(languages):
            name = f"quesst14{infix}_{number:05d}"
            write_noise(folder / f"{audio}/{name}.wav", 8000 + number, 8000)
            lines.append(f"quesst14Database/{audio}/{name}.wav {language}")
            truth.append(f"LEXEME quesst14_{number:05d} 1 0.1 0.5 {name} lex <NA> <NA>")
        (scoring / f"language_key_{split}.lst").write_text("\n".join(lines) + "\n")
        if split != "utterances":
            truth.append("LEXEME quesst14_00000 1 0.1 0.5 NO_KEYWORD lex <NA> <NA>")
            (scoring / f"groundtruth_quesst14_{split}").mkdir()
            path = scoring / f"groundtruth_quesst14_{split}/quesst14_{split}.rttm"
            path.write_text("\n".join(truth) + "\n")


# utterance -> recording, start and end in seconds; the last ends 0.3 s after the recording
SEGMENTS = {
    "ann-1": ("talk", 0.5, 1.25),
    "ann-2": ("talk", 1.25, 2.0),
    "bob-1": ("chat", 0.0, 0.9),
    "bob-2": ("chat", 1.5, 3.3),
}


def write_kaldi(
    folder: Path, sound: Path, segments: Mapping[str, tuple[str, float, float]] = SEGMENTS
) -> Path:
    """A data folder whose recordings of 3 s are in the folder ``sound``, named by their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    sound.mkdir(exist_ok=True)
    recordings = sorted({recording for recording, _, _ in segments.values()})
    for number, name in enumerate(recordings):
        wave = (make_sound(3.0, seed=number) * 32767).astype(np.int16)
        soundfile.write(sound / f"{name}.flac", wave, 16000)
    files = {
        "wav.scp": {name: sound / f"{name}.flac" for name in recordings},
        "segments": {name: " ".join(map(str, cells)) for name, cells in segments.items()},
        "text": {name: f"WORD {'AB'[name.endswith('2')]}" for name in segments},
        "utt2spk": {name: name.split("-")[0] for name in segments},
    }
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{a} {b}\n" for a, b in lines.items()))
    return folder


def write_common_voice(root: Path, split: str) -> None:
    """A table of two MP3 files at 32 kHz, as Common Voice writes it."""
    (root / "clips").mkdir(parents=True, exist_ok=True)
    lines = ["client_id\tpath\tsentence\tup_votes"]
    for i in range(2):
        name = f"common_voice_en_{split}{i}.mp3"
        soundfile.write(root / "clips" / name, make_sound(1.0, 32000, seed=i), 32000)
        lines.append(f"client{i}\t{name}\t“Well,” it’s a well-known 'word'.\t2")
    (root / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_cuts(path: Path, recordings: Path) -> None:
    """Cuts of lhotse: the recordings of a folder, and a second of each, with a text."""
    lines = []
    for file in sorted(recordings.glob("*.flac")):
        info, name = soundfile.info(file), file.stem
        recording = {
            "id": name, "sampling_rate": info.samplerate, "num_samples": info.frames,
            "duration": info.duration, "channel_ids": [0],
            "sources": [{"type": "file", "channels": [0], "source": str(file)}],
        }  # fmt: skip
        for start, duration in ((0, info.duration), (1.0, 1.0)):
            supervision = {
                "id": name, "recording_id": name, "start": 0, "duration": duration,
                "channel": 0, "text": "A WORD", "speaker": name,
            }  # fmt: skip
            cut = {
                "id": f"{name}-{start:g}", "type": "MonoCut", "start": start,
                "duration": duration, "channel": 0, "recording": recording,
                "supervisions": [supervision],
            }  # fmt: skip
            lines.append(json.dumps(cut) + "\n")
    path.write_bytes(gzip.compress("".join(lines).encode()))
