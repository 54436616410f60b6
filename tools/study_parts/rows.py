"""Teachers, sets of teachers, and rows of the study.

A row is a student by what it learned from; ``none`` is the student before training. Some students
begin as the first layers of ``hubert``.

All teachers but ``resemblyzer`` have six layers of width 192; three of these are the targets. The
teachers differ in training:
``sibling`` is ``hubert`` trained with another seed, ``wavlm`` and ``robust`` were trained
on the same units with other inputs, ``speaker`` and ``prosody`` on other targets without labels.
Two were trained with labels, so that one is better at phones and the other at speakers: ``phones``,
and another project's ``resemblyzer``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LAYERS = (2, 4, 6)
RESEMBLYZER_LAYERS = (0, 1, 2)  # its LSTM layers
EXPERTS = ("phones", "resemblyzer")
PLAIN = ("hubert", "wavlm", "robust")
MIXED = ("hubert", "resemblyzer")
SETS = (EXPERTS, PLAIN, MIXED)
# Also probed; no student learns from these, see docs/study_details.md
PROBED_SETS = (
    *SETS,
    ("hubert", "sibling"),
    ("hubert", "speaker", "prosody"),
    ("hubert", "speaker"),
    ("hubert", "wavlm"),
    ("hubert", "robust"),
)
SINGLES = ("phones", "resemblyzer", "hubert", "wavlm", "robust")  # each has students
# Third iterations of ``hubert`` on equally many seconds: like the others, with batches of twice the
# length, and with these and more voices
THIRD = ("hubert_3", "hubert_3_batches", "hubert_3_voices")
PROBED_TEACHERS = (*SINGLES, "sibling", "speaker", "prosody", *THIRD)
LABELLED = ("phones", "resemblyzer")  # trained with labels
# The best of these is the upper end of the scores. Fixed before the students were trained, so
# without THIRD, which came later.
SCALE = ("hubert", "wavlm", "robust", "sibling", "speaker", "prosody")
AVERAGE_HEADS = "average+heads"
START_FILE = "start.pt"

# 0.37 M parameters, trained from random weights
STUDENT: dict[str, Any] = {
    "extractor_conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2",
    "feature_grad_mult": 1.0,
    "encoder_layers": 2,
    "encoder_embed_dim": 96,
    "encoder_ffn_embed_dim": 384,
    "encoder_attention_heads": 4,
}


@dataclass(frozen=True)
class Row:
    """What a student learned from: teachers and how their targets were combined.

    Attributes:
        start: the teacher whose first layers the student begins as; "": random weights.
    """

    teachers: tuple[str, ...]
    combination: str = "separate"
    start: str = ""

    @property
    def name(self) -> str:
        name = set_name(self.teachers) or "none"
        if len(self.teachers) > 1:
            name += f", {self.combination}"
        return f"{name}, from {self.start}" if self.start else name

    @property
    def needed(self) -> tuple[str, ...]:
        """Teachers without which the student cannot be made."""
        return tuple(dict.fromkeys((*self.teachers, *([self.start] if self.start else []))))

    @property
    def file_name(self) -> str:
        """The name in names of files."""
        return self.name.replace(", ", "-").replace("+", "-").replace(" ", "-")


NONE = Row(())


def set_name(teachers: tuple[str, ...]) -> str:
    return "+".join(teachers)


def rows() -> list[Row]:
    """All rows, in the order in which a seed is run: those of the first hypotheses first."""
    result = [NONE, *(Row((name,)) for name in EXPERTS)]
    result += [Row(EXPERTS, c) for c in ("separate", "average")]
    result += [Row((name,)) for name in PLAIN]
    result += [Row(PLAIN, "separate"), Row(MIXED, "separate")]
    result += [Row(EXPERTS, c) for c in (AVERAGE_HEADS, "concat")]
    result += [Row(PLAIN, c) for c in ("average", "concat")]
    result += [Row(EXPERTS, f"average, {c}") for c in BASES]
    result += [Row(PLAIN, f"separate, {c}") for c in TERMS]
    return result + [Row(teachers, start=START) for teachers in STARTED]


BASES = ("phi_s", "procrustes")  # PHI-S: one scale; Procrustes: one scale and a common basis
TERMS = ("relation", "units")  # terms of the loss beside that of the heads
START = "hubert"  # of the students that do not start from random weights
STARTED = ((), ("hubert",), ("robust",), PLAIN)  # what they learn from


def model_config(row: Row, files: dict[str, str], noise: str, folder: str = "") -> dict[str, Any]:
    """The model config of a row.

    Args:
        files: ``teachers.NAME.model`` of each teacher.
        noise: folder of noises in the student's input.
        folder: where the units and the first weights of students with a ``start`` are.
    """
    combination, _, added = row.combination.partition(", ")
    started = {"kind": "file", "file": f"{folder}/{START_FILE}", "keep_heads": False}
    config: dict[str, Any] = {
        "teachers": {name: teacher_config(name, files) for name in row.teachers},
        "aggregation": "average" if combination == AVERAGE_HEADS else combination,
        "teacher_precision": "float32",  # on every kind of processor
        "student": started if row.start else STUDENT,
        # The student hears noise, babble and rooms; the teachers hear clean speech
        "distortion": {
            "setup": "setup1",
            "noise": [noise],
            "babble": True,
            "snr_min": 0.0,
            "snr_max": 20.0,
            "pitch_cents": 0.0,
            "convolutive_weights": {"reverb": 1.0, "band_reject": 0.0, "clean": 1.0},
        },
    }
    if combination == AVERAGE_HEADS:
        config["heads"] = {"per_teacher": True}
    if added == "relation":
        config["relation"] = {"weight": 1.0}
    elif added == "units":
        weight = 1 / len(row.teachers)
        config["unit_loss"] = [
            {"file": f"{folder}/{units_file(name)}", "weight": weight} for name in row.teachers
        ]
    elif added:
        config |= {"target_norm": added, "target_norm_steps": 100}
    return config


def units_file(teacher: str) -> str:
    return f"units_{teacher}.safetensors"


def teacher_config(name: str, files: dict[str, str]) -> dict[str, Any]:
    layers = RESEMBLYZER_LAYERS if name == "resemblyzer" else LAYERS
    return {"model": files[name], "layers": list(layers)}
