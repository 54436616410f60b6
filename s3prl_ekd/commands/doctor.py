"""Check the installation, and which recipes can run.

Prints versions, the audio decoder and its formats, devices, every shim for s3prl 0.4.18 (fired or
not needed), and for each of SUPERB's ten tasks whether s3prl's recipe can start in the working
folder; if not, what to type. The exit code is 0 if pretraining and ASR have all their modules,
else 1.

--throughput instead measures for about 10 s how many audio seconds a second one worker process
reads (an excerpt of each utterance, distorted if the model config says so), and how fast cached
targets are read, and prints how many workers are needed for --rate. Without a corpus it measures
noise.

--teachers fetches each teacher of a model config instead, compares its number of parameters with
the published one, if that is known, and the hidden states of the fast path with those of s3prl's
upstream, on one utterance and a padded batch (of a Hugging Face model, with transformers' own). It
prints a table and writes what it saw to a JSON file; the exit code is 0 if every teacher passes.

example:
  s3prl-ekd doctor
  s3prl-ekd doctor my_experiment --json
  s3prl-ekd doctor --teachers pretrain/ekd/config_model.yaml --audio utterance.flac
  s3prl-ekd doctor --throughput -c pretrain/ekd/config_runner.yaml -g pretrain/ekd/config_model.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import logging
import math
import platform
import shlex
import tempfile
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__, compat
from ..downstream import requirements
from ..downstream.tasks import TASKS
from ..errors import ConfigError, SetupError
from ..files.atomic import write_text
from ..files.report_file import check_report, json_begin
from ..system import s3prl_distribution
from ..system.tables import text_table
from ..teachers.names import check_teacher_sources

logger = logging.getLogger(__name__)

PACKAGES = (
    "torch",
    "torchaudio",
    "transformers",
    "huggingface_hub",
    "numpy",
    "soundfile",
    "tensorboardX",
    "pandas",
    "editdistance",
)
RUNNER, MODEL = "pretrain/ekd/config_runner.yaml", "pretrain/ekd/config_model.yaml"
MIN_SAMPLES = 8000
MAX_SAMPLES = 250_000  # of the utterance for --teachers, 15.6 s, to limit the teachers' memory
NEEDED_RATE = 5000.0  # audio seconds a second; what one large GPU may train on
PRETRAIN_FILES = ("config_runner.yaml", "config_model.yaml", "pretrain_expert.py")
# Format -> container and subtype that soundfile writes and the decoder must read.
FORMATS = {"FLAC": ("FLAC", "PCM_16"), "WAV": ("WAV", "PCM_16"), "Opus": ("OGG", "OPUS")}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``s3prl-ekd doctor``."""
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("."), help="working folder (default: here)"
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print the report as JSON")
    add("--throughput", action="store_true", help="measure the training data instead")
    add(
        "-c", "--config", metavar="RUNNER",
        help=f"corpus for --throughput (default: {RUNNER} if its corpus exists, else noise)",
    )  # fmt: skip
    add(
        "-g", "--upstream-config", metavar="MODEL",
        help=f"distortion for --throughput (default: {MODEL} if it exists, else none)",
    )  # fmt: skip
    add(
        "--rate", metavar="N", type=float,
        help=f"audio seconds a second that training needs (default: {NEEDED_RATE:g})",
    )  # fmt: skip
    add("--teachers", metavar="MODEL", help="check the teachers of this model config instead")
    add("--audio", metavar="FILE", help="utterance for --teachers (default: 4 s of noise)")
    add(
        "-o", "--output", metavar="FILE.json", type=Path,
        help="report of --teachers (default: teachers.json)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Print the report; return 0 if pretraining and ASR have all their modules, else 1."""
    if args.throughput and args.teachers is not None:
        raise ConfigError("--throughput and --teachers are two checks; type one after the other")
    for needed, options in (
        ("throughput", ("config", "upstream_config", "rate")),
        ("teachers", ("audio", "output")),
    ):
        for option in options:
            if getattr(args, option) is not None and not getattr(args, needed):
                name = option.replace("_", "-")
                raise ConfigError(f"--{name} is for --{needed}; add --{needed}")
    if args.teachers is not None:
        return _teachers(args)
    if args.throughput:
        return _throughput(args)
    if not args.folder.is_dir():
        raise SetupError(f"{args.folder} is not a folder")
    report = examine(args.folder)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if report["ok"] else 1


def _teachers(args: argparse.Namespace) -> int:
    """Check the teachers of a config; print a table, write the report, return 0 if all pass."""
    output = args.output or Path("teachers.json")
    check_report(output, json_begin("config"))
    from ..pretrain.settings import load_model_config

    settings = load_model_config(args.teachers)
    check_teacher_sources(settings.teachers)
    compat.apply()
    from ..analysis.teacher_check import check_teachers, noise, summary
    from ..data.audio import read_audio

    wave = noise() if args.audio is None else read_audio(args.audio, speech=True)
    wave = wave[:MAX_SAMPLES]
    if len(wave) < MIN_SAMPLES:
        raise ConfigError(
            f"--audio {args.audio}: {len(wave)} samples; expected an utterance of at least "
            f"{MIN_SAMPLES} (half a second)"
        )
    reports = check_teachers(settings.teachers, wave)
    failed = [report for report in reports if report.verdict != "ok"]
    contents = {
        "config": str(args.teachers),
        "audio": args.audio or "noise",
        "samples": len(wave),
        "device": "cpu",
        "versions": _versions(),
        "teachers": [report.to_json() for report in reports],
    }
    if args.json:
        print(json.dumps(contents, indent=1))
    else:
        print("\n".join(text_table(summary(reports), numbers=False, rule=True)))
        for report in failed:
            print(f"\n{report.name}: {report.verdict}")
    write_text(output, json.dumps(contents, indent=1) + "\n")
    logger.info("wrote %s", output)
    return 1 if failed else 0


def _throughput(args: argparse.Namespace) -> int:
    """Measure the training data of the configs; print the rates and the workers needed."""
    rate = NEEDED_RATE if args.rate is None else args.rate
    if not 0 < rate < math.inf:
        raise ConfigError(f"--rate must be a number above 0, got {rate:g}")
    if args.folder != Path("."):
        raise ConfigError(
            "--throughput takes no folder, because paths in configs are relative to the current "
            f"one; type: cd {shlex.quote(str(args.folder))} && s3prl-ekd doctor --throughput"
        )
    compat.apply()
    from ..data.batches import train_loader
    from ..data.throughput import measure_throughput, usable_cores, workers_needed, write_noise
    from ..distill.conv_layers import receptive_field
    from ..hidden_states.store import TargetReader
    from ..pretrain.interrupts import explain_worker_errors
    from ..pretrain.settings import load_model_config, load_runner_config
    from ..student_file import input_layers

    model = args.upstream_config or (MODEL if Path(MODEL).is_file() else None)
    settings = None if model is None else load_model_config(model)
    data = None
    if args.config is not None or Path(RUNNER).is_file():
        expert = load_runner_config(args.config or RUNNER).pretrain_expert
        if args.config is not None or Path(expert.datarc.libri_root).is_dir():
            data = expert.datarc
    with tempfile.TemporaryDirectory() as folder, explain_worker_errors("then measure again"):
        corpus = "noise" if data is None else f"{data.libri_root}, {', '.join(data.sets)}"
        data = data or write_noise(Path(folder))
        loader = train_loader(
            dataclasses.replace(data, num_workers=1),
            data.sets,
            min_samples=400
            if settings is None
            else receptive_field(input_layers(settings.student)),
            distortion=None if settings is None else settings.distortion,
            targets=None if data.target_cache is None else TargetReader(data.target_cache),
        )
        with contextlib.closing(loader):
            rates = measure_throughput(loader)
    report = {
        "corpus": corpus,
        "distortion": "clean" if settings is None else settings.distortion.setup,
        "audio_seconds_a_second": rates,
        "rate": rate,
        "workers": workers_needed(rate, rates["worker"]),
        "cores": usable_cores(),
    }
    print(json.dumps(report, indent=2) if args.json else throughput_text(report))
    return 0


def throughput_text(report: dict) -> str:
    """Format the report of ``--throughput``."""
    rates, rate, cores = report["audio_seconds_a_second"], report["rate"], report["cores"]
    rows: list[tuple[str, ...]] = [
        ("corpus", report["corpus"]),
        ("distortion", report["distortion"]),
        ("a worker reads", f"{rates['worker']:,.0f} audio seconds a second"),
    ]
    if "targets" in rates:
        slow = "" if rates["targets"] >= rate else "; too slow: use s3prl-ekd cache --dtype int8"
        read = f"{rates['targets']:,.0f} audio seconds a second, in the process that trains{slow}"
        rows.append(("cached targets", read))
    count = report["workers"]
    workers = f"{count} worker{'s' if count > 1 else ''}"
    rows.append(
        (
            f"for {rate:,.0f}",
            f"{workers}, each with a core: pretrain_expert.datarc.num_workers: {count}",
        )
    )
    # the process that trains needs a core, too
    free = max(1, cores - 1)
    least = min(free * rates["worker"], rates.get("targets", math.inf))
    verdict = "enough" if cores > count else f"too few: at most {least:,.0f} audio seconds a second"
    rows.append(("cores", f"{cores}, one of them for the process that trains: {verdict}"))
    return "throughput of the training data\n" + _section(rows)


def examine(folder: Path) -> dict:
    """Apply the shims; return the report as values that JSON can store."""
    shims = _shims()
    pretrain = requirements.check_modules(requirements.PRETRAIN_MODULES)
    recipes = []
    for task in TASKS.values():
        status = requirements.check_recipe(task, folder)
        recipes.append(
            {
                "task": task.name.upper(),
                "downstream": task.downstream,
                "ready": status.ready,
                "modules": not status.modules,
                "problems": [vars(p) for p in (*status.modules, *status.files)],
                "note": status.note,
            }
        )
    return {
        "ok": not pretrain and all(r["modules"] for r in recipes if r["task"] == "ASR"),
        "versions": _versions(),
        "s3prl_problem": s3prl_distribution.installation().problem,
        "torch_load": _torch_load(),
        "audio": _audio(),
        "devices": _devices(),
        "shims": shims,
        "pretrain": {"ready": not pretrain, "problems": [vars(p) for p in pretrain]},
        "recipes": recipes,
        "folder": _folder(folder),
    }


def _shims() -> list[dict]:
    failure = ""
    try:
        compat.apply_shims()
    except (ImportError, SetupError) as error:  # e.g. torch is not installed: report it
        failure = f"failed: {error}"
    return [
        {
            "name": shim.name,
            "state": "fired" if shim.name in compat.fired() else failure or "not needed",
            "since": shim.since,
            "needed_by": shim.needed_by,
            "summary": shim.summary,
        }
        for shim in compat.SHIMS
    ]


def _versions() -> dict[str, str | None]:
    """Map package -> version and build, or None if it is not installed."""
    s3prl = s3prl_distribution.installation()
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "s3prl_ekd": __version__,
        "s3prl": str(s3prl) if s3prl.folder else None,
    }
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    if torch := _torch():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
        versions["torch"] = f"{torch.__version__} ({build})"
    return versions


