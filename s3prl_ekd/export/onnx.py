"""A student as an ONNX graph: ``waves, lengths`` -> ``hidden_states, frame_lengths``.

The graph is traced from :class:`OnnxStudent`, which runs the student's forward over a copy of its
modules. In the copy, the first norm is one that onnxruntime computes accurately, and the positional
convolution's weight norm is folded. :func:`check` compares each exported graph with torch.
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
from ..distill.student import Student
from ..distill.student_forward import student_forward
from ..errors import CheckpointError, SetupError
from .compare import largest_difference, noise_waves

DYNAMIC: dict[str, Any] = {  # the dynamic dimensions of inputs and outputs, by their names
    "waves": {0: "batch", 1: "sample"},
    "lengths": {0: "batch"},
    "hidden_states": {1: "batch", 2: "frame"},
    "frame_lengths": {0: "batch"},
}
OPSET = 17  # the first with LayerNormalization; torch's exporter supports up to 20
_LIMIT = 2 * 10**9  # bytes; a protobuf cannot be larger than 2 GiB

TOLERANCE = 1e-4  # see largest_difference
SECONDS = (0.1, 1.0, 3.0)  # test waveforms, run one by one and as one padded batch


class OnnxStudent(nn.Module):
    """A copy of a student in eval mode, with the inputs and outputs of the ONNX graph."""

    def __init__(self, student: Student):
        super().__init__()
        self.min_samples = student.settings.min_samples
        self.backbone = Student(student.settings).backbone
        self.backbone.load_state_dict(student.backbone.state_dict())
        nn.utils.remove_weight_norm(self.backbone.encoder.pos_conv[0])
        first_block = self.backbone.feature_extractor.conv_layers[0]
        if isinstance(first_block[2], nn.GroupNorm):
            first_block[2] = TimeNorm(first_block[2])

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Run the student.

        Args:
            waves: float32 ``[batch, sample]`` at 16 kHz, zero-padded at the end; at least
                ``settings.min_samples`` samples.
            lengths: int64 ``[batch]``, valid samples; values below ``settings.min_samples`` are
                raised to it, as in the upstream.

        Returns:
            ``hidden_states`` ``[layer, batch, frame, dim]``: the projected features and each
            layer's output. ``frame_lengths`` int64 ``[batch]``: valid frames.
        """
        out = student_forward(self.backbone, waves, lengths.clamp(min=self.min_samples))
        return torch.stack(out.hidden_states), out.mask.sum(1, dtype=torch.int64)


class TimeNorm(nn.Module):
    """The first conv layer's GroupNorm with one group per channel: normalises over time, of a
    student with ``masked_norm`` over valid frames only.

    It sums in blocks. onnxruntime sums sequentially, which loses four digits over ten thousand
    frames if most are near zero, as in a padded utterance.
    """

    block = 64

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[batch, channel, frame]`` over all frames."""
        centred = x - self.mean(x)
        return self.scale(centred, self.mean(centred * centred))

    def masked(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Normalise over valid frames, ``lengths [batch]``; see ``masked_group_norm`` in
        :mod:`..distill.student_forward`."""
        valid = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
        valid = valid[:, None].to(x.dtype)  # [batch, 1, frame]
        count = lengths[:, None, None].to(x.dtype)
        centred = x - self.mean(x * valid, count)
        return self.scale(centred, self.mean(centred * centred * valid, count))

    def scale(self, centred: Tensor, variance: Tensor) -> Tensor:
        deviation = (variance + self.norm.eps).sqrt()
        return centred * (self.norm.weight[:, None] / deviation) + self.norm.bias[:, None]

    def mean(self, x: Tensor, count: Tensor | None = None) -> Tensor:
        """Sum over time divided by ``count [batch, 1, 1]``, or by the number of frames: ``[batch,
        channel, 1]``."""
        blocks = F.avg_pool1d(F.pad(x, (0, self.block - 1)), self.block)
        return blocks.sum(2, keepdim=True) * (self.block / (x.shape[2] if count is None else count))


