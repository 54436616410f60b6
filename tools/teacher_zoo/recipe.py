"""What is trained: sizes, stages, and how long; each choice with where it comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Family = Literal["hubert", "wavlm"]
InputKind = Literal["clean", "distorted", "mixed"]


@dataclass(frozen=True)
class TeacherSize:
    """A model of 3.3 M parameters, 320 samples a frame (ours; HuBERT Base: 512, 768, 12 layers)."""

    channels: int = 128  # of the seven convolutions
    width: int = 192
    ffn: int = 768
    heads: int = 4
    layers: int = 6
    conv_pos: int = 128
    conv_pos_groups: int = 16

    @property
    def conv_layers(self) -> str:
        """fairseq's notation of the extractor with the strides of HuBERT."""
        c = self.channels
        return f"[({c},10,5)] + [({c},3,2)] * 4 + [({c},2,2)] * 2"


@dataclass(frozen=True)
class UnitSettings:
    """Targets: ``mfcc_clusters`` for iteration 1 (HuBERT: 100), ``hidden_clusters`` of ``layer``
    for all that follow (HuBERT: 500 of layer 6 of 12; fewer for less speech), fitted on at most
    ``frames`` frames."""

    mfcc_clusters: int = 100
    hidden_clusters: int = 200
    layer: int = 3  # index into hidden_states: the middle of six
    frames: int = 300_000


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights. The defaults made the files that the package ships.

    ``steps`` are those of ``hubert``; the stages take the shares in :data:`STAGES`. ``penalty``,
    masking, betas and weight decay are HuBERT Base's; ``mix`` and ``mix_noise`` are WavLM's
    (section 3.3); learning rate, batch, clipping and ``alpha`` are ours, for an hour on two cores.
    HuBERT's alpha is 1, for runs a hundred times as long: after 300 steps of 16 s of the first
    stage, the loss of hidden frames of dev was 4.47 with 1 and 4.24 with 0.5 (4.50 by the units'
    frequencies alone). With 0.5, it was 4.12 after 300 steps of 16 s, and 4.06 after 600 of 8 s.
    Dropout is for runs that hear each utterance hundreds of times; these hear it ten times.
    """

    steps: int = 6000
    batch_seconds: float = 8.0
    crop_seconds: float = 4.0
    shortest_seconds: float = 0.5  # utterances below are left out
    lr: float = 1e-3
    warmup: float = 0.1  # share of a stage's steps
    clip: float = 5.0  # of the gradient's norm
    weight_decay: float = 0.01
    alpha: float = 0.5  # weight of masked frames; 1 - alpha is that of the others
    penalty: float = 10.0  # weight of the mean square of the conv features
    dropout: float = 0.0  # of attention, too; layers are dropped half as often
    mask_prob: float = 0.8  # share of frames, spans counted as if they never met
    mask_length: int = 10  # frames
    mix: float = 0.2  # share of utterances that something is mixed into
    mix_noise: float = 0.1  # share of those with noise, not speech
    snr_min: float = 0.0  # dB, of the distorted input
    snr_max: float = 20.0
    seed: int = 1337
    size: TeacherSize = field(default_factory=TeacherSize)
    units: UnitSettings = field(default_factory=UnitSettings)

    def as_json(self) -> dict[str, Any]:
        """As numbers and dicts of numbers."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingStage:
    """One training: which class, what it predicts, what it hears, what it goes on from."""

    name: str  # its folder in the zoo
    family: Family
    units: str  # "mfcc", or the stage whose middle layer is clustered
    input_kind: InputKind
    share: float  # of the recipe's steps
    lr: float = 1.0  # times the recipe's
    start: str = ""  # the stage it goes on from; "": random weights
    file: str = ""  # what is exported; "": nothing


STAGES = {
    stage.name: stage
    for stage in (
        TrainingStage("hubert_1", "hubert", "mfcc", "clean", share=0.5),
        # HuBERT's second iteration begins anew. Ours goes on, with a new head: a run this short has
        # no time to learn twice what the convolutions must hear.
        TrainingStage(
            "hubert",
            "hubert",
            "hubert_1",
            "clean",
            share=1.0,
            start="hubert_1",
            file="tiny_hubert.pt",
        ),
        TrainingStage(
            "robust_hubert",
            "hubert",
            "hubert_1",
            "distorted",
            share=1.0,
            lr=0.5,
            start="hubert",
            file="tiny_robust_hubert.pt",
        ),
        TrainingStage("wavlm", "wavlm", "hubert_1", "mixed", share=1.0, file="tiny_wavlm.pt"),
    )
}
TEACHERS = ("hubert", "robust_hubert", "wavlm")


def required_stages(teachers: tuple[str, ...]) -> list[TrainingStage]:
    """The stages that lead to these teachers, in the order in which they can run."""
    wanted = set(teachers)
    for stage in reversed(STAGES.values()):
        if stage.name in wanted:
            wanted |= {stage.start, stage.units}
    return [stage for stage in STAGES.values() if stage.name in wanted]


def stage_steps(recipe: Recipe, stage: TrainingStage) -> int:
    """Optimizer steps of a stage, at least one."""
    return max(1, round(recipe.steps * stage.share))


def changed_keys(one: dict[str, Any], other: dict[str, Any], above: str = "") -> list[str]:
    """``"key (one, other)"`` for each value that differs between two nested dicts."""
    found = []
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_keys(a, b, f"{above}{key}.")
        elif a != b:
            found.append(f"{above}{key} ({a}, now {b})")
    return found


def check_recipe(recipe: Recipe) -> None:
    """Raise ``ValueError`` with a sentence where a number makes no sense."""
    positive = [
        f.name for f in fields(recipe) if f.name in ("steps", "batch_seconds", "crop_seconds", "lr")
    ]
    for name in positive:
        if not 0 < getattr(recipe, name) < float("inf"):
            raise ValueError(f"{name} is {getattr(recipe, name)}; it must be above 0")
    if recipe.seed < 0:
        raise ValueError(f"seed is {recipe.seed}; 0 or more is allowed")
    for name in ("mfcc_clusters", "hidden_clusters"):
        if getattr(recipe.units, name) < 2:
            raise ValueError(f"{name} is {getattr(recipe.units, name)}; 2 or more are needed")
    if not 0 < recipe.alpha <= 1:
        raise ValueError(f"alpha is {recipe.alpha}; above 0 to 1 is allowed")
    if not 0 <= recipe.dropout < 1:
        raise ValueError(f"dropout is {recipe.dropout}; 0 to below 1 is allowed")
    if recipe.crop_seconds < recipe.shortest_seconds:
        raise ValueError(
            f"crop_seconds ({recipe.crop_seconds}) is below shortest_seconds "
            f"({recipe.shortest_seconds})"
        )
    if recipe.units.layer > recipe.size.layers:
        raise ValueError(f"layer {recipe.units.layer} is asked of {recipe.size.layers} layers")
