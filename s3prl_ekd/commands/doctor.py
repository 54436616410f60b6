"""Say what is installed here, what had to be mended, and which recipes could run.

Versions, the audio decoder and the formats it reads, the devices, every shim for s3prl 0.4.18
(fired, or not needed here), and for PR, SID, ER and ASR whether s3prl's recipe could start in
the working folder, with what to type where it could not. The exit code is 0 when pretraining
and ASR have all their modules, else 1.

example:
  s3prl-ekd doctor
  s3prl-ekd doctor my_experiment --json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import logging
import math
import platform
from importlib import metadata
from pathlib import Path

from .. import __version__, compat
from ..downstream import requirements
from ..downstream.tasks import TASKS, Task
from ..errors import SetupError

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
PRETRAIN_FILES = ("config_runner.yaml", "config_model.yaml", "pretrain_expert.py")
# what to write with soundfile, to be read back with the decoder in use
FORMATS = {"FLAC": ("FLAC", "PCM_16"), "WAV": ("WAV", "PCM_16"), "Opus": ("OGG", "OPUS")}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``s3prl-ekd doctor``."""
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("."), help="working folder (default: here)"
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the report; 0 if pretraining and ASR have all their modules, else 1.

    Raises:
        SetupError: ``args.folder`` is not a folder.
    """
    if not args.folder.is_dir():
        raise SetupError(f"{args.folder} is not a folder")
    report = examine(args.folder)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if report["ok"] else 1


def examine(folder: Path) -> dict:
    """Everything the report says, as plain values; applies the shims."""
    shims = _shims()
    pretrain = requirements.check_modules(requirements.PRETRAIN_MODULES)
    states = {task: requirements.check_recipe(task, folder) for task in TASKS.values()}
    asr_imports = not any(state.modules for task, state in states.items() if task.name == "asr")
    return {
        "ok": not pretrain and asr_imports,
        "versions": _versions(),
        "torch_load": _torch_load(),
        "audio": _audio(),
        "devices": _devices(),
        "shims": shims,
        "pretrain": {"ready": not pretrain, "problems": [vars(p) for p in pretrain]},
        "recipes": [_recipe(task, state) for task, state in states.items()],
        "folder": _folder(folder),
    }


def _shims() -> list[dict]:
    failure = ""
    try:
        compat.apply()
    except (ImportError, SetupError) as error:  # e.g. no torch at all: report, do not stop
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
    """Package -> version and build, None if it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions["s3prl_ekd"] = __version__
    versions["s3prl"] = _s3prl()
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    try:
        import torch
    except ImportError:
        return versions
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    versions["torch"] = f"{torch.__version__} ({build})"
    return versions


def _torch_load() -> str:
    """In one sentence what the installed torch does with checkpoints of strangers."""
    try:
        import torch
    except ImportError:
        return "torch does not import"
    if not (holes := compat.torch_load_cves(torch.__version__)):
        return "reads data only (weights_only=True)"
    return (
        f"a file can {holes} in torch {torch.__version__}, even with weights_only=True; s3prl_ekd "
        "scans each checkpoint first and refuses such files, other programs here do not; type: pip "
        "install --upgrade 'torch>=2.10'"
    )


def _s3prl() -> str | None:
    spec = importlib.util.find_spec("s3prl")
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).parent
    kind = "git checkout" if (home.parent / ".git").exists() else "package"
    return f"{(home / 'version.txt').read_text().strip()} ({kind}, {home})"


def _audio() -> dict:
    try:
        return {
            "decoder": compat.audio_decoder(),
            "formats": {name: _round_trip(*how) for name, how in FORMATS.items()},
        }
    except ImportError as error:
        return {"decoder": None, "formats": {}, "problem": str(error)}


def _round_trip(container: str, subtype: str) -> bool:
    """Whether half a second of a 200 Hz tone comes back through ``torchaudio.load``."""
    import numpy as np
    import soundfile
    import torchaudio

    tone = 0.5 * np.sin(2 * math.pi * 200 * np.arange(8000) / 16000)
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, tone, 16000, format=container, subtype=subtype)
        buffer.seek(0)
        wav, rate = torchaudio.load(buffer)
    except Exception as error:  # every way to fail is the same answer
        logger.debug("%s: %s", container, error)
        return False
    # lossy codecs may pad; what they return must still be the tone
    heard = wav[0, :8000].double().numpy()
    same_length = rate == 16000 and len(heard) == 8000
    return bool(same_length and np.corrcoef(heard, tone)[0, 1] > 0.95)


def _devices() -> dict[str, str]:
    """Device -> what it is, in words."""
    try:
        import torch
    except ImportError:
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


def _recipe(task: Task, state: requirements.RecipeStatus) -> dict:
    return {
        "task": task.name.upper(),
        "downstream": task.downstream,
        "ready": state.ready,
        "modules": not state.modules,
        "problems": [dataclasses.asdict(p) for p in (*state.modules, *state.files)],
        "note": state.note,
    }


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
    """The report as aligned columns under headings."""
    audio, folder = report["audio"], report["folder"]
    formats = {name: "yes" if reads else "no" for name, reads in audio["formats"].items()}
    decoder = audio["decoder"] or f"none: {audio['problem']}"
    tasks = [("pretraining", *_verdict(report["pretrain"]))]
    for recipe in report["recipes"]:
        tasks.append((f"{recipe['task']} (-d {recipe['downstream']})", *_verdict(recipe)))
    setup = "set up" if folder["pretrain_ekd"] else f"not set up; type: {folder['remedy']}"
    scripts = "of this s3prl checkout" if folder["own_scripts"] else "of the installed s3prl"
    sections = {
        "versions": [(k, v or "MISSING") for k, v in report["versions"].items()],
        "checkpoints": [("torch.load", report["torch_load"])],
        "audio": [("decoder", decoder), *formats.items()],
        "devices": list(report["devices"].items()) or [("none", "torch does not import")],
        "shims for s3prl 0.4.18": [
            (shim["name"], shim["state"], shim["since"], "\n".join(shim["needed_by"]))
            for shim in report["shims"]
        ],
        "could it run here?": tasks,
        "working folder": [("path", folder["path"]), ("pretrain/ekd", setup), ("scripts", scripts)],
    }
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in sections.items())


def _verdict(entry: dict) -> tuple[str, str]:
    """yes or no, and the reasons with what to type."""
    reasons = [
        problem["reason"] + (f"; type: {problem['remedy']}" if problem["remedy"] else "")
        for problem in entry["problems"]
    ]
    if entry.get("note"):
        reasons.append(entry["note"])
    return "yes" if entry["ready"] else "no", "\n".join(reasons)


def _table(rows: list[tuple[str, ...]]) -> str:
    """Left-aligned columns; further lines of a last cell go below its first."""
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    lines = []
    for *cells, last in rows:
        start = "  " + "".join(
            f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True)
        )
        first, *more = last.split("\n")
        lines += [(start + first).rstrip(), *(" " * len(start) + line for line in more)]
    return "\n".join(lines)
