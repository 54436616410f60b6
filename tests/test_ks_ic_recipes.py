"""KS and IC: their folders against s3prl's readers, wrong folders, and runs of `superb`."""

from __future__ import annotations

import csv
import errno
import functools
import io
import json
import os
import re
import shutil
from pathlib import Path

import pandas
import pytest
import torch
import yaml

from s3prl_ekd import compat
from s3prl_ekd.compat.catalyst import MODULES
from s3prl_ekd.compat.catalyst import _install as install_catalyst
from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.downstream.tasks.corpus_check import check_corpus
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.files import atomic
from s3prl_ekd.files.run_checkpoints import newest_step, read_checkpoint
from s3prl_ekd.prepare.ks import split_of
from s3prl_ekd.superb.submission import MEMBERS

from .conftest import command, run_downstream_here
from .corpora import PITCH, tone, write_manifest, write_noise
from .kill_and_resume import flat_values, unequal
from .preparing import accuracy, check_message, fails, prepare

SPLITS = {"train": 4, "dev": 2, "test": 2}


def write_words(folder: Path) -> Path:
    """Words with a pitch each: yes, no, and another one; and two noises."""
    import numpy as np

    rng, rows = np.random.default_rng(0), []
    for split, count in SPLITS.items():
        for word, hertz in zip(("yes", "no", "zebra"), PITCH.values(), strict=True):
            for number in range(count):
                wave = tone(rng, hertz, 8000 + 100 * number)
                rows.append((wave, (f"{split}-{word}-{number}.flac", split, word)))
    for number in range(2):
        write_noise(folder / f"noise/{number}.flac", 20_000 + number)
    return write_manifest(folder / "ks.tsv", ("split", "word"), rows)


