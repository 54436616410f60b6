"""A working folder in which `s3prl-ekd superb` takes seconds, and plans for it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile

from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.superb import plan as superb_plan

from .conftest import command

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
    "cache_features": None,
    "cache_features_gb": "50",
    "keep_features": False,
}


def make_workspace(folder: Path) -> Path:
    """Write SID and ER data of three speakers with one emotion each."""
    audio = folder / "audio"
    audio.mkdir()
    rng, lines = np.random.default_rng(1), ["path\tspeaker\temotion\tsplit\n"]
    for i, speaker in enumerate(("ann", "bob", "cy")):
        for j, split in enumerate(("train",) * 6 + ("dev",) * 2 + ("test",) * 2):
            time_axis = np.arange(7000 + 911 * j + 57 * i) / 16000
            sound = 0.2 * np.sin(2 * np.pi * (150 + 250 * i) * time_axis)
            sound += 0.02 * rng.standard_normal(len(time_axis))
            soundfile.write(audio / f"{speaker}{j}.wav", sound, 16000)
            lines.append(f"{speaker}{j}.wav\t{speaker}\t{('sad', 'glad')[i % 2]}\t{split}\n")
    (audio / "all.tsv").write_text("".join(lines))
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
