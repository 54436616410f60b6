"""Check the installation, and which recipes can run.

Prints versions, the audio decoder and its formats, devices, every shim for s3prl 0.4.18 (fired or
not needed), and for PR, SID, ER and ASR whether s3prl's recipe can start in the working folder; if
not, what to type. The exit code is 0 if pretraining and ASR have all their modules, else 1.

example:
  s3prl-ekd doctor
  s3prl-ekd doctor my_experiment --json
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import logging
import math
import platform
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__, compat
from ..downstream import requirements
from ..downstream.tasks import TASKS
from ..errors import SetupError
from ..system.tables import text_table

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
# Format -> container and subtype that soundfile writes and the decoder must read.
FORMATS = {"FLAC": ("FLAC", "PCM_16"), "WAV": ("WAV", "PCM_16"), "Opus": ("OGG", "OPUS")}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``s3prl-ekd doctor``."""
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("."), help="working folder (default: here)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the report; return 0 if pretraining and ASR have all their modules, else 1."""
    if not args.folder.is_dir():
        raise SetupError(f"{args.folder} is not a folder")
    report = examine(args.folder)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if report["ok"] else 1


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
        compat.apply()
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
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "s3prl_ekd": __version__,
        "s3prl": _s3prl(),
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
            "formats": {name: _round_trip(*spec) for name, spec in FORMATS.items()},
        }
    except ImportError as error:
        return {"decoder": None, "formats": {}, "problem": str(error)}


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
    formats = {name: "yes" if readable else "no" for name, readable in audio["formats"].items()}
    decoder = audio["decoder"] or f"none: {audio['problem']}"
    tasks = [("pretraining", *_readiness(report["pretrain"]))]
    for recipe in report["recipes"]:
        tasks.append((f"{recipe['task']} (-d {recipe['downstream']})", *_readiness(recipe)))
    setup = "set up" if folder["pretrain_ekd"] else f"not set up; type: {folder['remedy']}"
    scripts = "of this s3prl checkout" if folder["own_scripts"] else "of the installed s3prl"
    sections = {
        "versions": [(k, v or "MISSING") for k, v in report["versions"].items()],
        "checkpoints": [("torch.load", report["torch_load"])],
        "audio": [("decoder", decoder), *formats.items()],
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
