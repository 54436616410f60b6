"""The study's folder: settings, finished jobs, paths.

OUT/study.json               settings and digests of the data, checked at each start
OUT/pretrain, downstream     written by `s3prl-ekd init`
OUT/data, configs, cache     corpora, model and runner configs, cached teacher targets
OUT/done/JOB.json            a finished job, with its seconds
OUT/logs/JOB.txt             output of a job
OUT/students/NAME.pt         student files
OUT/result/pretrain, superb  run folders
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

from .design import StudySetting, file_digest, model_config, rows, runner_config


@dataclass(frozen=True)
class TimeSpent:
    """Wall-clock and CPU seconds of a finished job."""

    seconds: float
    cpu: float


class StudyFolder:
    """Paths and records in the folder ``root`` of a study."""

    def __init__(self, root: Path):
        self.root = root.absolute()

    @property
    def superb(self) -> Path:
        return self.root / "result/superb"

    def student_path(self, name: str) -> Path:
        return self.root / "students" / f"{name}.pt"

    def log_path(self, job: str) -> Path:
        return self.root / "logs" / f"{job}.txt"

    def time_spent(self, job: str) -> TimeSpent | None:
        """Time of a job; None if it is not finished."""
        path = self.root / "done" / f"{job}.json"
        if not path.is_file():
            return None
        try:
            record = read_json(path, "record", SetupError)
            return TimeSpent(float(record["seconds"]), float(record["cpu"]))
        except (KeyError, TypeError, ValueError):
            raise SetupError(f"{path} is damaged; delete it to run the job again") from None

    def mark_done(self, job: str, spent: TimeSpent) -> None:
        """Record that a job is finished."""
        write_json(self.root / "done" / f"{job}.json", vars(spent))

    def start(self, setting: StudySetting, speech: Path, inputs: dict[str, str]) -> None:
        """Start or resume a study: compare with ``study.json`` if there is one; write the configs.

        Needs the folder's lock. ``study.json`` is written last, so a start that is killed before
        can be repeated with other settings. The configs are written at each start, since the paths
        of corpus and teachers may have changed; only their contents are compared.

        Args:
            speech: the folder with the manifests.
            inputs: from :func:`input_digests`.

        Raises:
            ConfigError: the study was started with other settings or data.
            SetupError: cannot write to the folder.
        """
        resumed = self.exists
        if resumed:
            self.check_unchanged(setting, inputs)
        try:
            for name in ("configs", "done", "logs", "students"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            for row in rows(setting):
                self._yaml(row.name, model_config(setting, row))
            self._yaml("runner", runner_config(setting, speech))
            self._yaml("start", runner_config(setting, speech, trained=False))
            if not resumed:
                write_json(self._study, {"setting": setting.as_json(), "inputs": inputs})
        except OSError as error:
            raise SetupError(f"cannot write to {self.root}: {error.strerror}") from None

    @property
    def _study(self) -> Path:
        return self.root / "study.json"

    @property
    def exists(self) -> bool:
        """Whether the folder has a study."""
        return self._study.is_file()

    def check_unchanged(self, setting: StudySetting, inputs: dict[str, str] | None = None) -> None:
        """Check that settings and data are those of ``study.json``; None: the settings only.

        Raises:
            ConfigError: with the keys that differ.
        """
        from teacher_zoo.recipe import changed_keys

        recorded = read_json(self._study, "setting", ConfigError)
        check_format_version(recorded.get("version", 1), 1, f"the study {self._study}", ConfigError)
        current = json.loads(json.dumps(setting.as_json()))
        changed = changed_keys(recorded.get("setting", {}), current)
        if inputs is not None:
            changed += changed_keys(recorded.get("inputs", {}), inputs)
        if changed:
            raise ConfigError(
                f"{self.root}: the settings or data have changed: {', '.join(changed)}; use the "
                "same ones to resume, or another folder with -o"
            )

    def _yaml(self, name: str, contents: dict[str, Any]) -> None:
        with atomic_file(self.root / "configs" / f"{name}.yaml") as file:
            file.write(yaml.safe_dump(contents, sort_keys=False).encode())


def input_digests(setting: StudySetting, speech: Path, noise: Path) -> dict[str, str]:
    """Digests of the manifests, of the lexicon, and of the noises' names and sizes.

    Raises:
        DataError: the noise folder has no audio.
        SetupError: cannot read a file.
    """
    names = [f"{name}.tsv" for name in ("unlabeled", *setting.tasks)]
    names += ["lexicon.txt"] if "pr" in setting.tasks else []
    try:
        digests = {name: file_digest(speech / name) for name in names}
        # the name of the test condition contains the folder's name
        noises = f"{noise.name} {noise_digest(str(noise))}"
    except OSError as error:
        raise SetupError(f"cannot read {error.filename}: {error.strerror}") from None
    return digests | {"noise": noises}


def write_json(path: Path, contents: Any) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(contents, indent=1) + "\n").encode())
