"""Design of the study: the grid of students and the settings they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from s3prl_ekd.errors import ConfigError, SetupError
from s3prl_ekd.files.atomic import file_sha256
from s3prl_ekd.teachers import zoo

TASKS = ("pr", "asr", "sid", "er")
ENSEMBLES = ("average", "concat", "separate")
NONE = "none"  # the control: a student with its initial weights, not distilled
CLEAN = "clean"
ZERO_LR = 1e-60  # passes the check for a positive learning rate, and is 0 in float32

# Options of s3prl-ekd superb that change the tiny recipes. PR has SUPERB's linear probe: on such
# small students it learns in minutes, while the recipe's BiLSTM hardly improves in that time. SID
# trains on whole utterances, so that their features can be cached.
DOWNSTREAM_OPTIONS = {
    "pr": ("--lr", "pr=1e-2")
    + ("--override", "pr=config.downstream_expert.model.select='FrameLevel'"),
    "asr": ("--lr", "asr=3e-3"),
    "sid": ("--override", "sid=config.downstream_expert.datarc.max_timestep=16000000"),
}
PROBES = {"pr": "a linear probe", "asr": "the recipe's BiLSTM"}


@dataclass(frozen=True)
class StudentSize:
    """Size of a student with seven convolutions, at 320 samples a frame.

    Attributes:
        channels: of each convolution.
        width: of the transformer layers.
        layers: number of transformer layers.
    """

    channels: int
    width: int
    layers: int

    def student(self, from_teacher: bool) -> dict[str, Any]:
        """The ``student`` section of a model config.

        Args:
            from_teacher: initialised from a teacher; then it has the shape of the tiny teachers
                and a frozen conv extractor.
        """
        c = self.channels
        return {
            "extractor_conv_feature_layers": f"[({c},10,5)] + [({c},3,2)] * 4 + [({c},2,2)] * 2",
            "conv_pos": 128 if from_teacher else 32,
            "conv_pos_groups": 16 if from_teacher else 4,
            "encoder_layers": self.layers,
            "encoder_embed_dim": self.width,
            "encoder_ffn_embed_dim": (4 if from_teacher else 2) * self.width,
            "encoder_attention_heads": 4,
            **({"feature_grad_mult": 0.0} if from_teacher else {}),
        }


@dataclass(frozen=True)
class StudySetting:
    """Settings that influence the results, the same for all students; students differ only in
    teachers, aggregation, size and seed.

    Attributes:
        teachers: name -> source, as in a model config.
        layers: target layers of each teacher.
        init: the teacher that initialises all students; None: random weights.
        sizes: name -> size.
        seeds: of the distillation; a student's downstream runs have the same seed.
        steps, batch, seconds, lr: of each distillation; ``seconds`` is the longest excerpt.
        tasks: task -> steps of its downstream training.
        snr: dB of the noisy test.
        sid_seconds: seconds kept from each dev and test utterance of SID.
        all_folds: ER is cross-validated, leaving out one speaker at a time; else it has the
            manifest's split.
    """

    teachers: dict[str, str]
    layers: tuple[int, ...]
    sizes: dict[str, StudentSize]
    init: str | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 200
    batch: int = 8
    seconds: float = 2.0
    lr: float = 1e-3
    tasks: dict[str, int] | None = None
    snr: float = 5.0
    sid_seconds: float = 1.0
    all_folds: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seconds", "lr", "sid_seconds"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        if self.steps < 4:
            raise ConfigError(f"--steps must be 4 or more, got {self.steps}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds has a duplicate: {' '.join(map(str, self.seeds))}")
        if len(self.teachers) < 2:
            raise ConfigError(
                f"--teacher: an ensemble needs 2 teachers or more, got {', '.join(self.teachers)}"
            )
        if self.init is not None and self.init not in self.teachers:
            raise ConfigError(
                f"--init must be none or one of {', '.join(self.teachers)}; got {self.init}"
            )
        multiple = 4 if self.init is None else 16  # heads; groups of the positional convolution
        for name, size in self.sizes.items():
            if min(size.channels, size.width, size.layers) < 1 or size.width % multiple:
                raise ConfigError(
                    f"--size {name}: channels, width and layers must be above 0 and the width a "
                    f"multiple of {multiple}; got {size.channels},{size.width},{size.layers}"
                )

    def as_json(self) -> dict[str, Any]:
        """The settings as stored in ``study.json``, with digests in place of the teachers' paths.

        Raises:
            SetupError: a tiny teacher's file is missing from this installation.
        """
        record = asdict(self)
        record["downstream"] = {
            task: " ".join(DOWNSTREAM_OPTIONS[task])
            for task in self.tasks or ()
            if task in DOWNSTREAM_OPTIONS
        }
        record["teachers"] = {name: _digest(source) for name, source in self.teachers.items()}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in record.items()}


def _digest(source: str) -> str:
    """Digest of a teacher's file, or the source itself if it is no file.

    A tiny teacher's name is part of the digest: its random initialisation has the same file.
    """
    if source in zoo.NAMES:
        return f"{source} {file_digest(zoo.checkpoint_path(source))}"
    return file_digest(Path(source)) if Path(source).is_file() else source


def file_digest(path: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file."""
    return file_sha256(path)[:16]


