"""The study's folder: what was asked, what is done, where everything lies.

OUT/study.json               the setting and digests of the data; others are refused
OUT/pretrain, downstream     of `s3prl-ekd init`
OUT/data, configs, cache     corpora, model and runner configs, the teachers' targets
OUT/done/PART.json           a finished part, with its seconds
OUT/logs/PART.txt            all that a part has said
OUT/students/NAME.pt         the students
OUT/result/pretrain, superb  the runs
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from s3prl_ekd.errors import ConfigError, SetupError
from s3prl_ekd.files.atomic import atomic_file
from s3prl_ekd.files.formats import check_format_version
from s3prl_ekd.files.text import read_json
from s3prl_ekd.superb.plan import noise_digest

from .design import Setting, file_digest, model_config, rows, runner_config


@dataclass(frozen=True)
class Spent:
    """Seconds of a finished part: by the clock, and of processors."""

    seconds: float
    cpu: float


class Folder:
    """Paths of a study, and its short records.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path):
        self.root = root.absolute()

    @property
    def superb(self) -> Path:
        return self.root / "result/superb"

    def student(self, name: str) -> Path:
        return self.root / "students" / f"{name}.pt"

    def log(self, part: str) -> Path:
        return self.root / "logs" / f"{part}.txt"

    def spent(self, part: str) -> Spent | None:
        """What a part took; None where it is not finished."""
        path = self.root / "done" / f"{part}.json"
        if not path.is_file():
            return None
        try:
            found = read_json(path, "record", SetupError)
            return Spent(float(found["seconds"]), float(found["cpu"]))
        except (KeyError, TypeError, ValueError):
            raise SetupError(f"{path} is damaged; remove it to run the part again") from None

    def finish(self, part: str, spent: Spent) -> None:
        """Say that a part is finished."""
        write_json(self.root / "done" / f"{part}.json", vars(spent))

    def begin(self, setting: Setting, speech: Path, inputs: dict[str, str]) -> None:
        """Write the configs, and ``study.json`` where there is none; where there is, compare first.

        Call it with the folder's lock. ``study.json`` comes last, so a start that was killed
        before is begun anew. The configs are written at each start: corpus and teachers may have
        moved, and only what is in them counts.

        Args:
            speech: the folder with the manifests.
            inputs: of :func:`inputs_of`.

        Raises:
            ConfigError: the study was begun with another setting or other data.
            SetupError: the folder cannot be written to.
        """
        begun = self.begun
        if begun:
            self.compare(setting, inputs)
        try:
            for name in ("configs", "done", "logs", "students"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            for row in rows(setting):
                self._yaml(row.name, model_config(setting, row))
            self._yaml("runner", runner_config(setting, speech))
            self._yaml("start", runner_config(setting, speech, taught=False))
            if not begun:
                write_json(self._study, {"setting": setting.plain(), "inputs": inputs})
        except OSError as error:
            raise SetupError(f"{self.root} cannot be written to: {error.strerror}") from None

    @property
    def _study(self) -> Path:
        return self.root / "study.json"

    @property
    def begun(self) -> bool:
        """Whether a study is there."""
        return self._study.is_file()

    def compare(self, setting: Setting, inputs: dict[str, str] | None = None) -> None:
        """Refuse what the study that is there was not begun with. None: do not compare the data.

        Raises:
            ConfigError: naming what differs.
        """
        from teacher_zoo.recipe import differences

        before = read_json(self._study, "setting", ConfigError)
        check_format_version(before.get("version", 1), 1, f"the study {self._study}", ConfigError)
        now = json.loads(json.dumps(setting.plain()))
        changed = differences(before.get("setting", {}), now)
        if inputs is not None:
            changed += differences(before.get("inputs", {}), inputs)
        if changed:
            raise ConfigError(
                f"{self.root} was begun with other settings or data: {', '.join(changed)}; give "
                "the same ones to go on, or another folder with -o"
            )

    def _yaml(self, name: str, contents: dict[str, Any]) -> None:
        with atomic_file(self.root / "configs" / f"{name}.yaml") as file:
            file.write(yaml.safe_dump(contents, sort_keys=False).encode())


def inputs_of(setting: Setting, speech: Path, noise: Path) -> dict[str, str]:
    """Digests of the manifests, the lexicon, and the noises' names and sizes.

    Raises:
        DataError: there are no noises.
        SetupError: one of them cannot be read.
    """
    names = [f"{name}.tsv" for name in ("unlabeled", *setting.tasks)]
    names += ["lexicon.txt"] if "pr" in setting.tasks else []
    try:
        found = {name: file_digest(speech / name) for name in names}
        # the folder's name stands in the name of the condition
        noises = f"{noise.name} {noise_digest(str(noise))}"
    except OSError as error:
        raise SetupError(f"{error.filename} cannot be read: {error.strerror}") from None
    return found | {"noise": noises}


def write_json(path: Path, contents: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(contents, indent=1) + "\n").encode())
