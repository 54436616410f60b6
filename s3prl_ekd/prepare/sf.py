"""``prepare sf`` and ``prepare snips``: preprocessed Audio SNIPS' layout, for SF.

s3prl reads ``ROOT/FOLDER/NAME.wav`` with the folders ``train``, ``valid`` and ``test``, of the
speakers in the recipe: those whose names begin NAME. A line of ``ROOT/all.iob.snips.txt`` is

    NAME BOS PLAY ADELE EOS<tab>O O artist INTENT

with a tag for each word from BOS on and, in place of one for EOS, the intent, which SF does not
use. ``O`` is no slot; consecutive words with the same tag are one slot. ``ROOT/slots.txt`` lists
the tags; its first line is ``O``.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.audio_files import find_audio
from ..data.manifest import MAX_LIST, SPLITS, ManifestEntry
from ..errors import DataError
from ..files.text import read_text
from .asr import foreign_characters, normalise
from .common import (
    PREPARED,
    PrepareTask,
    add_convert_option,
    audio_lengths,
    link_folder,
    manifest_of,
    new_folder,
    placing,
    print_splits,
    read_audio_parts,
    write_lines,
)
from .lexicon import shorten_list

TEXTS, SLOTS = "all.iob.snips.txt", "slots.txt"
FOLDERS = {"train": "train", "dev": "valid", "test": "test"}
SPEAKERS = {  # SUPERB's
    "train": "Ivy Joanna Joey Justin Kendra Kimberly Matthew Salli".split(),
    "dev": "Aditi Amy Geraint Nicole".split(),
    "test": "Brian Emma Raveena Russell".split(),
}
OUTSIDE = "O"
_PUNCTUATION = "?!.,;-"  # s3prl skips a word that is a part of this
_SEPARATORS = ":;"  # s3prl's metrics join slots with them, and fail if a slot has one

SF_DESCRIPTION = """\
Write a corpus in Audio SNIPS' layout for `run_downstream.py -d ctc` with snips_tiny.yaml:
OUT/all.iob.snips.txt, OUT/slots.txt, OUT/{train,valid,test} with symlinks to the audio, and
OUT/prepared.tsv, which maps the new names to the manifest's paths.

Needs the columns path, split, text, and iob: for each word of the text O, or the name of its slot
after B- (its first word) or I-. Names of slots may also stand alone. A slot right after one of the
same name is one with it, as in Audio SNIPS. Texts are converted to upper case; allowed are A to Z,
the apostrophe and spaces; --strip-punctuation removes punctuation.

    path     split  text                  iob
    1.flac   train  play something funky  O O B-genre
