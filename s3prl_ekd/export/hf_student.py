"""A DistilHuBERT-style Hugging Face folder as a student: the way back of :mod:`.huggingface`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from .. import compat
from ..distill.conv_spec import conv_layers_text
from ..distill.settings import StudentSettings
from ..distill.student import Student
from ..errors import CheckpointError, ConfigError, TeacherError
from ..files.config import build
from ..student_file import LoadedStudent
from ..teachers.hf_names import fairseq_name
from ..teachers.huggingface import check_folder as check_hf_folder
from ..teachers.huggingface import load_folder

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


def student_settings(config, folder: Path) -> StudentSettings:
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
