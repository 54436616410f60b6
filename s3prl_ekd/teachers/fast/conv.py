"""The conv extractor of HuBERT, wav2vec 2.0 and WavLM as matrix products over frames.

It is about half of a Base teacher's time. Frames are kept as rows, ``[frame, channel]``: then a
convolution of stride s is a few matrix products on views of its input, s taps each, and nothing is
copied or laid out anew. The first two layers, where the frames are many, go piece by piece, so
that a piece stays in the processor's cache. What the group norm behind the first convolution does
to a channel is an affine map whose mean and variance follow from those of the waveform's frames:
it goes into that convolution's weights, one set for each utterance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # WavLM has a class of the same name
    from s3prl.upstream.wav2vec2.wav2vec2_model import ConvFeatureExtractionModel

_PIECE = 1024  # frames of the second layer a thread works on at a time: 4 MB of its input


@dataclass(frozen=True)
class _Block:
    """One conv layer: ``weight`` ``[kernel, in, out]``, ``bias`` or None, a layer norm or None."""

    weight: Tensor
    bias: Tensor | None
    norm: nn.LayerNorm | None
    stride: int

    @property
    def kernel(self) -> int:
        return self.weight.shape[0]

    def frames(self, count: int) -> int:
        """Frames that ``count`` frames give."""
        return (count - self.kernel) // self.stride + 1


class ConvExtractor:
    """Waveforms to conv features, with the weights of s3prl's module.

    Args:
        module: s3prl's ``ConvFeatureExtractionModel`` with ``conv_layers``; see :func:`is_known`.
        dtype: what is computed in.
    """

    def __init__(self, module: ConvFeatureExtractionModel, dtype: torch.dtype = torch.float32):
        self.module = module
        self.dtype = dtype
        self._made: tuple[torch.device, list[_Block], nn.GroupNorm | None] | None = None

    @property
    def spec(self) -> list[tuple[int, int]]:
        """Kernel and stride of each layer."""
        convs = [block[0] for block in self.module.conv_layers]
        return [(conv.kernel_size[0], conv.stride[0]) for conv in convs]

    def __call__(self, waves: Tensor) -> Tensor:
        """``[batch, sample]`` -> ``[batch, frame, channel]``."""
        if self._convolves_faster(waves):
            return self.module(waves).transpose(1, 2)
        blocks, group_norm = self._blocks(waves.device)
        first, *rest = blocks
        frames = waves.unfold(1, first.kernel, first.stride)  # [batch, frame, tap]
        weight, bias = _first_weights(first, group_norm, frames)  # [batch, tap, channel]
        weight, bias = weight.to(self.dtype), bias.to(self.dtype)
        if waves.device.type == "cpu" and rest:
            hidden = _two_layers(frames, weight, bias, first.norm, rest.pop(0))
        else:
            hidden = torch.baddbmm(bias[:, None], frames.to(self.dtype), weight)
            hidden = _activate(hidden, first.norm)
        for block in rest:
            hidden = _activate(_convolve(hidden, block), block.norm)
        return hidden

    def _convolves_faster(self, waves: Tensor) -> bool:
        """Whether cuDNN may use the tensor cores in float32 and matrix products may not."""
        if waves.device.type != "cuda" or self.dtype != torch.float32:
            return False
        try:
            return torch.backends.cudnn.allow_tf32 > torch.backends.cuda.matmul.allow_tf32
        except RuntimeError:  # torch 2.9 and later, where somebody has used the settings' new names
            return True

    def _blocks(self, device: torch.device) -> tuple[list[_Block], nn.GroupNorm | None]:
        if self._made is None or self._made[0] != device:
            self._made = (device, *self._make(device))
        return self._made[1:]

    def _make(self, device: torch.device) -> tuple[list[_Block], nn.GroupNorm | None]:
        blocks, group_norm = [], None
        # Some of these tensors become the module's parameters: plain tensors, not inference's.
        with torch.inference_mode(False), torch.no_grad():
            for number, layer in enumerate(self.module.conv_layers):
                conv, norm = layer[0], _norm(layer)
                if isinstance(norm, nn.GroupNorm):
                    group_norm, norm = norm, None
                dtype = self.dtype if number else torch.float32
                weight = _by_taps(conv.weight, dtype, device)
                bias = None if conv.bias is None else conv.bias.detach().to(dtype)
                blocks.append(_Block(weight, bias, norm, conv.stride[0]))
        return blocks, group_norm


def is_known(module: ConvFeatureExtractionModel) -> bool:
    """Whether a module is a stack of convolutions as :class:`ConvExtractor` computes it."""
    layers = getattr(module, "conv_layers", None)
    if (
        not isinstance(layers, nn.ModuleList)
        or getattr(module, "conv_type", "default") != "default"
    ):
        return False
    for number, layer in enumerate(layers):
        if not isinstance(layer, nn.Sequential) or type(layer[0]) is not nn.Conv1d:
            return False
        conv, norm = layer[0], _norm(layer)
        plain = (conv.padding, conv.dilation, conv.groups) == ((0,), (1,), 1)
        if not plain or type(layer[-1]) is not nn.GELU or layer[-1].approximate != "none":
            return False
        if isinstance(norm, nn.GroupNorm) and (number or norm.num_groups != conv.out_channels):
            return False
    first: Any = layers[0]
    return first[0].in_channels == 1


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two extractors compute the same function."""
    ours, theirs = one.state_dict(), other.state_dict()
    if ours.keys() != theirs.keys() or str(one) != str(other):
        return False
    return all(torch.equal(ours[name], theirs[name].to(ours[name])) for name in ours)


