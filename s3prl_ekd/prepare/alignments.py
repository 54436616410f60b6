"""``prepare alignments``: which phone is spoken when, by forced alignment of the text."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.audio_files import SAMPLE_RATE
from ..data.manifest import ManifestEntry
from ..errors import DataError, SetupError
from .asr import COLUMNS, normalise
from .common import PREPARED, PrepareTask, link_folder, manifest_of, new_folder, write_lines
from .lexicon import Pronunciations, add_lexicon_options, collect_pronunciations, shorten_list

ALIGNED, AUDIO = "aligned.tsv", "audio"
DESCRIPTION = """\
Write OUT/aligned.tsv for `s3prl-ekd probe`: the manifest with a column `segments`, where a segment
is PHONE:START+LENGTH in frames of 10 ms, without stress, SIL for silence. OUT/audio links to the
audio.

The text of each utterance is aligned with its pronunciations by PocketSphinx and its acoustic model
of American English (pip install pocketsphinx). Needs the columns path, speaker, text, split,
and a lexicon (--lexicon, --g2p). Utterances that cannot be aligned are left out and counted. The
phones are those of the lexicon, which a speaker with an accent may not have said.
"""


def align(wave: Any, words: Sequence[str], aligner: Any) -> str:
    """The segments of an utterance, or "" if its text cannot be aligned.

    Args:
        wave: ``[sample]`` at 16 kHz, -1 to 1.
        words: words of the aligner's dictionary.
        aligner: see :func:`make_aligner`.
    """
    pcm = (wave.clamp(-1, 1) * 32767).short().numpy().tobytes()
    aligner.set_align_text(" ".join(words).lower())
    # hyp() after the second pass would crash the interpreter (PocketSphinx 5.1)
    if not _decode(aligner, pcm) or aligner.hyp() is None:
        return ""
    aligner.set_alignment()  # a second pass, with the phones of the words found by the first
    if not _decode(aligner, pcm):
        return ""
    segments = [
        f"{phone.name}:{phone.start}+{phone.duration}"
        for word in aligner.get_alignment()
        for phone in word
    ]
    return " ".join(segments)


def _decode(aligner: Any, pcm: bytes) -> bool:
    """Decode an utterance; return whether the alignment reaches its end."""
    aligner.start_utt()
    aligner.process_raw(pcm, full_utt=True)
    try:
        aligner.end_utt()
    except RuntimeError:
        return False
    return True


def make_aligner(pronunciations: Mapping[str, Sequence[str]]) -> Any:
    """A decoder of PocketSphinx with these words.

    Raises:
        SetupError: PocketSphinx is not installed.
    """
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise SetupError("alignments need PocketSphinx; type: pip install pocketsphinx") from None
    with tempfile.TemporaryDirectory() as folder:
        dictionary = Path(folder) / "words.dict"
        lines = [
            f"{word.lower()} {' '.join(phone.rstrip('012') for phone in phones)}\n"
            for word, phones in sorted(pronunciations.items())
        ]
        dictionary.write_text("".join(lines), encoding="utf-8")
        # The second pass often fails on word times of the best path through the lattice; with batch
        # normalisation an alignment does not depend on earlier utterances
        return Decoder(lm=None, dict=str(dictionary), bestpath=False, cmn="batch", loglevel="FATAL")


def _configure(parser: argparse.ArgumentParser) -> None:
    add_lexicon_options(parser)


def _prepare_alignments(args: argparse.Namespace) -> None:
    from ..data.audio import read_audio  # torch; not for prepare --help

    if not args.lexicon and not args.g2p:
        raise SetupError("alignments need pronunciations: add --lexicon FILE, --g2p, or both")
    manifest = manifest_of(args, COLUMNS)
    entries = manifest.entries
    texts = [normalise(entry.cells["text"]).split() for entry in entries]
    pronunciations: Pronunciations = collect_pronunciations(args, set().union(*texts))
    aligner = make_aligner(pronunciations)
    cells_of = [_cells(entry) for entry in entries]
    names = dict.fromkeys(name for cells in cells_of for name in cells)  # of all manifests
    columns = [name for name in names if name not in ("path", "segments")]
    rows, failed = [], []
    pairs = zip(entries, texts, cells_of, strict=True)
    for entry, words, cells in tqdm(list(pairs), desc="alignments", unit=" utterances", delay=0.3):
        known = bool(words) and all(word in pronunciations for word in words)
        wave = read_audio(entry.part(manifest.root)) if known else None
        segments = "" if wave is None else align(wave, words, aligner)
        if segments:
            row = [f"{AUDIO}/{entry.path}", segments, *(cells.get(name, "") for name in columns)]
            rows.append("\t".join(row))
        else:
            failed.append(entry.name)
    if not rows:
        unknown = sorted(set().union(*texts) - pronunciations.keys())
        cause = f"no pronunciation of {shorten_list(unknown)}" if unknown else "check its texts"
        raise DataError(f"no utterance of {manifest.source} could be aligned; {cause}")
    with new_folder(args.out, replace=args.replace) as folder:
        link_folder(manifest.root, folder / AUDIO)
        write_lines(folder / ALIGNED, ["\t".join(["path", "segments", *columns]), *rows])
        write_lines(folder / PREPARED, [f"task\t{args.task}", f"manifest\t{manifest.source}"])
    print(f"aligned {len(rows)} of {len(entries)} utterances")
    if failed:
        print(f"left out: {shorten_list(failed)}")
    print(f"next: s3prl-ekd probe tiny_hubert --data {shlex.quote(str(args.out / ALIGNED))}")


def _cells(entry: ManifestEntry) -> dict[str, str]:
    """The cells of an entry, with its split, and with offset and duration (seconds) of segments."""
    cells = {**entry.cells, "split": entry.split}
    for name in ("offset", "duration"):
        cells.setdefault(name, "")
    if entry.offset is not None and entry.length is not None:
        cells["offset"] = repr(entry.offset / SAMPLE_RATE)
        cells["duration"] = repr(entry.length / SAMPLE_RATE)
    return cells


ALIGNMENTS = PrepareTask(
    "phones by forced alignment, for probe", DESCRIPTION, _prepare_alignments, _configure
)
