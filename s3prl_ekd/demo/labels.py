"""Labels for the demo's SID and ER, as manifests that `s3prl-ekd prepare` reads.

OUT/sid.tsv       the corpus with speakers; of each speaker, 3/5 train, 1/5 dev, 1/5 test
OUT/er.tsv        OUT/moods/*.flac, the same sentences spoken in four moods
OUT/lexicon.txt   the pronunciation of every word of the corpus, for PR
"""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path

from tqdm import tqdm

from ..data.audio_files import find_audio
from ..data.audio_writer import encode_audio
from ..files.atomic import atomic_file, make_folder, write_text
from .sentences import sentences
from .voices import make_voices, speak

# Speaking rate and pitch of each mood. Each utterance deviates by up to the spread, so that
# neighbouring moods overlap.
MOODS = {"angry": (1.25, 58), "glad": (1.1, 70), "neutral": (1.0, 50), "sad": (0.8, 36)}
RATE_SPREAD, PITCH_SPREAD = 0.1, 9
SPLITS = ("train", "train", "train", "dev", "test")
MOOD_SPEAKERS = {"train": 4, "dev": 2, "test": 2}


def make_labels(corpus: Path, out: Path, *, moods: int = 30, seed: int = 1337) -> None:
    """Write the manifests, the audio of the moods and the lexicon; existing audio is not rewritten.

    Args:
        corpus: folder of the demo's corpus (:mod:`.corpus`).
        moods: utterances of each mood in train; dev and test get a third each, 2 at least.
    """
    make_folder(out / "moods")
    lexicon = resources.files(__package__).joinpath("lexicon.txt")
    write_text(out / "lexicon.txt", lexicon.read_text(encoding="utf-8"))
    lines = ["path\tspeaker\tsplit"]
    counts: dict[str, int] = {}
    for path in sorted(corpus / name for name in find_audio(corpus)):
        if not path.match("*-clean/*/*/*.flac"):
            continue
        speaker = path.parent.parent.name
        index = counts[speaker] = counts.get(speaker, -1) + 1
        name = path.relative_to(corpus).as_posix()
        lines.append(f"{name}\t{speaker}\t{SPLITS[index % len(SPLITS)]}")
    write_text(out / "sid.tsv", "\n".join([*lines, ""]))
    lines = ["path\tspeaker\temotion\tsplit", *_moods(out, moods, seed)]
    write_text(out / "er.tsv", "\n".join([*lines, ""]))


def _moods(out: Path, count: int, seed: int) -> list[str]:
    rng = random.Random(f"moods {seed}")
    texts = sentences(rng)
    voices = iter(make_voices(sum(MOOD_SPEAKERS.values()), seed + 1))
    utterances = []
    for split, speakers in MOOD_SPEAKERS.items():
        talkers = [next(voices) for _ in range(speakers)]
        for index in range(count if split == "train" else max(2, count // 3)):
            text, speaker = next(texts), index % speakers
            for mood, (rate, pitch) in MOODS.items():
                rate += rng.uniform(-RATE_SPREAD, RATE_SPREAD)
                pitch += rng.randint(-PITCH_SPREAD, PITCH_SPREAD)
                name = f"moods/{split}{speaker}-{index:03d}-{mood}.flac"
                utterances.append((name, text, talkers[speaker], rate, pitch))
    lines = []
    for name, text, voice, rate, pitch in tqdm(utterances, desc="demo moods", unit=" utterances"):
        if not (out / name).is_file():
            wave = speak(text, voice, rate=rate, pitch=pitch)
            with atomic_file(out / name) as file:
                file.write(encode_audio(wave, "flac"))
        speaker_name, _, mood = Path(name).stem.split("-")
        split = speaker_name.rstrip("0123456789")
        lines.append(f"{name}\t{speaker_name}\t{mood}\t{split}")
    return lines
