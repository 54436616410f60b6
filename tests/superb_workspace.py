"""A working folder in which `s3prl-ekd superb` takes seconds, and plans for it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.superb import plan as superb_plan

from .conftest import command
from .corpora import tone, write_manifest

OPTIONS = {
    "tasks": ["sid", "er"],
    "recipes": "tiny",
    "recipe": [],
    "lr": [],
    "steps": [],
    "override": [],
    "seeds": [1337],
    "selection": "hidden_states",
    "noise": [],
    "snr": [],
    "jobs": 1,
    "gpus": 1,
    "cache_features": False,
    "cache_features_gb": "50",
    "keep_features": False,
}


def make_workspace(folder: Path) -> Path:
    """Write SID and ER data of three speakers with one emotion each."""
    rng, rows = np.random.default_rng(1), []
    for i, speaker in enumerate(("ann", "bob", "cy")):
        for j, split in enumerate(("train",) * 6 + ("dev",) * 2 + ("test",) * 2):
            wave = tone(rng, 150 + 250 * i, 7000 + 911 * j + 57 * i, noise=0.02)
            rows.append((wave, (f"{speaker}{j}.wav", speaker, ("sad", "glad")[i % 2], split)))
    write_manifest(folder / "audio/all.tsv", ("speaker", "emotion", "split"), rows)
    command("init", ".", cwd=folder)
    command("prepare", "sid", "audio/all.tsv", "-o", "data/sid", cwd=folder)
    command(
        *("prepare", "er", "audio/all.tsv", "-o", "data/er", "--fold-column", "speaker"),
        cwd=folder,
        check=False,
    )
    if not (folder / "data/er").is_dir():  # only bob is glad, so folds by speaker fail: by split
        command("prepare", "er", "audio/all.tsv", "-o", "data/er", cwd=folder)
    return folder


def plan_runs(tmp_path, *upstreams, **changes):
    options = {**OPTIONS, "output": tmp_path / "out", "upstreams": list(upstreams), **changes}
    return superb_plan.plan_runs(SimpleNamespace(**options))


def short_runs(tmp_path, out, **changes):
    """SID runs of eight steps."""
    override = "sid=config.downstream_expert.datarc.train_batch_size=4"
    override += ",,config.downstream_expert.datarc.max_timestep=9000"
    options = {"tasks": ["sid"], "steps": ["sid=8"], "override": [override], **changes}
    return plan_runs(tmp_path / out, "fbank_no_cmvn", **options)


def last_states(run):
    """The contents of the last checkpoint of :func:`short_runs`."""
    return read_checkpoint(run.folder / "states-8.ckpt")
