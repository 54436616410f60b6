"""Compare size and speed of the stores of hidden states between two checkouts.

Both write the same random hidden states of 13 layers of width 768: a target cache in float16 and
int8, and a downstream feature cache in float16. Prints CPU milliseconds and bytes: the median over
turns for each checkout, the median of the turns' ratios, and its quartiles. The checkouts take
turns, in processes of their own with one thread, so that other load affects both. Whether a target
cache has the same bytes is printed, too.

example:
  python tools/store_speed.py /data/before /data/after --turns 10
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LAYERS, WIDTH, UTTERANCES, BATCH = 13, 768, 24, 16
FRAMES = (50, 750)  # shortest and longest utterance: 1 to 15 s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="CHECKOUT", type=Path)
    parser.add_argument("after", metavar="CHECKOUT", type=Path)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--folder", default="/dev/shm", help="of the caches (default: in memory)")
    args = parser.parse_args()
    results: tuple[list[dict], list[dict]] = ([], [])
    for _ in range(args.turns):
        for checkout, values in zip((args.before, args.after), results, strict=True):
            values.append(_in_checkout(checkout, args.folder))
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


def _in_checkout(checkout: Path, folder: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.resolve())}
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['measure'](sys.argv[2])"
    argv = [sys.executable, "-c", code, os.path.abspath(__file__), folder]
    options = {"env": environment, "cwd": folder, "capture_output": True, "check": True}
    output = subprocess.run(argv, **options)
    return json.loads(output.stdout)


def measure(folder: str) -> None:
    """Print ``{name: milliseconds, bytes or digest}`` of the package that is imported."""
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
    print(json.dumps(results))


def _timed(function: Callable) -> tuple[float, object]:
    start = time.process_time()
    result = function()
    return 1000 * (time.process_time() - start), result


def _targets(folder: Path, dtype: str, utterances: list, results: dict) -> None:
    from s3prl_ekd.hidden_states import store

    folder.mkdir()
    layout = (store.TargetBlock("hubert", LAYERS, WIDTH),)
    targets = [[layer] for layer in range(LAYERS)]
    teacher = {"class": "", "weights": "", "answer": [1.0] * LAYERS, "targets": targets}
    key = {"teachers": {"hubert": teacher}, "teacher_precision": "float32", "tables": {}}
    key |= {"contents": store.PER_TEACHER, "sequence_length": 0, "max_timestep": 0}
    names = tuple(map(str, range(len(utterances))))
    index = store.Index(dtype, layout, 0, key, names)
    packed = [store.pack_targets({"hubert": states[None]}, layout) for states in utterances]

    def build() -> None:
        store.write_index(folder, index)
        writer = store.CacheWriter(folder, index)
        for states in packed:
            writer.add(*store.encode_targets(states, layout, dtype, "x"), 320 * len(states))
        writer.finish()
        writer.close()

    results[f"targets {dtype}: build, ms"], _ = _timed(build)
    reader = store.TargetReader(folder)
    batches = [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
    for kind in ("first", "second"):  # the first read of an utterance checks its CRC
        seconds, _ = _timed(lambda: [reader.batch(batch) for batch in batches])
        results[f"targets {dtype}: {kind} read, ms"] = seconds
    results[f"targets {dtype}: bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    contents = b"".join((folder / name).read_bytes() for name in (store.TARGETS, store.RECORDS))
    results[f"targets {dtype}"] = hashlib.sha256(contents).hexdigest()


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
