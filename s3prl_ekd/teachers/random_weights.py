"""Checkpoints with random weights: HuBERT and WavLM in s3prl's checkpoint formats.

They load through s3prl's own ``hubert_local`` and ``wavlm_local``, like the published checkpoints.
By default they are 150 times smaller. They are not trained, but their features depend on the input,
so a student can learn to predict them. :func:`random_init` gives a tiny teacher of the zoo with
random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import compat
from ..files.torch_load import safe_load
from . import zoo

CONV_LAYERS = "[(64,10,5)] + [(64,3,2)] * 4 + [(64,2,2)] * 2"  # one frame every 320 samples

# WavLM's initialisation is so small that six layers hardly change their input. With this factor
# they change it about as much as HuBERT's layers.
_WAVLM_GAIN = 3.0


def hubert_checkpoint(
    *, seed: int = 1337, classes: int = 20, normalize: bool = False, **settings: Any
) -> dict[str, Any]:
    """A HuBERT checkpoint in the format of ``s3prl.upstream.hubert.convert``.

    Args:
        seed: of the weights; the global random state does not change.
        classes: number of cluster labels.
        normalize: whether the upstream normalises waveforms, as HuBERT Large does.
        settings: see :func:`_model_settings`.

    Returns:
        Tensors and builtin containers under ``task_cfg``, ``model_cfg``, ``model_weight`` and
        ``dictionaries_symbols``.
    """
    sizes = _model_settings(**settings)
    states = {
        "task_cfg": {"label_rate": 50.0, "sample_rate": 16_000, "normalize": normalize},
        "model_cfg": {
            "label_rate": 50.0,
            "final_dim": min(sizes["encoder_embed_dim"], 256),
            "untie_final_proj": True,
            **sizes,
        },
        "dictionaries_symbols": [[str(label) for label in range(classes)]],
    }
    return {**states, "model_weight": _draw_weights(states, seed)}


def wavlm_checkpoint(
    *, seed: int = 1338, normalize: bool = False, **settings: Any
) -> dict[str, Any]:
    """A WavLM checkpoint, ``{"cfg", "model"}``, with gated relative position bias.

    For the arguments see :func:`hubert_checkpoint`.
    """
    cfg = {
        "normalize": normalize,
        "relative_position_embedding": True,
        "num_buckets": 320,
        "max_distance": 800,
        "gru_rel_pos": True,
        **_model_settings(**settings),
    }
    return {"cfg": cfg, "model": _draw_weights({"cfg": cfg}, seed, _WAVLM_GAIN)}


def _model_settings(
    *,
    conv_layers: str = CONV_LAYERS,
    embed_dim: int = 96,
    ffn_dim: int = 192,
    heads: int = 4,
    layers: int = 6,
    conv_pos: int = 32,
    conv_pos_groups: int = 4,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Settings of s3prl's HuBERT and WavLM.

    Args:
        conv_layers: fairseq's notation, ``[(channels, kernel, stride), ...]``.
        embed_dim, ffn_dim: widths of the transformer and of its feed-forward network.
        heads: attention heads; must divide ``embed_dim``.
        layers: transformer layers; the upstream returns one more hidden state.
        conv_pos, conv_pos_groups: kernel and groups of the positional convolution.
        config: further settings of the model, such as ``layer_norm_first``.
    """
    return {
        # as in HuBERT Base and WavLM Base
        "extractor_mode": "default",
        "conv_bias": False,
        "activation_fn": "gelu",
        "layer_norm_first": False,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.05,
        "dropout_input": 0.1,
        "dropout_features": 0.1,
        "feature_grad_mult": 0.1,
        # sizes
        "conv_feature_layers": conv_layers,
        "encoder_embed_dim": embed_dim,
        "encoder_ffn_embed_dim": ffn_dim,
        "encoder_attention_heads": heads,
        "encoder_layers": layers,
        "conv_pos": conv_pos,
        "conv_pos_groups": conv_pos_groups,
        **(config or {}),
    }


def _draw_weights(
    states: Mapping[str, Any], seed: int, gain: float = 1.0
) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build_model(states)
    _increase_variation(model, gain)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _increase_variation(model: nn.Module, gain: float) -> None:
    """Make the features of a random network vary over time and between layers.

    With PyTorch's initialisation all frames get nearly the same vector: the convolutions' outputs
    are positive on average, so a constant dominates. Zero-mean filters prevent this.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("feature_extractor") and weight.dim() == 3:
                weight.sub_(weight.mean(dim=(1, 2), keepdim=True))
            elif name.startswith("encoder.layers") and weight.dim() == 2:
                weight.mul_(gain)


def random_init(name: str, seed: int = 1337) -> dict[str, Any]:
    """The checkpoint of a tiny teacher with random instead of trained weights, in float16.

    ``name`` is one of :data:`s3prl_ekd.teachers.zoo.NAMES`; ``tiny_hubert`` and
    ``tiny_robust_hubert`` give the same checkpoint. The global random state does not change.

    Raises:
        SetupError: no such teacher.
        CheckpointError: its file is damaged.
    """
    path = zoo.checkpoint_path(name)
    states = dict(safe_load(path, "tiny teacher"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = untrained_model(states)
    key = "model_weight" if "model_cfg" in states else "model"
    states[key] = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    return states


def untrained_model(states: Mapping[str, Any]) -> nn.Module:
    """Build s3prl's HuBERT or WavLM from a checkpoint's settings, with initial weights.

    Both transformers get BERT's initialisation, as in fairseq. s3prl's HuBERT lacks it: with
    PyTorch's initialisation each layer reduces the variation between frames by a tenth, and
    training soon removes the rest. Draws from torch's global generator.

    Args:
        states: a checkpoint in s3prl's format; its weights are not used.
    """
    compat.apply()
    model: Any = _build_model(states)
    if "model_cfg" in states:
        from s3prl.upstream.wavlm.modules import init_bert_params

        model.encoder.apply(init_bert_params)
    return model


def _build_model(states: Mapping[str, Any]) -> nn.Module:
    """Build s3prl's HuBERT or WavLM from a checkpoint's settings; s3prl draws the weights."""
    if "cfg" in states:
        from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

        return WavLM(WavLMConfig(states["cfg"]))
    from s3prl.upstream.hubert import hubert_model

    return hubert_model.HubertModel(
        hubert_model.HubertConfig(**states["model_cfg"]),
        hubert_model.HubertPretrainingConfig(**states["task_cfg"]),
        states["dictionaries_symbols"],
    )
