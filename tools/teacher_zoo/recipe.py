"""Training recipe of the tiny teachers: sizes, stages, settings, each with its origin."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Family = Literal["hubert", "wavlm"]
InputKind = Literal["clean", "distorted", "mixed"]


@dataclass(frozen=True)
class TeacherSize:
    """Size of a model: 3.3 M parameters, 320 samples a frame.

    Ours; HuBERT Base has 512 channels, width 768 and 12 layers.
    """

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
    """Settings of the k-means units.

    Attributes:
        mfcc_clusters: units of iteration 1 (HuBERT: 100).
        hidden_clusters: units of later iterations (HuBERT: 500; fewer here, for less speech).
        layer: hidden states that are clustered (HuBERT: layer 6 of 12).
        frames: maximum number of frames for k-means.
    """

    mfcc_clusters: int = 100
    hidden_clusters: int = 200
    layer: int = 3  # index into hidden_states: the middle of six
    frames: int = 300_000


@dataclass(frozen=True)
class TeacherRecipe:
    """Settings that influence the weights. The defaults are those of the package's files.

    ``steps`` is for stage ``hubert``; other stages take a share of it, see :data:`STAGES`.
    ``penalty``, masking, betas and weight decay are HuBERT Base's; ``mix`` and ``mix_noise`` are
    WavLM's (section 3.3); learning rate, batch, clipping and ``alpha`` are ours, for an hour on two
    cores. HuBERT's alpha is 1, for runs a hundred times as long: after 300 steps of 16 s of the
    first stage, the loss of masked frames on dev was 4.47 with 1 and 4.24 with 0.5 (4.50 by unit
    frequencies alone). With 0.5, it was 4.12 after 300 steps of 16 s, and 4.06 after 600 of 8 s.
    Dropout is for runs of hundreds of epochs; these have ten.
    """

    steps: int = 6000
    batch_seconds: float = 8.0
    crop_seconds: float = 4.0
    shortest_seconds: float = 0.5  # shorter utterances are skipped
    lr: float = 1e-3
    warmup: float = 0.1  # share of a stage's steps
    clip: float = 5.0  # of the gradient's norm
    weight_decay: float = 0.01
    alpha: float = 0.5  # weight of masked frames; that of unmasked ones is 1 - alpha
    penalty: float = 10.0  # weight of the mean square of the conv features
    dropout: float = 0.0  # also of attention; the layer drop rate is half of it
    mask_prob: float = 0.8  # share of masked frames if spans did not overlap
    mask_length: int = 10  # frames
    mix: float = 0.2  # share of utterances that are mixed with speech or noise
    mix_noise: float = 0.1  # share of those that get noise
    snr_min: float = 0.0  # dB, of the distorted input
    snr_max: float = 20.0
    pair_seconds: float = 1.0  # longest excerpt of a pair
    pair_utterances: int = 16  # pairs in a batch
    seed: int = 1337
    size: TeacherSize = field(default_factory=TeacherSize)
    units: UnitSettings = field(default_factory=UnitSettings)

    def as_json(self) -> dict[str, Any]:
        """The recipe as nested dicts."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingStage:
    """A training run: its model class, targets, input and initialisation."""

    name: str  # its folder in the zoo
    family: Family
    # Targets: clusters of "mfcc", of "prosody", or of the middle layer of a stage or of a shipped
    # teacher; "phones": those of the manifest; "": pairs of excerpts
    units: str
    input_kind: InputKind
    share: float  # of the recipe's steps
    lr: float = 1.0  # times the learning rate of the recipe
    start: str = ""  # the stage or shipped teacher that initialises it; "": random weights
    file: str = ""  # name of the exported file; "": not exported
    train_extractor: bool = True  # False: the conv extractor stays as in ``start``


STAGES = {
    stage.name: stage
    for stage in (
        TrainingStage("hubert_1", "hubert", "mfcc", "clean", share=0.5),
        # HuBERT's second iteration starts from random weights. Ours continues the first with a new
        # head: there are too few steps to train the convolutions twice.
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
        # A third iteration of the shipped tiny HuBERT, with its own units
        TrainingStage(
            "hubert_3",
            "hubert",
            "tiny_hubert",
            "clean",
            share=1.0,
            lr=0.5,
            start="tiny_hubert",
            file="tiny_hubert_3.pt",
        ),
        # Of the study only: teachers that know something else than phones, trained without labels
        TrainingStage("prosody", "hubert", "prosody", "clean", share=2 / 3, file="tiny_prosody.pt"),
        TrainingStage(
            "speaker",
            "hubert",
            "",
            "distorted",
            share=0.5,
            lr=0.5,
            start="tiny_robust_hubert",
            train_extractor=False,
            file="tiny_speaker.pt",
        ),
        # Of the study only, trained with labels: a teacher that knows phones better than the others
        TrainingStage(
            "phones",
            "hubert",
            "phones",
            "clean",
            share=1 / 3,
            lr=0.5,
            start="tiny_robust_hubert",
            file="tiny_phones.pt",
        ),
    )
}
SHIPPED = ("hubert", "robust_hubert", "wavlm")  # in the package
TEACHERS = (*SHIPPED, "hubert_3", "prosody", "speaker", "phones")


def required_stages(teachers: tuple[str, ...]) -> list[TrainingStage]:
    """The stages that these teachers depend on, in the order in which they run."""
    names = set(teachers)
    for stage in reversed(STAGES.values()):
        if stage.name in names:
            names |= {stage.start, stage.units}
    return [stage for stage in STAGES.values() if stage.name in names]


def stage_steps(recipe: TeacherRecipe, stage: TrainingStage) -> int:
    """Number of optimizer steps of a stage, 1 or more."""
    return max(1, round(recipe.steps * stage.share))


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """List the values that differ between two nested dicts, as ``"key (old, now new)"``."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key} ({a}, now {b})")
    return changed


def check_recipe(recipe: TeacherRecipe) -> None:
    """Check the ranges of the settings.

    Raises:
        ValueError: a setting is out of range.
    """
    positive = [
        f.name for f in fields(recipe) if f.name in ("steps", "batch_seconds", "crop_seconds", "lr")
    ]
    for name in positive:
        if not 0 < getattr(recipe, name) < float("inf"):
            raise ValueError(f"{name} must be above 0, got {getattr(recipe, name)}")
    if recipe.seed < 0:
        raise ValueError(f"seed must be 0 or more, got {recipe.seed}")
    if recipe.pair_utterances < 2:
        raise ValueError(f"pair_utterances must be 2 or more, got {recipe.pair_utterances}")
    for name in ("mfcc_clusters", "hidden_clusters"):
        if getattr(recipe.units, name) < 2:
            raise ValueError(f"{name} must be 2 or more, got {getattr(recipe.units, name)}")
    if not 0 < recipe.alpha <= 1:
        raise ValueError(f"alpha must be above 0 and at most 1, got {recipe.alpha}")
    if not 0 <= recipe.dropout < 1:
        raise ValueError(f"dropout must be 0 or more and below 1, got {recipe.dropout}")
    if recipe.crop_seconds < recipe.shortest_seconds:
        raise ValueError(
            f"crop_seconds must be shortest_seconds ({recipe.shortest_seconds}) or more, got "
            f"{recipe.crop_seconds}"
        )
    if recipe.units.layer > recipe.size.layers:
        raise ValueError(
            f"units.layer must be at most {recipe.size.layers}, got {recipe.units.layer}"
        )
