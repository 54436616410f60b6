"""Building target caches, and training with them."""

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch
from torch.utils.data import DataLoader

from s3prl_ekd.data.batches import DistillationDataset, train_loader, unwrap_batch
from s3prl_ekd.data.distortion.settings import DistortionSettings
from s3prl_ekd.data.prefetch import copy_batch, prefetch
from s3prl_ekd.data.tables import read_tables
from s3prl_ekd.errors import DataError
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.hidden_states.store import RECORD, TargetReader, read_index
from s3prl_ekd.launch import run_pretrain
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.target_cache import build

from .cache_cases import adapter, cache, configs, files
from .conftest import STUDENT, data_settings, edit_yaml
from .kill_and_resume import unequal


def start(monkeypatch, name, *options):
    argv = ["run_pretrain.py", "-u", "ekd", "-n", name, "--device", "cpu", *options]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        return run_pretrain()
    except SystemExit as error:
        return error.code


NEW = ("-c", "runner.yaml", "-g", "model.yaml")


def test_a_resumed_run_ends_with_the_same_weights(
    cache_folder, cached_targets, teachers, corpus, monkeypatch
):
    """With dropout, workers, a cached dev table and a distorted student, bit for bit."""
    data = {"target_cache": str(cached_targets / "float16"), "num_workers": 2, "dev_sets": ["dev"]}
    shutil.copytree(corpus / "tables", "tables")
    lines = (corpus / "tables/train.csv").read_text().splitlines()
    with_dev = {"file_path": str(cache_folder / "tables"), "sets": ["train"], "dev_sets": ["dev"]}
    (cache_folder / "tables/train.csv").write_text("\n".join(lines[:10]) + "\n")
    (cache_folder / "tables/dev.csv").write_text("\n".join([lines[0], *lines[10:]]) + "\n")
    model = {"student": STUDENT, "distortion": {"setup": "setup1"}}
    configs(cache_folder, teachers, corpus, with_dev, **model)
    assert cache(cache_folder, "cache") == 0
    data |= with_dev | {"target_cache": "cache"}
    configs(cache_folder, teachers, corpus, data, **model)
    assert start(monkeypatch, "whole", *NEW) == 0
    (cache_folder / "result/pretrain/cut").mkdir()
    shutil.copy("result/pretrain/whole/states-3.ckpt", "result/pretrain/cut")
    assert start(monkeypatch, "cut", "-a") == 0
    one, two = (
        read_checkpoint(newest_checkpoint(f"result/pretrain/{name}")) for name in ("whole", "cut")
    )
    assert one["Step"] == two["Step"] == 6
    for part in ("student", "heads"):
        assert not unequal(one["EKD"][part], two["EKD"][part])
    scalars = read_scalars("result/pretrain/whole")
    assert len(scalars["ekd/dev-loss"]) == 2 and "ekd/train-wavlm/l1_layer4" in scalars


@pytest.mark.slow
def test_several_processes_read_one_cache(cache_folder, cached_targets, monkeypatch):
    """Two processes equal one with two accumulated batches."""
    with edit_yaml(cache_folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"] |= {
            "target_cache": str(cached_targets / "int8"),
            "num_workers": 1,
        }
        config["pretrain_expert"]["datarc"]["train_batch_size"] = 1
    command = ["-m", "s3prl_ekd", "run_pretrain.py", "-u", "ekd", "--device", "cpu", *NEW]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *torchrun, *command, "-n", "two"], check=True, env=env)
    twice = "config.runner.gradient_accumulate_steps=2"
    assert start(monkeypatch, "one", *NEW, "-o", twice) == 0
    one, two = (
        read_checkpoint(newest_checkpoint(f"result/pretrain/{name}"))["EKD"]
        for name in ("one", "two")
    )
    for part in ("student", "heads"):
        for name, weight in one[part].items():
            assert torch.allclose(weight, two[part][name], atol=1e-5), name


