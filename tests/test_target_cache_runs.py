"""Targets stored once: how they are built, and the runs that read them."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from s3prl_ekd.data.batches import only_item, train_loader
from s3prl_ekd.errors import DataError
from s3prl_ekd.files.run_checkpoints import newest, read_run
from s3prl_ekd.hidden_states.store import RECORD, TargetReader, read_index
from s3prl_ekd.launch import run_pretrain
from s3prl_ekd.pretrain.target_cache import build as plan
from s3prl_ekd.pretrain.tensorboard import read_scalars
from s3prl_ekd.workspace import write_workspace

from .cache_cases import adapter, cache, configs, files, make_stored
from .conftest import STUDENT, data_settings
from .kill_and_resume import unequal


@pytest.fixture(scope="module")
def stored(tmp_path_factory, teachers, corpus):
    return make_stored(tmp_path_factory.mktemp("stored"), teachers, corpus)


@pytest.fixture
def folder(tmp_path, teachers, corpus, monkeypatch):
    write_workspace(tmp_path)
    configs(tmp_path, teachers, corpus)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(monkeypatch, name, *words):
    argv = ["run_pretrain.py", "-u", "ekd", "-n", name, "--device", "cpu", *words]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        return run_pretrain()
    except SystemExit as left:
        return left.code


NEW = ("-c", "runner.yaml", "-g", "model.yaml")


def test_a_resumed_run_ends_with_the_same_bits(folder, stored, teachers, corpus, monkeypatch):
    """With dropout, workers, a dev table (of the cached ones) and a distorted student."""
    data = {"target_cache": str(stored / "float16"), "num_workers": 2, "dev_sets": ["dev"]}
    shutil.copytree(corpus / "tables", "tables")
    lines = (corpus / "tables/train.csv").read_text().splitlines()
    with_dev = {"file_path": str(folder / "tables"), "sets": ["train"], "dev_sets": ["dev"]}
    (folder / "tables/train.csv").write_text("\n".join(lines[:10]) + "\n")
    (folder / "tables/dev.csv").write_text("\n".join([lines[0], *lines[10:]]) + "\n")
    model = {"student": STUDENT, "distortion": {"setup": "setup1"}}
    configs(folder, teachers, corpus, with_dev, **model)
    assert cache(folder, "cache") == 0
    data |= with_dev | {"target_cache": "cache"}
    configs(folder, teachers, corpus, data, **model)
    assert start(monkeypatch, "whole", *NEW) == 0
    (folder / "result/pretrain/cut").mkdir()
    shutil.copy("result/pretrain/whole/states-3.ckpt", "result/pretrain/cut")
    assert start(monkeypatch, "cut", "-a") == 0
    one, two = (read_run(newest(f"result/pretrain/{name}")) for name in ("whole", "cut"))
    assert one["Step"] == two["Step"] == 6
    for part in ("student", "heads"):
        assert not unequal(one["EKD"][part], two["EKD"][part])
    scalars = read_scalars("result/pretrain/whole")
    assert len(scalars["ekd/dev-loss"]) == 2 and "ekd/train-wavlm/l1_layer4" in scalars


@pytest.mark.slow
def test_several_processes_read_one_cache(folder, stored, monkeypatch):
    """Two processes, batches of 2, equal one with batches of 4 made of the same."""
    rows = yaml.safe_load((folder / "runner.yaml").read_text())
    rows["pretrain_expert"]["datarc"] |= {"target_cache": str(stored / "int8"), "num_workers": 1}
    rows["pretrain_expert"]["datarc"]["train_batch_size"] = 1
    (folder / "runner.yaml").write_text(yaml.safe_dump(rows))
    words = ["-m", "s3prl_ekd", "run_pretrain.py", "-u", "ekd", "--device", "cpu", *NEW]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *together, *words, "-n", "two"], check=True, env=env)
    twice = "config.runner.gradient_accumulate_steps=2"
    assert start(monkeypatch, "one", *NEW, "-o", twice) == 0
    one, two = (read_run(newest(f"result/pretrain/{name}"))["EKD"] for name in ("one", "two"))
    for part in ("student", "heads"):
        for name, weight in one[part].items():
            assert torch.allclose(weight, two[part][name], atol=1e-5), name


def test_two_readers_with_workers_of_both_kinds_at_once(stored, corpus):
    def batches(context):
        loader = train_loader(
            data_settings(corpus / "audio", 2, corpus / "tables"),
            ["train"],
            min_samples=400,
            targets=TargetReader(stored / "int8"),
            shuffle=False,
        )
        if context is None:
            return loader
        loader.dataset.targets.batch(["u1.flac"])  # mapped before the workers are there
        return DataLoader(
            loader.dataset, 1, num_workers=2, collate_fn=only_item, multiprocessing_context=context
        )

    want = list(batches(None))
    count = 0
    for each in zip(want, batches("fork"), batches("spawn"), strict=True):
        for batch in each[1:]:
            assert batch.names == each[0].names
            assert torch.equal(batch.targets.values, each[0].targets.values)
            assert torch.equal(batch.targets.scales, each[0].targets.scales)
            count += 1
    assert count == 12


# Building


def test_a_killed_build_goes_on_to_the_same_bytes(folder, capfd):
    assert cache(folder, folder / "whole", "--dtype", "int8") == 0
    code = (
        "import sys, time; from s3prl_ekd import cli; from s3prl_ekd.hidden_states import store;"
        "store.EVERY = -1; add = store.CacheWriter.add;"
        "store.CacheWriter.add = lambda *a: (time.sleep(0.2), add(*a));"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = ["cache", "-c", "runner.yaml", "-g", "model.yaml", "-o", "cut", "--dtype", "int8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: sums depend on how they part
    running = subprocess.Popen([sys.executable, "-c", code, *words], env=environment)
    records, end = folder / "cut/utterances.bin", time.monotonic() + 120
    while not records.exists() or records.stat().st_size < 4 * RECORD.itemsize:
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    capfd.readouterr()
    assert cache(folder, folder / "cut", "--dtype", "int8") == 2  # one writer at a time
    assert "is in use: process" in capfd.readouterr().err
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    done = records.stat().st_size // RECORD.itemsize
    assert 4 <= done < 12
    with open(folder / "cut/targets.bin", "ab") as file:
        file.write(b"half of an utterance")
    with pytest.raises(DataError, match=f"not complete: {done} of 12 utterances are done; go on"):
        adapter(folder, target_cache="cut")
    capfd.readouterr()
    assert cache(folder, folder / "cut", "--dtype", "int8") == 0
    assert f"{done}/12 [" in capfd.readouterr().err  # the bar begins there
    assert files(folder / "cut") == files(folder / "whole")
    assert cache(folder, folder / "cut", "--dtype", "int8") == 0
    assert "is complete already" in capfd.readouterr().out
    assert files(folder / "cut") == files(folder / "whole")


def test_ctrl_c_keeps_what_is_done(folder, monkeypatch, capfd):
    from s3prl_ekd.pretrain.target_cache import build

    add, calls = build.CacheWriter.add, []

    def interrupted(self, *args):
        add(self, *args)
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(build.CacheWriter, "add", interrupted)
    assert cache(folder, "cache") == 130
    monkeypatch.setattr(build.CacheWriter, "add", add)
    assert (folder / "cache/utterances.bin").stat().st_size == 5 * RECORD.itemsize
    said = capfd.readouterr().err
    assert "stopped by Ctrl-C" in said and "Traceback" not in said
    assert cache(folder, "cache") == 0 and read_index(folder / "cache").complete


def test_the_size_is_said_and_right(folder, capfd, monkeypatch):
    assert cache(folder, "cache", "--size") == 0
    said = capfd.readouterr().out
    assert "12 utterances, 0.00 h; float16, a frame has hubert 2 x 48" in said
    assert not (folder / "cache").exists()
    assert cache(folder, "cache") == 0
    # 0.5 to 1.6 s by 320 samples, less one frame each, 3 teachers, 2 layers, 48 dims, 2 bytes
    frames = sum(int((8000 + 1600 * i - 400) / 320) + 1 for i in range(12))
    assert (folder / "cache/targets.bin").stat().st_size == frames * 3 * 2 * 48 * 2
    out = capfd.readouterr().out
    assert "in the mean" in out and "target_cache='cache'" in out
    free = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: free)
    assert cache(folder, "other") == 2
    assert "name a folder on another disk, or make them smaller" in capfd.readouterr().err


def test_a_full_disk_is_a_sentence_and_the_build_goes_on_later(folder, capfd):
    assert cache(folder, "whole") == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert cache(folder, "cache") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capfd.readouterr().err
    assert "cannot write the target cache cache: " in said and "make room and type" in said
    assert "Traceback" not in said
    assert cache(folder, "cache") == 0
    assert files(folder / "cache") == files(folder / "whole")


def test_bad_audio_is_left_out_of_cache_and_run(folder, teachers, corpus, capfd, caplog):
    shutil.copytree(corpus / "audio", folder / "audio")
    (folder / "audio/u3.flac").write_bytes(b"no audio")
    data = {"libri_root": str(folder / "audio")}
    configs(folder, teachers, corpus, data)
    assert cache(folder, "cache") == 2
    assert "u3.flac" in capfd.readouterr().err
    configs(folder, teachers, corpus, {**data, "on_bad_audio": "skip"})
    assert cache(folder, "cache", "--dtype", "int8", "--force") == 0
    assert "left out u3.flac: it is not audio" in caplog.text
    assert "1 utterances have no targets" in capfd.readouterr().out
    expert = adapter(folder, target_cache="cache", train_batch_size=12)
    batch = expert.dataloader.dataset[0]
    assert [bad.path for bad in batch.bad] == ["u3.flac"] and len(batch.names) == 11
    assert torch.isfinite(expert(batch, defaultdict(list))[0])
    shutil.copy(corpus / "audio/u3.flac", folder / "audio")
    (bad,) = expert.dataloader.dataset[0].bad
    assert bad.path == "u3.flac" and bad.kind == "no targets"
    whole = adapter(folder, target_cache="cache", on_bad_audio="error", train_batch_size=12)
    assert "it was bad when the target cache cache was built" in whole.dataloader.dataset[0].problem
