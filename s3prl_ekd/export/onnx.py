"""A student as an ONNX graph: ``waves, lengths`` -> ``hidden_states, frame_lengths``.

The graph is traced from :class:`OnnxStudent`, which runs the student's forward over a copy of its
modules; in the copy onnxruntime can compute the first norm accurately, and the positional
convolution's weight norm is folded. That it gives the same is checked each time: the distance to
torch is measured, and the speed and int8 version too.
"""

from __future__ import annotations

import functools
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import __version__
from ..distill.student import Student, build_backbone
from ..distill.student_forward import student_forward
from ..errors import CheckpointError, SetupError

INPUTS, OUTPUTS = ("waves", "lengths"), ("hidden_states", "frame_lengths")
DYNAMIC = {
    "waves": {0: "batch", 1: "sample"},
    "lengths": {0: "batch"},
    "hidden_states": {1: "batch", 2: "frame"},
    "frame_lengths": {0: "batch"},
}
OPSET = 17  # which brought LayerNormalization; torch's exporter knows up to 20
_LIMIT = 2 * 10**9  # bytes; a protobuf cannot be larger than 2 GiB

TOLERANCE = 1e-4  # of a hidden state, or of the layer's largest value where that is above 1
SECONDS = (0.1, 1.0, 3.0)  # the lengths at which a graph is checked, alone and as a padded batch


class OnnxStudent(nn.Module):
    """A student's forward with the inputs and outputs of a graph, over a copy of its weights.

    Args:
        student: in eval mode.
    """

    def __init__(self, student: Student):
        super().__init__()
        self.min_samples = student.settings.min_samples
        self.backbone = build_backbone(student.settings)
        self.backbone.load_state_dict(student.backbone.state_dict())
        nn.utils.remove_weight_norm(self.backbone.encoder.pos_conv[0])
        first = self.backbone.feature_extractor.conv_layers[0]
        if isinstance(first[2], nn.GroupNorm):
            first[2] = TimeNorm(first[2])

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Run the student.

        Args:
            waves: float32 ``[batch, sample]`` at 16 kHz, zero-padded at the end; at least
                ``settings.min_samples`` samples.
            lengths: int64 ``[batch]``, valid samples of each; shorter ones count as
                ``settings.min_samples``, as in the upstream.

        Returns:
            ``hidden_states`` ``[layer, batch, frame, dim]``: the projected features and each
            layer's output. ``frame_lengths`` int64 ``[batch]``: valid frames of each.
        """
        out = student_forward(self.backbone, waves, lengths.clamp(min=self.min_samples))
        return torch.stack(out.hidden_states), out.mask.sum(1, dtype=torch.int64)


class TimeNorm(nn.Module):
    """The first conv layer's GroupNorm, a group a channel: a mean and a variance over time.

    Its sums are made in blocks. onnxruntime adds up one by one, and over ten thousand steps, most
    of them near zero in a padded row, that alone costs four digits.
    """

    block = 64

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean(x)  # [batch, channel, frame]
        deviation = (self.mean(centred * centred) + self.norm.eps).sqrt()
        return centred * (self.norm.weight[:, None] / deviation) + self.norm.bias[:, None]

    def mean(self, x: Tensor) -> Tensor:
        blocks = F.avg_pool1d(F.pad(x, (0, self.block - 1)), self.block)
        return blocks.sum(2, keepdim=True) * (self.block / x.shape[2])


def require_onnx() -> None:
    """Raise SetupError where a package of the extra ``onnx`` is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise SetupError(f"this needs {error.name}; type: pip install 's3prl_ekd[onnx]'") from None