def with_absolute_paths(setting: StudySetting) -> StudySetting:
    """Make the paths of teachers absolute, since the runs start in another folder.

    Raises:
        SetupError: no such file.
    """
    teachers = {}
    for name, source in setting.teachers.items():
        if ("/" in source or Path(source).is_file()) and "://" not in source:
            if not Path(source).exists():
                raise SetupError(f"--teacher {name}: no such file: {source}")
            source = os.path.abspath(source)
        teachers[name] = source
    return replace(setting, teachers=teachers)


@dataclass(frozen=True)
class StudyRow:
    """A row of the table: students that differ only in the seed."""

    size: str
    learned_from: str  # a teacher, an aggregation over all teachers, or none

    @property
    def name(self) -> str:
        return f"{self.size}-{self.learned_from}"


@dataclass(frozen=True)
class StudyStudent:
    """One student: a row and a seed."""

    row: StudyRow
    seed: int

    @property
    def name(self) -> str:
        """Name of the student's run folder, file and upstream."""
        return f"{self.row.name}-seed{self.seed}"


def rows(setting: StudySetting) -> Iterator[StudyRow]:
    """Rows of each size: no teacher, each single teacher, all teachers under each aggregation."""
    for size in setting.sizes:
        for learned_from in (NONE, *setting.teachers, *ENSEMBLES):
            yield StudyRow(size, learned_from)


def students(setting: StudySetting) -> list[StudyStudent]:
    """All students, sorted by seed, so that a study that is stopped has complete comparisons."""
    return [StudyStudent(row, seed) for seed in setting.seeds for row in rows(setting)]


def model_config(setting: StudySetting, row: StudyRow) -> dict[str, Any]:
    """The model config of a row (``run_pretrain.py -g``).

    All rows have the same initial weights, random or from one teacher, so they differ only in their
    targets. In rows that are not distilled from that teacher, it has weight 0. The control's config
    has a teacher, too, since a config needs one.
    """
    ensemble = row.learned_from in ENSEMBLES
    target_teachers = set(setting.teachers) if ensemble else {row.learned_from}
    if row.learned_from == NONE:
        target_teachers = {setting.init or next(iter(setting.teachers))}
    teachers = {
        name: {"model": source, "layers": list(setting.layers)}
        | ({} if name in target_teachers else {"weight": 0.0})
        for name, source in setting.teachers.items()
        if name in target_teachers or name == setting.init
    }
    return {
        "teachers": teachers,
        "aggregation": row.learned_from if ensemble else "separate",
        "student": setting.sizes[row.size].student(from_teacher=setting.init is not None),
        "init": {"teacher": setting.init},
        "loss": {"cosine_weight": 1.0},
    }


def runner_config(setting: StudySetting, speech: Path, trained: bool = True) -> dict[str, Any]:
    """The runner config (``run_pretrain.py -c``), the same for every student.

    Args:
        speech: the folder with the manifests.
        trained: False for the control: a few steps with learning rate 0 in float32.
    """
    steps = setting.steps if trained else 4
    interval = max(1, steps // 4)
    return {
        "runner": {
            "total_steps": steps,
            "gradient_clipping": 5.0,
            "gradient_accumulate_steps": 1,
            "log_step": interval,
            "save_step": 2 * interval if 2 * interval < steps else 1,
            "max_keep": 1,
            "n_epochs": -1,
            "precision": "float32",
        },
        "optimizer": {
            "name": "AdamW_with_schedule",
            "lr": float(setting.lr) if trained else ZERO_LR,
            "warmup_proportion": 0.1,
            "betas": [0.9, 0.98],
            "eps": 1e-6,
        },
        "pretrain_expert": {
            "datarc": {
                "libri_root": str(speech),
                "file_path": "data/unlabeled/len_for_bucket",
                "sets": ["train"],
                "train_batch_size": setting.batch,
                "num_workers": 0,
                "sequence_length": round(16_000 * setting.seconds),
            }
        },
    }
