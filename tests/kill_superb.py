"""Kill ``s3prl-ekd superb`` at random moments, and rename its output folders.

Each time: send SIGKILL to the command (not to its child processes), repeat the command at once and
let it finish, and compare weights and predictions with those of an uninterrupted run. Then rename
the upstream's folder, make another run under the old name, and test the renamed run under noise:
nothing may change in the other folder.

example:
  python -m tests.kill_superb --times 10
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile
import torch

from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint

from .conftest import make_sound
from .superb_workspace import make_workspace
from .test_run_folders import contents

RUN = "sid/lr0.003-seed1337"
STEPS = 240


def superb(folder: Path, out: str, name: str, *options: str) -> subprocess.Popen:
    override = "sid=config.downstream_expert.datarc.train_batch_size=4"
    override += ",,config.downstream_expert.datarc.max_timestep=4000"
    argv = ["superb", f"{name}=fbank_no_cmvn", "--tasks", "sid", "--recipes", "tiny", "-o", out]
    argv += ["--steps", f"sid={STEPS}", "--override", override, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "s3prl_ekd", *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(folder: Path, out: str, name: str, *options: str) -> None:
    """Run the command to its end."""
    assert superb(folder, out, name, *options).wait() == 0, (folder / out / name).as_posix()


def kill_and_repeat(folder: Path, out: str, rng: random.Random) -> tuple[int, float]:
    """Return the last step saved before the kill, and the seconds of the repeated command."""
    run = folder / out / "x" / RUN
    process = superb(folder, out, "x")
    start = time.monotonic()
    kill_step = rng.randrange(-1, STEPS)  # -1: before the first checkpoint
    wait = rng.uniform(0, 0.3)
    while process.poll() is None:
        steps = [int(path.stem.removeprefix("states-")) for path in run.glob("states-*.ckpt")]
        if max(steps, default=-1) >= kill_step and (steps or run.is_dir()):
            time.sleep(wait)
            break
        if time.monotonic() - start > 120:
            raise AssertionError("the run did not start")
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    path = newest_checkpoint(run)
    saved = read_checkpoint(path)["Step"] if path else 0
    start = time.monotonic()
    finish(folder, out, "x")
    return saved, time.monotonic() - start


def compare(folder: Path, one: str, other: str) -> list[str]:
    """Names of the weights and prediction files that differ between two output folders."""
    runs = [folder / out / "x" / RUN for out in (one, other)]
    differing = []
    first, second = (read_checkpoint(newest_checkpoint(run)) for run in runs)
    for part in ("Featurizer", "Downstream"):
        for key, value in first[part].items():
            if isinstance(value, torch.Tensor) and not torch.equal(value, second[part][key]):
                differing.append(f"{part}.{key}")
    for name in TASKS["sid"].files(None):
        if (runs[0] / name).read_bytes() != (runs[1] / name).read_bytes():
            differing.append(name)
    return differing


def rename_and_test(folder: Path, out: str) -> list[str]:
    """Rename upstream ``x`` to ``y``, make a new ``x``, and test ``y`` under noise.

    Returns:
        Files of ``x`` that changed meanwhile, and missing ones of ``y``.
    """
    root = folder / out
    (root / "x").rename(root / "y")
    finish(folder, out, "x")
    before = contents(root / "x")
    finish(folder, out, "y", "--noise", "rain", "--snr", "0")
    after = contents(root / "x")
    names = before.keys() | after.keys()
    misplaced = [name for name in names if before.get(name) != after.get(name)]
    if not (root / "y" / RUN / "noisy/rain_snr0/test_predict.txt").is_file():
        misplaced.append("the predictions of y")
    return misplaced


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=10, help="number of repetitions (default: 10)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    errors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = make_workspace(Path(name))
        (folder / "rain").mkdir()
        soundfile.write(folder / "rain/rain.wav", make_sound(1.0), 16000)
        finish(folder, "uninterrupted", "x")
        for number in range(args.times):
            out = f"killed{number}"
            saved, seconds = kill_and_repeat(folder, out, rng)
            differing = compare(folder, "uninterrupted", out)
            misplaced = rename_and_test(folder, out)
            errors += len(differing) + len(misplaced)
            print(
                f"{number + 1}: killed with step {saved} of {STEPS} saved, repeated in "
                f"{seconds:.0f} s; different: {len(differing)} {differing[:3]}; "
                f"misplaced: {len(misplaced)} {misplaced[:3]}",
                flush=True,
            )
    print(f"killed and renamed {args.times} times; different or misplaced: {errors}")
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
