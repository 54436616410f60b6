"""Kill a run with SIGKILL at random moments, resume it each time with -a, and compare weights,
optimizer, random states and TensorBoard with an uninterrupted run.

example:
  python -m tests.kill_and_resume --kills 10 --workers 2
  python -m tests.kill_and_resume --kills 3 --pruned
  python -m tests.kill_and_resume --kills 3 --shared
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import yaml

from s3prl_ekd.essence.units import Units, save_units
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.launch import run_pretrain
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.workspace import write_workspace

from .conftest import STUDENT

SAVE_STEP, STEPS = 4, 24
# Everything with a state or random numbers: dropout of student and teachers, layer drop (NumPy),
# distortions, excerpts, running target statistics, teacher dropping, scheduled teacher weights.
MODEL = {
    "target_norm": "phi_s",
    "targets": {"drop_teachers": 0.5, "weight_steps": 20},
    "teacher_dropout": True,
    "distortion": {"setup": "setup2", "babble": True},
}
# Also with gates: a copy of a teacher, whose sparsity is reached soon.
PRUNED_MODEL = {
    "student": {"kind": "copy", "of": "hubert"},
    "heads": {"kind": "layerwise"},
    "pruning": {"sparsity": 0.05, "reach_at": 8},
    "init": {},
}
# With targets that teachers share: a common basis whose statistics are frozen after 12 of 48
# batches, relations, units of two teachers on masked spans, norms over valid frames.
SHARED_MODEL = {
    "aggregation": "average",
    "target_norm": "procrustes",
    "target_norm_steps": 12,
    "relation": {"weight": 10.0, "window": 20, "similarity": "centred", "between_layers": True},
    "unit_loss": [
        {"file": "hubert.safetensors", "weight": 0.5},
        {"file": "wavlm.safetensors", "unmasked_weight": 0.25},
    ],
    "teacher_masked_norm": True,
    "student": {**STUDENT, "mask": {"length": 4, "share": 0.5}, "masked_norm": True},
}


def write_units(folder: Path) -> None:
    """Units with random centroids, of layer 2 of hubert and layer 4 of wavlm."""
    for seed, (name, layer) in enumerate((("hubert", 2), ("wavlm", 4))):
        centroids = torch.randn(6, 48, generator=torch.Generator().manual_seed(seed))
        save_units(Units(centroids, name, layer), folder / f"{name}.safetensors")


def write_run(
    folder: Path, teachers: dict[str, Path], corpus: Path, workers: int, kind: str = ""
) -> None:
    """Write the configs of a run of 24 steps of 2 batches; an epoch has 4 batches."""
    from .conftest import edit_yaml, write_configs

    write_workspace(folder)
    write_units(folder)
    pruned = kind == "pruned"
    models = {
        "": {**MODEL, "student": {**STUDENT, "encoder_layerdrop": 0.2}},
        "pruned": {**MODEL, **PRUNED_MODEL},
        "shared": {**SHARED_MODEL, "distortion": MODEL["distortion"]},
    }
    write_configs(folder, teachers, corpus, **models[kind])
    if kind != "shared":
        with edit_yaml(folder / "model.yaml") as model:
            model["teachers"]["wavlm"]["final_weight"] = 0.2
    runner = yaml.safe_load((folder / "runner.yaml").read_text())
    if pruned:
        runner["optimizer"] = {"name": "FusedAdamW", "lr": 1e-3}
    runner["runner"].update(
        total_steps=STEPS,
        save_step=SAVE_STEP,
        log_step=4,
        max_keep=2,
        gradient_accumulate_steps=2,
        eval_step=5,
        autosave_minutes=0.004,
    )
    data = runner["pretrain_expert"]["datarc"]
    dev = (corpus / "tables" / "train.csv").read_text().splitlines()[:4]
    (folder / "tables").mkdir()
    (folder / "tables" / "dev.csv").write_text("\n".join(dev) + "\n")
    (folder / "tables" / "train.csv").write_bytes((corpus / "tables" / "train.csv").read_bytes())
    data.update(num_workers=workers, file_path=str(folder / "tables"), dev_sets=["dev"])
    (folder / "runner.yaml").write_text(yaml.safe_dump(runner))


def start(folder: Path) -> int:
    """Start or resume the run in a new process group; return the process id.

    The process is forked with all modules loaded, because a new interpreter would need seconds.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        command = "run_pretrain.py -u ekd -n x -a -c runner.yaml -g model.yaml --device cpu"
        sys.argv = command.split()
        code = run_pretrain()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_to_the_end(folder: Path) -> None:
    """Start or resume the run, and wait for its end."""
    _, status = os.waitpid(start(folder), 0)
    assert status == 0, (folder / "log.txt").read_text()[-3000:]


