"""Compare the speed of training data and of the stores of hidden states between two checkouts.

- Stores: both write the same random hidden states of 13 layers of width 768: a target cache in
  float16 and int8, and a downstream feature cache in float16.
- Distortions: audio seconds per CPU second of the kinds and of `setup1`, on noise.
- Loader: audio seconds per CPU second of both processes, and of the worker, which reads FLAC
  files of noise: alone, distorted (`setup1`), and with cached targets of three teachers with three
  layers of width 768 in float16, which the process that trains converts to tensors.

Prints the median over turns for each checkout, the median of the turns' ratios, and its quartiles.
The checkouts take turns, in processes of their own with one thread, so that other load affects
both. Whether a target cache has the same bytes is printed, too.

example:
  python tools/data_speed.py /data/before /data/after --turns 10
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS, WIDTH, UTTERANCES, BATCH = 13, 768, 24, 16
FRAMES = (50, 750)  # shortest and longest utterance: 1 to 15 s
SECONDS = (15.0, 12.0, 9.0)  # of the noise that is distorted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="CHECKOUT", type=Path)
    parser.add_argument("after", metavar="CHECKOUT", type=Path)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--passes", type=int, default=4, help="of the loader and the distortions")
    parser.add_argument("--folder", default="/dev/shm", help="of the caches (default: in memory)")
    args = parser.parse_args()
    results: tuple[list[dict], list[dict]] = ([], [])
    for _ in range(args.turns):
        for checkout, values in zip((args.before, args.after), results, strict=True):
            values.append(_in_checkout(checkout, args.folder, args.passes))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.turns} turns, seed 0\n")
    print(f"{'':32} {'before':>12} {'after':>12}  ratio [quartiles]")
    for name in results[0][0]:
        before, after = ([turn[name] for turn in values] for values in results)
        if isinstance(before[0], str):
            print(f"{name:32} {'same bytes' if before == after else 'other bytes':>25}")
            continue
        ratios = [new / old for old, new in zip(before, after, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        medians = f"{statistics.median(before):12.1f} {statistics.median(after):12.1f}"
        print(f"{name:32} {medians}  {middle:.3f} [{low:.3f}, {high:.3f}]")


def _in_checkout(checkout: Path, folder: str, passes: int) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.resolve())}
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['measure'](*sys.argv[2:])"
    argv = [sys.executable, "-c", code, os.path.abspath(__file__), folder, str(passes)]
    options = {"env": environment, "cwd": folder, "capture_output": True, "check": True}
    output = subprocess.run(argv, **options)
    return json.loads(output.stdout)


def measure(folder: str, passes: str) -> None:
    """Print ``{name: milliseconds, bytes, rate or digest}`` of the package that is imported."""
    import torch

    random.seed(0)
    torch.manual_seed(0)
    frames = [random.randint(*FRAMES) for _ in range(UTTERANCES)]
    states = torch.randn(LAYERS, FRAMES[1], WIDTH)
    results: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for dtype in ("float16", "int8"):
            _targets(Path(root, dtype), dtype, [states[:, :count] for count in frames], results)
        _features(Path(root, "features"), [states[:, :n].half() for n in frames[:5]], results)
        _distortions(int(passes), results)
        _loader(Path(root), frames, int(passes), results)
    print(json.dumps(results))


def _timed(function: Callable) -> tuple[float, object]:
    start = time.process_time()
    result = function()
    return 1000 * (time.process_time() - start), result


def _targets(folder: Path, dtype: str, utterances: list, results: dict) -> None:
    from s3prl_ekd.hidden_states import store

    names = tuple(map(str, range(len(utterances))))
    layout = (store.TargetBlock("hubert", LAYERS, WIDTH),)
    packed = [store.pack_targets({"hubert": states[None]}, layout) for states in utterances]
    results[f"targets {dtype}: build, ms"], _ = _timed(
        lambda: _build(folder, dtype, layout, dict(zip(names, packed, strict=True)))
    )
    reader = store.TargetReader(folder)
    batches = [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
    for kind in ("first", "second"):  # the first read of an utterance checks its CRC
        seconds, _ = _timed(lambda: [reader.batch(batch).values for batch in batches])
        results[f"targets {dtype}: {kind} read, ms"] = seconds
    results[f"targets {dtype}: bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    contents = (folder / store.TARGETS).read_bytes()
    results[f"targets {dtype}"] = hashlib.sha256(contents).hexdigest()


def _build(folder: Path, dtype: str, layout: tuple, utterances: dict) -> None:
    """Write a target cache of ``{name: [frame, column]}`` with 320 samples for each frame."""
    import torch

    from s3prl_ekd.hidden_states import store

    folder.mkdir()
    teachers = {
        name: {"class": "", "weights": "", "answer": [1.0] * count, "targets": [[0]] * count}
        for name, count, _ in layout
    }
    key = {"teachers": teachers, "teacher_precision": "float32", "tables": {}}
    key |= {"contents": store.PER_TEACHER, "sequence_length": 0, "max_timestep": 0}
    index = store.Index(dtype, layout, 0, key, tuple(utterances))
    store.write_index(folder, index)
    writer = store.CacheWriter(folder, index)
    for states in utterances.values():
        samples: Any = 320 * len(states)
        wave = torch.zeros(samples) if store.VERSION > 1 else samples
        writer.add(*store.encode_targets(states, layout, dtype, "x"), wave)
    writer.finish()
    writer.close()


def _distortions(passes: int, results: dict) -> None:
    import torch

    from s3prl_ekd.data.distortion import convolutive
    from s3prl_ekd.data.distortion.pipeline import Distorter
    from s3prl_ekd.data.distortion.settings import DistortionSettings

    rng = random.Random(0)
    room = convolutive.simulate_impulse(0.5, 5.0, 0)
    distorter = Distorter(DistortionSettings(setup="setup1"))
    without = Distorter(DistortionSettings(setup="setup1", pitch_cents=0))
    kinds = {
        "pitch": lambda wave, _: convolutive.shift_pitch(wave, rng.uniform(-500, 500)),
        "reverb": lambda wave, _: convolutive.reverberate(wave, room, direct=0),
        "band reject": lambda wave, _: convolutive.reject_band(wave, rng.uniform(200, 6000), 500),
        "setup1": lambda wave, name: distorter(wave, name, 0, "student"),
        "setup1 without pitch": lambda wave, name: without(wave, name, 0, "student"),
    }
    waves = [0.1 * torch.randn(round(16000 * seconds)) for seconds in SECONDS]
    for kind, distort in kinds.items():
        count = 4 * passes if "setup1" in kind else passes
        cost, _ = _timed(lambda: [distort(w, str(i)) for i in range(count) for w in waves])  # noqa: B023
        results[f"{kind}: audio s a CPU s"] = 1000 * count * sum(SECONDS) / cost


def _loader(folder: Path, frames: list[int], passes: int, results: dict) -> None:
    import numpy as np
    import soundfile
    import torch

    from s3prl_ekd.data.batches import train_loader
    from s3prl_ekd.data.distortion.settings import DistortionSettings
    from s3prl_ekd.data.lengths import write_table
    from s3prl_ekd.data.settings import DataSettings
    from s3prl_ekd.data.tables import Utterance
    from s3prl_ekd.hidden_states.store import TargetBlock, TargetReader

    rng = np.random.default_rng(0)
    samples = {f"{i}.flac": 320 * count for i, count in enumerate(frames)}
    for name, count in samples.items():
        noise = np.convolve(rng.standard_normal(count), np.hanning(8), "same")
        soundfile.write(folder / name, 0.05 * noise, 16000)  # about as compressible as speech
    write_table(folder / "noise.csv", (Utterance(*item) for item in samples.items()))
    layout = tuple(TargetBlock(name, 3, WIDTH) for name in ("hubert", "robust", "wavlm"))
    states = torch.randn(FRAMES[1], 9 * WIDTH)
    _build(
        folder / "cache",
        "float16",
        layout,
        {name: states[: samples[name] // 320] for name in samples},
    )
    data = DataSettings(str(folder), str(folder), ("noise",), BATCH, num_workers=1)
    cases = {
        "loader, clean": {},
        "loader, setup1": {"distortion": DistortionSettings(setup="setup1")},
        "loader, cached": {"targets": TargetReader(folder / "cache")},
    }
    for case, options in cases.items():
        loader = train_loader(data, ["noise"], min_samples=400, **options)
        before = _cpu_seconds()
        for _ in range(4 * passes):
            for batch in loader:
                assert not batch.problem
                if batch.targets is not None:
                    _ = batch.targets.values
        own, _ = _cpu_seconds()
        loader.close()
        total, audio = own + _cpu_seconds()[1] - sum(before), sum(samples.values()) / 16000
        rate = 4 * passes * audio
        results[f"{case}: audio s a CPU s"] = rate / total
        results[f"{case}, worker only"] = rate / (total - own + before[0])


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds of this process, and of its child processes that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, children = (usage.ru_utime + usage.ru_stime for usage in usages)
    return own, children


def _features(folder: Path, utterances: list, results: dict) -> None:
    from s3prl_ekd.hidden_states.feature_store import FeatureStore, folder_size

    store = FeatureStore(folder, "upstream", 50)
    keys = [f"{i:032x}" for i in range(len(utterances))]

    def write() -> None:
        for key, states in zip(keys, utterances, strict=True):
            store.write(key, states)

    results["features: write, ms"], _ = _timed(write)
    results["features: read, ms"], read = _timed(lambda: [store.read(key) for key in keys])
    assert all(a.equal(b) for a, b in zip(read, utterances, strict=True))  # type: ignore[call-overload]
    results["features: bytes"] = folder_size(folder)


if __name__ == "__main__":
    main()
