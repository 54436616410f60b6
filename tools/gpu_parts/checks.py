"""Parts of a GPU check that are not benchmarks. ``toy``: few steps of small models on a CPU.

Each gets an empty folder and a function that saves its result; it raises an error if it fails.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from s3prl_ekd.demo.corpus import make_corpus
from s3prl_ekd.errors import EkdError
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.system.precision import automatic_precision
from s3prl_ekd.workspace import write_workspace

from ..bench.inputs import TABLE, write_corpus

Save = Callable[[dict[str, Any]], None]
REPO = Path(__file__).parents[2]


def environment(folder: Path, device: str, toy: bool, save: Save) -> None:
    """Versions, card and driver, and what ``precision: auto`` is here."""
    packages = ("torch", "torchaudio", "s3prl", "transformers", "numpy")
    result: dict[str, Any] = {"python": platform.python_version(), "device": "CPU", "auto": None}
    for name in packages:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = None
    if device != "cpu":
        card = torch.cuda.get_device_properties(device)
        result |= {"device": card.name, "memory": card.total_memory, "cuda": torch.version.cuda}
        result["capability"] = f"{card.major}.{card.minor}"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        result["driver"] = done.stdout.strip().partition("\n")[0]
    result["auto"] = automatic_precision(device)[0]
    save(result)


def cuda_tests(folder: Path, device: str, toy: bool, save: Save) -> None:
    """Run the tests that are marked ``cuda``; without a GPU they are skipped."""
    files = [p for p in sorted((REPO / "tests").glob("test_*.py")) if "mark.cuda" in p.read_text()]
    report = folder / "report.xml"
    argv = ["-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={report}", *map(str, files)]
    code = subprocess.run([sys.executable, "-m", "pytest", *argv], cwd=REPO).returncode
    result: dict[str, Any] = {"passed": 0, "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            result["failed"].append(case.get("name"))
        elif "skipped" in outcomes:
            result["skipped"].append(case.get("name"))
        else:
            result["passed"] += 1
    save(result)
    if code:
        raise RuntimeError(f"pytest ended with code {code}")


def run_pretrain(
    folder: Path, name: str, *start: str, model: str, options: dict, device: str
) -> None:
    """Run the tiny experiment in a working folder, by ``python -m START``."""
    argv = ["-m", *start, "run_pretrain.py", "-u", "ekd", "-n", name, "-g", model]
    argv += ["--device", device]
    argv += ["-c", "pretrain/ekd/tiny_runner.yaml"]
    argv += ["-o", ",,".join(f"config.{key}={value!r}" for key, value in options.items())]
    subprocess.run([sys.executable, *argv], cwd=folder, check=True)


def workspace(folder: Path, toy: bool) -> dict[str, Any]:
    """Make a working folder with a small corpus: the demo's synthetic speech, or else noise.

    Returns:
        Options of ``-o`` that select the corpus.
    """
    write_workspace(folder)
    corpus, tables, name = folder / "corpus", "len_for_bucket", "train-clean"
    speech = not toy
    if speech:
        try:
            make_corpus(corpus, utterances={name: 64, "dev-clean": 2, "test-clean": 2})
        except EkdError:  # espeak-ng is missing
            speech = False
    if not speech:
        corpus.mkdir(exist_ok=True)
        write_corpus(corpus, 8 if toy else 64, 1.0 if toy else 4.0)
        tables, name = "tables", TABLE
    root = corpus if name != TABLE else corpus / "audio"
    data = {"libri_root": str(root), "file_path": str(corpus / tables), "sets": [name]}
    return {f"pretrain_expert.datarc.{key}": value for key, value in data.items()}


def training(folder: Path, device: str, toy: bool, save: Save) -> None:
    """Train the tiny experiment in float32 and in bfloat16 (toy: twice in float32)."""
    options = workspace(folder, toy)
    steps, interval = (4, 1) if toy else (300, 10)
    options |= {"runner.total_steps": steps, "runner.log_step": interval}
    options["runner.save_step"] = steps - 1
    losses: dict[str, list[float]] = {}
    for name in ("float32", "bfloat16"):
        precision = "float32" if toy else name
        model = folder / "pretrain/ekd" / f"{name}.yaml"
        keys = {"extends": "tiny_model.yaml", "teacher_precision": precision}
        model.write_text(yaml.safe_dump(keys))
        keys = {"runner.precision": precision}
        start = ("s3prl_ekd",)
        own = {**options, **keys}
        run_pretrain(folder, name, *start, model=str(model), options=own, device=device)
        scalars = read_scalars(folder / "result/pretrain" / name)["ekd/train-loss"]
        losses[name] = [scalars[step] for step in sorted(scalars)]
        save({"steps": steps, "interval": interval, "losses": losses})
    pairs = list(zip(losses["float32"], losses["bfloat16"], strict=True))
    relative = [abs(half - full) / abs(full) for full, half in pairs]
    save(
        {
            "steps": steps,
            "interval": interval,
            "losses": losses,
            "largest_difference": max(relative),
            "mean_difference": sum(relative) / len(relative),
        }
    )


def torchrun(folder: Path, device: str, toy: bool, save: Save) -> None:
    """A few steps of ``run_pretrain.py`` under torchrun, with two processes if there are two GPUs.

    A single process exchanges nothing; a test marked ``cuda`` runs a step over NCCL with one.
    """
    processes = min(2, torch.cuda.device_count()) if device != "cpu" else 1
    options = {**workspace(folder, toy), "runner.total_steps": 4, "runner.log_step": 1}
    options["runner.save_step"] = 3
    start = ("torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    model = "pretrain/ekd/tiny_model.yaml"
    start += ("-m", "s3prl_ekd")
    run_pretrain(folder, "x", *start, model=model, options=options, device=device)
    losses = read_scalars(folder / "result/pretrain/x")["ekd/train-loss"]
    save({"processes": processes, "losses": list(losses.values())})
