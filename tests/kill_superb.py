"""Kill ``s3prl-ekd superb`` at random moments, and rename what it has written.

Each time: SIGKILL to the command alone, the same command at once, until it has finished; its
weights and predictions are compared with those of one that was left alone. Then the upstream's
folder is renamed, another run made under its old name, and the renamed one tested under noise:
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
from s3prl_ekd.files.run_checkpoints import newest, read_run

from .conftest import make_sound
from .superb_workspace import make_workspace
from .test_run_folders import contents

RUN = "sid/lr0.003-seed1337"
STEPS = 240


def superb(folder: Path, out: str, name: str, *words: str) -> subprocess.Popen:
    more = "sid=config.downstream_expert.datarc.train_batch_size=4"
    more += ",,config.downstream_expert.datarc.max_timestep=4000"
    argv = ["superb", f"{name}=fbank_no_cmvn", "--tasks", "sid", "--recipes", "tiny", "-o", out]
    argv += ["--steps", f"sid={STEPS}", "--override", more, *words]
    return subprocess.Popen(
        [sys.executable, "-m", "s3prl_ekd", *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(folder: Path, out: str, name: str, *words: str) -> None:
    """The command to its end."""
    assert superb(folder, out, name, *words).wait() == 0, (folder / out / name).as_posix()


def kill_and_start_again(folder: Path, out: str, rng: random.Random) -> tuple[int, float]:
    """Returns the step that was saved when it was killed, and the seconds that were left to it."""
    run = folder / out / "x" / RUN
    process = superb(folder, out, "x")
    start = time.monotonic()
    goal = rng.randrange(-1, STEPS)  # -1: before anything is saved
    wait = rng.uniform(0, 0.3)
    while process.poll() is None:
        steps = [int(path.stem.removeprefix("states-")) for path in run.glob("states-*.ckpt")]
        if max(steps, default=-1) >= goal and (steps or run.is_dir()):
            time.sleep(wait)
            break
        if time.monotonic() - start > 120:
            raise AssertionError("the run does not begin")
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    path = newest(run)
    saved = read_run(path)["Step"] if path else 0
    start = time.monotonic()
    finish(folder, out, "x")
    return saved, time.monotonic() - start


def compare(folder: Path, one: str, other: str) -> list[str]:
    """What differs between the runs of two folders: weights and predictions."""
    runs = [folder / out / "x" / RUN for out in (one, other)]
    differing = []
    first, second = (read_run(newest(run)) for run in runs)
    for part in ("Featurizer", "Downstream"):
        for key, value in first[part].items():
            if isinstance(value, torch.Tensor) and not torch.equal(value, second[part][key]):
                differing.append(f"{part}.{key}")
    for name in TASKS["sid"].files(None):
        if (runs[0] / name).read_bytes() != (runs[1] / name).read_bytes():
            differing.append(name)
    return differing


def rename_and_test(folder: Path, out: str) -> list[str]:
    """What was misplaced; the folder of ``x`` becomes ``y``, a new ``x`` is made, ``y`` tested."""
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
    parser.add_argument("--times", type=int, default=10, help="how often (default: 10)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        folder = make_workspace(Path(name))
        (folder / "rain").mkdir()
        soundfile.write(folder / "rain/rain.wav", make_sound(1.0), 16000)
        finish(folder, "whole", "x")
        for number in range(args.times):
            out = f"cut{number}"
            saved, seconds = kill_and_start_again(folder, out, rng)
            differing = compare(folder, "whole", out)
            misplaced = rename_and_test(folder, out)
            lost += len(differing) + len(misplaced)
            print(
                f"{number + 1}: killed with step {saved} of {STEPS} saved, {seconds:.0f} s to the "
                f"end; unequal: {len(differing)} {differing[:3]}; misplaced: {len(misplaced)} "
                f"{misplaced[:3]}",
                flush=True,
            )
    print(f"{args.times} times killed and renamed; lost or misplaced: {lost}")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
