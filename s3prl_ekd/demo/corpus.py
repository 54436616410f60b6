"""The demo's corpus: synthetic speech in the layout of LibriSpeech.

    OUT/{train,dev,test}-clean/SPK/CHAP/SPK-CHAP-NNNN.flac and SPK-CHAP.trans.txt
    OUT/len_for_bucket/{train,dev,test}-clean.csv     length tables for s3prl
    OUT/noise/*.flac                                  noise clips of 10 s
    OUT/corpus.json                                   its parameters and a checksum

The speakers of the three splits are disjoint, and every sentence is unique. The same parameters
give the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.audio_files import is_hidden_or_system
from ..data.audio_writer import write_audio
from ..data.lengths import write_table
from ..data.tables import Utterance
from ..errors import DataError
from ..files.atomic import atomic_folder, file_sha256
from ..files.formats import check_format_version
from ..files.text import read_json
from ..prepare.asr import TABLES, normalise
from .noise import make_noises
from .sentences import sentences
from .voices import SAMPLE_RATE, make_voices, speak, to_int16

RECORD = "corpus.json"
VERSION = 1  # increase it when a change of the code changes the bytes
SPEAKERS = {"train-clean": 8, "dev-clean": 2, "test-clean": 2}
UTTERANCES = {"train-clean": 400, "dev-clean": 40, "test-clean": 40}
NOISE_SECONDS = 10.0
_FIRST_SPEAKER, _CHAPTER = 101, 1


def make_corpus(
    out: str | Path,
    *,
    seed: int = 1337,
    speakers: Mapping[str, int] | None = None,
    utterances: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Make the corpus in ``out``, unless it exists with these parameters and a correct checksum.

    Args:
        out: folder of the corpus; a folder with other contents is never overwritten.
        speakers: number of speakers in each split (default: :data:`SPEAKERS`).
        utterances: number of utterances in each split (default: :data:`UTTERANCES`).

    Returns:
        The contents of ``corpus.json``: ``parameters``, ``splits`` (``utterances``, ``seconds`` and
        ``speakers`` of each), ``noise`` (file names) and ``checksum``.
    """
    out = Path(out).resolve()
    parameters = {
        "version": VERSION,
        "seed": seed,
        "speakers": dict(SPEAKERS if speakers is None else speakers),
        "utterances": dict(UTTERANCES if utterances is None else utterances),
    }
    _check(parameters)
    record = read_record(out)
    if record is not None and record["parameters"] == parameters:
        if corpus_checksum(out) == record["checksum"]:
            return record
    elif record is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not a demo corpus; use another folder")
    with atomic_folder(out, DataError) as folder:
        return _make(folder, parameters)


def corpus_checksum(root: Path) -> str:
    """SHA-256 of a corpus: names and bytes of all files, except ``corpus.json`` and files that
    :func:`is_hidden_or_system` ignores (a new ``.DS_Store`` does not change it)."""
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if name != RECORD and not any(map(is_hidden_or_system, relative.parts)):
            total.update(f"{file_sha256(path)}  {name}\n".encode())
    return total.hexdigest()


def _check(parameters: Mapping[str, Any]) -> None:
    speakers, utterances = parameters["speakers"], parameters["utterances"]
    if set(speakers) != set(utterances):
        raise DataError(f"speakers and utterances have different splits: {speakers}, {utterances}")
    for split, count in speakers.items():
        if not 1 <= count <= utterances[split]:
            raise DataError(
                f"{split}: the number of speakers must be 1 to {utterances[split]} (the number of "
                f"utterances), got {count}"
            )


def read_record(out: Path) -> dict[str, Any] | None:
    """The contents of ``corpus.json``; None if ``out`` has no demo corpus.

    Raises:
        DataError: a newer version made the corpus.
    """
    try:
        record = read_json(out / RECORD, "record of the demo corpus", DataError)
    except DataError:
        return None
    if "checksum" not in record or not isinstance(record.get("parameters"), dict):
        return None
    version = record["parameters"].get("version")
    check_format_version(version, VERSION, f"the demo corpus {out}", DataError)
    return record


def _make(root: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    seed, speakers, utterances = (parameters[key] for key in ("seed", "speakers", "utterances"))
    people = enumerate(make_voices(sum(speakers.values()), seed), start=_FIRST_SPEAKER)
    rng = random.Random(f"corpus {seed}")
    texts = sentences(rng)
    splits: dict[str, Any] = {}
    speech: list[np.ndarray] = []  # of the first split, for the babble noise
    bar = tqdm(total=sum(utterances.values()), unit=" utterances", desc="demo corpus")
    (root / TABLES).mkdir()
    for split, count in speakers.items():
        talkers = list(itertools.islice(people, count))
        rows = []
        lines: dict[str, list[str]] = {}
        for index in range(utterances[split]):
            speaker, voice = talkers[index % count]
            folder = f"{split}/{speaker}/{_CHAPTER}"
            name = f"{speaker}-{_CHAPTER}-{index // count:04d}"
            text = next(texts)
            # As in real speech, rate and pitch differ between utterances.
            wave = speak(text, voice, rate=rng.uniform(0.9, 1.1), pitch=rng.randint(44, 56))
            (root / folder).mkdir(parents=True, exist_ok=True)
            write_audio(root / folder / f"{name}.flac", wave)
            transcript = f"{folder}/{speaker}-{_CHAPTER}.trans.txt"
            lines.setdefault(transcript, []).append(f"{name} {normalise(text)}\n")
            rows.append(Utterance(f"{folder}/{name}.flac", len(wave)))
            if not splits:
                speech.append(wave / 32768)
            bar.update()
        for transcript, content in lines.items():
            (root / transcript).write_text("".join(content), encoding="utf-8")
        write_table(root / TABLES / f"{split}.csv", rows)
        splits[split] = {
            "utterances": len(rows),
            "seconds": round(sum(row.length for row in rows) / SAMPLE_RATE, 1),
            "speakers": [str(number) for number, _ in talkers],
        }
    bar.close()
    noise = make_noises(np.random.default_rng(seed), speech, NOISE_SECONDS)
    (root / "noise").mkdir()
    for name, clip in noise.items():
        write_audio(root / "noise" / f"{name}.flac", to_int16(clip))
    record = {
        "parameters": parameters,
        "splits": splits,
        "noise": [f"noise/{name}.flac" for name in noise],
        "checksum": corpus_checksum(root),
    }
    (root / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record
