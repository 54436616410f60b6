"""Convert a student to transformers' ``HubertModel`` or ``WavLMModel``: same weights, renamed.

:mod:`..teachers.hf_student` does the reverse.

A copied student has the hidden states of the model it is a copy of, and becomes a ``WavLMModel`` if
it has relative positions. transformers' layers are of one size, so a pruned student is padded
(:mod:`.padding`) before. Its ``hidden_states[N]``, for N layers, is ``last_hidden_state``.

s3prl's ``DistillerModel`` without heads is a HuBERT without the layer norm before its feature
projection (``feat_proj_layer_norm: false``). Hidden states of both, for N layers:

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

transformers has no ``masked_norm``: its group norm includes padding. The hidden states of such a
student are those of its ``HubertModel`` for single utterances, and not in padded batches.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import compat
from ..distill.student import Student
from ..distill.student_forward import normalise
from ..distill.student_settings import Architecture, PrunedSettings, StudentSettings
from ..errors import CheckpointError, SetupError
from ..student_file import LoadedStudent
from ..teachers.hf_names import fairseq_name
from ..teachers.hf_student import FIXED_NOT_COPIED, NAMES
from ..teachers.huggingface import MODEL_TYPES, quiet_transformers
from .card_data import CardFacts
from .compare import largest_difference, noise_waves
from .model_card import hf_card
from .padding import padded

if TYPE_CHECKING:
    from transformers import HubertConfig, HubertModel, WavLMConfig, WavLMModel

    HFConfig: TypeAlias = HubertConfig | WavLMConfig
    HFModel: TypeAlias = HubertModel | WavLMModel

logger = logging.getLogger(__name__)

FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16_000,
}


def tolerance(settings: Architecture) -> float:
    """Largest allowed difference from the student's hidden states, of about 1 in size: of the
    rounding of two implementations, of which a copied student has more layers."""
    return 5e-5 if isinstance(settings, PrunedSettings) else 1e-5


def hf_config(settings: Architecture) -> HFConfig:
    """Convert a student's settings to a configuration of transformers.

    The training settings ``extractor_dropout`` and ``feature_grad_mult`` have no counterpart, nor
    has ``masked_norm``. Layer dropout is 0, so fine-tuning does not change the number of hidden
    states.

    Args:
        settings: those of a copied student have all heads and as many units in each layer, see
            :func:`.padding.padded_settings`.

    Raises:
        SetupError: transformers is not installed.
    """
    compat.apply()  # transformers imports torchaudio
    try:
        from transformers import HubertConfig, WavLMConfig
    except ImportError:
        raise SetupError(
            "transformers is not installed; type: pip install transformers safetensors"
        ) from None
    channels, kernels, strides = zip(*settings.conv_layers, strict=True)
    values: dict[str, Any] = {
        **{hf_name: getattr(settings, name) for name, hf_name in NAMES.items()},
        "feat_extract_activation": "gelu",
        "layer_norm_eps": 1e-5,
        "num_hidden_layers": settings.encoder_layers,
        "feat_extract_norm": "layer" if settings.extractor_mode == "layer_norm" else "group",
        "conv_dim": [*channels],
        "conv_kernel": [*kernels],
        "conv_stride": [*strides],
        "layerdrop": 0.0,
        # without SpecAugment there is no mask embedding, as in a student
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }
    if isinstance(settings, StudentSettings):
        units, dropout = settings.encoder_ffn_embed_dim, 0.0
        values |= {"conv_pos_batch_norm": False, **FIXED_NOT_COPIED}
    else:
        units, dropout = settings.ffn_dims[0], settings.input_dropout
        values["conv_bias"] = settings.conv_bias
    values |= {"intermediate_size": units, "feat_proj_dropout": dropout}
    if isinstance(settings, PrunedSettings) and settings.position_buckets:
        return WavLMConfig(
            **values,
            num_buckets=settings.position_buckets,
            max_bucket_distance=settings.max_distance,
        )
    return HubertConfig(**values)


def to_hf_model(student: Student) -> HFModel:
    """Copy the student's weights to a new model of transformers, in eval mode.

    If the conv extractor is as wide as the layers, s3prl's model has no feature projection, and
    that of transformers becomes the identity.

    Raises:
        CheckpointError: the student has scales that transformers' models lack.
        SetupError: transformers is not installed.
    """
    if isinstance(student.settings, PrunedSettings):
        if student.settings.feature_scale:
            raise CheckpointError(
                "the student scales its conv features (pruning.last_conv: soft), which "
                "transformers' models do not; type: s3prl-ekd export onnx, or distil and prune the "
                "student again with last_conv: hard"
            )
        student = padded(student)
    config = hf_config(student.settings)
    import transformers

    weights = {n: value.float().cpu() for n, value in student.backbone.state_dict().items()}
    if student.backbone.post_extract_proj is None:
        weights["post_extract_proj.weight"] = torch.eye(student.width)
        weights["post_extract_proj.bias"] = torch.zeros(student.width)
    layer_norm = student.settings.extractor_mode == "layer_norm"
    with quiet_transformers():
        model: HFModel = getattr(transformers, MODEL_TYPES[config.model_type])(config)
    names = {name: fairseq_name(name, layer_norm) for name in model.state_dict()}
    model.load_state_dict({hf_name: weights.pop(name) for hf_name, name in names.items()})
    assert not weights, f"weights without a counterpart: {sorted(weights)}"
    return model.eval()


def save_hf_model(model: HFModel, folder: Path, normalize: bool = False) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    ``normalize``: whether the model expects normalised waveforms.
    """
    with quiet_transformers():
        # a single file; transformers may split it into shards otherwise
        model.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    text = json.dumps({**PREPROCESSOR, "do_normalize": normalize}, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def write_hf_folder(
    loaded: LoadedStudent, folder: Path, name: str, facts: CardFacts
) -> tuple[int, float]:
    """Write a student as a Hugging Face folder with a card, and compare it with the student.

    Args:
        folder: empty; gets :data:`FILES`.
        name: title of the card.

    Returns:
        The model's parameters, and its largest difference from the student's hidden states.

    Raises:
        CheckpointError, SetupError: see :func:`to_hf_model` and :func:`check_hf_export`.
    """
    student = loaded.student
    model = to_hf_model(student)
    save_hf_model(model, folder, student.settings.normalize_waveforms)
    error = check_hf_export(folder, student)
    count = sum(parameter.numel() for parameter in model.parameters())
    card = hf_card(loaded, name, count, error, tolerance(student.settings), facts)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return count, error


def check_hf_export(folder: Path, student: Student) -> float:
    """Load a folder with ``AutoModel`` and compare it with the student on a padded batch; a student
    with ``masked_norm``, which transformers lacks, on single utterances.

    Returns:
        The largest absolute difference in a hidden state, padded frames included.

    Raises:
        CheckpointError: it is above :func:`tolerance`, see :func:`.compare.largest_difference`.
    """
    from transformers import AutoModel

    with quiet_transformers():
        model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    counts = [max(student.settings.min_samples, count) for count in (16_000, 11_111, 1_600)]
    waves = noise_waves(*counts)
    batches = [[wave] for wave in waves] if student.settings.masked_norm else [waves]
    return max(_largest_difference(model, student.eval(), batch) for batch in batches)


@torch.no_grad()
def _largest_difference(model: HFModel, student: Student, batch: list[Tensor]) -> float:
    """Compare a model of transformers with the student on waveforms ``[sample]``. Raises
    CheckpointError."""
    waves, lengths = pad_sequence(batch, batch_first=True), torch.tensor([*map(len, batch)])
    output = student(waves, lengths)
    inputs = normalise(waves, lengths) if student.settings.normalize_waveforms else waves
    projected, states, last = hf_states(model, inputs, lengths)
    if isinstance(student.settings, PrunedSettings):
        expected, states = output.hidden_states, [*states[:-1], last]
    else:
        expected = [*output.hidden_states, output.last]
        states = [projected * output.mask[..., None], *states[1:], last]
    return largest_difference(
        expected,
        states,
        tolerance(student.settings),
        "the Hugging Face model",
        "; another version of transformers may help",
    )


def hf_states(
    model: HFModel, waves: Tensor, lengths: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Run a model of transformers.

    Args:
        model: from :func:`to_hf_model`, or loaded from its folder.
        waves: ``[batch, sample]`` at 16 kHz, zero-padded at the end.
        lengths: ``[batch]``, valid samples.

    Returns:
        The projected features, not always zero at padded frames; the input of the first layer and
        the output of each; ``last_hidden_state``. All ``[batch, frame, dim]``.
    """
    projected: list[Tensor] = []
    states: list[Tensor] = []

    def of(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    # Hooks on the layers, because transformers 4 and 5 differ in the last of hidden_states.
    hooks = [
        layer.register_forward_hook(lambda _, __, out: states.append(of(out)))
        for layer in model.encoder.layers
    ]
    hooks += [
        model.encoder.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        model.feature_projection.register_forward_hook(
            lambda _, __, out: projected.append(of(out))
        ),
    ]
    mask = torch.arange(waves.shape[1])[None] < lengths[:, None]  # [batch, sample]
    try:
        out = model(waves, attention_mask=mask.long())
    finally:
        for hook in hooks:
            hook.remove()
    return projected[0], states, out.last_hidden_state