def step_of(log: Path, offset: int) -> int:
    """The last step that the progress bar has shown in the log after ``offset``; -1 if none."""
    if not log.exists():
        return -1
    steps = re.findall(rf"(\d+)/{STEPS} \[", log.read_text(errors="replace")[offset:])
    return int(steps[-1]) if steps else -1


def kill_and_resume(folder: Path, kills: int, rng: random.Random) -> list[tuple[int, int]]:
    """Run to the end and kill the process ``kills`` times.

    One in six is killed during start-up, the others at a random moment of the remaining steps.

    Returns:
        The step of the progress bar and the saved step at each kill.
    """
    log, moments, saved = folder / "log.txt", [], 0
    while len(moments) < kills:
        offset = len(log.read_text(errors="replace")) if log.exists() else 0
        remaining = kills - len(moments)
        steps = rng.uniform(0, min(STEPS - 2 - saved, 2 * (STEPS - saved) / (remaining + 1)))
        pid = start(folder)
        if rng.random() < 1 / 6:
            time.sleep(rng.uniform(0, 1))
        else:
            while step_of(log, offset) < saved + int(steps):
                time.sleep(0.005)
                assert not os.waitpid(pid, os.WNOHANG)[0], log.read_text()[-3000:]
            time.sleep(rng.uniform(0, 0.3))
        if rng.random() < 0.5:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)  # its workers stay alive
        _, status = os.waitpid(pid, 0)
        assert status == signal.SIGKILL, "the run ended before the kill"
        shown = step_of(log, offset)
        path = newest_checkpoint(folder / "result/pretrain/x")
        saved = read_checkpoint(path)["Step"] if path else 0
        moments.append((shown, saved))
    run_to_the_end(folder)
    return moments


def outcome(folder: Path) -> dict[str, object]:
    """Everything that a run writes, as flat values: last and best checkpoint, TensorBoard."""
    run = folder / "result/pretrain/x"
    states = read_checkpoint(newest_checkpoint(run))
    states = {key: value for key, value in states.items() if key not in ("Args", "Config")}
    best = read_checkpoint(run / "dev-best.ckpt")["EKD"]["student"]
    return dict(flat_values({**states, "best": best, "scalars": read_scalars(run)}))


def flat_values(value, path=""):
    """Yield ``(path, value)`` of each tensor, number, text and None in nested dicts and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat_values(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flat_values(item, f"{path}/{i}")
    elif isinstance(value, (torch.Tensor, int, float, str, type(None))):
        yield path, value


def unequal(one: dict[str, object], two: dict[str, object]) -> list[str]:
    """The names of the values that are not equal bit for bit."""
    names = []
    for name in one.keys() | two.keys():
        a, b = one.get(name), two.get(name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            equal = a.dtype == b.dtype and torch.equal(a, b)
        else:
            equal = type(a) is type(b) and a == b
        if not equal:
            names.append(name)
    return sorted(names)


def main() -> int:
    from .conftest import write_corpus, write_teachers

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0, help="data loader workers")
    for option, text in (
        ("--pruned", "the student is being pruned"),
        ("--shared", "targets that teachers share"),
    ):
        parser.add_argument(option, action="store_const", const=option[2:], dest="kind", help=text)
    parser.add_argument("--seed", type=int, default=None, help="seed of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        teachers = write_teachers(root)
        write_corpus(root)
        for folder in ("uninterrupted", "killed"):
            (root / folder).mkdir()
            write_run(root / folder, teachers, root, args.workers, args.kind or "")
        run_to_the_end(root / "uninterrupted")
        moments = kill_and_resume(root / "killed", args.kills, rng)
        print(f"killed {args.kills} times, at (step, saved step) of {STEPS}: {moments}")
        one, two = outcome(root / "uninterrupted"), outcome(root / "killed")
        names = unequal(one, two)
        print(f"{len(one)} values compared; unequal: {len(names)} {names[:10]}")
        return bool(names)


if __name__ == "__main__":
    sys.exit(main())
