"""Random twins: what a tiny teacher was before its first step, to tell learning from architecture.

Initialised as ``tools/teacher_zoo/models.py`` begins a training: s3prl's classes, and BERT's
initialisation for the transformer of both (s3prl's HuBERT lacks it, fairseq's has it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import compat
from ..safe_load import safe_load
from . import weights


def random_twin(name: str, seed: int = 1337) -> dict[str, Any]:
    """The checkpoint of a tiny teacher with fresh random weights in the place of the learned ones.

    Args:
        name: one of :data:`s3prl_ekd.zoo.NAMES`. The twins of ``tiny_hubert`` and
            ``tiny_robust_hubert`` are one.
        seed: of the weights; the global random state is left as it is.

    Returns:
        What the teacher's file holds, in s3prl's format, with float16 weights as there.

    Raises:
        SetupError: there is no such teacher.
        CheckpointError: its file is damaged.
    """
    path = weights(name)
    states = dict(safe_load(path, "tiny teacher"))
    compat.apply()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _hubert(states) if "model_cfg" in states else _wavlm(states)
    key = "model_weight" if "model_cfg" in states else "model"
    states[key] = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    return states


def _hubert(states: dict[str, Any]) -> nn.Module:
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


def _wavlm(states: dict[str, Any]) -> nn.Module:
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    return WavLM(WavLMConfig(states["cfg"]))
