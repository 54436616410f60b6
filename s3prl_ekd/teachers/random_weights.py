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

# Settings that HuBERT Base and WavLM Base share, independent of the size.
_SHARED: dict[str, Any] = {
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
}
# WavLM's initialisation is so small that six layers hardly change their input. With this factor
# they change it about as much as HuBERT's layers.
_WAVLM_GAIN = 3.0


def hubert_checkpoint(
    *,
    seed: int = 1337,
    conv_layers: str = CONV_LAYERS,
    embed_dim: int = 96,
    ffn_dim: int = 192,
    heads: int = 4,
    layers: int = 6,
    conv_pos: int = 32,
    conv_pos_groups: int = 4,
    classes: int = 20,
    normalize: bool = False,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A HuBERT checkpoint in the format of ``s3prl.upstream.hubert.convert``.

    Args:
        seed: of the weights; the global random state does not change.
        conv_layers: fairseq's notation, ``[(channels, kernel, stride), ...]``.
        embed_dim, ffn_dim: widths of the transformer and of its feed-forward network.
        heads: attention heads; must divide ``embed_dim``.
        layers: transformer layers; the upstream returns one more hidden state.
        conv_pos, conv_pos_groups: kernel and groups of the positional convolution.
        classes: number of cluster labels.
        normalize: whether the upstream normalises waveforms, as HuBERT Large does.
        config: further settings of the model, such as ``layer_norm_first``.

    Returns:
        Tensors and builtin containers under ``task_cfg``, ``model_cfg``, ``model_weight`` and
        ``dictionaries_symbols``.
    """
    from s3prl.upstream.hubert.hubert_model import (
        HubertConfig,
        HubertModel,
        HubertPretrainingConfig,
    )

    task_cfg = {"label_rate": 50.0, "sample_rate": 16_000, "normalize": normalize}
    model_cfg = {
        "label_rate": 50.0,
        **_SHARED,
        "conv_feature_layers": conv_layers,
        "encoder_embed_dim": embed_dim,
        "encoder_ffn_embed_dim": ffn_dim,
        "encoder_attention_heads": heads,
        "encoder_layers": layers,
        "conv_pos": conv_pos,
        "conv_pos_groups": conv_pos_groups,
        "final_dim": min(embed_dim, 256),
        "untie_final_proj": True,
        **(config or {}),
    }
    symbols = [[str(label) for label in range(classes)]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HubertModel(HubertConfig(**model_cfg), HubertPretrainingConfig(**task_cfg), symbols)
    _increase_variation(model)
    return {
        "task_cfg": task_cfg,
        "model_cfg": model_cfg,
        "model_weight": _weights(model),
        "dictionaries_symbols": symbols,
    }


def wavlm_checkpoint(
    *,
    seed: int = 1338,
    conv_layers: str = CONV_LAYERS,
    embed_dim: int = 96,
    ffn_dim: int = 192,
    heads: int = 4,
    layers: int = 6,
    conv_pos: int = 32,
    conv_pos_groups: int = 4,
    normalize: bool = False,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A WavLM checkpoint, ``{"cfg", "model"}``, with gated relative position bias.

    For the arguments see :func:`hubert_checkpoint`.
    """
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    cfg = {
        **_SHARED,
        "conv_feature_layers": conv_layers,
        "encoder_embed_dim": embed_dim,
        "encoder_ffn_embed_dim": ffn_dim,
        "encoder_attention_heads": heads,
        "encoder_layers": layers,
        "conv_pos": conv_pos,
        "conv_pos_groups": conv_pos_groups,
        "normalize": normalize,
        "relative_position_embedding": True,
        "num_buckets": 320,
        "max_distance": 800,
        "gru_rel_pos": True,
        **(config or {}),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WavLM(WavLMConfig(cfg))
    _increase_variation(model, _WAVLM_GAIN)
    return {"cfg": cfg, "model": _weights(model)}


def _increase_variation(model: torch.nn.Module, gain: float = 1.0) -> None:
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


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def random_init(name: str, seed: int = 1337) -> dict[str, Any]:
    """The checkpoint of a tiny teacher with random instead of trained weights.

    Args:
        name: one of :data:`s3prl_ekd.teachers.zoo.NAMES`. ``tiny_hubert`` and
            ``tiny_robust_hubert`` give the same checkpoint.
        seed: of the weights; the global random state does not change.

    Returns:
        The contents of the teacher's file with other weights: s3prl's format, float16.

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


def untrained_model(states: dict[str, Any]) -> nn.Module:
    """Build s3prl's HuBERT or WavLM from a checkpoint's settings, with initial weights.

    Both transformers get BERT's initialisation, as in fairseq. s3prl's HuBERT lacks it: with
    PyTorch's initialisation each layer reduces the variation between frames by a tenth, and
    training soon removes the rest. Draws from torch's global generator.

    Args:
        states: a checkpoint in s3prl's format; its weights are not used.
    """
    compat.apply()
    if "model_cfg" not in states:
        from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

        return WavLM(WavLMConfig(states["cfg"]))
    from s3prl.upstream.hubert.hubert_model import (
        HubertConfig,
        HubertModel,
        HubertPretrainingConfig,
    )
    from s3prl.upstream.wavlm.modules import init_bert_params

    model = HubertModel(
        HubertConfig(**states["model_cfg"]),
        HubertPretrainingConfig(**states["task_cfg"]),
        states["dictionaries_symbols"],
    )
    model.encoder.apply(init_bert_params)
    return model
