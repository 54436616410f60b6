"""Synthesise small corpora of commands, to try the recipes of KS, IC, SF, ASV, SD and QbE.

Writes OUT/audio, OUT/noise, and manifests: OUT/ks.tsv (words), OUT/ic.tsv (sentences with action,
object and location), OUT/sf.tsv (the same sentences, object and location as slots),
OUT/speakers.tsv (the same sentences, with speakers, for ASV and SD) and OUT/qbe.tsv (single words
as queries, sentences of other voices as documents). Voices of train, dev and test differ. The same
options give the same bytes. Needs the extra demo.

example:
  python tools/make_commands.py commands
  s3prl-ekd prepare ks commands/ks.tsv --noise commands/noise -o data/ks
  s3prl-ekd prepare ic commands/ic.tsv -o data/ic
  s3prl-ekd prepare sf commands/sf.tsv -o data/sf
  s3prl-ekd prepare asv commands/speakers.tsv -o data/asv
  s3prl-ekd prepare sd commands/speakers.tsv -o data/sd
  s3prl-ekd prepare qbe commands/qbe.tsv -o data/qbe
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from s3prl_ekd.data.manifest import SPLITS
from s3prl_ekd.demo.voices import Voice, make_voices, speak
from s3prl_ekd.errors import EkdError, SetupError
from s3prl_ekd.files.atomic import atomic_folder
from s3prl_ekd.prepare.ks import WORDS

OTHER_WORDS = ("bird", "cat", "dog", "happy", "house", "tree", "wow")
ACTIONS = {"activate": "turn on", "deactivate": "turn off", "increase": "turn up", "bring": "bring"}
OBJECTS = ("lights", "heat", "music", "volume")
LOCATIONS = {"none": "", "kitchen": "in the kitchen", "bedroom": "in the bedroom"}
QUERIES = (*OBJECTS, "kitchen", "bedroom", "bring")
DOCUMENT_EVERY = 8  # of the training sentences one in so many is a document
VOICES = {"train": 16, "dev": 4, "test": 6}
NOISES, NOISE_SECONDS = 4, 3


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a user's error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=5, help="seed (%(default)s)")
    args = parser.parse_args(argv)
    try:
        make_corpora(args.out, args.seed)
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_corpora(out: Path, seed: int) -> None:
    """Write the corpora.

    Raises:
        SetupError: ``out`` exists, or cannot be written.
    """
    if out.exists():
        raise SetupError(f"{out} exists; give a new folder")
    rng = random.Random(f"commands {seed}")
    voices = iter(make_voices(sum(VOICES.values()), seed))
    speakers = {split: list(itertools.islice(voices, VOICES[split])) for split in SPLITS}
    with atomic_folder(out, SetupError) as folder:
        words = ["path\tsplit\tword"]
        for name, split, voice, word in _cross(speakers, (*WORDS, *OTHER_WORDS)):
            _speak(folder, f"audio/ks/{name}", word, voice, rng)
            words.append(f"audio/ks/{name}\t{split}\t{word}")
        intents = ["path\tsplit\taction\tobject\tlocation"]
        slots, queries = ["path\tsplit\ttext\tiob"], ["path\tsplit\ttext"]
        people = ["path\tsplit\tspeaker"]
        commands = list(itertools.product(ACTIONS, OBJECTS, LOCATIONS))
        for name, split, voice, command in _cross(speakers, commands):
            if split != "train" and rng.random() < 0.5:
                continue
            action, thing, place = command
            text = f"{ACTIONS[action]} the {thing} {LOCATIONS[place]}".strip()
            _speak(folder, f"audio/ic/{name}", text, voice, rng)
            intents.append(f"audio/ic/{name}\t{split}\t{action}\t{thing}\t{place}")
            people.append(f"audio/ic/{name}\t{split}\t{name.partition('-')[0]}")
            names = {thing: "B-object", place: "B-location"}
            tags = " ".join(names.get(word, "O") for word in text.split())
            slots.append(f"audio/ic/{name}\t{split}\t{text}\t{tags}")
            if split == "train" and len(slots) % DOCUMENT_EVERY == 0:
                queries.append(f"audio/ic/{name}\ttrain\t{text}")
        for name, split, voice, word in _cross(speakers, QUERIES):
            if split != "train":
                _speak(folder, f"audio/qbe/{name}", word, voice, rng)
                queries.append(f"audio/qbe/{name}\t{split}\t{word}")
        (folder / "noise").mkdir()
        samples = np.random.default_rng(seed).normal(0, 0.02, (NOISES, NOISE_SECONDS * 16_000))
        for number, wave in enumerate(samples):
            soundfile.write(folder / f"noise/noise{number}.wav", wave, 16_000, subtype="PCM_16")
        manifests = {"ks": words, "ic": intents, "sf": slots, "speakers": people, "qbe": queries}
        for name, lines in manifests.items():
            (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts = (f"{name}.tsv {len(lines) - 1} utterances" for name, lines in manifests.items())
    print(f"{out}: {', '.join(counts)}; noise/")


def _cross(speakers: dict[str, list[Voice]], items: tuple | list) -> Iterator[tuple]:
    """Yield (file name, split, voice, item) of each voice and item."""
    for split, voices in speakers.items():
        for speaker, voice in enumerate(voices):
            for number, item in enumerate(items):
                yield f"{split}{speaker:02d}-{number:03d}.flac", split, voice, item


def _speak(folder: Path, name: str, text: str, voice: Voice, rng: random.Random) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = speak(text, voice, rate=rng.uniform(0.8, 1.2), pitch=rng.randint(40, 60))
    soundfile.write(path, wave, 16_000, subtype="PCM_16")


if __name__ == "__main__":
    raise SystemExit(main())
