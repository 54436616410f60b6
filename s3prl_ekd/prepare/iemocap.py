"""IEMOCAP's own labels, as SUPERB uses them: four classes, five sessions.

``SessionN/dialog/EmoEvaluation/DIALOG.txt`` has for each utterance a line of its time, name, label
and valence, activation, dominance, separated by tabs; lines of single annotators follow it:

    [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]

Its audio is ``SessionN/sentences/wav/DIALOG/NAME.wav``. SUPERB keeps neutral, happy, angry and sad,
takes excited for happy, and leaves out the rest. In the whole corpus that makes 5531 utterances:
1085, 1023, 1151, 1031 and 1241 in sessions 1 to 5.
"""

from __future__ import annotations

from pathlib import Path

from ..data.audio_files import is_passed_over
from ..errors import DataError
from .er import Item

LABELS = ("neu", "hap", "ang", "sad")  # s3prl's order
MERGED = {"exc": "hap"}
SESSIONS = tuple(f"Session{number}" for number in range(1, 6))
WHOLE = dict(zip(SESSIONS, (1085, 1023, 1151, 1031, 1241), strict=True))


def read_iemocap(root: Path) -> list[Item]:
    """The utterances of the four classes, by session, dialog and place in the dialog.

    Raises:
        DataError: ``root`` is not IEMOCAP's folder, a session has no labels, or audio is missing.
    """
    check_shape(root)
    items, missing = [], []
    for session in SESSIONS:
        before = len(items)
        for file in sorted((root / session / "dialog" / "EmoEvaluation").glob("*.txt")):
            if is_passed_over(file.name):
                continue
            for name, label in _labels(file):
                path = f"{session}/sentences/wav/{name.rpartition('_')[0]}/{name}.wav"
                if not (root / path).is_file():
                    missing.append(path)
                items.append(Item(path, label, name.split("_")[0], session))
        if len(items) == before:
            raise DataError(
                f"{root / session / 'dialog' / 'EmoEvaluation'} has no line with a label of "
                f"{', '.join((*LABELS, *MERGED))}"
            )
    if missing:
        raise DataError(
            f"{root} lacks the audio of {len(missing)} of {len(items)} labelled utterances: "
            f"{', '.join(missing[:3])}{', …' * (len(missing) > 3)}"
        )
    return items


def _labels(file: Path) -> list[tuple[str, str]]:
    """Name and label of each utterance of one dialog that is of one of the classes."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start})") from error
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith("["):
            continue
        cells = line.split("\t")
        if len(cells) < 3 or "_" not in cells[1]:
            raise DataError(
                f"{file}: line {number} is not time, name, label and [v, a, d], separated by tabs"
            )
        label = MERGED.get(cells[2], cells[2])
        if label in LABELS:
            found.append((cells[1], label))
    return found


def check_shape(root: Path) -> None:
    """Raise :class:`DataError` unless the folders of IEMOCAP's five sessions are in ``root``."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the one with Session1 to Session5 in it")
    for session in SESSIONS:
        for below in ("dialog/EmoEvaluation", "sentences/wav"):
            if not (root / session / below).is_dir():
                found = (path.parent for path in root.glob("*/Session1"))
                inside = next((path for path in found if not is_passed_over(path.name)), None)
                hint = f"; is it {inside}?" if inside else ""
                raise DataError(f"{root} is not IEMOCAP: it has no {session}/{below}{hint}")
