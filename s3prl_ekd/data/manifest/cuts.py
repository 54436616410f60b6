"""lhotse's manifests of cuts: ``*.jsonl`` and ``*.jsonl.gz``, read by lhotse (extra ``lhotse``).

A cut of a whole recording is a file, any other cut a segment of one. Only audio files are read:
lhotse can also name commands and addresses, which are never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, SetupError, first_line
from ...files.text import check_regular
from .entries import ManifestEntry, below_common_root, check_audio_name, segment_samples

SUFFIXES = (".jsonl", ".jsonl.gz")
_TOLERANCE = 0.001  # seconds by which a cut of a whole recording may differ from it


def import_lhotse() -> Any:
    """The module lhotse. Raises SetupError if it is not installed."""
    try:
        import lhotse
    except ImportError:
        raise SetupError(
            "lhotse's files are read by lhotse; type: pip install 'lhotse>=1.33,<2'"
        ) from None
    return lhotse


def read_cuts(
    path: Path, columns: Sequence[str], audio_root: Path | None, split: str
) -> tuple[Path, list[ManifestEntry]]:
    """Read a manifest of cuts; arguments as of :func:`.kaldi.read_kaldi`.

    The columns are ``id``, and ``text`` and ``speaker`` of the supervisions.

    Raises:
        DataError: the file cannot be read, or a cut is not (a segment of) an audio file.
        SetupError: lhotse is not installed.
    """
    unknown = [name for name in columns if name not in ("path", "split", "text", "speaker")]
    if unknown:
        raise DataError(f"{path}: cuts have no column {unknown[0]}; use a tab-separated manifest")
    lhotse = import_lhotse()
    check_regular(path, "manifest of cuts", DataError)
    entries = []
    try:
        for number, cut in enumerate(lhotse.CutSet.from_jsonl_lazy(path.absolute()), start=1):
            entries.append(_entry(cut, f"{path}: line {number}", split))
    except DataError:
        raise
    except Exception as error:  # lhotse has no class for a damaged manifest
        raise DataError(
            f"{path}: line {len(entries) + 1} is not a cut: {first_line(error)}"
        ) from None
    if not entries:
        raise DataError(f"{path} has no cuts")
    return below_common_root(entries, audio_root)


def _entry(cut: Any, location: str, split: str) -> ManifestEntry:
    recording: Any = getattr(cut, "recording", None)
    sources: list[Any] = [] if recording is None else recording.sources
    problem = ""
    if len(sources) != 1:
        problem = "has no recording of one file (is it padded or mixed?)"
    elif sources[0].type != "file":
        problem = f"has audio of type {str(sources[0].type)[:40]!r}, and only files are read"
    elif recording.num_channels != 1:
        problem = f"has a recording of {recording.num_channels} channels; write each to a file"
    elif recording.transforms:
        problem = "has audio that lhotse would change; save the audio and its cuts first"
    if problem:
        raise DataError(f"{location}: the cut {str(cut.id)[:80]} {problem}")
    check_audio_name(str(sources[0].source), location)
    texts = [str(s.text) for s in cut.supervisions if s.text]
    speakers = {str(s.speaker) for s in cut.supervisions if s.speaker}
    cells = {"id": str(cut.id), "text": " ".join(texts)}
    cells["speaker"] = speakers.pop() if len(speakers) == 1 else ""
    cells = {name: " ".join(value.split()) for name, value in cells.items()}  # one line
    entry = ManifestEntry(location, str(sources[0].source), split, cells)
    if cut.start == 0 and abs(cut.duration - recording.duration) < _TOLERANCE:
        return entry
    offset, length = segment_samples(repr(cut.start), repr(cut.duration), location)
    return ManifestEntry(location, entry.path, split, cells, offset, length)