"""
SNIPS_DESCRIPTION = """\
Check preprocessed Audio SNIPS for `run_downstream.py -d ctc -c downstream/ctc/snips.yaml`: DIR
contains all.iob.snips.txt, slots.txt, train, valid and test, as s3prl's documentation has them.
Writes symlinks to them.
"""


@dataclass(frozen=True)
class Utterances:
    """The utterances of a split that s3prl reads.

    Attributes:
        files: sorted.
        texts: of each file, its line of :data:`TEXTS` without the name.
        without_text: the number of audio files without a line, of all speakers.
    """

    files: list[Path]
    texts: list[str]
    without_text: int


def read_texts(root: Path) -> dict[str, str]:
    """Map each name in :data:`TEXTS` to the rest of its line."""
    lines = read_text(root / TEXTS, "list of texts", DataError, MAX_LIST).split("\n")
    parts = (line.strip().partition(" ") for line in lines)
    return {name: text for name, _, text in parts if name}


def read_slots(path: Path) -> list[str]:
    """Read the names of slots.

    Raises:
        DataError: the file cannot be read, or s3prl cannot use a name.
    """
    first, *slots = read_text(path, "list of slots", DataError).split("\n")
    if first != OUTSIDE:
        raise DataError(
            f"{path}: line 1 must be {OUTSIDE}, because s3prl skips it; got {first!r:.40}"
        )
    for number, slot in enumerate(slots, start=2):
        if any(mark in _SEPARATORS or mark.isspace() for mark in slot):
            raise DataError(
                f"{path}: line {number}: a slot must not have a space, a colon or a semicolon, "
                f"got {slot!r:.40}"
            )
    return slots


def find_utterances(
    root: Path, folders: Sequence[str], speakers: Sequence[str], texts: dict[str, str]
) -> Utterances:
    """Find the audio files whose name begins with one of ``speakers`` and which have a text.

    Args:
        root: the corpus.
        folders: below ``root``.
        texts: :func:`read_texts` of ``root``.

    Raises:
        DataError: there are none.
    """
    files: list[Path] = []
    without_text = 0
    for folder in folders:
        count = len(files)
        for name in find_audio(root / folder) if (root / folder).is_dir() else ():
            file = root / folder / name
            if file.suffix != ".wav":
                continue
            if file.stem not in texts:
                without_text += 1
            elif file.stem.startswith(tuple(speakers)):
                files.append(file)
        if len(files) == count:
            raise DataError(
                f"{root} has no {folder}/NAME.wav with a NAME that is in {TEXTS} and begins with "
                f"one of the speakers {', '.join(speakers)}"
            )
    return Utterances(files, [texts[file.stem] for file in files], without_text)


def words_and_tags(text: str) -> tuple[list[str], list[str]]:
    """Words and tags of a text of :data:`TEXTS` as s3prl splits them.

    Raises:
        ValueError: it has no tab, or several.
    """
    words, tags = text.split("\t")
    return words.split(" ")[1:-1], tags.split(" ")[1:-1]


def check_texts(root: Path, utterances: Utterances, slots: Collection[str]) -> None:
    """Check that s3prl can encode the texts, and that there are slots to evaluate.

    Raises:
        DataError: names the first utterance with a problem.
    """
    slots, has_slots = {OUTSIDE, *slots}, False
    for file, text in zip(utterances.files, utterances.texts, strict=True):
        location = f"{root / TEXTS}: the line of {file.stem}"
        try:
            words, tags = words_and_tags(text)
        except ValueError:
            raise DataError(
                f"{location} must be NAME BOS WORDS EOS, a tab, and O TAGS INTENT"
            ) from None
        if all(word in _PUNCTUATION for word in words):
            raise DataError(f"{location} has no words")
        if unknown := next((tag for tag in tags if tag not in slots), None):
            raise DataError(f"{location} has the slot {unknown!r:.40}, which {SLOTS} lacks")
        if len(tags) < len(words) and tags[-1:] != [OUTSIDE]:
            raise DataError(f"{location} has {len(words)} words and {len(tags)} tags")
        has_slots = has_slots or any(tag != OUTSIDE for tag in tags)
    if not has_slots:
        folder = utterances.files[0].parent
        raise DataError(f"{root / TEXTS} has no slots for {folder}; SF's metrics need some")


def check_vocabulary(path: Path) -> None:
    """Raise DataError if a vocabulary file has characters at which s3prl's metrics split."""
    for line in read_text(path, "vocabulary", DataError).split("\n"):
        if line and line in _SEPARATORS:
            raise DataError(f"{path} must not have {line!r}: s3prl's metrics split slots there")


def _prepare_sf(args: argparse.Namespace) -> None:
    manifest = manifest_of(args, ("path", "split", "text", "iob"))
    entries = manifest.entries
    tagged = [_tagged_words(entry, args.strip_punctuation) for entry in entries]
    slots: dict[str, set[str]] = {split: set() for split in SPLITS}
    for entry, (_, tags) in zip(entries, tagged, strict=True):
        slots[entry.split].update(tags)
    for split, used in slots.items():
        used.discard(OUTSIDE)
        if not used:
            raise DataError(f"{manifest.source} has no {split} utterance with a slot")
    parts = read_audio_parts(args, manifest, entries)
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    lines: list[str] = []
    prepared = ["id\tpath\tsplit\tsamples"]
    with new_folder(args.out, replace=args.replace) as folder:
        for entry, audio, (words, tags) in placing(list(zip(entries, parts, tagged, strict=True))):
            part = FOLDERS[entry.split]
            name = f"{part}-{len(lines):06d}"  # which begins with the speaker, for s3prl
            audio.place(folder / part / f"{name}.wav")
            lengths[entry.split].append(audio.samples)
            lines.append(f"{name} BOS {' '.join(words)} EOS\t{OUTSIDE} {' '.join(tags)} none")
            prepared.append(f"{name}\t{entry.name}\t{entry.split}\t{audio.samples}")
        write_lines(folder / TEXTS, lines)
        names = sorted(set().union(*slots.values()))
        # no line break at the end, after which s3prl would read a slot without a name
        (folder / SLOTS).write_text("\n".join([OUTSIDE, *names]), encoding="utf-8")
        write_lines(folder / PREPARED, prepared)
    print_splits(lengths)
    unseen = sorted(set(names) - slots["train"])
    print(f"{len(names)} slots" + f"; train lacks {shorten_list(unseen)}" * bool(unseen))
    _print_keys(args.out)


