"""Make s3prl's modules work with ``copy.deepcopy`` and ``pickle``.

Two things in them prevent it: the activation is a function defined within a function, which pickle
cannot name; and torch's ``weight_norm`` keeps the last computed weight, which deepcopy refuses
because it is part of a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm


def gelu(x: Tensor) -> Tensor:
    """s3prl's GELU, computed in float32."""
    return torch.nn.functional.gelu(x.float()).type_as(x)


class WeightNormConv1d(nn.Conv1d):
    """A convolution with ``torch.nn.utils.weight_norm``; a copy computes its weight again."""

    def __getstate__(self) -> dict[str, Any]:
        computed = {norm.name for norm in self._norms()}
        return {key: value for key, value in self.__dict__.items() if key not in computed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for norm in self._norms():
            setattr(self, norm.name, norm.compute_weight(self))

    def _norms(self) -> list[WeightNorm]:
        hooks = self.__dict__["_forward_pre_hooks"].values()
        return [hook for hook in hooks if isinstance(hook, WeightNorm)]


def make_copyable(backbone: nn.Module) -> None:
    """Replace what prevents copies of a student's modules; its outputs do not change."""
    module: Any
    for module in backbone.modules():
        if type(module) is nn.Conv1d and module._forward_pre_hooks:
            module.__class__ = WeightNormConv1d
        activation = getattr(module, "activation_fn", None)
        if getattr(activation, "__qualname__", "") == "get_activation_fn.<locals>.gelu":
            module.activation_fn = gelu
