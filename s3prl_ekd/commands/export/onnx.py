"""Write a student as an ONNX file with dynamic batch and time.

Inputs: `waves` [batch, sample], float32, 16 kHz, zero-padded at the end, and `lengths` [batch],
int64, the valid samples of each. Outputs: `hidden_states` [layer, batch, frame, dim], the projected
features and each layer's output, and `frame_lengths` [batch]. The graph is compared with torch at
three lengths and on a padded batch before the file gets its name. Needs the extra onnx.

example:
  s3prl-ekd export onnx student.safetensors -o student.onnx --int8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import CheckpointError
from .student import add_checkpoint, load


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export onnx``."""
    add_checkpoint(parser)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    parser.add_argument(
        "--int8",
        action="store_true",
        help="a second file, FILE with .int8 in its name: matrix products in int8 (dynamic "
        "quantisation); its size, speed and error are printed",
    )
    parser.add_argument(
        "--opset", type=int, default=17, choices=(17, 18, 19, 20), help="default: 17"
    )
    parser.add_argument("--force", action="store_true", help="write over existing files")


def main(args: argparse.Namespace) -> int:
    """Write the file or files; the exit code is 0."""
    import torch

    from ...export.onnx import (
        OnnxSession,
        check,
        onnx_bytes,
        quantised,
        relative_errors,
        require_onnx,
        speed,
    )

    outputs = {"fp32": args.output}
    if args.int8:
        outputs["int8"] = args.output.with_name(f"{args.output.stem}.int8{args.output.suffix}")
    for path in outputs.values():
        if path.exists() and not args.force:
            raise CheckpointError(f"{path} exists; add --force to write over it")
    require_onnx()  # before anything is loaded
    source, loaded = load(args.checkpoint)
    student = loaded.student
    threads = torch.get_num_threads()  # as many for both, or the speeds would say nothing
    graphs = {"fp32": onnx_bytes(student, args.opset)}
    sessions = {"fp32": OnnxSession(graphs["fp32"], threads)}
    worst = check(student, sessions["fp32"])
    print(f"{source}: the ONNX graph equals torch, largest difference {worst:.1e}")
    if args.int8:
        graphs["int8"] = quantised(graphs["fp32"])
        sessions["int8"] = OnnxSession(graphs["int8"], threads)
    errors = {name: relative_errors(student, session) for name, session in sessions.items()}
    for name, values in errors.items():
        if not max(values) < 1:
            raise CheckpointError(f"the {name} graph gives something else (error {max(values)})")
    factors = speed(student, sessions)
    for name, path in outputs.items():
        _write(path, graphs[name])
        *_, alone, batch = errors[name]
        print(
            f"{path}: {len(graphs[name]) / 1e6:.1f} MB, "
            f"{factors['torch'] / factors[name]:.2f} times torch's speed, relative error of the "
            f"last layer {alone:.1e} (noise of 3 s), {batch:.1e} (padded batch of 0.1, 1 and 3 s)"
        )
    print(
        f"next: onnxruntime.InferenceSession({str(args.output)!r}).run(None, "
        '{"waves": ..., "lengths": ...})'
    )
    return 0


def _write(path: Path, data: bytes) -> None:
    from ...files.atomic import whole_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