def _tagged_words(entry: ManifestEntry, strip_punctuation: bool) -> tuple[list[str], list[str]]:
    """The normalised words of an entry, and the tag of each."""
    words, tags = entry.cells["text"].split(), entry.cells["iob"].split()
    if len(words) != len(tags):
        raise DataError(
            f"{entry.location}: {len(words)} words in text and {len(tags)} tags in iob; a word "
            "needs a tag"
        )
    tagged = []
    for word, tag in zip(words, tags, strict=True):
        slot = re.sub("^[BI]-", "", tag)
        if not slot or any(mark in slot for mark in _SEPARATORS) or (slot == OUTSIDE != tag):
            raise DataError(
                f"{entry.location}: a tag must be O, B-NAME, I-NAME or NAME, without colon or "
                f"semicolon, got {tag!r:.40}"
            )
        # a word may become several, or none
        tagged += [(part, slot) for part in normalise(word, strip_punctuation).split()]
    if not tagged:
        raise DataError(f"{entry.location} has no text")
    if characters := foreign_characters("".join(word for word, _ in tagged)):
        raise DataError(
            f"{entry.location}: the text has {characters!r:.40}; allowed are A to Z, the "
            "apostrophe and spaces (--strip-punctuation removes punctuation)"
        )
    return [word for word, _ in tagged], [tag for _, tag in tagged]


def _prepare_snips(args: argparse.Namespace) -> None:
    for name in (TEXTS, SLOTS, *FOLDERS.values()):
        if not (args.root / name).exists():
            raise DataError(f"{args.root} has no {name}; use the unpacked folder SNIPS")
    texts, slots = read_texts(args.root), read_slots(args.root / SLOTS)
    lengths: dict[str, list[int]] = {}
    prepared, notes = ["id\tsplit\tsamples"], Counter[str]()
    for split, folder in FOLDERS.items():
        found = find_utterances(args.root, [folder], SPEAKERS[split], texts)
        check_texts(args.root, found, slots)
        names = [file.relative_to(args.root).as_posix() for file in found.files]
        lengths[split] = audio_lengths(args.root, names, args.jobs)
        for name, length in zip(names, lengths[split], strict=True):
            prepared.append(f"{Path(name).stem}\t{split}\t{length}")
        notes["audio files without a text"] += found.without_text
        notes.update(_peculiarities(found.texts))
    with new_folder(args.out, replace=args.replace) as out:
        for name in (TEXTS, SLOTS, *FOLDERS.values()):
            link_folder(args.root / name, out / name)
        write_lines(out / PREPARED, prepared)
    print_splits(lengths)
    for note, count in notes.items():
        if count:
            print(f"note: {count} {note}")
    _print_keys(args.out)


def _peculiarities(texts: Iterable[str]) -> Iterator[str]:
    """What s3prl alters in texts, as notes, one for each text."""
    for text in texts:
        words, tags = words_and_tags(text)
        if len(words) != len(tags):
            yield "texts with more words than tags, or fewer: s3prl drops the rest"
        words = [word for word in words if word != "&" and word not in _PUNCTUATION]
        if foreign_characters("".join(words)):
            yield "texts with characters that the vocabulary lacks: s3prl reads them as <unk>"


def _print_keys(out: Path) -> None:
    print(f"wrote {out}; in the YAML: path: {out}")
    print(f"               slots_file: {out / SLOTS}")


def _configure(parser: argparse.ArgumentParser) -> None:
    add_convert_option(parser)
    parser.add_argument(
        "--strip-punctuation",
        action="store_true",
        help="remove punctuation from texts (default: an error)",
    )


SF = PrepareTask(
    "Audio SNIPS' layout from a manifest, for -d ctc", SF_DESCRIPTION, _prepare_sf, _configure
)
SNIPS = PrepareTask(
    "check preprocessed Audio SNIPS, for -d ctc",
    SNIPS_DESCRIPTION,
    _prepare_snips,
    inputs=(("root", "DIR"),),
)