def onnx_bytes(student: Student, opset: int = OPSET) -> bytes:
    """The graph of a student as the contents of an ``.onnx`` file.

    Its metadata says ``sample_rate`` (Hz), ``stride`` (samples a frame), ``min_samples`` and
    ``made_by``.

    Raises:
        SetupError: onnx or onnxruntime is not installed.
        CheckpointError: the student is too large for one file.
    """
    require_onnx()
    import onnx

    size = sum(p.numel() for p in student.parameters()) * 4
    if size > _LIMIT:
        raise CheckpointError(f"the student has {size / 1e9:.1f} GB; an ONNX file holds 2 GB")
    model = OnnxStudent(student).eval()
    waves = torch.zeros(2, 4 * student.settings.min_samples)  # any sizes: both are dynamic
    file = io.BytesIO()
    # torch has a newer exporter, which needs more packages and, before 2.9, was not finished
    older: dict[str, Any] = {"dynamo": False, "dynamic_axes": DYNAMIC}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (waves, torch.tensor([waves.shape[1], waves.shape[1] // 2])),
            file,  # type: ignore[arg-type]  # torch's annotation allows paths only
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            opset_version=opset,
            **older,
        )
    graph = onnx.load_from_string(file.getvalue())
    facts = {
        "sample_rate": 16_000,
        "stride": student.settings.stride,
        "min_samples": student.settings.min_samples,
        "made_by": f"s3prl_ekd {__version__}",
    }
    onnx.helper.set_model_props(graph, {name: str(value) for name, value in facts.items()})
    onnx.checker.check_model(graph)
    return graph.SerializeToString()


class OnnxSession:
    """A graph in onnxruntime on the CPU.

    Args:
        graph: the contents of an ``.onnx`` file.
        threads: of one operation; None leaves it to onnxruntime.
    """

    def __init__(self, graph: bytes, threads: int | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        if threads:
            options.intra_op_num_threads = options.inter_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, waves: Tensor, lengths: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """``[batch, sample]``, ``[batch]`` -> ``hidden_states [layer, batch, frame, dim]`` and
        ``frame_lengths [batch]``."""
        feed = {"waves": waves.numpy(), "lengths": lengths.numpy()}
        hidden_states, frame_lengths = self.session.run(None, feed)
        return hidden_states, frame_lengths


def check(student: Student, run: OnnxSession) -> float:
    """Compare a graph with the student at three lengths and on the three as a padded batch.

    Returns:
        The largest difference of a hidden state.

    Raises:
        CheckpointError: it is above :data:`TOLERANCE`, or the frame counts differ.
    """
    worst = 0.0
    for waves, lengths in _batches(student):
        with torch.no_grad():
            expected = student(waves, lengths)
        got, frames = run(waves, lengths)
        if frames.tolist() != expected.mask.sum(1).int().tolist():
            raise CheckpointError(f"the ONNX graph counts {frames.tolist()} frames; not written")
        for ours, theirs in zip(expected.hidden_states, got, strict=True):
            error = float(np.abs(ours.numpy() - theirs).max())
            if not error <= TOLERANCE * max(1.0, ours.abs().max().item()):
                raise CheckpointError(
                    f"the ONNX graph is {error:.1e} away from torch at {waves.shape[1]} samples, "
                    f"more than {TOLERANCE:.0e}; it is not written"
                )
            worst = max(worst, error)
    return worst


def relative_errors(student: Student, run: OnnxSession) -> list[float]:
    """How far the last hidden state is from the student's, for each input of :func:`check`.

    Root mean square of the difference over that of the state itself, over valid frames.
    """
    errors = []
    for waves, lengths in _batches(student):
        with torch.no_grad():
            expected = student(waves, lengths)
        valid = expected.mask.bool()
        ours = expected.hidden_states[-1][valid].numpy()
        theirs = run(waves, lengths)[0][-1][valid.numpy()]
        errors.append(float(np.sqrt(np.square(ours - theirs).mean() / np.square(ours).mean())))
    return errors


def quantised(graph: bytes) -> bytes:
    """The graph with the weights of its matrix products as int8, one scale an output channel.

    Convolutions stay float32: as int8 they are several times slower in onnxruntime on a CPU, and
    they carry most of the error.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice on preparing static quantisation
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_dynamic(
                onnx.load_from_string(graph),
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
            return path.read_bytes()
    finally:
        logging.disable(before)


def real_time_factors(
    runs: Mapping[str, Callable[[], object]], seconds: float, repeats: int = 5
) -> dict[str, list[float]]:
    """How long each of ``runs`` takes for a second of audio, in turns, so that all share a load.

    Args:
        runs: name -> what works through ``seconds`` of audio.
        repeats: measured turns; one more comes first, unmeasured.

    Returns:
        name -> wall time over audio time, one value a turn.
    """
    factors: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                factors[name].append((time.perf_counter() - start) / seconds)
    return factors


def speed(
    student: Student, sessions: Mapping[str, OnnxSession], seconds: float = 5.0
) -> dict[str, float]:
    """The median real-time factor of ``torch`` and of each session on one waveform of noise."""
    waves = 0.1 * torch.randn(1, int(seconds * 16_000), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([waves.shape[1]])

    def in_torch() -> None:
        with torch.inference_mode():
            student(waves, lengths)

    runs: dict[str, Callable[[], object]] = {"torch": in_torch}
    for name, session in sessions.items():
        runs[name] = functools.partial(session, waves, lengths)
    factors = real_time_factors(runs, seconds)
    return {name: statistics.median(values) for name, values in factors.items()}


def _batches(student: Student) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    counts = [max(student.settings.min_samples, round(s * 16_000)) for s in SECONDS]
    waves = [0.1 * torch.randn(count, generator=generator) for count in counts]
    single = [(wave[None], torch.tensor([len(wave)])) for wave in waves]
    return [*single, (pad_sequence(waves, batch_first=True), torch.tensor(counts))]
