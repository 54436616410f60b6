"""The conv extractor of wav2vec 2.0 (arXiv 2006.11477) as matrix products over frames, for students
and teachers, with gradients.

The extractor takes half of a Base teacher's time and most of a small student's. Four changes make
it faster than a sequence of convolutions; the results are equal except for rounding:

- Frames are stored as rows, ``[frame, channel]``. A convolution of stride s is then a few matrix
  products on views of its input, s taps each, without copies.
- The group norm after the first convolution is an affine map of each channel. Its mean and variance
  follow from those of the waveform's frames, so it is folded into the convolution's weights, one
  set for each utterance.
- On a CPU, the first two layers, which have the most frames, are computed in chunks that fit in the
  processor's cache. For the backward pass the first layer is computed again, chunk by chunk.
- The backward pass needs only what each convolution returned; GELU is computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .student_forward import normalise

if TYPE_CHECKING:  # WavLM has a class of the same name
    from s3prl.upstream.wav2vec2.wav2vec2_model import ConvFeatureExtractionModel

# What the extractors of a student and its teachers compute for a batch: normalised waveforms and
# features.
Shared = dict[Any, Tensor]
_CHUNK = 1024  # frames of the second layer per chunk and thread: 4 MB of its input


class ConvExtractor:
    """Computes conv features with the weights of s3prl's module.

    Args:
        module: see :func:`supports_blocks`.
        dtype: of the computation; None: that of the weights, or autocast's.
        masked_norm: take the statistics of the group norm over valid frames only (*ours*).
        frozen: the weights change only in ways that torch's version counter shows, as a teacher's.
    """

    def __init__(
        self,
        module: ConvFeatureExtractionModel,
        dtype: torch.dtype | None = None,
        masked_norm: bool = False,
        frozen: bool = False,
    ):
        self.module, self.dtype, self.masked_norm = module, dtype, masked_norm
        self.frozen = frozen
        self.forget_weights()

    def __getstate__(self) -> dict[str, Any]:
        names = ("module", "dtype", "masked_norm", "frozen")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget_weights()  # a copy has its own

    @property
    def spec(self) -> list[tuple[int, int]]:
        """Kernel and stride of each layer."""
        blocks: Any = self.module.conv_layers
        return [(block[0].kernel_size[0], block[0].stride[0]) for block in blocks]

    def forget_weights(self) -> None:
        """Convert the weights again at the next call."""
        self._digest: tuple[list[Any], bytes] = ([], b"")
        self._layers: list[ConvLayer] = []
        self._layers_of: Any = None  # dtype, and versions or copies of the weights

    def __call__(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """Compute features ``[batch, frame, channel]`` of waveforms ``[batch, sample]``, of which
        ``lengths [batch]``, on the CPU, are valid."""
        dtype = self._dtype_on(waves.device)
        layers = self._converted(dtype)
        valid = None
        if self.masked_norm and int(lengths.min()) < waves.shape[1]:
            counts = torch.div(lengths - layers[0].kernel, layers[0].stride, rounding_mode="floor")
            frames = torch.arange((waves.shape[1] - layers[0].kernel) // layers[0].stride + 1)
            valid = (frames <= counts[:, None]).to(waves.device, non_blocking=True)
        with torch.autocast(waves.device.type, enabled=False):
            return conv_features(layers, waves, valid, dtype)

    def shared_features(
        self, waves: Tensor, lengths: Tensor, normalize: bool, shared: Shared
    ) -> Tensor:
        """The features of a batch, computed once for all extractors with the same weights.

        Args:
            waves, lengths: see :meth:`__call__`.
            normalize: whether to normalise the waveforms before.
            shared: what was computed for this batch; the results are added.
        """
        dtype = self._dtype_on(waves.device)
        key = (self.digest(), dtype, self.masked_norm, normalize)
        if key not in shared:
            if normalize and "normalised" not in shared:
                on_device = lengths.to(waves.device, non_blocking=True)
                shared["normalised"] = normalise(waves, on_device)
            shared[key] = self(shared["normalised"] if normalize else waves, lengths)
        return shared[key]

    def digest(self) -> bytes:
        """Digest of layers and weights, computed again when a weight has changed.

        Changes by ``.data`` are not noticed before :meth:`forget_weights`: it is for the extractors
        of teachers and of a student that is trained with a frozen one.
        """
        versions = [*map(_version, self.module.parameters())]
        if self._digest[0] != versions:
            digest = hashlib.blake2b(digest_size=16)
            for layer in read_layers(self.module.conv_layers, torch.float32):
                norm = layer.norm
                affine = [] if norm is None else [norm.weight, norm.bias]
                weights = [layer.weight, layer.bias, *affine, *layer.scales]
                shapes = [None if weight is None else tuple(weight.shape) for weight in weights]
                kind = None if norm is None else (isinstance(norm, nn.GroupNorm), norm.eps)
                digest.update(repr((layer.stride, kind, shapes)).encode())
                for weight in weights:
                    if weight is not None:
                        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
            self._digest = versions, digest.digest()
        return self._digest[1]

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        """The type of the computation."""
        if self.dtype is not None:
            return self.dtype
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        dtype: torch.dtype = next(self.module.parameters()).dtype
        return dtype

    def _converted(self, dtype: torch.dtype) -> list[ConvLayer]:
        """The layers; without gradients they are kept until a weight changes.

        Values are compared, unless the extractor is frozen, as torch's version counter misses
        changes by ``.data`` and of inference tensors. On a GPU a comparison would wait for it, and
        the conversion takes microseconds.
        """
        blocks: Any = self.module.conv_layers
        weights = [*self.module.parameters()]
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return read_layers(blocks, dtype)
        current = dtype, [*map(_version, weights)] if self.frozen else weights
        if self._layers_of is None or not _equal(self._layers_of, current):
            with torch.inference_mode(False), torch.no_grad():  # usable where gradients are needed
                self._layers = read_layers(blocks, dtype, contiguous=True)
                if self.frozen:
                    self._layers_of = current
                elif all(weight.device.type == "cpu" for weight in weights):
                    self._layers_of = dtype, [weight.clone() for weight in weights]
        return self._layers


def _equal(a: tuple[torch.dtype, list[Any]], b: tuple[torch.dtype, list[Any]]) -> bool:
    """Whether both have the same type of the computation, and equal weights or versions."""

    def same(x: Any, y: Any) -> bool:
        if not isinstance(x, Tensor):
            return bool(x == y)
        return (x.dtype, x.device) == (y.dtype, y.device) and torch.equal(x, y)

    return a[0] == b[0] and all(map(same, a[1], b[1]))


def _version(weight: Tensor) -> tuple[torch.device, int, int]:
    """A value that changes if a weight does."""
    changes = 0 if weight.is_inference() else weight._version
    return weight.device, weight.data_ptr(), changes


@dataclass(frozen=True)
class ConvLayer:
    """One conv layer: ``weight`` ``[kernel, in, out]``, ``bias`` ``[out]`` or None, and s3prl's
    modules."""

    weight: Tensor
    bias: Tensor | None
    block: Any

    @property
    def kernel(self) -> int:
        return self.weight.shape[0]

    @property
    def stride(self) -> int:
        return self.block[0].stride[0]  # type: ignore[no-any-return]

    @property
    def norm(self) -> nn.LayerNorm | nn.GroupNorm | None:
        """The norm between convolution and GELU; s3prl wraps a layer norm in two transpositions."""
        return norm_of(self.block)

    @property
    def scales(self) -> list[Tensor]:
        """Factors ``[out]`` of the channels after GELU: gates of a student that is being pruned,
        fixed factors of one that was."""
        scales = [self.block.gate.values] if hasattr(self.block, "gate") else []
        return scales + ([self.block.scale.weight] if hasattr(self.block, "scale") else [])


def read_layers(
    blocks: Iterable[Any], dtype: torch.dtype, contiguous: bool = False
) -> list[ConvLayer]:
    """The layers of s3prl's conv blocks; weights in ``dtype``, except those of the first layer.

    They are differentiable views or copies of the parameters; with ``contiguous``, contiguous.
    """
    layers: list[ConvLayer] = []
    for block in blocks:
        conv = block[0]
        weight = conv.weight.permute(2, 1, 0)
        if layers:  # the first layer's weights are folded with a norm in float64
            weight = weight.to(dtype)
        weight = weight.contiguous() if contiguous else weight
        bias = None if conv.bias is None else conv.bias.to(dtype)
        layers.append(ConvLayer(weight, bias, block))
    return layers


def norm_of(block: Any) -> nn.LayerNorm | nn.GroupNorm | None:
    types = (nn.GroupNorm, nn.LayerNorm)
    return next((module for module in block.modules() if isinstance(module, types)), None)


def supports_blocks(module: Any) -> bool:
    """Whether :func:`conv_features` can compute an extractor: convolutions without padding, with
    GELU, and a group norm over each channel after the first, or layer norms, or no norm."""
    blocks: Any = getattr(module, "conv_layers", None)
    if (
        not isinstance(blocks, nn.ModuleList)
        or getattr(module, "conv_type", "default") != "default"
    ):
        return False
    for index, block in enumerate(blocks):
        if not isinstance(block, nn.Sequential) or type(block[0]) is not nn.Conv1d:
            return False
        conv, norm = block[0], norm_of(block)
        simple = (conv.padding, conv.dilation, conv.groups) == ((0,), (1,), 1)
        gelu = block[3 if norm is not None else 2] if len(block) > 2 else None
        if not simple or type(gelu) is not nn.GELU or gelu.approximate != "none":
            return False
        if isinstance(norm, nn.GroupNorm) and (index or norm.num_groups != conv.out_channels):
            return False
    first: Any = blocks[0]
    return bool(first[0].in_channels == 1)


def conv_features(
    layers: Sequence[ConvLayer],
    waves: Tensor,
    valid: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute conv features.

    Args:
        layers: see :func:`read_layers`.
        waves: ``[batch, sample]``.
        valid: bool ``[batch, frame]``, the first layer's frames in the statistics of its group
            norm; None: all, padding included, as in s3prl.
        dtype: of the computation.

    Returns:
        ``[batch, frame, channel]`` in ``dtype``.
    """
    first, *rest = layers
    frames = waves.unfold(1, first.kernel, first.stride)  # [batch, frame, tap]
    if isinstance(first.norm, nn.GroupNorm):
        # The norm removes a constant. Without it, sums are small and their rounding errors, too.
        share = torch.ones_like(frames[..., 0]) if valid is None else valid.to(frames.dtype)
        offset = (frames.double().mean(2) * share).sum(1) / share.sum(1)
        waves = waves - offset[:, None].to(waves.dtype)
        frames = waves.unfold(1, first.kernel, first.stride)
    weight, bias = first_weights(first, frames, valid)
    weight, bias = weight.to(dtype), bias.to(dtype)
    # `hidden` is what a convolution returned, before norm and GELU.
    norm: nn.Module | None = first.norm if isinstance(first.norm, nn.LayerNorm) else None
    last = first
    if waves.device.type == "cpu" and norm is None and rest:
        last = rest.pop(0)
        hidden = _two_layers(frames, weight, bias, _scaled(last, first), last.stride)
        hidden, norm = _add_bias(hidden, last), last.norm
    else:
        hidden = torch.baddbmm(bias[:, None], frames.to(dtype), weight)
    for layer in rest:
        hidden = _normalised(hidden, norm)
        hidden = _gelu_and_convolution(hidden, _scaled(layer, last), layer.stride)
        hidden, last, norm = _add_bias(hidden, layer), layer, layer.norm
    features = F.gelu(_normalised(hidden, norm))
    for scale in last.scales:
        features = features * scale.to(dtype)
    return features


