"""Compare the speed of a student in torch, transformers and onnxruntime on one core.

Row ``torch`` is the upstream ``ekd_student``; ``modules`` runs its conv extractor as s3prl's
modules, as the hidden-set package does; ``bfloat16`` is torch under autocast, on CPUs with AMX.

Exports a random full-size two-layer student (or CKPT) to each format and compares the outputs with
torch's. The formats then process the same noise waveforms in turns, so that other load on the
machine affects all of them. Prints the median real-time factor (time over audio duration) with its
quartiles, and the ratio of torch's CPU time to the format's, the median over turns. Needs the extra
onnx.

example:
  python -m tools.bench.exports --repeats 20
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # has to be set before torch is imported

import argparse  # noqa: E402
import platform  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

from s3prl_ekd import compat  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help="default: random weights")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[2.0, 5.0, 15.0], help="durations (2 5 15)"
    )
    parser.add_argument("--repeats", type=int, default=15, help="number of measured turns (15)")
    args = parser.parse_args()
    compat.apply()

    import torch

    from s3prl_ekd.distill.student import Student
    from s3prl_ekd.distill.student_forward import student_forward
    from s3prl_ekd.distill.student_settings import StudentSettings
    from s3prl_ekd.export.huggingface import (
        check_hf_export,
        quiet_transformers,
        save_hf_model,
        to_hf_model,
    )
    from s3prl_ekd.export.onnx import OnnxSession, check, onnx_bytes, quantised, relative_errors
    from s3prl_ekd.student_file import load_student

    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = load_student(args.checkpoint).student if args.checkpoint else None
    student = (student or Student(StudentSettings())).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_hf_model(to_hf_model(student), Path(folder))
        error = check_hf_export(Path(folder), student)
        from transformers import AutoModel

        with quiet_transformers():
            hubert = AutoModel.from_pretrained(folder).eval()
    graphs = {"onnx fp32": onnx_bytes(student)}
    graphs["onnx int8"] = quantised(graphs["onnx fp32"])
    sessions = {name: OnnxSession(graph, 1) for name, graph in graphs.items()}
    count = sum(p.numel() for p in student.parameters())
    print(f"{count:,} parameters; {machine()}")
    print(f"largest difference to torch: HF {error:.1e}, ", end="")
    print(f"ONNX fp32 {check(student, sessions['onnx fp32']):.1e}; relative error of int8's last ")
    errors = relative_errors(student, sessions["onnx int8"])
    print(f"layer: {errors[-2]:.1e} (3 s), {errors[-1]:.1e} (padded batch of 0.1, 1 and 3 s)")
    sizes = {name: count * 4 for name in ("torch", "modules", "HF", "bfloat16")}
    sizes |= {name: len(graph) for name, graph in graphs.items()}

    @torch.autocast("cpu", torch.bfloat16)
    def in_bfloat16(waves, lengths):
        return student(waves, lengths)

    for seconds in args.seconds:
        waves = 0.1 * torch.randn(1, int(seconds * 16_000))
        lengths = torch.tensor([waves.shape[1]])
        runs = {
            "torch": lambda w=waves, n=lengths: student(w, n),
            "modules": lambda w=waves, n=lengths: student_forward(student.backbone, w, n),
            "HF": lambda w=waves: hubert(w, output_hidden_states=True),
        }
        for name, session in sessions.items():
            runs[name] = lambda s=session, w=waves, n=lengths: s(w, n)
        if torch.cpu._is_amx_tile_supported():
            runs["bfloat16"] = lambda w=waves, n=lengths: in_bfloat16(w, n)
        with torch.inference_mode():
            wall, cpu = measure(runs, seconds, args.repeats)
        print(f"\n{seconds:g} s of audio, {args.repeats} turns:\n")
        print("| | MB | RTF (quartiles) | CPU RTF | torch's time / its time (quartiles) |")
        print("|---|---|---|---|---|")
        for name in runs:
            low, median, high = np.percentile(wall[name], [25, 50, 75])
            ratio = np.percentile(np.divide(cpu["torch"], cpu[name]), [25, 50, 75])
            print(
                f"| {name} | {sizes[name] / 1e6:.1f} | {median:.4f} ({low:.4f} to {high:.4f}) | "
                f"{np.median(cpu[name]):.4f} | {ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f}) |"
            )


def measure(runs, seconds: float, repeats: int):
    """Measure wall-clock and CPU time over audio duration.

    Args:
        runs: name -> function that processes the audio.
        seconds: duration of the audio.
        repeats: number of measured turns.

    Returns:
        Two dicts, name -> ``repeats`` values.
    """
    wall = {name: [] for name in runs}
    cpu = {name: [] for name in runs}
    names = list(runs)
    for turn in range(repeats + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter(), time.process_time()
            runs[name]()
            if turn >= 2:  # after two warm-up turns
                wall[name].append((time.perf_counter() - start[0]) / seconds)
                cpu[name].append((time.process_time() - start[1]) / seconds)
    return wall, cpu


def machine() -> str:
    """Describe the processor, its load, and package versions."""
    import onnxruntime
    import torch
    import transformers

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{name}, {os.cpu_count()} CPUs{load}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, onnxruntime {onnxruntime.__version__}; one thread"
    )


if __name__ == "__main__":
    main()
