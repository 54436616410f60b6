"""A student as transformers' ``HubertModel``, the same weights under other names, and the way back.

s3prl's ``DistillerModel`` without heads is a HuBERT without the layer norm in front of its feature
projection, which ``feat_proj_layer_norm: false`` expresses. The hidden states of the two, counted
from 0 in a student of N layers:

=======================  ============================================================
``ekd_student``          ``HubertModel``
=======================  ============================================================
``hidden_states[0]``     ``feature_projection(feature_extractor(waves))``, zero at padded
                         frames; not among its ``hidden_states``
(none)                   ``hidden_states[0]``: the input of the first layer, behind the
                         positional convolution and, unless the layers normalise first,
                         a layer norm
``hidden_states[n]``     ``hidden_states[n]``, n = 1 ... N: the output of layer n
=======================  ============================================================

Where the layers normalise first, ``last_hidden_state`` is behind one more layer norm, and
transformers 4 puts it in the place of ``hidden_states[N]``; transformers 5 does not.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import compat
from ..distill.conv_layers import conv_layers_text
from ..distill.settings import StudentSettings
from ..distill.student import Student
from ..errors import CheckpointError, ConfigError, SetupError, TeacherError
from ..files.config import build
from ..student_file import LoadedStudent
from ..teachers.hf_names import fairseq_name
from ..teachers.huggingface import _quiet_transformers as quiet_transformers
from ..teachers.huggingface import check_folder as check_hf_folder
from ..teachers.huggingface import load_folder

if TYPE_CHECKING:
    from transformers import HubertConfig, HubertModel

logger = logging.getLogger(__name__)

# HubertConfig's settings that a student has no choice in: name -> the only value.
_FIXED = {
    "feat_proj_layer_norm": False,
    "conv_bias": False,
    "conv_pos_batch_norm": False,
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "adapter_attn_dim": None,
}
_UNUSED = "mask_emb"  # of masked prediction; no hidden state needs it

TOLERANCE = 1e-6  # how far a hidden state may be from the student's
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "do_normalize": False,  # a student takes waveforms as they are
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16_000,
}


def load_hf_student(folder: str | Path) -> LoadedStudent:
    """Read a folder with ``config.json`` and ``model.safetensors`` as a student without heads.

    Settings that matter in training only and that transformers has not (``feature_grad_mult``,
    ``extractor_dropout``) get their defaults.

    Raises:
        CheckpointError: no such folder, no ``HubertModel`` of a student's kind, or weights that
            do not fit.
        SetupError: transformers is not installed.
    """
    compat.apply()  # transformers imports torchaudio
    folder = Path(folder)
    where = "the Hugging Face folder"
    try:
        kind = check_hf_folder(folder, where)
        if kind != "hubert":
            raise CheckpointError(f"{folder} has a model of type {kind}; a student is a hubert")
        upstream = load_folder(folder, where)
    except TeacherError as error:
        raise CheckpointError(str(error)) from None
    network = upstream.network
    settings = student_settings(network.config, folder)
    if upstream.normalize:
        if settings.extractor_mode == "layer_norm":
            raise CheckpointError(
                f"{folder} wants normalised waveforms (do_normalize), which a student does not "
                "have: its hidden states would be others"
            )
        logger.warning(
            "%s was made with normalised waveforms (do_normalize) and a student takes them as they "
            "are; its first layer normalises, so this changes little unless they are very quiet",
            folder,
        )
    layer_norm = settings.extractor_mode == "layer_norm"
    weights = {fairseq_name(k, layer_norm): v for k, v in network.state_dict().items()}
    weights.pop(_UNUSED, None)
    student = Student(settings)
    if student.backbone.post_extract_proj is None:
        _drop_identity(weights, folder)
    try:
        student.backbone.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{folder} does not fit a student: {first}") from None
    about = {"source": f"the Hugging Face folder {folder.resolve().name}", "step": None}
    return LoadedStudent(student.eval(), None, {}, about)


def student_settings(config: HubertConfig, folder: Path) -> StudentSettings:
    """The size of a student from transformers' ``HubertConfig``.

    Raises:
        CheckpointError: the model has something that a student has not.
    """
    for name, only in _FIXED.items():
        value = getattr(config, name, only)
        if value != only:
            raise CheckpointError(
                f"{folder}: {name} is {value} in config.json; a student has {only}, as DistilHuBERT"
            )
    conv = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    values = {
        "extractor_mode": "layer_norm" if config.feat_extract_norm == "layer" else "default",
        "extractor_conv_feature_layers": conv_layers_text(tuple(conv)),
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": config.hidden_act,
        "layer_norm_first": config.do_stable_layer_norm,
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
    }
    try:
        return build(StudentSettings, values, "config.json")
    except ConfigError as error:
        raise CheckpointError(f"{folder} is no student: {error}") from None


def _drop_identity(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """s3prl's model projects nothing where the widths are equal; transformers' always does."""
    weight, bias = weights.pop("post_extract_proj.weight"), weights.pop("post_extract_proj.bias")
    if not torch.equal(weight, torch.eye(len(weight))) or bias.any():
        raise CheckpointError(
            f"{folder}: the conv extractor is as wide as the layers, and a student then has no "
            "feature projection; this model has one that is not the identity"
        )


def hubert_config(settings: StudentSettings) -> HubertConfig:
    """transformers' ``HubertConfig`` of a student's size.

    ``extractor_dropout`` and ``feature_grad_mult`` matter in training only and have no counterpart.
    No layer is ever dropped, so that the number of hidden states stays in fine-tuning too.

    Raises:
        SetupError: transformers is not installed.
    """
    compat.apply()  # transformers imports torchaudio
    try:
        from transformers import HubertConfig
    except ImportError:
        raise SetupError(
            "this needs transformers; type: pip install transformers safetensors"
        ) from None
    channels, kernels, strides = zip(*settings.conv_layers, strict=True)
    return HubertConfig(
        feat_extract_norm="layer" if settings.extractor_mode == "layer_norm" else "group",
        feat_extract_activation="gelu",
        feat_proj_layer_norm=False,
        feat_proj_dropout=0.0,
        conv_dim=list(channels),
        conv_kernel=list(kernels),
        conv_stride=list(strides),
        conv_bias=False,
        num_conv_pos_embeddings=settings.conv_pos,
        num_conv_pos_embedding_groups=settings.conv_pos_groups,
        num_hidden_layers=settings.encoder_layers,
        hidden_size=settings.encoder_embed_dim,
        intermediate_size=settings.encoder_ffn_embed_dim,
        num_attention_heads=settings.encoder_attention_heads,
        hidden_act=settings.activation_fn,
        do_stable_layer_norm=settings.layer_norm_first,
        layer_norm_eps=1e-5,
        hidden_dropout=settings.dropout,
        attention_dropout=settings.attention_dropout,
        activation_dropout=settings.activation_dropout,
        layerdrop=0.0,
        # without these the model has a mask embedding, which a student has not
        apply_spec_augment=False,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
    )


def to_hubert(student: Student) -> HubertModel:
    """The student's weights in a new ``HubertModel``, in eval mode.

    Where the conv extractor is as wide as the layers, s3prl's model has no feature projection;
    transformers' gets the identity.

    Raises:
        SetupError: transformers is not installed.
    """
    settings = student.settings
    config = hubert_config(settings)
    from transformers import HubertModel

    own = {name: value.detach().float().cpu() for name, value in _state(student).items()}
    layer_norm = settings.extractor_mode == "layer_norm"
    with quiet_transformers():
        model = HubertModel(config)
    names = {name: fairseq_name(name, layer_norm) for name in model.state_dict()}
    model.load_state_dict({theirs: own.pop(ours) for theirs, ours in names.items()})
    assert not own, f"not taken: {sorted(own)}"
    return model.eval()


def _state(student: Student) -> dict[str, Tensor]:
    state = dict(student.backbone.state_dict())
    if student.backbone.post_extract_proj is None:
        state["post_extract_proj.weight"] = torch.eye(student.width)
        state["post_extract_proj.bias"] = torch.zeros(student.width)
    return state


def save_hubert(model: HubertModel, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``."""
    with quiet_transformers():
        # one file: no student is as large as transformers' limit for a shard
        model.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    text = json.dumps(PREPROCESSOR, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def check_folder(folder: Path, student: Student) -> float:
    """Load a folder as anybody would and compare it with the student on a padded batch.

    Returns:
        The largest difference of a hidden state, padded frames included.

    Raises:
        CheckpointError: it is above :data:`TOLERANCE`, relative to the largest value if above 1.
    """
    from transformers import AutoModel

    with quiet_transformers():
        model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    waves, lengths = sample_batch(student.settings)
    with torch.no_grad():
        ours = student.eval()(waves, lengths)
        theirs = hubert_states(model, waves, lengths)
    theirs[0] = theirs[0] * ours.mask[..., None]
    worst = 0.0
    for mine, other in zip([*ours.hidden_states, ours.last], theirs, strict=True):
        error = (mine - other).abs().max().item()
        if not error <= TOLERANCE * max(1.0, mine.abs().max().item()):
            raise CheckpointError(
                f"the Hugging Face model is {error:.1e} away from the student, more than "
                f"{TOLERANCE:.0e}; nothing is written (transformers of another version may help)"
            )
        worst = max(worst, error)
    return worst


def hubert_states(model: HubertModel, waves: Tensor, lengths: Tensor) -> list[Tensor]:
    """What a student calls ``hidden_states``, and behind it ``last``, out of a ``HubertModel``.

    Padded frames of the first, the projected features, are to be set to zero.

    Args:
        model: of :func:`to_hubert`, or loaded from its folder.
        waves: ``[batch, sample]`` at 16 kHz, zero-padded at the end.
        lengths: ``[batch]``, valid samples.
    """
    kept: list[Tensor] = []
    # The output of each layer itself: transformers 4 and 5 differ in the last of hidden_states.
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in model.encoder.layers
    ]
    hooks.append(
        model.feature_projection.register_forward_hook(lambda _, __, out: kept.append(out))
    )
    mask = torch.arange(waves.shape[1])[None] < lengths[:, None]  # [batch, sample]
    try:
        out = model(waves, attention_mask=mask.long())
    finally:
        for hook in hooks:
            hook.remove()
    return [*kept, out.last_hidden_state]


def sample_batch(settings: StudentSettings) -> tuple[Tensor, Tensor]:
    """Three waveforms of noise, about 1, 0.7 and 0.1 s, padded: ``waves, lengths``."""
    generator = torch.Generator().manual_seed(0)
    counts = [max(settings.min_samples, count) for count in (16_000, 11_111, 1_600)]
    waves = [0.1 * torch.randn(count, generator=generator) for count in counts]
    return pad_sequence(waves, batch_first=True), torch.tensor(counts)
