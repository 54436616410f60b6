"""s3prl's HuBERT and WavLM for pretraining: with masking and a head.

The forward pass is here because WavLM's has no head, and HuBERT's computes the similarity of frames
and units on copies (``[unit, frame, dim]``). It calls the methods of s3prl's classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from s3prl_ekd import compat
from s3prl_ekd.teachers.random_weights import hubert_checkpoint, untrained_model, wavlm_checkpoint

from .criterion import EncodedBatch
from .recipe import Family, TeacherRecipe

TEMPERATURE = 0.1  # of the cosine similarities (HuBERT, equation 3)


class CosineHead(nn.Module):
    """HuBERT's head (equation 3) for WavLM, which has none; not exported."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.final_proj = nn.Linear(width, width)
        self.label_embs_concat = nn.Parameter(torch.empty(classes, width).uniform_())


class MaskedPredictor(nn.Module):
    """A backbone of s3prl with a head that predicts units.

    Args:
        family: ``hubert`` or ``wavlm``.
        recipe: size and masking.
        classes: number of units; without units, 1.

    Attributes:
        checkpoint: contents of an exported file except the weights, in s3prl's format.
    """

    def __init__(self, family: Family, recipe: TeacherRecipe, classes: int):
        super().__init__()
        compat.apply()
        self.family = family
        self.checkpoint = _configuration(family, recipe, classes)
        self.backbone = untrained_model(self.checkpoint)
        if family == "wavlm":
            self.wavlm_head = CosineHead(recipe.size.width, classes)

    def forward(self, waves: Tensor, mask: bool = True) -> EncodedBatch:
        """Mask frames of ``waves [batch, sample]`` (equally long), if ``mask``, and encode them.

        Masks are drawn from NumPy's global generator, as in s3prl.
        """
        from s3prl.upstream.wav2vec2.wav2vec2_model import GradMultiply

        model = self.backbone
        features = model.feature_extractor(waves)  # [batch, channel, frame]
        features = GradMultiply.apply(features, model.feature_grad_mult)
        penalty = features.float().square().mean()
        hidden = model.layer_norm(features.transpose(1, 2))
        if model.post_extract_proj is not None:
            hidden = model.post_extract_proj(hidden)
        hidden = model.dropout_input(hidden).float()  # the mask embedding is float32, also in bf16
        masked = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if mask:
            target_list = (None,) if self.family == "hubert" else ()
            hidden, masked = model.apply_mask(hidden, None, *target_list)
        hidden, _ = model.encoder(hidden, padding_mask=None)  # [batch, frame, width]
        return EncodedBatch(hidden, masked, penalty)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[frame, width]`` -> ``[frame, unit]``: cosine similarity over temperature, float32."""
        head = self.backbone if self.family == "hubert" else self.wavlm_head
        with torch.autocast(hidden.device.type, enabled=False):
            projected = normalize(head.final_proj(hidden.float()), dim=-1)
            return projected @ normalize(head.label_embs_concat, dim=-1).T / TEMPERATURE

    def embeddings(self, hidden: Tensor) -> Tensor:
        """Project the mean over frames: ``[excerpt, frame, width] -> [excerpt, width]``."""
        return self.backbone.final_proj(hidden.mean(1))

    def head_weights(self) -> dict[str, Tensor]:
        """The weights of the head, by name in the ``state_dict``."""
        head = ("final_proj.", "label_embs_concat")
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name.split(".", 1)[1].startswith(head)
        }

    @torch.no_grad()
    def layer(self, wave: Tensor, index: int) -> Tensor:
        """Entry ``index`` (from 1) of ``hidden_states``, for ``[sample]``: ``[frame, width]``."""
        hidden, _ = self.backbone.extract_features(wave[None], mask=False, output_layer=index)
        return hidden[0]


def _configuration(family: Family, recipe: TeacherRecipe, classes: int) -> dict[str, Any]:
    """A checkpoint without weights, with size, masking and dropout of ``recipe``."""
    size = recipe.size
    arguments = {
        "conv_layers": size.conv_layers,
        "embed_dim": size.width,
        "ffn_dim": size.ffn,
        "heads": size.heads,
        "layers": size.layers,
        "conv_pos": size.conv_pos,
        "conv_pos_groups": size.conv_pos_groups,
    }
    training = {
        "mask_prob": recipe.mask_prob,
        "mask_length": recipe.mask_length,
        "dropout": recipe.dropout,
        "attention_dropout": recipe.dropout,
        "dropout_input": recipe.dropout,
        "encoder_layerdrop": recipe.dropout / 2,
    }
    if family == "hubert":
        states = hubert_checkpoint(**arguments, classes=classes)
        del states["model_weight"]
        states["model_cfg"].update(training)
    else:
        states = wavlm_checkpoint(**arguments)
        del states["model"]
        states["cfg"].update(training)
    return states
