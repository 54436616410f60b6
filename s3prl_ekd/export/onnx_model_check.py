"""What an ONNX student is worth: its distance to torch, its int8 version, its speed."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..distill.student import Student
from ..errors import CheckpointError

TOLERANCE = 1e-4  # of a hidden state, or of the layer's largest value where that is above 1
SECONDS = (0.1, 1.0, 3.0)  # the lengths at which a graph is checked, alone and as a padded batch


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


def speed(student: Student, sessions: Mapping[str, OnnxSession], seconds: float = 5.0):
    """The median real-time factor of ``torch`` and of each session on one waveform of noise."""
    waves = 0.1 * torch.randn(1, int(seconds * 16_000), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([waves.shape[1]])

    def in_torch():
        with torch.inference_mode():
            student(waves, lengths)

    runs: dict[str, Callable[[], object]] = {"torch": in_torch}
    for name, session in sessions.items():
        runs[name] = lambda session=session: session(waves, lengths)
    factors = real_time_factors(runs, seconds)
    return {name: statistics.median(values) for name, values in factors.items()}


def _batches(student: Student) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    counts = [max(student.settings.min_samples, round(s * 16_000)) for s in SECONDS]
    waves = [0.1 * torch.randn(count, generator=generator) for count in counts]
    single = [(wave[None], torch.tensor([len(wave)])) for wave in waves]
    return [*single, (pad_sequence(waves, batch_first=True), torch.tensor(counts))]
