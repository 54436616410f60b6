"""Convert a student to transformers' ``HubertModel`` and back: same weights, renamed.

s3prl's ``DistillerModel`` without heads is a HuBERT without the layer norm before its feature
projection (``feat_proj_layer_norm: false``). Hidden states of both, for a student of N layers:

=======================  ============================================================
``ekd_student``          ``HubertModel``
=======================  ============================================================
``hidden_states[0]``     ``feature_projection(feature_extractor(waves))``, zero at padded
                         frames; not among its ``hidden_states``
(none)                   ``hidden_states[0]``: the input of the first layer, after the
                         positional convolution and, with ``layer_norm_first: false``,
                         a layer norm
``hidden_states[n]``     ``hidden_states[n]``, n = 1 ... N: the output of layer n
=======================  ============================================================

With ``layer_norm_first: true``, ``last_hidden_state`` is layer N's output after a layer norm.
transformers 4 returns it as ``hidden_states[N]`` too; transformers 5 does not.
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
from ..distill.student import Student
from ..distill.student_settings import StudentSettings
from ..errors import CheckpointError, ConfigError, SetupError, TeacherError
from ..files.config import from_plain_data
from ..student_file import LoadedStudent
from ..teachers.hf_names import fairseq_name
from ..teachers.huggingface import check_hf_folder, load_folder, quiet_transformers
from .compare import largest_difference, noise_waves

if TYPE_CHECKING:
    from transformers import HubertConfig, HubertModel

logger = logging.getLogger(__name__)

# HubertConfig's settings that are fixed for a student: name -> the only allowed value.
_FIXED = {
    "feat_proj_layer_norm": False,
    "conv_bias": False,
    "conv_pos_batch_norm": False,
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "adapter_attn_dim": None,
}
_NAMES = {  # a student's setting -> the same in HubertConfig
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_ffn_embed_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
    "activation_fn": "hidden_act",
    "layer_norm_first": "do_stable_layer_norm",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
}
_UNUSED = "mask_emb"  # for masked prediction; no hidden state depends on it

TOLERANCE = 1e-6  # largest allowed difference from the student's hidden states
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "do_normalize": False,  # a student expects waveforms that are not normalised
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16_000,
}


def load_hf_student(folder: Path) -> LoadedStudent:
    """Load a folder with ``config.json`` and ``model.safetensors`` as a student without heads.

    Training settings that transformers lacks (``feature_grad_mult``, ``extractor_dropout``) get
    their defaults.

    Raises:
        CheckpointError: no such folder, a model that is not a ``HubertModel`` with a student's
            architecture, or weights that do not fit it.
        SetupError: transformers is not installed.
    """
    compat.apply()  # transformers imports torchaudio
    label = "the Hugging Face folder"
    try:
        model_type = check_hf_folder(folder, label)
        if model_type != "hubert":
            raise CheckpointError(f"{folder} has model_type {model_type}; expected hubert")
        upstream = load_folder(folder, label)
    except TeacherError as error:
        raise CheckpointError(str(error)) from None
    network = upstream.network
    settings = student_settings(network.config, folder)
    if upstream.normalize:
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
    about = {"source": f"the Hugging Face folder {folder.resolve().name}", "step": None}
    return LoadedStudent(student.eval(), None, {}, about)


def student_settings(config: HubertConfig, folder: Path) -> StudentSettings:
    """Convert transformers' ``HubertConfig`` to a student's settings.

    Raises:
        CheckpointError: the model's architecture is not a student's.
    """
    for name, expected in _FIXED.items():
        value = getattr(config, name, expected)
        if value != expected:
            raise CheckpointError(
                f"{folder}/config.json: {name} must be {expected}, as in DistilHuBERT, got {value}"
            )
    conv = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    values = {name: getattr(config, hf_name) for name, hf_name in _NAMES.items()}
    values["extractor_mode"] = "layer_norm" if config.feat_extract_norm == "layer" else "default"
    values["extractor_conv_feature_layers"] = conv_layers_text(tuple(conv))
    try:
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


def hubert_config(settings: StudentSettings) -> HubertConfig:
    """Convert a student's settings to transformers' ``HubertConfig``.

    The training settings ``extractor_dropout`` and ``feature_grad_mult`` have no counterpart. Layer
    dropout is 0, so fine-tuning does not change the number of hidden states.

    Raises:
        SetupError: transformers is not installed.
    """
    compat.apply()  # transformers imports torchaudio
    try:
        from transformers import HubertConfig
    except ImportError:
        raise SetupError(
            "transformers is not installed; type: pip install transformers safetensors"
        ) from None
    channels, kernels, strides = zip(*settings.conv_layers, strict=True)
    return HubertConfig(
        **{name: value for name, value in _FIXED.items() if value is not None},
        **{hf_name: getattr(settings, name) for name, hf_name in _NAMES.items()},
        feat_extract_norm="layer" if settings.extractor_mode == "layer_norm" else "group",
        conv_dim=list(channels),
        conv_kernel=list(kernels),
        conv_stride=list(strides),
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        # without SpecAugment there is no mask embedding, as in a student
        apply_spec_augment=False,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
    )


def to_hubert(student: Student) -> HubertModel:
    """Copy the student's weights to a new ``HubertModel`` in eval mode.

    If the conv extractor is as wide as the layers, s3prl's model has no feature projection, and
    that of transformers becomes the identity.

    Raises:
        SetupError: transformers is not installed.
    """
    settings = student.settings
    config = hubert_config(settings)
    from transformers import HubertModel

    weights = {n: value.float().cpu() for n, value in student.backbone.state_dict().items()}
    if student.backbone.post_extract_proj is None:
        weights["post_extract_proj.weight"] = torch.eye(student.width)
        weights["post_extract_proj.bias"] = torch.zeros(student.width)
    layer_norm = settings.extractor_mode == "layer_norm"
    with quiet_transformers():
        model = HubertModel(config)
    names = {name: fairseq_name(name, layer_norm) for name in model.state_dict()}
    model.load_state_dict({hf_name: weights.pop(name) for hf_name, name in names.items()})
    assert not weights, f"weights without a counterpart: {sorted(weights)}"
    return model.eval()


def save_hubert(model: HubertModel, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``."""
    with quiet_transformers():
        # a single file; transformers may split it into shards otherwise
        model.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    text = json.dumps(PREPROCESSOR, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def check_hf_export(folder: Path, student: Student) -> float:
    """Load a folder with ``AutoModel`` and compare it with the student on a padded batch.

    Returns:
        The largest absolute difference in a hidden state, padded frames included.

    Raises:
        CheckpointError: it is above :data:`TOLERANCE`, see :func:`.compare.largest_difference`.
    """
    from transformers import AutoModel

    with quiet_transformers():
        model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    counts = [max(student.settings.min_samples, count) for count in (16_000, 11_111, 1_600)]
    waves, lengths = pad_sequence(noise_waves(*counts), batch_first=True), torch.tensor(counts)
    with torch.no_grad():
        output = student.eval()(waves, lengths)
        hf_states = hubert_states(model, waves, lengths)
    hf_states[0] = hf_states[0] * output.mask[..., None]
    return largest_difference(
        [*output.hidden_states, output.last],
        hf_states,
        TOLERANCE,
        "the Hugging Face model",
        "; another version of transformers may help",
    )


def hubert_states(model: HubertModel, waves: Tensor, lengths: Tensor) -> list[Tensor]:
    """A student's ``hidden_states`` followed by its ``last``, computed by a ``HubertModel``.

    Unlike the student's, padded frames of the first state (the projected features) are not zero.

    Args:
        model: from :func:`to_hubert`, or loaded from its folder.
        waves: ``[batch, sample]`` at 16 kHz, zero-padded at the end.
        lengths: ``[batch]``, valid samples.
    """
    states: list[Tensor] = []
    # Hooks on the layers, because transformers 4 and 5 differ in the last of hidden_states.
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in model.encoder.layers
    ]
    hooks.append(
        model.feature_projection.register_forward_hook(lambda _, __, out: states.append(out))
    )
    mask = torch.arange(waves.shape[1])[None] < lengths[:, None]  # [batch, sample]
    try:
        out = model(waves, attention_mask=mask.long())
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, out.last_hidden_state]
