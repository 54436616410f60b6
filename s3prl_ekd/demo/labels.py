"""Labels for the demo's SID and ER, as manifests that `s3prl-ekd prepare` reads.

OUT/sid.tsv       the corpus again: who speaks, every fifth utterance of each dev, another test
OUT/er.tsv        OUT/moods/*.flac: the same sentences in four ways of speaking
OUT/lexicon.txt   the pronunciation of every word of the corpus, for PR
"""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path

import soundfile
from tqdm import tqdm

from ..data.audio_files import find_audio
from ..files.atomic import atomic_file, make_folder
from .sentences import sentences
from .voices import SAMPLE_RATE, make_voices, speak

# Rate and pitch that a mood is spoken with; each utterance departs from them by up to the spread,
# so that neighbouring moods overlap.
MOODS = {"angry": (1.25, 58), "glad": (1.1, 70), "neutral": (1.0, 50), "sad": (0.8, 36)}
RATE_SPREAD, PITCH_SPREAD = 0.1, 9
SPLITS = ("train", "train", "train", "dev", "test")
MOOD_SPEAKERS = {"train": 4, "dev": 2, "test": 2}


def make_labels(corpus: Path, out: Path, *, moods: int = 30, seed: int = 1337) -> None:
    """Write the manifests, the audio of the moods and the lexicon; what is there is kept.

    Args:
        corpus: the demo's corpus (:mod:`.corpus`).
        out: the folder to write into.
        moods: utterances of each mood in train; a third as many in dev and in test.
        seed: of sentences, voices and moods.

    Raises:
        DataError: a folder cannot be made.
    """
    make_folder(out / "moods")
    lexicon = resources.files(__package__).joinpath("lexicon.txt").read_bytes()
    _write(out / "lexicon.txt", lexicon)
    lines = ["path\tspeaker\tsplit"]
    counts: dict[str, int] = {}
    for path in sorted(corpus / name for name in find_audio(corpus)):
        if not path.match("*-clean/*/*/*.flac"):
            continue
        speaker = path.parent.parent.name
        index = counts[speaker] = counts.get(speaker, -1) + 1
        name = path.relative_to(corpus).as_posix()
        lines.append(f"{name}\t{speaker}\t{SPLITS[index % len(SPLITS)]}")
    _write(out / "sid.tsv", _text(lines))
    _write(out / "er.tsv", _text(["path\tspeaker\temotion\tsplit", *_moods(out, moods, seed)]))


def _moods(out: Path, count: int, seed: int) -> list[str]:
    rng = random.Random(f"moods {seed}")
    texts = sentences(rng)
    voices = iter(make_voices(sum(MOOD_SPEAKERS.values()), seed + 1))
    work = []
    for split, speakers in MOOD_SPEAKERS.items():
        talkers = [next(voices) for _ in range(speakers)]
        for index in range(count if split == "train" else max(2, count // 3)):
            text, who = next(texts), index % speakers
            for mood, (rate, pitch) in MOODS.items():
                rate += rng.uniform(-RATE_SPREAD, RATE_SPREAD)
                pitch += rng.randint(-PITCH_SPREAD, PITCH_SPREAD)
                name = f"moods/{split}{who}-{index:03d}-{mood}.flac"
                work.append((name, text, talkers[who], rate, pitch))
    lines = []
    for name, text, voice, rate, pitch in tqdm(work, desc="demo moods", unit=" utterances"):
        if not (out / name).is_file():
            wave = speak(text, voice, rate=rate, pitch=pitch)
            with atomic_file(out / name) as file:
                soundfile.write(file, wave, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
        speaker, _, mood = Path(name).stem.split("-")
        lines.append(f"{name}\t{speaker}\t{mood}\t{speaker.rstrip('0123456789')}")
    return lines


def _text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)