def first_weights(layer: ConvLayer, frames: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight ``[batch, tap, channel]`` and bias ``[batch, channel]`` of the first layer, with its
    group norm folded in.

    For weights w, the mean over time of w·x is w·mean(x), and its variance is wᵀ·cov(x)·w.
    ``valid``: bool ``[batch, frame]``, the frames of these statistics; None: all.
    """
    batch, norm = frames.shape[0], layer.norm
    weight = layer.weight[:, 0]  # [tap, channel]
    if not isinstance(norm, nn.GroupNorm):
        bias = weight.new_zeros(weight.shape[1]) if layer.bias is None else layer.bias
        return weight.expand(batch, -1, -1), bias.expand(batch, -1)
    # float64: the variance is a small difference of large sums
    frames = frames.double()
    share = 1.0 if valid is None else valid[..., None].double()
    count = frames.shape[1] if valid is None else valid.sum(1)[:, None, None]
    mean = (frames * share).sum(1, keepdim=True) / count  # [batch, 1, tap]
    centred = (frames - mean) * share
    # Not as matrix products, which are counted in SUPERB's MACs: those of the convolutions remain.
    rows = [(centred * centred[..., tap, None]).sum(1) for tap in range(layer.kernel)]
    covariance = torch.stack(rows, 1) / count  # [batch, tap, tap]
    exact = weight.double()
    variance = (covariance[..., None] * exact[:, None] * exact).sum((1, 2))  # [batch, channel]
    scale = norm.weight / torch.sqrt(variance + norm.eps)  # the conv's bias cancels with the mean
    shift = norm.bias - (mean.transpose(1, 2) * exact).sum(1) * scale
    if layer.bias is not None:
        shift = shift + 0 * layer.bias  # its gradient is 0; DistributedDataParallel needs one
    return exact * scale[:, None], shift


def _scaled(layer: ConvLayer, previous: ConvLayer) -> Tensor:
    """The weights ``[kernel, in, out]``, times the factors of the previous layer's channels."""
    weight = layer.weight
    for scale in previous.scales:
        weight = weight * scale[:, None].to(weight.dtype)
    return weight.contiguous()


def _add_bias(hidden: Tensor, layer: ConvLayer) -> Tensor:
    if layer.bias is None:
        return hidden
    return hidden + layer.bias if hidden.requires_grad else hidden.add_(layer.bias)


def _normalised(hidden: Tensor, norm: nn.Module | None) -> Tensor:
    return hidden if norm is None else norm(hidden).to(hidden.dtype)


class _Layer(torch.autograd.Function):
    """GELU and a convolution: ``[batch, frame, in]``, weights ``[kernel, in, out]`` -> ``[batch,
    frame, out]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        keep = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        return convolve(F.gelu(x) if keep else torch.ops.aten.gelu_(x), weight, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x, weight), grad = ctx.saved_tensors, grad.contiguous()
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            total = _zeros(weight)
            add_weight_gradient(total, F.gelu(x), grad, ctx.stride)
            grad_weight = total.to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad, weight, ctx.stride, x.shape[1])
            grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        return grad_x, grad_weight, None


class _TwoLayers(torch.autograd.Function):
    """The first convolution, GELU and the second convolution, in chunks of frames.

    ``frames [batch, frame, tap]``, weights ``[batch, tap, channel]`` and biases ``[batch,
    channel]`` of the first, weights ``[kernel, in, out]`` of the second -> ``[batch, frame, out]``.
    """

    @staticmethod
    def forward(
        ctx: Any, frames: Tensor, weight: Tensor, bias: Tensor, second: Tensor, stride: int
    ) -> Tensor:
        ctx.save_for_backward(frames, weight, bias, second)
        ctx.stride = stride
        kernel, channels = second.shape[0], second.shape[2]
        count = (frames.shape[1] - kernel) // stride + 1
        out = weight.new_empty(frames.shape[0], count, channels)
        overlap = max(0, kernel - stride)  # of the first layer's frames of two chunks
        last = out.new_empty(0)
        for utterance, rows, part in _chunks(count, len(frames), kernel, stride):
            hidden = out.new_empty(rows.stop - rows.start, second.shape[1])
            known = overlap if part.start else 0
            hidden[:known] = last[:known] if known else 0
            taps = frames[utterance, rows.start + known : rows.stop].to(weight.dtype)
            new = hidden[known:]
            torch.addmm(bias[utterance], taps, weight[utterance], out=new)
            torch.ops.aten.gelu_(new)
            last = hidden[len(hidden) - overlap :]
            convolve(hidden[None], second, stride, out[utterance, part][None])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        frames, weight, bias, second = ctx.saved_tensors
        stride, grad = ctx.stride, grad.contiguous()
        grad_weight, grad_bias, grad_second = _zeros(weight), _zeros(bias), _zeros(second)
        for utterance, rows, part in _chunks(grad.shape[1], len(frames), len(second), stride):
            taps = frames[utterance, rows].to(weight.dtype)
            hidden = torch.addmm(bias[utterance], taps, weight[utterance])
            chunk = grad[utterance, part][None]
            add_weight_gradient(grad_second, F.gelu(hidden)[None], chunk, stride)
            before = input_gradient(chunk, second, stride, len(taps))[0]
            before = torch.ops.aten.gelu_backward(before, hidden)
            _add_product(grad_weight[utterance], taps.T, before)
            grad_bias[utterance] += before.sum(0)
        dtype = weight.dtype
        return None, grad_weight.to(dtype), grad_bias.to(dtype), grad_second.to(dtype), None


_gelu_and_convolution: Callable[..., Tensor] = _Layer.apply
_two_layers: Callable[..., Tensor] = _TwoLayers.apply


def _chunks(count: int, batch: int, kernel: int, stride: int) -> Iterator[tuple[int, slice, slice]]:
    """Utterance, frames of the first layer and frames of the second layer of each chunk."""
    chunk = _CHUNK * torch.get_num_threads()
    for utterance in range(batch):
        for begin in range(0, count, chunk):
            end = min(begin + chunk, count)
            yield utterance, slice(begin * stride, (end - 1) * stride + kernel), slice(begin, end)


def _groups(x: Tensor, kernel: int, stride: int, frames: int) -> Iterator[tuple[slice, Tensor]]:
    """Views of ``x [batch, frame, channel]``, one for each ``stride`` taps of a convolution: the
    taps, and ``[batch, frame, tap and channel]``."""
    channels = x.shape[2]
    for tap in range(0, kernel, stride):
        taps = slice(tap, min(tap + stride, kernel))
        # Row t is a view of consecutive frames of x, from frame t * stride + tap on.
        size = (x.shape[0], frames, (taps.stop - tap) * channels)
        strides = (x.stride(0), stride * channels, 1)
        yield taps, x.as_strided(size, strides, x.storage_offset() + tap * channels)


def convolve(x: Tensor, weight: Tensor, stride: int, out: Tensor | None = None) -> Tensor:
    """Convolve: contiguous ``[batch, frame, in]``, ``[kernel, in, out]`` -> ``[batch, frame,
    out]``."""
    kernel, batch = weight.shape[0], x.shape[0]
    frames = (x.shape[1] - kernel) // stride + 1
    if out is None:
        out = x.new_empty(batch, frames, weight.shape[2])
    for taps, rows in _groups(x, kernel, stride, frames):
        matrix = weight[taps].flatten(0, 1).expand(batch, -1, -1)
        if taps.start == 0:
            torch.bmm(rows, matrix, out=out)
        else:
            out.baddbmm_(rows, matrix)
    return out


def add_weight_gradient(total: Tensor, x: Tensor, grad: Tensor, stride: int) -> None:
    """Add the gradient of :func:`convolve`'s weights to ``total [kernel, in, out]``, float32 or the
    type of ``x``; ``grad``: that of its result."""
    for taps, rows in _groups(x, total.shape[0], stride, grad.shape[1]):
        part = total[taps].flatten(0, 1)  # a view
        for utterance in range(x.shape[0]):
            _add_product(part, rows[utterance].T, grad[utterance])


def _zeros(weight: Tensor) -> Tensor:
    """Zeros of a weight's shape, to sum many products: at least float32."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, which may have more precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def input_gradient(grad: Tensor, weight: Tensor, stride: int, count: int) -> Tensor:
    """The gradient ``[batch, frame, in]`` of :func:`convolve`'s input, of ``count`` frames, from
    ``grad [batch, frame, out]`` of its result."""
    kernel, channels, _ = weight.shape
    batch, frames, _ = grad.shape
    result = grad.new_zeros(batch, count, channels)
    for taps, rows in _groups(result, kernel, stride, frames):
        matrix = weight[taps].flatten(0, 1).T.expand(batch, -1, -1)
        rows.baddbmm_(grad, matrix)
    return result
