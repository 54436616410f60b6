"""Load a Hugging Face folder as a student: transformers' ``HubertModel`` or ``WavLMModel``, its
weights renamed. :mod:`..export.huggingface` does the reverse and compares their hidden states.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from .. import compat
from ..distill.conv_layers import conv_layers_text
from ..distill.student import Student
from ..distill.student_settings import Architecture, PrunedSettings, StudentSettings
from ..errors import CheckpointError, ConfigError, TeacherError
from ..files.config import from_plain_data
from ..student_file import LoadedStudent
from .hf_names import fairseq_name
from .huggingface import check_hf_folder, load_folder

if TYPE_CHECKING:
    from transformers import HubertConfig, WavLMConfig

    HFConfig: TypeAlias = HubertConfig | WavLMConfig

logger = logging.getLogger(__name__)

STUDENT_TYPES = ("hubert", "wavlm")  # model_type of models that can be a student
# Settings of transformers that are fixed for a student: name -> the only allowed value.
FIXED = {
    "conv_pos_batch_norm": False,
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "adapter_attn_dim": None,
}
FIXED_NOT_COPIED = {"feat_proj_layer_norm": False, "conv_bias": False}
NAMES = {  # a student's setting -> the same in transformers
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "encoder_embed_dim": "hidden_size",
    "encoder_attention_heads": "num_attention_heads",
    "activation_fn": "hidden_act",
    "layer_norm_first": "do_stable_layer_norm",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
}
_UNUSED = "mask_emb"  # for masked prediction; no hidden state depends on it


def load_hf_student(folder: Path, name: str = "") -> LoadedStudent:
    """Load a Hugging Face folder as a student without heads.

    A HuBERT with a layer norm before its feature projection and a WavLM become copied students.
    Settings that transformers lacks (``feature_grad_mult``, ``extractor_dropout``, ``masked_norm``)
    get their defaults, so the student's group norm includes padding, as that of transformers does.

    Args:
        folder: with ``config.json`` and weights.
        name: where the student says it was taken from; the folder's name by default.

    Raises:
        CheckpointError: no such folder, a model that has not a student's architecture, or weights
            that do not fit it.
        SetupError: transformers is not installed.
    """
    compat.apply()  # transformers imports torchaudio
    label = "the Hugging Face folder"
    try:
        model_type = check_hf_folder(folder, label)
        if model_type not in STUDENT_TYPES:
            raise CheckpointError(f"{folder} has model_type {model_type}; expected hubert or wavlm")
        upstream = load_folder(folder, label)
    except TeacherError as error:
        raise CheckpointError(str(error)) from None
    network = upstream.network
    settings = student_settings(network.config, folder, upstream.normalize)
    if upstream.normalize and isinstance(settings, StudentSettings):
        if settings.extractor_mode == "layer_norm":
            raise CheckpointError(
                f"{folder} expects normalised waveforms (do_normalize: true), but a student does "
                "not normalise them, so its hidden states would differ"
            )
        logger.warning(
            "%s expects normalised waveforms (do_normalize: true), but a student does not normalise"
            " waveforms. Its first conv layer normalises over time, so hidden states change little "
            "unless the audio is very quiet",
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
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{folder}: weights do not fit a student: {reason}") from None
    source = f"the Hugging Face model {name}" if name else f"the folder {folder.resolve().name}"
    about = {"source": source, "step": None}
    return LoadedStudent(student.eval(), None, {}, about)


def student_settings(config: HFConfig, folder: Path, normalize: bool) -> Architecture:
    """Convert a configuration of transformers to a student's settings.

    Args:
        config: of a HuBERT or a WavLM.
        folder: for messages.
        normalize: whether the model expects normalised waveforms.

    Raises:
        CheckpointError: the model's architecture is not a student's.
    """
    wavlm = config.model_type == "wavlm"
    copied = wavlm or config.feat_proj_layer_norm
    for name, expected in (FIXED if copied else FIXED | FIXED_NOT_COPIED).items():
        value = getattr(config, name, expected)
        if value != expected:
            raise CheckpointError(
                f"{folder}/config.json: {name} must be {expected}, as in "
                f"{'HuBERT Base' if copied else 'DistilHuBERT'}, got {value}"
            )
    conv = tuple(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    depth, units = config.num_hidden_layers, config.intermediate_size
    values = {name: getattr(config, hf_name) for name, hf_name in NAMES.items()}
    values["extractor_mode"] = "layer_norm" if config.feat_extract_norm == "layer" else "default"
    if copied:
        values |= {
            "conv_layers": [[*layer] for layer in conv],
            "conv_bias": config.conv_bias,
            "normalize_waveforms": normalize,
            "heads": [[*range(config.num_attention_heads)]] * depth,
            "ffn_dims": [units] * depth,
            "position_buckets": config.num_buckets if wavlm else 0,
            "max_distance": config.max_bucket_distance if wavlm else 0,
            "input_dropout": config.feat_proj_dropout,
        }
    else:
        values |= {
            "extractor_conv_feature_layers": conv_layers_text(conv),
            "encoder_layers": depth,
            "encoder_ffn_embed_dim": units,
        }
    try:
        if copied:
            return from_plain_data(PrunedSettings, values, "config.json")
        return from_plain_data(StudentSettings, values, "config.json")
    except ConfigError as error:
        raise CheckpointError(f"{folder} cannot be a student: {error}") from None


def _drop_identity(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Remove an identity projection: s3prl's model has none if the widths are equal.

    Raises:
        CheckpointError: the projection is not the identity.
    """
    weight, bias = weights.pop("post_extract_proj.weight"), weights.pop("post_extract_proj.bias")
    if not torch.equal(weight, torch.eye(len(weight))) or bias.any():
        raise CheckpointError(
            f"{folder}: feature_projection.projection is not the identity, but a student has no "
            "feature projection if its conv extractor is as wide as its layers"
        )