def _norm(layer: nn.Sequential) -> nn.LayerNorm | nn.GroupNorm | None:
    """The norm of one conv layer; a layer norm stands between two transpositions."""
    kinds = (nn.GroupNorm, nn.LayerNorm)
    return next((module for module in layer.modules() if isinstance(module, kinds)), None)


def _by_taps(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[out, in, kernel]`` laid out as ``[kernel, in, out]``.

    In float32 the parameter becomes a view of that: there is one copy of the weights in memory.
    """
    weight = parameter.detach().permute(2, 1, 0).to(device, dtype).contiguous()
    if dtype == parameter.dtype and device == parameter.device:
        parameter.data = weight.permute(2, 1, 0)
    return weight


def _first_weights(
    block: _Block, norm: nn.GroupNorm | None, frames: Tensor
) -> tuple[Tensor, Tensor]:
    """The first layer as ``[batch, tap, channel]`` and ``[batch, channel]``, its group norm in it.

    For weights w, the mean over time of w·x is w·mean(x), and its variance wᵀ·cov(x)·w.
    """
    batch = frames.shape[0]
    weight = block.weight[:, 0]  # [tap, channel]
    bias = weight.new_zeros(weight.shape[1]) if block.bias is None else block.bias
    if norm is None:
        return weight.expand(batch, -1, -1), bias.expand(batch, -1)
    mean = frames.mean(1, keepdim=True, dtype=torch.float64)  # [batch, 1, tap]
    centred = frames - mean  # float64: the variance is a small difference of large sums otherwise
    covariance = centred.transpose(1, 2) @ centred / frames.shape[1]  # [batch, tap, tap]
    exact = weight.double()
    variance = ((covariance @ exact) * exact).sum(1)  # [batch, channel]
    scale = norm.weight / torch.sqrt(variance + norm.eps)  # the conv's bias is part of the mean
    shift = norm.bias - (mean @ exact).squeeze(1) * scale
    return (exact * scale[:, None]).float(), shift.float()


def _two_layers(
    frames: Tensor, weight: Tensor, bias: Tensor, norm: nn.LayerNorm | None, second: _Block
) -> Tensor:
    """The first two layers of each utterance, piece by piece: ``[batch, frame, channel]``."""
    piece = _PIECE * torch.get_num_threads()
    count = second.frames(frames.shape[1])
    out = weight.new_empty(frames.shape[0], count, second.weight.shape[2])
    for utterance in range(frames.shape[0]):
        for begin in range(0, count, piece):
            end = min(begin + piece, count)
            rows = slice(begin * second.stride, (end - 1) * second.stride + second.kernel)
            taps = frames[utterance, rows].to(weight.dtype)
            hidden = torch.addmm(bias[utterance], taps, weight[utterance])
            hidden = _activate(hidden, norm)
            made = _convolve(hidden[None], second, out[utterance : utterance + 1, begin:end])
            if second.norm is None:
                torch.ops.aten.gelu_(made)
            else:
                made.copy_(_activate(made, second.norm))
    return out


def _convolve(hidden: Tensor, block: _Block, out: Tensor | None = None) -> Tensor:
    """``[batch, frame, in]`` -> ``[batch, frame, out]``, a product for each stride of taps."""
    batch, count, channels = hidden.shape
    made = block.frames(count)
    if out is None:
        out = hidden.new_empty(batch, made, block.weight.shape[2])
    for first in range(0, block.kernel, block.stride):
        taps = block.weight[first : first + block.stride]  # [tap, in, out]
        # Row t holds the frames t * stride + first and the few behind it: they lie side by side.
        size = (batch, made, taps.shape[0] * channels)
        steps = (hidden.stride(0), block.stride * channels, 1)
        start = hidden.storage_offset() + first * channels
        rows = hidden.as_strided(size, steps, start)
        matrix = taps.reshape(1, -1, taps.shape[2]).expand(batch, -1, -1)
        if first == 0:
            torch.bmm(rows, matrix, out=out)
        else:
            out.baddbmm_(rows, matrix)
    return out if block.bias is None else out.add_(block.bias)


def _activate(hidden: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """Layer norm if there is one, and GELU in place."""
    if norm is not None:
        weight, bias = norm.weight.to(hidden.dtype), norm.bias.to(hidden.dtype)
        hidden = F.layer_norm(hidden, norm.normalized_shape, weight, bias, norm.eps)
    return torch.ops.aten.gelu_(hidden)
