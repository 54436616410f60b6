"""The question as a grid: which students there are, and everything that they have in common."""

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
ENSEMBLE = ("average", "concat", "separate")
NONE = "none"  # the control: a student with its first weights, which no one has taught
CLEAN = "clean"
NO_STEP = 1e-60  # a learning rate is above 0; in float32 this one is 0

# What the downstream runs have beside the tiny recipes, as s3prl-ekd superb takes it. PR has
# SUPERB's own probe, a linear one: on students this small it learns in minutes, in which the
# recipe's BiLSTM hardly begins. SID trains on whole utterances, whose features can be kept.
DOWNSTREAM = {
    "pr": ("--lr", "pr=1e-2")
    + ("--override", "pr=config.downstream_expert.model.select='FrameLevel'"),
    "asr": ("--lr", "asr=3e-3"),
    "sid": ("--override", "sid=config.downstream_expert.datarc.max_timestep=16000000"),
}
PROBES = {"pr": "a linear probe", "asr": "the recipe's BiLSTM"}


@dataclass(frozen=True)
class Size:
    """A student of seven convolutions and some transformer layers, 320 samples a frame."""

    channels: int
    width: int
    layers: int

    def student(self, begun: bool) -> dict[str, Any]:
        """The ``student`` of a model config.

        Args:
            begun: it has a teacher's first weights, and so the shape of the tiny teachers; its
                extractor stays what it is.
        """
        c = self.channels
        return {
            "extractor_conv_feature_layers": f"[({c},10,5)] + [({c},3,2)] * 4 + [({c},2,2)] * 2",
            "conv_pos": 128 if begun else 32,
            "conv_pos_groups": 16 if begun else 4,
            "encoder_layers": self.layers,
            "encoder_embed_dim": self.width,
            "encoder_ffn_embed_dim": (4 if begun else 2) * self.width,
            "encoder_attention_heads": 4,
            **({"feature_grad_mult": 0.0} if begun else {}),
        }


@dataclass(frozen=True)
class Setting:
    """All that decides the numbers. One value for all students, so that only what is compared
    differs: teachers, aggregation, size, seed.

    Attributes:
        teachers: name -> source, as a model config takes it.
        layers: of each teacher, whose outputs are the targets.
        init: the teacher whose weights all students begin with; None: random ones.
        sizes: name -> size.
        seeds: of the distillation; the downstream runs on a student have the same.
        steps, batch, seconds, lr: of each distillation; ``seconds`` is the longest excerpt.
        tasks: task -> steps of its downstream training.
        snr: dB of the noisy test.
        sid_seconds: what is left of each dev and test utterance of SID.
        all_folds: ER leaves out each speaker once, and does not take the manifest's split.
    """

    teachers: dict[str, str]
    layers: tuple[int, ...]
    sizes: dict[str, Size]
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
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')}: a number above 0 is needed")
        if self.steps < 4:
            raise ConfigError("--steps: 4 or more are needed")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("--seeds names a seed twice")
        if len(self.teachers) < 2:
            raise ConfigError("--teacher: two teachers or more are needed, to have an ensemble")
        if self.init is not None and self.init not in self.teachers:
            raise ConfigError(
                f"--init {self.init}: none is allowed, or one of: {', '.join(self.teachers)}"
            )
        multiple = 4 if self.init is None else 16  # heads; groups of the positional convolution
        for size, about in self.sizes.items():
            if min(about.channels, about.width, about.layers) < 1 or about.width % multiple:
                raise ConfigError(
                    f"--size {size}: channels, width and layers are needed, above 0 and the width "
                    f"a multiple of {multiple}"
                )

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it, with digests of the teachers' files: the paths do not matter.

        Raises:
            SetupError: a tiny teacher's file is missing from this installation.
        """
        found = asdict(self)
        found["downstream"] = {
            task: " ".join(DOWNSTREAM[task]) for task in self.tasks or () if task in DOWNSTREAM
        }
        found["teachers"] = {name: _digest(source) for name, source in self.teachers.items()}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}


def _digest(source: str) -> str:
    """Of what a source holds; a tiny teacher keeps its name, as its random twin has its file."""
    if source in zoo.NAMES:
        return f"{source} {file_digest(zoo.checkpoint_path(source))}"
    return file_digest(Path(source)) if Path(source).is_file() else source


def file_digest(path: Path) -> str:
    """The start of its SHA-256: enough to see that a file is another one."""
    return file_sha256(path)[:16]


def resolved(setting: Setting) -> Setting:
    """Sources that are files get whole paths: the runs start in another folder.

    Raises:
        SetupError: one looks like a file and is not there.
    """
    found = {}
    for name, source in setting.teachers.items():
        if ("/" in source or Path(source).is_file()) and "://" not in source:
            if not Path(source).exists():
                raise SetupError(f"--teacher {name}: there is no such file: {source}")
            source = os.path.abspath(source)
        found[name] = source
    return replace(setting, teachers=found)


@dataclass(frozen=True)
class Row:
    """Students that differ in nothing but the seed: a row of the table."""

    size: str
    learned_from: str  # a teacher's name, the aggregation over all of them, or none

    @property
    def name(self) -> str:
        return f"{self.size}-{self.learned_from}"


@dataclass(frozen=True)
class Student:
    """One distillation; of the control, the student before it."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        """Of its folder, its file, and its upstream."""
        return f"{self.row.name}-seed{self.seed}"


def rows(setting: Setting) -> Iterator[Row]:
    """Size after size: no teacher, each single teacher, all of them under each aggregation."""
    for size in setting.sizes:
        for learned_from in (NONE, *setting.teachers, *ENSEMBLE):
            yield Row(size, learned_from)


def students(setting: Setting) -> list[Student]:
    """Seed after seed, so that a study that is cut has whole comparisons."""
    return [Student(row, seed) for seed in setting.seeds for row in rows(setting)]


def model_config(setting: Setting, row: Row) -> dict[str, Any]:
    """What ``run_pretrain.py -g`` reads.

    First weights are random or those of one teacher for all rows, also for students that do not
    learn from it: it is named with weight 0 then. So rows differ in their targets alone. The
    control, too, needs a teacher to be named.
    """
    ensemble = row.learned_from in ENSEMBLE
    learned = set(setting.teachers) if ensemble else {row.learned_from}
    if row.learned_from == NONE:
        learned = {setting.init or next(iter(setting.teachers))}
    teachers = {
        name: {"model": source, "layers": list(setting.layers)}
        | ({} if name in learned else {"weight": 0.0})
        for name, source in setting.teachers.items()
        if name in learned or name == setting.init
    }
    return {
        "teachers": teachers,
        "aggregation": row.learned_from if ensemble else "separate",
        "student": setting.sizes[row.size].student(begun=setting.init is not None),
        "init": {"teacher": setting.init},
        "loss": {"cosine_weight": 1.0},
    }


def runner_config(setting: Setting, speech: Path, taught: bool = True) -> dict[str, Any]:
    """What ``run_pretrain.py -c`` reads, the same for every student.

    Args:
        speech: the folder with the manifests.
        taught: False for the control: a few steps of no length leave the weights what they are.
    """
    steps = setting.steps if taught else 4
    every = max(1, steps // 4)
    return {
        "runner": {
            "total_steps": steps,
            "gradient_clipping": 5.0,
            "gradient_accumulate_steps": 1,
            "log_step": every,
            "save_step": 2 * every if 2 * every < steps else 1,
            "max_keep": 1,
            "n_epochs": -1,
            "fp16": False,
        },
        "optimizer": {
            "name": "AdamW_with_schedule",
            "lr": float(setting.lr) if taught else NO_STEP,
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
