"""Which teachers can be computed fast, and the encoders that do it.

The experts of s3prl for HuBERT, wav2vec 2.0, WavLM and UniSpeech-SAT, as they come from a hub name
or a checkpoint; every other upstream stays on the plain path: it is called as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from .conv import ConvExtractor, same_weights
from .encoder import FastEncoder, is_known

logger = logging.getLogger(__name__)

_FAMILIES = {
    "s3prl.upstream.hubert.expert": "hubert",
    "s3prl.upstream.wav2vec2.expert": "wav2vec2",
    "s3prl.upstream.wavlm.expert": "wavlm",
    "s3prl.upstream.unispeech_sat.expert": "unispeech_sat",
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def family(upstream: nn.Module) -> str | None:
    """The family of an upstream that can be computed fast, or None."""
    kind = type(upstream)
    name = _FAMILIES.get(kind.__module__) if kind.__name__ == "UpstreamExpert" else None
    if name is None or not is_known(upstream.model):
        return None
    if name == "wav2vec2":  # two switches of its expert, which nobody of ours turns
        usual = upstream.apply_padding_mask and not upstream.numpy_wav_normalize
        if not usual or upstream.feature_selection is not None:
            return None
    return name


def normalizes(upstream: nn.Module) -> bool:
    """Whether an expert of :func:`family` brings waveforms to zero mean and unit variance."""
    if hasattr(upstream, "wav_normalize"):
        return bool(upstream.wav_normalize)
    settings = upstream.task_cfg if hasattr(upstream, "task_cfg") else upstream.cfg
    return bool(settings.normalize)


def fast_encoders(
    upstreams: Mapping[str, nn.Module], precision: str = "float32", compiled: bool = False
) -> dict[str, FastEncoder]:
    """An encoder for each upstream that can have one; extractors of the same weights are one.

    Args:
        upstreams: by teacher name.
        precision: one of :data:`PRECISIONS`.
        compiled: run the layers through ``torch.compile``.
    """
    extractors: list[ConvExtractor] = []
    encoders = {}
    for name, upstream in upstreams.items():
        kind = family(upstream)
        if kind is None:
            logger.info("teacher %s: plain path, in float32 (%s)", name, type(upstream).__module__)
            continue
        module = upstream.model.feature_extractor
        extractor = next((e for e in extractors if same_weights(e.module, module)), None)
        if extractor is None:
            extractor = ConvExtractor(module, PRECISIONS[precision])
            extractors.append(extractor)
        encoders[name] = FastEncoder(
            upstream.model,
            extractor,
            normalize=normalizes(upstream),
            counts_frames=kind == "wav2vec2",
            precision=PRECISIONS[precision],
            compiled=compiled,
            name=name,
        )
    if len(extractors) < len(encoders):
        logger.info("%d teachers, %d different conv extractors", len(encoders), len(extractors))
    return encoders