def require_onnx() -> None:
    """Raise SetupError if a package of the extra ``onnx`` is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise SetupError(
            f"{error.name} is not installed; type: pip install onnx onnxruntime"
        ) from None


def onnx_bytes(student: Student, opset: int = OPSET) -> bytes:
    """Export a student; return the contents of an ``.onnx`` file.

    Metadata: ``sample_rate`` (Hz), ``stride`` (samples per frame), ``min_samples``, ``made_by``.

    Raises:
        CheckpointError: the student is too large for one file.
    """
    import onnx

    size = sum(p.numel() for p in student.parameters()) * 4
    if size > _LIMIT:
        raise CheckpointError(f"the student has {size / 1e9:.1f} GB; an ONNX file holds at most 2")
    model = OnnxStudent(student).eval()
    waves = torch.zeros(2, 4 * student.settings.min_samples)  # any sizes: both are dynamic
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (waves, torch.tensor([waves.shape[1], waves.shape[1] // 2])),
            file,  # type: ignore[arg-type]  # torch's annotation allows paths only
            input_names=["waves", "lengths"],
            output_names=["hidden_states", "frame_lengths"],
            opset_version=opset,
            dynamic_axes=DYNAMIC,
            dynamo=False,  # the newer exporter needs more packages, unfinished before torch 2.9
        )
    graph = onnx.load_from_string(file.getvalue())
    metadata = {
        "sample_rate": 16_000,
        "stride": student.settings.stride,
        "min_samples": student.settings.min_samples,
        "made_by": f"s3prl_ekd {__version__}",
    }
    onnx.helper.set_model_props(graph, {key: str(value) for key, value in metadata.items()})
    onnx.checker.check_model(graph)
    return graph.SerializeToString()


class OnnxSession:
    """An onnxruntime session of the contents of an ``.onnx`` file, on ``threads`` CPU threads."""

    def __init__(self, graph: bytes, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, waves: Tensor, lengths: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Run ``waves [batch, sample]`` and ``lengths [batch]``.

        Returns:
            ``hidden_states [layer, batch, frame, dim]`` and ``frame_lengths [batch]``.
        """
        feed = {"waves": waves.numpy(), "lengths": lengths.numpy()}
        return tuple(self.session.run(None, feed))


def check(student: Student, run: OnnxSession) -> float:
    """Compare a graph with the student on three waveforms, one by one and as a padded batch.

    Returns:
        The largest absolute difference in a hidden state.

    Raises:
        CheckpointError: it is above :data:`TOLERANCE`, or the frame counts differ.
    """
    worst = 0.0
    for waves, lengths in _batches(student):
        with torch.no_grad():
            expected = student(waves, lengths)
        states, frames = map(torch.from_numpy, run(waves, lengths))
        expected_frames = expected.mask.sum(1).long()
        if not torch.equal(frames, expected_frames):
            raise CheckpointError(
                f"the ONNX graph gives {frames.tolist()} frames, expected "
                f"{expected_frames.tolist()}; nothing is written"
            )
        subject = f"the ONNX graph, run on {waves.shape[1]} samples,"
        error = largest_difference(expected.hidden_states, list(states), TOLERANCE, subject)
        worst = max(worst, error)
    return worst


def relative_errors(student: Student, run: OnnxSession) -> list[float]:
    """Relative error of the last hidden state, for each input of :func:`check`.

    It is RMS(difference) / RMS(student's state), over valid frames.
    """
    errors = []
    for waves, lengths in _batches(student):
        with torch.no_grad():
            expected = student(waves, lengths)
        valid = expected.mask.bool()
        state = expected.hidden_states[-1][valid].numpy()
        difference = state - run(waves, lengths)[0][-1][valid.numpy()]
        errors.append(float(np.sqrt(np.square(difference).mean() / np.square(state).mean())))
    return errors


def quantised(graph: bytes) -> bytes:
    """Quantise the weights of matrix products to int8, with one scale per output channel.

    Weights have 7 bits: with 8, sums of two products saturate at 16 bits on CPUs without VNNI.
    Convolutions stay float32: in int8 they are several times slower in onnxruntime on a CPU and
    cause most of the error.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    previous_level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice about static quantisation
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_dynamic(
                onnx.load_from_string(graph),
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                reduce_range=True,
            )
            return path.read_bytes()
    finally:
        logging.disable(previous_level)


def real_time_factors(
    runs: Mapping[str, Callable[[], object]], seconds: float, repeats: int = 5
) -> dict[str, list[float]]:
    """Time several functions alternately, so that other load affects all of them equally.

    Args:
        runs: name -> function that processes ``seconds`` of audio.
        repeats: measured rounds; one unmeasured warm-up round precedes them.

    Returns:
        name -> real-time factor (wall time / audio time) of each round.
    """
    factors: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:
                factors[name].append((time.perf_counter() - start) / seconds)
    return factors


def speed(student: Student, sessions: Mapping[str, OnnxSession]) -> dict[str, float]:
    """Median real-time factor of ``torch`` and of each session, on 5 s of noise."""
    waves = noise_waves(5 * 16_000)[0][None]
    lengths = torch.tensor([waves.shape[1]])

    def run_torch() -> None:
        with torch.inference_mode():
            student(waves, lengths)

    runs = {name: functools.partial(run, waves, lengths) for name, run in sessions.items()}
    factors = real_time_factors({"torch": run_torch, **runs}, seconds=5)
    return {name: statistics.median(values) for name, values in factors.items()}


def _batches(student: Student) -> list[tuple[Tensor, Tensor]]:
    """Test inputs ``(waves, lengths)``: each waveform alone, then all as a padded batch."""
    counts = [max(student.settings.min_samples, round(s * 16_000)) for s in SECONDS]
    waves = noise_waves(*counts)
    single = [(wave[None], torch.tensor([len(wave)])) for wave in waves]
    return [*single, (pad_sequence(waves, batch_first=True), torch.tensor(counts))]
