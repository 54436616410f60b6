"""LibriSpeech as it is unpacked: its splits, and the text of each utterance.

``SPLIT/SPK/CHAP/SPK-CHAP-NNNN.flac``, with a line for each utterance in ``SPK-CHAP.trans.txt``
beside them. ASR and PR as SUPERB does them train on 100 h and need three of the seven splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..data.audio_files import SAMPLE_RATE, find_audio, read_headers
from ..data.lengths import Row
from ..errors import DataError

NEEDED = ("train-clean-100", "dev-clean", "test-clean")  # by SUPERB's ASR and PR
SPLITS = (*NEEDED, "train-clean-360", "train-other-500", "dev-other", "test-other")


def check_shape(root: Path) -> list[str]:
    """The splits that are there, those of :data:`NEEDED` first.

    Raises:
        DataError: one of :data:`NEEDED` is missing; all that are missing are named.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the one with {', '.join(NEEDED)} in it")
    missing = [split for split in NEEDED if not (root / split).is_dir()]
    if not missing:
        return [split for split in SPLITS if (root / split).is_dir()]
    inside = root / "LibriSpeech"  # the folder that is in the archives
    if all((inside / split).is_dir() for split in NEEDED):
        why = f"has none of its splits directly in it; give {inside}"
    elif root.name in SPLITS:
        why = f"is one split; give the folder above, {root.resolve().parent}"
    else:
        archives = ", ".join(f"{split}.tar.gz" for split in missing)
        why = f"lacks {', '.join(f'{split}/' for split in missing)}; unpack {archives} there"
    raise DataError(f"{root} {why}")


def read_texts(root: Path, folders: Sequence[str]) -> dict[Path, list[str]]:
    """The words, in upper case, of each audio file in ``folders`` below ``root``, by path.

    Raises:
        DataError: a folder is not there or has no audio, or a file has no text.
    """
    texts: dict[Path, list[str]] = {}
    transcripts: dict[Path, dict[str, str]] = {}
    for folder in folders:
        names = find_audio(root / folder)
        if not names:
            raise DataError(f"{root / folder} has no audio (.flac .wav .ogg .opus) in it")
        for name in names:
            file = root / folder / name
            utterance = file.name.partition(".")[0]
            source = file.with_name(utterance.rpartition("-")[0] + ".trans.txt")
            if source not in transcripts:
                transcripts[source] = _read_transcript(source, file)
            words = transcripts[source].get(utterance, "").upper().split()
            if not words:
                raise DataError(f"{source} has no text for the utterance {utterance}")
            texts[file] = words
    return texts


def _read_transcript(source: Path, file: Path) -> dict[str, str]:
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except OSError:
        raise DataError(f"{file} has no transcript: {source} is not there") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text (byte {error.start})") from None
    return {name: text for name, _, text in (line.partition(" ") for line in lines)}


def measure_splits(
    root: Path,
    splits: Sequence[str],
    *,
    jobs: int = 8,
    progress: Callable[[int], Callable[[int], object]] = lambda total: lambda done: None,
) -> dict[str, list[Row]]:
    """Path below ``root`` and length in samples of each utterance of ``splits``.

    Args:
        jobs: threads that read headers.
        progress: given the number of files, returns what is told how many more are done.

    Raises:
        DataError: a file cannot be read or is not 16 kHz mono; the first of a split are named.
    """
    names = {split: [f"{split}/{name}" for name in find_audio(root / split)] for split in splits}
    advance = progress(sum(map(len, names.values())))
    rows: dict[str, list[Row]] = {}
    for split, paths in names.items():
        rows[split], bad = [], []
        for path, header in zip(
            paths, read_headers(root, paths, jobs=jobs, advance=advance), strict=True
        ):
            if isinstance(header, DataError):
                bad.append(str(header))
            elif (header.rate, header.channels) != (SAMPLE_RATE, 1):
                bad.append(f"{path} is {header.rate} Hz with {header.channels} channels")
            else:
                rows[split].append((path, header.frames))
        if bad:
            raise DataError(
                f"{root}: {len(bad)} of the {len(paths)} files of {split} cannot be used; unpack "
                f"them again: {'; '.join(bad[:3])}{'; …' * (len(bad) > 3)}"
            )
    return rows
