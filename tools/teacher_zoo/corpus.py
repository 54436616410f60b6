"""The training corpus: utterances of some folders, and which of them are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s3prl_ekd.data.audio_files import SAMPLE_RATE, find_audio, read_headers
from s3prl_ekd.data.manifest import read_manifest
from s3prl_ekd.data.manifest.phones import Segment, parse_segments
from s3prl_ekd.errors import DataError

_HOLD_OUT_EVERY = 50  # without a manifest, one in 50 utterances is for dev


@dataclass(frozen=True)
class CorpusUtterance:
    """An audio file. ``key`` (folder number and relative path) is the same on every machine."""

    key: str
    path: str
    length: int  # samples at 16 kHz
    segments: tuple[Segment, ...] = ()  # phones, where the manifest has them


@dataclass(frozen=True)
class Corpus:
    """Training and held-out utterances, each sorted by key."""

    train: tuple[CorpusUtterance, ...]
    dev: tuple[CorpusUtterance, ...]

    @property
    def all(self) -> tuple[CorpusUtterance, ...]:
        """Train, then dev, as in :class:`labels.FrameLabels`."""
        return self.train + self.dev

    @property
    def digest(self) -> str:
        """Digest of all keys, lengths and splits."""
        text = "\n".join(f"{u.key}\t{u.length}" for u in (*self.train, *self.dev))
        return hashlib.blake2b(f"{len(self.train)}\n{text}".encode(), digest_size=8).hexdigest()


def hours(utterances: Sequence[CorpusUtterance]) -> float:
    """Total duration in hours."""
    return sum(u.length for u in utterances) / SAMPLE_RATE / 3600


def read_corpus(
    folders: Sequence[str | Path], manifests: Sequence[str | Path], shortest: int
) -> Corpus:
    """Find the audio below ``folders``; of a folder with a manifest, only the files it lists.

    Args:
        folders: of audio files; the folder's number is part of each key.
        manifests: TSV files with columns ``path`` and ``split``, each directly in one of the
            folders; ``test`` is not used. Without one, one in 50 is held out by a hash of its key.
        shortest: samples; shorter utterances are skipped.

    Raises:
        DataError: a folder or manifest is missing or invalid, a file is not audio, or a split is
            empty.
    """
    tables: dict[Path, dict[str, tuple[str, tuple[Segment, ...]]]] = {}
    for manifest in map(Path, manifests):
        home = manifest.resolve().parent
        if home not in {Path(folder).resolve() for folder in folders}:
            raise DataError(f"{manifest} is in none of the audio folders; move it into its folder")
        listed = tables.setdefault(home, {})
        for entry in read_manifest(manifest).entries:
            listed[entry.path] = (entry.split, parse_segments(entry))
    by_split: dict[str, list[CorpusUtterance]] = {"train": [], "dev": [], "test": []}
    for number, folder in enumerate(map(Path, folders)):
        table = tables.get(folder.resolve())
        names = sorted(table) if table is not None else find_audio(folder)
        if not names:
            raise DataError(f"no audio file in {folder}")
        headers = read_headers(folder, names, bar=True)
        for name, header in zip(names, headers, strict=True):
            if isinstance(header, DataError):
                raise header
            if header.samples < shortest:
                continue
            key = f"{number}/{name}"
            split, segments = table[name] if table is not None else (_split_by_name(key), ())
            utterance = CorpusUtterance(key, str(folder / name), header.samples, segments)
            by_split[split].append(utterance)
    if not by_split["dev"] and len(by_split["train"]) > 1 and not tables:
        by_split["dev"].append(by_split["train"].pop())  # a small corpus: hold out one
    for split in ("train", "dev"):
        if not by_split[split]:
            raise DataError(
                f"{split} has no utterance of {shortest / SAMPLE_RATE:g} s or more; give more "
                "audio, or a manifest with that split"
            )
    return Corpus(tuple(by_split["train"]), tuple(by_split["dev"]))


def _split_by_name(key: str) -> str:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return "dev" if int.from_bytes(digest, "big") % _HOLD_OUT_EVERY == 0 else "train"