def test_forked_and_spawned_workers_at_once(cached_targets, corpus):
    def batches(context):
        loader = train_loader(
            data_settings(corpus / "audio", 2, corpus / "tables"),
            ["train"],
            min_samples=400,
            targets=TargetReader(cached_targets / "int8"),
            shuffle=False,
        )
        if context is None:
            return loader
        loader.dataset.targets.batch(["u1.flac"])  # mapped before the workers start
        return DataLoader(
            loader.dataset,
            1,
            num_workers=2,
            collate_fn=unwrap_batch,
            multiprocessing_context=context,
        )

    expected = list(batches(None))
    count = 0
    for first, *others in zip(expected, batches("fork"), batches("spawn"), strict=True):
        for batch in others:
            assert batch.names == first.names
            assert torch.equal(batch.targets.values, first.targets.values)
            assert torch.equal(batch.targets.scales, first.targets.scales)
            count += 1
    assert count == 12


def test_a_worker_sends_no_targets(cached_targets, corpus):
    """Read by the receiver they are the same, also with a second cache open."""
    data = data_settings(corpus / "audio", 12, corpus / "tables")
    readers = [TargetReader(cached_targets / dtype) for dtype in ("float16", "int8")]
    rows = read_tables(corpus / "tables", ["train"])
    for dataset in [DistillationDataset(data, rows, 400, targets=reader) for reader in readers]:
        targets = dataset[0].targets
        sent = pickle.dumps(targets)
        assert targets.values.nbytes > 100_000 and len(sent) < 500
        received = pickle.loads(sent)
        assert received.values.dtype == targets.values.dtype
        assert torch.equal(received.values, targets.values)
        assert torch.equal(received.frames, targets.frames)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
def test_batches_that_are_copied_ahead_are_the_same(cached_targets, corpus, device):
    def copy_to_cpu(batch):  # prefetch copies on CUDA only
        return copy_batch(batch, "cpu")

    def loader():
        return train_loader(
            data_settings(corpus / "audio", 2, corpus / "tables", num_workers=1),
            ["train"],
            min_samples=400,
            distortion=DistortionSettings(setup="setup1"),
            targets=TargetReader(cached_targets / "int8"),
            shuffle=False,
            pin_memory=device == "cuda",
        )

    ahead = prefetch(loader(), device) if device == "cuda" else map(copy_to_cpu, loader())
    pairs = list(zip(loader(), ahead, strict=True))
    assert len(pairs) == 6
    for batch, ahead in pairs:
        assert ahead.waves.device.type == device and ahead.lengths.device.type == "cpu"
        assert torch.equal(ahead.waves.cpu(), batch.waves) and ahead.names == batch.names
        expected, copied = batch.targets.on("cpu"), ahead.targets.on(device)
        for name, target in expected.values.items():
            assert torch.equal(copied.values[name].cpu(), target)


# Building