def _torch() -> Any:
    """The module, or None if it cannot be imported."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def _torch_load() -> str:
    """Describe in a sentence how safely the installed torch loads untrusted checkpoints."""
    if not (torch := _torch()):
        return "cannot import torch"
    if not (attacks := compat.torch_load_cves(torch.__version__)):
        return "reads data only (weights_only=True)"
    return (
        f"a file can {attacks} in torch {torch.__version__}, even with weights_only=True; "
        "s3prl_ekd scans each checkpoint and rejects such files, other programs do not; type: pip "
        "install --upgrade 'torch>=2.10'"
    )


def _audio() -> dict:
    try:
        return {
            "torchaudio_repair": compat.torchaudio_repair(),
            "decoder": compat.audio_decoder(),
            "formats": {name: _round_trip(*spec) for name, spec in FORMATS.items()},
        }
    except ImportError as error:
        return {"torchaudio_repair": "", "decoder": None, "formats": {}, "problem": str(error)}


def _round_trip(container: str, subtype: str) -> bool:
    """Return whether ``torchaudio.load`` decodes a 200 Hz tone of 0.5 s correctly."""
    import numpy as np
    import soundfile
    import torchaudio

    tone = 0.5 * np.sin(2 * math.pi * 200 * np.arange(8000) / 16000)
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, tone, 16000, format=container, subtype=subtype)
        buffer.seek(0)
        wav, rate = torchaudio.load(buffer)
    except Exception as error:  # any error means that the format cannot be read
        logger.debug("%s: %s", container, error)
        return False
    # Lossy codecs may pad, and change the samples a little.
    decoded = wav[0, :8000].double().numpy()
    same_length = rate == 16000 and len(decoded) == 8000
    return bool(same_length and np.corrcoef(decoded, tone)[0, 1] > 0.95)


def _devices() -> dict[str, str]:
    """Map device -> description."""
    if not (torch := _torch()):
        return {}
    devices = {"cpu": f"{torch.get_num_threads()} threads", "cuda": "none", "mps": "none"}
    if torch.cuda.is_available():
        del devices["cuda"]
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = f"{card.name}, {card.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return devices


def _folder(folder: Path) -> dict:
    missing = [name for name in PRETRAIN_FILES if not (folder / "pretrain/ekd" / name).is_file()]
    return {
        "path": str(folder.resolve()),
        "pretrain_ekd": not missing,
        "missing": [f"pretrain/ekd/{name}" for name in missing],
        "remedy": requirements.init_command(folder) if missing else "",
        "own_scripts": (folder / "run_pretrain.py").is_file() and (folder / "hub.py").is_file(),
    }


def as_text(report: dict) -> str:
    """Format the report as aligned columns under headings."""
    audio, folder = report["audio"], report["folder"]
    versions = [(name, version or "MISSING") for name, version in report["versions"].items()]
    if report["s3prl_problem"]:
        index = [name for name, _ in versions].index("s3prl")
        versions.insert(index + 1, ("", report["s3prl_problem"]))
    formats = {name: "yes" if readable else "no" for name, readable in audio["formats"].items()}
    decoder = audio["decoder"] or f"none: {audio['problem']}"
    torchaudio = "imported by this package only; other programs, such as transformers, cannot"
    others = (
        [("torchaudio", f"{torchaudio}:\n{repair}")]
        if (repair := audio["torchaudio_repair"])
        else []
    )
    tasks = [("pretraining", *_readiness(report["pretrain"]))]
    for recipe in report["recipes"]:
        tasks.append((f"{recipe['task']} (-d {recipe['downstream']})", *_readiness(recipe)))
    setup = "set up" if folder["pretrain_ekd"] else f"not set up; type: {folder['remedy']}"
    scripts = "of this s3prl checkout" if folder["own_scripts"] else "of the installed s3prl"
    sections = {
        "versions": versions,
        "checkpoints": [("torch.load", report["torch_load"])],
        "audio": [("decoder", decoder), *formats.items(), *others],
        "devices": list(report["devices"].items()) or [("none", "cannot import torch")],
        "shims for s3prl 0.4.18": [
            (shim["name"], shim["state"], shim["since"], "\n".join(shim["needed_by"]))
            for shim in report["shims"]
        ],
        "ready to run": tasks,
        "working folder": [("path", folder["path"]), ("pretrain/ekd", setup), ("scripts", scripts)],
    }
    return "\n\n".join(f"{title}\n{_section(rows)}" for title, rows in sections.items())


def _readiness(entry: dict) -> tuple[str, str]:
    """Return "yes" or "no", and the reasons with the command that helps."""
    reasons = [
        problem["reason"] + (f"; type: {problem['remedy']}" if problem["remedy"] else "")
        for problem in entry["problems"]
    ]
    if entry.get("note"):
        reasons.append(entry["note"])
    return "yes" if entry["ready"] else "no", "\n".join(reasons)


def _section(rows: list[tuple[str, ...]]) -> str:
    """An indented table; the last cell of a row may have several lines."""
    lines = []
    for *cells, last in rows:
        first, *more = last.split("\n")
        lines += [(*cells, first), *((*[""] * len(cells), line) for line in more)]
    return textwrap.indent("\n".join(text_table(lines, numbers=False)), "  ")
