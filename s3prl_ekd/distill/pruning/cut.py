"""Cut a student with gates to the units that its gates keep.

The values of the gates go into the weights behind the units (DPHuBERT's code does the same), so the
cut student computes what the student with gates computes in eval mode. It is exact up to rounding
with ``norms: kept``. With ``norms: all``, a layer norm is taken over fewer channels than before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..conv_layers import ConvLayers
from ..student import Student
from ..student_settings import PrunedSettings, Unit
from .backbone import PrunedBackbone

Values = dict[tuple[Unit, int], Tensor]  # kind of unit and layer -> values of its gates


class StateDifference(NamedTuple):
    """How far one hidden state is from another: the largest absolute difference, and the root mean
    square of the difference relative to that of the state."""

    largest: float
    relative: float


def gate_values(student: Student, random: int | None = None) -> Values:
    """The values of a student's gates in eval mode.

    Args:
        student: with gates.
        random: a seed; keep as many units of each layer, but draw which ones, with values of 1.

    Raises:
        CheckpointError: the student has no gates.
    """
    if student.is_cut or not isinstance(student.backbone, PrunedBackbone):
        raise CheckpointError(
            "the student has no gates: it was cut before, or trained without pruning; give a run "
            "with pruning in its model config"
        )
    values = {(unit, i): gate.fixed() for unit, i, gate in student.backbone.gates()}
    if random is None:
        return values
    generator = torch.Generator().manual_seed(random)
    for key, value in values.items():
        order = torch.randperm(len(value), generator=generator)
        values[key] = (value > 0).float()[order]
    return values


@torch.no_grad()
def cut(student: Student, values: Values) -> Student:
    """The student without the units whose gate is 0; the argument does not change."""
    settings = student.settings
    assert isinstance(settings, PrunedSettings)
    weights = {
        name: value.clone()
        for name, value in student.backbone.state_dict().items()
        if not name.endswith(".log_alpha")
    }
    conv = _cut_conv(weights, settings, values)
    heads, ffn_dims = [], []
    for layer in range(settings.encoder_layers):
        heads.append(_cut_attention(weights, settings, values, layer))
        ffn_dims.append(_cut_feed_forward(weights, settings, values, layer))
    smaller = dataclasses.replace(
        settings,
        conv_layers=conv,
        heads=tuple(heads),
        ffn_dims=tuple(ffn_dims),
        gates=None,
    )
    result = Student(smaller)
    result.backbone.load_state_dict(weights)
    return result.train(student.training)


@torch.no_grad()
def differences(student: Student, other: Student, waves: Iterable[Tensor]) -> list[StateDifference]:
    """How far the hidden states of two students in eval mode are apart.

    Args:
        student: the reference.
        other: with as many layers, of the same width.
        waves: ``[sample]`` each, 16 kHz; every one runs alone, without padding.

    Returns:
        For each hidden state, over all frames of the waveforms.
    """
    largest: list[float] = []
    squares: list[float] = []
    references: list[float] = []
    for wave in waves:
        length = torch.tensor([len(wave)])
        states = [model(wave[None], length).hidden_states for model in (student, other)]
        errors = [b.double() - a.double() for a, b in zip(*states, strict=True)]
        largest_now = [error.abs().max().item() for error in errors]
        largest = [*map(max, largest or largest_now, largest_now)]
        squares = _add(squares, errors)
        references = _add(references, states[0])
    return [
        StateDifference(worst, math.sqrt(square / max(reference, 1e-30)))
        for worst, square, reference in zip(largest, squares, references, strict=True)
    ]


def is_exact(settings: PrunedSettings) -> bool:
    """Whether a cut of a student with these gates changes nothing but the rounding."""
    gates = settings.gates
    return gates is None or gates.norms == "kept" or "conv" not in gates.units


def _add(sums: list[float], states: Iterable[Tensor]) -> list[float]:
    """Add each state's sum of squares."""
    new = [state.double().square().sum().item() for state in states]
    return [a + b for a, b in zip(sums, new, strict=True)] if sums else new


def _cut_conv(weights: dict[str, Tensor], settings: PrunedSettings, values: Values) -> ConvLayers:
    layers = []
    last = len(settings.conv_layers) - 1
    for i, (channels, kernel, stride) in enumerate(settings.conv_layers):
        value = values.get(("conv", i), torch.ones(channels))
        kept = value.nonzero()[:, 0]
        block = f"feature_extractor.conv_layers.{i}."
        for name in [n for n in weights if n.startswith(block)]:
            weights[name] = weights[name][kept]
        if i < last:
            following = f"feature_extractor.conv_layers.{i + 1}.0.weight"
            weights[following] = (weights[following] * value[:, None])[:, kept]
        elif settings.feature_scale:
            weights[f"{block}scale.weight"] *= value[kept]
        layers.append((len(kept), kernel, stride))
    for name in ("layer_norm.weight", "layer_norm.bias"):
        weights[name] = weights[name][kept]
    weights["post_extract_proj.weight"] = weights["post_extract_proj.weight"][:, kept]
    return tuple(layers)


def _cut_attention(
    weights: dict[str, Tensor], settings: PrunedSettings, values: Values, layer: int
) -> tuple[int, ...]:
    places = settings.heads[layer]
    path = f"encoder.layers.{layer}.self_attn."
    value = values.get(("heads", layer), torch.ones(len(places)))
    whole = values.get(("attention", layer), torch.ones(1))
    weights[f"{path}out_proj.bias"] *= whole
    value = value * whole
    kept = value.nonzero()[:, 0]
    if places and not len(kept):
        for name in [n for n in weights if n.startswith(path)]:
            if not name.endswith(("out_proj.bias", "relative_attention_bias.weight")):
                del weights[name]
        if settings.layer_norm_first:
            _remove_norm(weights, f"encoder.layers.{layer}.self_attn_layer_norm")
    elif places:
        rows = value.repeat_interleave(settings.head_dim)
        index = rows.nonzero()[:, 0]
        for projection in ("q_proj", "k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                name = f"{path}{projection}.{kind}"
                weights[name] = weights[name][index]
        weights[f"{path}out_proj.weight"] = (weights[f"{path}out_proj.weight"] * rows)[:, index]
    return tuple(places[i] for i in kept.tolist())


def _cut_feed_forward(
    weights: dict[str, Tensor], settings: PrunedSettings, values: Values, layer: int
) -> int:
    path = f"encoder.layers.{layer}."
    units = settings.ffn_dims[layer]
    value = values.get(("ffn", layer), torch.ones(units))
    whole = values.get(("feed_forward", layer), torch.ones(1))
    weights[f"{path}fc2.bias"] *= whole
    value = value * whole
    kept = value.nonzero()[:, 0]
    if units and not len(kept):
        for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
            del weights[path + name]
        if settings.layer_norm_first:
            _remove_norm(weights, f"{path}final_layer_norm")
    elif units:
        for name in ("fc1.weight", "fc1.bias"):
            weights[path + name] = weights[path + name][kept]
        weights[f"{path}fc2.weight"] = (weights[f"{path}fc2.weight"] * value)[:, kept]
    return len(kept)


def _remove_norm(weights: dict[str, Tensor], path: str) -> None:
    """Remove a layer norm in front of a module of which only the output's bias is left."""
    del weights[f"{path}.weight"], weights[f"{path}.bias"]