def test_a_killed_build_continues_to_the_same_bytes(cache_folder, capfd):
    assert cache(cache_folder, cache_folder / "whole", "--dtype", "int8") == 0
    code = (
        "import sys, time; from s3prl_ekd import cli; from s3prl_ekd.hidden_states import store;"
        "store.SYNC_SECONDS = -1; add = store.CacheWriter.add;"
        "store.CacheWriter.add = lambda *a: (time.sleep(0.2), add(*a));"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    argv = ["cache", "-c", "runner.yaml", "-g", "model.yaml", "-o", "cut", "--dtype", "int8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # results depend on it
    running = subprocess.Popen([sys.executable, "-c", code, *argv], env=environment)
    records, end = cache_folder / "cut/utterances.bin", time.monotonic() + 120
    while not records.exists() or records.stat().st_size < 4 * RECORD.itemsize:
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    capfd.readouterr()
    assert cache(cache_folder, cache_folder / "cut", "--dtype", "int8") == 2  # one writer at a time
    assert re.search(rf"\b{running.pid}\b", capfd.readouterr().err)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    done = records.stat().st_size // RECORD.itemsize
    assert 4 <= done < 12
    with open(cache_folder / "cut/targets.bin", "ab") as file:
        file.write(b"half of an utterance")
    with pytest.raises(DataError, match=rf"\b{done}\b.*\b12\b.*s3prl-ekd cache"):
        adapter(cache_folder, target_cache="cut")
    capfd.readouterr()
    assert cache(cache_folder, cache_folder / "cut", "--dtype", "int8") == 0
    assert f"{done}/12 [" in capfd.readouterr().err  # the progress bar starts there
    assert files(cache_folder / "cut") == files(cache_folder / "whole")
    written = (cache_folder / "cut/targets.bin").stat().st_mtime_ns
    assert cache(cache_folder, cache_folder / "cut", "--dtype", "int8") == 0
    assert (cache_folder / "cut/targets.bin").stat().st_mtime_ns == written  # nothing to build
    assert files(cache_folder / "cut") == files(cache_folder / "whole")


def test_ctrl_c_keeps_finished_utterances(cache_folder, monkeypatch, capfd):
    add, calls = build.CacheWriter.add, []

    def interrupted(self, *args):
        add(self, *args)
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(build.CacheWriter, "add", interrupted)
    assert cache(cache_folder, "cache") == 130
    monkeypatch.setattr(build.CacheWriter, "add", add)
    assert (cache_folder / "cache/utterances.bin").stat().st_size == 5 * RECORD.itemsize
    error = capfd.readouterr().err
    assert "Ctrl-C" in error and "Traceback" not in error
    assert cache(cache_folder, "cache") == 0 and read_index(cache_folder / "cache").complete


def test_the_size_is_printed_and_right(cache_folder, capfd, monkeypatch):
    assert cache(cache_folder, "cache", "--size") == 0
    output = capfd.readouterr().out
    assert re.search(r"\b12\b.*\b0\.00 h\b.*\bfloat16\b.*\bhubert 2 x 48\b", output)
    assert not (cache_folder / "cache").exists()
    assert cache(cache_folder, "cache") == 0
    # 0.5 to 1.6 s by 320 samples, less one frame each, 3 teachers, 2 layers, 48 dims, 2 bytes
    frames = sum(int((8000 + 1600 * i - 400) / 320) + 1 for i in range(12))
    assert (cache_folder / "cache/targets.bin").stat().st_size == frames * 3 * 2 * 48 * 2
    out = capfd.readouterr().out
    assert re.search(r"wavlm: .*\d%.*\d%", out) and "target_cache='cache'" in out
    free = shutil.disk_usage(cache_folder)._replace(free=1000)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: free)
    assert cache(cache_folder, "other") == 2
    error = capfd.readouterr().err
    for text in ("other", "0.000 GB", "--dtype int8", "--aggregated"):
        assert text in error


def test_a_build_continues_after_a_full_disk(cache_folder, capfd):
    assert cache(cache_folder, "whole") == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert cache(cache_folder, "cache") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capfd.readouterr().err
    assert re.search(r"error: .*\bcache: File too large", error) and "Traceback" not in error
    assert cache(cache_folder, "cache") == 0
    assert files(cache_folder / "cache") == files(cache_folder / "whole")


def test_bad_audio_is_left_out_of_cache_and_run(cache_folder, teachers, corpus, capfd, caplog):
    shutil.copytree(corpus / "audio", cache_folder / "audio")
    (cache_folder / "audio/u3.flac").write_bytes(b"no audio")
    data = {"libri_root": str(cache_folder / "audio")}
    configs(cache_folder, teachers, corpus, data)
    assert cache(cache_folder, "cache") == 2
    assert "u3.flac" in capfd.readouterr().err
    configs(cache_folder, teachers, corpus, {**data, "on_bad_audio": "skip"})
    assert cache(cache_folder, "cache", "--dtype", "int8", "--force") == 0
    assert "u3.flac" in caplog.text
    assert re.search(r"^1\b", capfd.readouterr().out, re.MULTILINE)
    expert = adapter(cache_folder, target_cache="cache", train_batch_size=12)
    batch = expert.dataloader.dataset[0]
    assert [bad.path for bad in batch.bad] == ["u3.flac"] and len(batch.names) == 11
    assert torch.isfinite(expert(batch, defaultdict(list))[0])
    shutil.copy(corpus / "audio/u3.flac", cache_folder / "audio")
    (bad,) = expert.dataloader.dataset[0].bad
    assert bad.path == "u3.flac" and bad.kind == "no targets"
    strict = adapter(cache_folder, target_cache="cache", on_bad_audio="error", train_batch_size=12)
    assert re.search(r"u3\.flac\b.*\bcache\b", strict.dataloader.dataset[0].problem)
