"""Export a student as an ONNX file with dynamic batch size and length.

Inputs: `waves` [batch, sample], float32, 16 kHz, zero-padded at the end, and `lengths` [batch],
int64, valid samples. Outputs: `hidden_states` [layer, batch, frame, dim], the projected features
(of a copied student, the input of the first layer) and each layer's output, and `frame_lengths`
[batch], int64, valid frames. The graph is compared with torch on waveforms of three lengths and on
a padded batch; if they differ, FILE is not written.
Needs onnx and onnxruntime (pip install onnx onnxruntime).

example:
  s3prl-ekd export onnx student.safetensors -o student.onnx --int8
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ...errors import CheckpointError
from . import check_output, load_checkpoint

# Typed in a shell within single quotes.
_RUN = (
    "import sys, numpy as np, onnxruntime as ort; session = ort.InferenceSession(sys.argv[1]); "
    "inputs = dict(waves=np.zeros((1, 16000), np.float32), lengths=np.array([16000])); "
    "print(session.run(None, inputs)[0].shape)"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export onnx``."""
    parser.add_argument(
        "--int8",
        action="store_true",
        help="also write FILE with .int8 before its suffix: matrix products in int8 (dynamic "
        "quantisation); its size, speed and error are printed",
    )
    parser.add_argument(
        "--opset", type=int, default=17, choices=(17, 18, 19, 20), help="default: 17"
    )


def main(args: argparse.Namespace) -> int:
    """Write the file or files; return exit code 0."""
    import torch

    from ...export import onnx
    from ...student_file import require_cut

    outputs = {"fp32": args.output}
    if args.int8:
        outputs["int8"] = args.output.with_name(f"{args.output.stem}.int8{args.output.suffix}")
    for path in outputs.values():
        check_output(path, args.force)
    onnx.require_onnx()  # before the checkpoint is loaded
    source, loaded = load_checkpoint(args.checkpoint)
    require_cut(loaded.student, source.path)
    student = loaded.student
    threads = torch.get_num_threads()  # the same for onnxruntime, so that speeds are comparable
    graphs = {"fp32": onnx.onnx_bytes(student, args.opset)}
    sessions = {"fp32": onnx.OnnxSession(graphs["fp32"], threads)}
    worst = onnx.check(student, sessions["fp32"])
    print(f"{source}: largest difference of the ONNX graph from torch: {worst:.1e}")
    if args.int8:
        graphs["int8"] = onnx.quantised(graphs["fp32"])
        sessions["int8"] = onnx.OnnxSession(graphs["int8"], threads)
    errors = {name: onnx.relative_errors(student, session) for name, session in sessions.items()}
    for name, values in errors.items():
        if not max(values) < 1:
            raise CheckpointError(
                f"the relative error of the {name} graph is {max(values)}, expected below 1; "
                "nothing is written"
            )
    factors = onnx.speed(student, sessions)
    for name, path in outputs.items():
        _write(path, graphs[name])
        *_, alone, batch = errors[name]
        print(
            f"{path}: {len(graphs[name]) / 1e6:.1f} MB, "
            f"{factors['torch'] / factors[name]:.2f} times the speed of torch, relative error of "
            f"the last layer {alone:.1e} (3 s of noise), {batch:.1e} "
            "(padded batch of 0.1, 1 and 3 s)"
        )
    print(f"next: python -c '{_RUN}' {shlex.quote(str(args.output))}")
    return 0


def _write(path: Path, data: bytes) -> None:
    from ...files.atomic import atomic_file, explain_write_errors

    with explain_write_errors(path, CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(data)
