"""The speech: every utterance of some folders, and which of them are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from s3prl_ekd.data.audio_files import SAMPLE_RATE, find_audio, read_headers
from s3prl_ekd.data.manifest import read_manifest
from s3prl_ekd.errors import DataError

_HOLD_OUT_EVERY = 50  # without a manifest, one utterance in so many is for dev


@dataclass(frozen=True)
class Utterance:
    """One audio file. ``key`` is its name that no machine changes: folder number and path."""

    key: str
    path: str
    length: int  # samples at 16 kHz


@dataclass(frozen=True)
class Corpus:
    """Utterances to train on and held-out ones, each in the order of its keys."""

    train: tuple[Utterance, ...]
    dev: tuple[Utterance, ...]

    @property
    def all(self) -> tuple[Utterance, ...]:
        """Train, then dev: the order of the labels."""
        return self.train + self.dev

    @property
    def digest(self) -> str:
        """Changes with any name, length or split."""
        text = "\n".join(f"{u.key}\t{u.length}" for u in (*self.train, *self.dev))
        return hashlib.blake2b(f"{len(self.train)}\n{text}".encode(), digest_size=8).hexdigest()


def hours(utterances: Sequence[Utterance]) -> float:
    """Their sum."""
    return sum(u.length for u in utterances) / SAMPLE_RATE / 3600


def read_corpus(
    folders: Sequence[str | Path], manifests: Sequence[str | Path], shortest: int
) -> Corpus:
    """All audio below ``folders``; of a folder in which a manifest lies, what that lists.

    Args:
        folders: of FLAC, WAV, Ogg or Opus, the folder's number being part of each key.
        manifests: TSV files with the columns ``path`` and ``split``, each directly in one of the
            folders; ``test`` is never used. Without one, a fiftieth is held out by name.
        shortest: samples; what is shorter is left out.

    Raises:
        DataError: a folder or manifest is missing or not usable, a file is no audio, or nothing
            is left to train on or to hold out.
    """
    splits: dict[Path, dict[str, str]] = {}
    for manifest in map(Path, manifests):
        home = manifest.resolve().parent
        if home not in {Path(folder).resolve() for folder in folders}:
            raise DataError(f"{manifest} lies in none of the audio folders; put it into its folder")
        listed = splits.setdefault(home, {})
        listed.update((entry.path, entry.split) for entry in read_manifest(manifest))
    found: dict[str, list[Utterance]] = {"train": [], "dev": [], "test": []}
    for number, folder in enumerate(map(Path, folders)):
        split_of = splits.get(folder.resolve())
        names = sorted(split_of) if split_of is not None else find_audio(folder)
        if not names:
            raise DataError(f"{folder} holds no .flac, .wav, .ogg or .opus file")
        with tqdm(total=len(names), desc=f"headers of {folder}", unit=" files") as bar:
            headers = read_headers(folder, names, advance=bar.update)
        for name, header in zip(names, headers, strict=True):
            if isinstance(header, DataError):
                raise header
            if header.samples < shortest:
                continue
            key = f"{number}/{name}"
            split = split_of[name] if split_of is not None else _split_by_name(key)
            found[split].append(Utterance(key, str(folder / name), header.samples))
    if not found["dev"] and len(found["train"]) > 1 and not splits:
        found["dev"].append(found["train"].pop())  # a corpus too small for a fiftieth
    for split in ("train", "dev"):
        if not found[split]:
            raise DataError(
                f"no utterance of {shortest / SAMPLE_RATE:g} s or more is left for {split}; "
                "give more audio, or a manifest with that split"
            )
    return Corpus(tuple(found["train"]), tuple(found["dev"]))


def _split_by_name(key: str) -> str:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return "dev" if int.from_bytes(digest, "big") % _HOLD_OUT_EVERY == 0 else "train"