def write_intents(folder: Path) -> Path:
    """Three actions with a pitch each, and two objects with a length each."""
    import numpy as np

    rng, rows = np.random.default_rng(1), []
    for split, count in SPLITS.items():
        for action, hertz in PITCH.items():
            for number in range(count):
                thing = ("lights", "the heat")[number % 2]
                wave = tone(rng, hertz, 8000 + 4000 * (number % 2))
                cells = (f"{split}-{action}-{number}.flac", split, action, thing, "none")
                rows.append((wave, cells))
    return write_manifest(folder / "ic.tsv", ("split", "action", "object", "location"), rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working folder with both corpora in data/."""
    folder = tmp_path_factory.mktemp("work")
    words, intents = write_words(folder / "words"), write_intents(folder / "intents")
    command("init", folder / "work", cwd=folder)
    data = folder / "work/data"
    assert prepare("ks", words, "--noise", folder / "words/noise", "-o", data / "ks") == 0
    assert prepare("ic", intents, "-o", data / "ic") == 0
    return folder / "work"


# --- folders


def test_splits_of_speech_commands_are_s3prls(tmp_path):
    compat.apply()
    from s3prl.downstream.speech_commands.expert import split_dataset

    names = [f"{i:08x}_nohash_{i % 3}.wav" for i in range(300)]
    (tmp_path / "yes").mkdir()
    for name in names:
        (tmp_path / "yes" / name).touch()
    train, dev = ({path.name for _, path in part} for part in split_dataset(tmp_path))
    ours = {split: {n for n in names if split_of(n) == split} for split in SPLITS}
    assert (ours["train"], ours["dev"]) == (train, dev) and len(ours["test"]) > 10


def test_s3prl_reads_the_words_in_their_splits(work):
    compat.apply()
    from s3prl.downstream.speech_commands import dataset, expert

    root = work / "data/ks"
    for split, part in zip(SPLITS, expert.split_dataset(root / "train"), strict=False):
        read = sorted((word, os.path.basename(os.readlink(path))) for word, path in part)
        assert read == sorted(
            (label, f"{split}-{word}-{n}.flac")
            for word, label in (("yes", "yes"), ("no", "no"), ("zebra", "_unknown_"))
            for n in range(SPLITS[split])
        )
    test = dataset.SpeechCommandsTestingDataset(speech_commands_test_root=root / "test")
    labels = sorted(dataset.CLASSES[test[i][1]] for i in range(len(test)))
    assert labels == sorted(2 * ["yes", "no", "_unknown_"])
    silence = dataset.SpeechCommandsDataset(
        expert.split_dataset(root / "train")[0], speech_commands_root=root / "train"
    )
    assert sum(name == "_silence_" for name, _ in silence.data) == 2


def test_tables_of_intents(work):
    for name, count in (("train", 12), ("valid", 6), ("test", 6)):
        rows = list(csv.DictReader((work / f"data/ic/data/{name}_data.csv").open()))
        assert len(rows) == count
        for row in rows:
            source = os.path.basename(os.readlink(work / "data/ic" / row["path"]))
            split, action, number = Path(source).stem.split("-")
            assert (row["action"], row["location"]) == (action, "none")
            assert split == {"valid": "dev"}.get(name, name)
            assert row["object"] == ("lights", "the heat")[int(number) % 2]


def test_the_real_corpora_are_checked_and_linked(work, tmp_path, capsys):
    ks, ic = tmp_path / "ks", tmp_path / "ic"
    folders = (work / "data/ks/train", work / "data/ks/test")
    assert prepare("speech_commands", *folders, "-o", ks) == 0
    assert (ks / "train/yes").is_dir() and "train: 12 files, dev: 6" in capsys.readouterr().out
    source = tmp_path / "fluent"
    (source / "wavs").mkdir(parents=True)
    (source / "data").symlink_to(work / "data/ic/data")
    (source / "audio").symlink_to((work / "data/ic/audio").resolve())
    assert prepare("fluent_commands", source, "-o", ic) == 0
    assert (ic / "data/test_data.csv").is_file()
    check_message(
        fails(capsys, "fluent_commands", tmp_path, "-o", tmp_path / "x"), "train_data.csv"
    )
    wrong = (work / "data/ks/train", work / "data", "-o", tmp_path / "y")
    assert "data" in fails(capsys, "speech_commands", *wrong)


@pytest.mark.parametrize(
    "task, old, new, part",
    [
        ("ks", "\tdev\tyes", "\tdev\t../../x", 6),
        ("ks", "\tdev\t", "\ttrain\t", "dev"),
        ("ic", "\tdev\tlow", "\tdev\tnew", "new"),
        ("ic", "\tlights\t", "\ta,b\t", 2),
        ("ic", "\tlocation", "\tplace", "location"),
    ],
)
def test_invalid_manifests(task, old, new, part, tmp_path, capsys):
    write = write_words if task == "ks" else write_intents
    manifest = write(tmp_path / "corpus")
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line.replace(old, new) for line in lines))
    options = ("--noise", tmp_path / "corpus/noise") if task == "ks" else ()
    message = fails(capsys, task, manifest, *options, "-o", tmp_path / "out")
    if not isinstance(part, int):
        assert part in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", ["3", "-1e5", "NA", "None", "null", "true", "inf"])
def test_values_that_pandas_converts_are_refused(value, tmp_path, capsys):
    read = pandas.read_csv(io.StringIO(f"x\n{value}\n"))["x"][0]
    assert not isinstance(read, str)
    manifest = write_intents(tmp_path / "corpus")
    manifest.write_text(manifest.read_text().replace("\tnone", f"\t{value}"))
    assert value in fails(capsys, "ic", manifest, "-o", tmp_path / "out")


def test_a_quote_that_is_not_closed_is_a_sentence(work, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / f"data/{name}_data.csv").write_text('path,action\n"' + 200_000 * "x\n")
    config = recipe(work, "ic", file_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"train_data\.csv is damaged"):
        check_corpus("fluent_commands", config, "recipe.yaml", folder=work)


def test_noises_of_less_than_a_second_are_refused(tmp_path, capsys):
    manifest = write_words(tmp_path / "corpus")
    write_noise(tmp_path / "corpus/noise/2.flac", 15_999)
    options = ("--noise", tmp_path / "corpus/noise", "-o", tmp_path / "out")
    check_message(fails(capsys, "ks", manifest, *options), 15999)


def recipe(work: Path, task: str, **paths: str) -> dict:
    config = yaml.safe_load((work / TASKS[task].tiny).read_text())
    config["downstream_expert"]["datarc"]["batch_size"] = 8
    for key, path in paths.items():
        config["downstream_expert"]["datarc"][key] = path
    return config


@pytest.mark.parametrize(
    "task, key, path",
    [
        ("ks", "speech_commands_root", "data/ks"),
        ("ks", "speech_commands_test_root", "data/ks"),
        ("ks", "speech_commands_root", "data/none"),
        ("ic", "file_path", "data"),
    ],
)
def test_a_wrong_folder_is_a_sentence_before_training(work, task, key, path):
    name = TASKS[task].downstream
    check_corpus(name, recipe(work, task), "recipe.yaml", folder=work)
    with pytest.raises(ConfigError, match=re.escape(path)) as raised:
        check_corpus(name, recipe(work, task, **{key: path}), "recipe.yaml", folder=work)
    assert str(raised.value).startswith("recipe.yaml: ") and "\n" not in str(raised.value)


def test_a_batch_of_more_than_all_recordings_is_refused(work):
    """s3prl would wait for ever: it drops the only batch, which is not full."""
    config = recipe(work, "ks")
    config["downstream_expert"]["datarc"]["batch_size"] = 15
    with pytest.raises(ConfigError, match="batch_size is 15.* 14 recordings"):
        check_corpus("speech_commands", config, "recipe.yaml", folder=work)


def test_a_value_that_training_lacks_is_named(work, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "valid", "test"):
        text = (work / f"data/ic/data/{name}_data.csv").read_text()
        text = text.replace(",low,", ",new,") if name == "test" else text
        (tmp_path / f"data/{name}_data.csv").write_text(text)
    (tmp_path / "audio").symlink_to((work / "data/ic/audio").resolve())
    config = recipe(work, "ic", file_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"test_data\.csv: line 2: the action 'new'"):
        check_corpus("fluent_commands", config, "recipe.yaml", folder=work)


# --- runs


def test_names_in_the_archive_are_those_of_submit_py():
    assert MEMBERS["ks", None] == {"test_predict.txt": "ks_public/predict.txt"}
    assert MEMBERS["ic", None] == {"test_predict.csv": "ic_public/predict.csv"}


@pytest.mark.parametrize("missing", [False, True])
def test_the_wrapped_sampler_gives_each_process_its_part(missing, monkeypatch):
    """Two processes share the order of the sampler; without catalyst it is our class."""
    if missing:
        for name in MODULES:
            monkeypatch.delitem(__import__("sys").modules, name, raising=False)
        install_catalyst()
    else:
        compat.apply()
    from catalyst.data.sampler import DistributedSamplerWrapper

    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
        sampler = torch.utils.data.SequentialSampler(range(10, 20))
        parts.append(list(DistributedSamplerWrapper(sampler)))
    assert len(parts[0]) == len(parts[1]) == 5 and sorted(parts[0] + parts[1]) == list(range(10))


def test_superb_runs_both_tasks(work):
    argv = ["superb", "fbank_no_cmvn", "--tasks", "ks", "ic", "--recipes", "tiny", "-o", "out"]
    argv += ["--steps", "40", "--lr", "0.02"]
    argv += ["--override", "ks=config.downstream_expert.datarc.batch_size=8"]
    command(*argv, cwd=work)
    command("report", "out", cwd=work)
    rows = {r["task"]: r for r in csv.DictReader((work / "out/report/report.csv").open())}
    for task in ("ks", "ic"):
        (folder,) = (work / f"out/fbank_no_cmvn/{task}").iterdir()
        # s3prl's own value, and one from the files by hand
        (value,) = re.findall(r"test at step \d+: (\S+)", (folder / "log.log").read_text())
        assert float(rows[task]["value"]) == pytest.approx(100 * float(value), abs=1e-3)
        if task == "ks":
            assert accuracy(folder, "test") == pytest.approx(float(value))
        else:
            lines = [
                (folder / f"test_{n}.csv").read_text().splitlines() for n in ("predict", "truth")
            ]
            right = sum(a == b for a, b in zip(*lines, strict=True))
            assert right / len(lines[1]) == pytest.approx(float(value))
        record = json.loads((folder / "superb.json").read_text())
        assert record["finished"] and record["task"] == task
    assert float(rows["ks"]["value"]) > 60  # three pitches of twelve classes
    command("predict-zip", "out", "-o", "p.zip", "--partial", cwd=work)


@pytest.mark.parametrize("task, noise", [("ks", 20.0), ("ic", 0.0)])
def test_an_interrupted_run_resumes_exactly_and_hears_noise(task, noise, work, monkeypatch):
    """In the middle of the second of three epochs of three batches."""
    monkeypatch.chdir(work)
    run = functools.partial(run_downstream_here, monkeypatch)
    recipe, name = TASKS[task], f"whole_{task}"
    settings = ["total_steps=8", "log_step=4", "save_step=4", "eval_step=4", "max_keep=9"]
    settings = [f"config.runner.{setting}" for setting in settings]
    settings.append("config.downstream_expert.datarc.batch_size=4")
    argv = ["-u", "fbank_no_cmvn", "-d", recipe.downstream, "-c", recipe.tiny, "-p", name]
    run("-m", "train", *argv, "-o", ",,".join(settings))
    part = f"part_{task}"
    Path(part).mkdir()
    shutil.copy(f"{name}/states-4.ckpt", part)
    run("-m", "train", "-e", f"{part}/states-4.ckpt", "-o", f"args.expdir='{part}'")
    states = [read_checkpoint(Path(folder, "states-8.ckpt")) for folder in (name, part)]
    for state in states:
        del state["Args"]
    assert not unequal(*(dict(flat_values(state)) for state in states))

    test = ("-m", "evaluate", "-t", "test", "-e", f"{name}/states-8.ckpt")
    run(*test)
    run(*test, "--noise", "../words/noise", "--snr", str(noise))
    (noisy,) = Path(name, "noisy").iterdir()
    clean, under_noise = (recipe.measure(folder, None)[0] for folder in (Path(name), noisy))
    assert clean.names == under_noise.names and clean.reference == under_noise.reference


def test_a_save_that_fails_leaves_the_older_checkpoint(work, monkeypatch):
    """s3prl removes it before it saves the best model and the new checkpoint."""
    monkeypatch.chdir(work)
    settings = ["total_steps=4", "log_step=2", "save_step=2", "eval_step=2", "max_keep=1"]
    settings = [f"config.runner.{setting}" for setting in settings]
    options = ",,".join([*settings, "config.downstream_expert.datarc.batch_size=4"])
    argv = ["-m", "train", "-u", "fbank_no_cmvn", "-d", TASKS["ks"].downstream]
    argv += ["-c", TASKS["ks"].tiny, "-o", options]
    save = atomic.atomic_torch_save

    def fail_later(states, path, *args, **kwargs):
        if states["Step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(states, path, *args, **kwargs)

    with monkeypatch.context() as full_disk, pytest.raises((OSError, SystemExit)):
        full_disk.setattr(atomic, "atomic_torch_save", fail_later)
        run_downstream_here(full_disk, *argv, "-p", "failed")
    assert newest_step("failed") == 2
    run_downstream_here(monkeypatch, *argv, "-p", "saved")
    assert [path.name for path in Path("saved").glob("states-*")] == ["states-4.ckpt"]
