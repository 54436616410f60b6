"""Random twins: what a tiny teacher was before its first step: architecture without learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import compat
from ..files.safe_load import safe_load
from .zoo import weights


def random_twin(name: str, seed: int = 1337) -> dict[str, Any]:
    """The checkpoint of a tiny teacher with fresh random weights in the place of the learned ones.

    Args:
        name: one of :data:`s3prl_ekd.teachers.zoo.NAMES`. The twins of ``tiny_hubert`` and
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = untrained(states)
    key = "model_weight" if "model_cfg" in states else "model"
    states[key] = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    return states


def untrained(states: dict[str, Any]) -> nn.Module:
    """s3prl's HuBERT or WavLM of a checkpoint's configuration, with the weights that training
    begins with: drawn from torch's global generator.

    Both transformers get BERT's initialisation, as in fairseq. s3prl's HuBERT lacks it, and with
    PyTorch's own each layer loses a tenth of what differs from frame to frame, and training soon
    the rest.

    Args:
        states: of a file in s3prl's format (see :mod:`.random_weights`); weights in it
            do not count.
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
