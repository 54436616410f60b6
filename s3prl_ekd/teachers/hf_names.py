"""Convert weight names of transformers' speech models to fairseq's, which s3prl uses."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from ..distill.conv_layers import conv_layers_text, parse_conv_layers
from ..errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_CONV = r"feature_extractor\.conv_layers\.(\d+)\."
_POS = r"encoder\.pos_conv_embed\.conv\."
_LAYER = r"(encoder\.layers\.\d+)\."
# (pattern at the start of transformers' name, its replacement in fairseq's name)
_RULES = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (_CONV + r"conv\.", r"feature_extractor.conv_layers.\1.0."),
        (_CONV + r"layer_norm\.", r"feature_extractor.conv_layers.\1.2{norm}."),
        (r"feature_projection\.layer_norm\.", "layer_norm."),
        (r"feature_projection\.projection\.", "post_extract_proj."),
        # weight_norm: its names since torch 2.0 to the older ones, which s3prl uses
        (_POS + r"parametrizations\.weight\.original0$", "encoder.pos_conv.0.weight_g"),
        (_POS + r"parametrizations\.weight\.original1$", "encoder.pos_conv.0.weight_v"),
        (_POS, "encoder.pos_conv.0."),
        (r"encoder\.pos_conv_embed\.layers\.(\d+)\.conv\.", r"encoder.pos_conv.\1.0."),
        (_LAYER + r"attention\.gru_rel_pos_const$", r"\1.self_attn.grep_a"),
        (_LAYER + r"attention\.gru_rel_pos_linear\.", r"\1.self_attn.grep_linear."),
        (_LAYER + r"attention\.rel_attn_embed\.", r"\1.self_attn.relative_attention_bias."),
        (_LAYER + r"attention\.", r"\1.self_attn."),
        (_LAYER + r"layer_norm\.", r"\1.self_attn_layer_norm."),
        (_LAYER + r"feed_forward\.intermediate_dense\.", r"\1.fc1."),
        (_LAYER + r"feed_forward\.output_dense\.", r"\1.fc2."),
        (r"masked_spec_embed$", "mask_emb"),
    )
)
# Weights that transformers' models may lack and no hidden state depends on.
_UNUSED = re.compile(r"mask_emb$|final_proj\.|label_embs_concat$|layer_norm\.")


def fairseq_name(name: str, layer_norm: bool) -> str:
    """fairseq's name of a tensor of transformers; ``layer_norm``: the conv layers have layer norms,
    not a group norm in the first."""
    for pattern, text in _RULES:
        if pattern.match(name):
            return pattern.sub(text.replace("{norm}", ".1" if layer_norm else ""), name, count=1)
    return name


def fairseq_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings of s3prl's ``HubertConfig`` or ``WavLMConfig`` from a transformers config."""
    conv = conv_layers_text(
        tuple(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    )
    parse_conv_layers(conv, "conv_dim, conv_kernel, conv_stride")  # s3prl passes it to eval
    settings = {
        "extractor_mode": "layer_norm" if config.feat_extract_norm == "layer" else "default",
        "conv_feature_layers": conv,
        "conv_bias": bool(config.conv_bias),
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": str(config.hidden_act),
        # data2vec-audio has no such setting: it is post-norm
        "layer_norm_first": bool(getattr(config, "do_stable_layer_norm", False)),
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
    }
    if config.model_type == "wavlm":
        settings.update(
            relative_position_embedding=True,
            gru_rel_pos=True,
            num_buckets=config.num_buckets,
            max_distance=config.max_bucket_distance,
        )
    if config.model_type == "data2vec-audio":  # a stack of positional convs
        depth = config.num_conv_pos_embeddings
        settings.update(conv_pos=depth * config.conv_pos_kernel_size, pos_conv_depth=depth)
    return settings


def fairseq_model(network: PreTrainedModel, location: str) -> nn.Module:
    """Copy a transformers model into s3prl's ``HubertModel`` or ``WavLM``, in fairseq's layout.

    Raises:
        ConfigError: the model has parts that fairseq's layout lacks.
    """
    config = network.config
    norm = config.feat_extract_norm == "layer"
    weights = {fairseq_name(name, norm): value for name, value in network.state_dict().items()}
    try:
        model = _build_model(config)
        missing, extra = model.load_state_dict(weights, strict=False)
        unmatched = [*extra, *(name for name in missing if not _UNUSED.match(name))]
        if unmatched:
            raise ValueError(f"{unmatched[0]} has no counterpart")
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise ConfigError(
            f"{location}: cannot convert the model to the student's layout: {first_line(error)}; "
            "choose another init.teacher or set init.teacher: null"
        ) from None
    return model.eval()


def _build_model(config: PreTrainedConfig) -> nn.Module:
    settings = fairseq_config(config)
    if config.model_type == "wavlm":
        from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

        model = WavLM(WavLMConfig(settings))
    else:
        from s3prl.upstream.hubert import hubert_model

        depth = settings.pop("pos_conv_depth", 1)
        model_config = hubert_model.HubertConfig(label_rate=50.0, **settings)
        model_config.pos_conv_depth = depth  # read by s3prl's encoder
        task = hubert_model.HubertPretrainingConfig(label_rate=50.0, sample_rate=16_000)
        model = hubert_model.HubertModel(model_config, task, [None])
    if model.post_extract_proj is None:  # transformers projects even if the widths are equal
        model.post_extract_proj = nn.Linear(model.embed, config.hidden_size)
    return model
