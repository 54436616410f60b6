"""Targets stored once: they are s3prl's of each utterance alone, and a run is the same."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np
import pytest
import soundfile
import torch
import yaml
from torch.utils.data import DataLoader

from s3prl_ekd import cli
from s3prl_ekd.checkpoints import newest, read_run
from s3prl_ekd.data.batches import DistillationDataset, only_item, train_loader
from s3prl_ekd.errors import ConfigError, DataError
from s3prl_ekd.evaluate.scalars import read_scalars
from s3prl_ekd.launch import run_pretrain
from s3prl_ekd.pretrain_expert import UpstreamPretrainExpert
from s3prl_ekd.target_cache import plan
from s3prl_ekd.target_cache.index import RECORD, read_index, write_index
from s3prl_ekd.target_cache.layout import Block, columns, joined, part_of, parted, pieces
from s3prl_ekd.target_cache.reader import TargetReader
from s3prl_ekd.workspace import write_workspace

from .conftest import STUDENT, write_configs
from .kill_and_resume import unequal

STILL = {**STUDENT, **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)}
LAYERS = (2, 4)  # of write_configs


def configs(folder, teachers, corpus, data=None, **model):
    """``runner.yaml`` and ``model.yaml``, whole utterances unless ``data`` says otherwise."""
    write_configs(folder, teachers, corpus, **{"student": STILL, **model})
    config = yaml.safe_load((folder / "runner.yaml").read_text())
    config["pretrain_expert"]["datarc"] |= {"sequence_length": 0, **(data or {})}
    (folder / "runner.yaml").write_text(yaml.safe_dump(config))


def cache(folder, out, *words):
    """``s3prl-ekd cache`` in this process; the exit code."""
    names = [str(folder / name) for name in ("runner.yaml", "model.yaml")]
    more = ["--device", "cpu", "-o", str(out), *words]
    try:
        return cli.main(["cache", "-c", names[0], "-g", names[1], *more])
    except SystemExit as left:
        return left.code


@pytest.fixture(scope="module")
def stored(tmp_path_factory, teachers, corpus):
    """Folders of complete caches by dtype, of whole utterances and plain teachers."""
    folder = tmp_path_factory.mktemp("stored")
    configs(folder, teachers, corpus, teacher_path="plain")
    for dtype in ("float16", "bfloat16", "int8"):
        assert cache(folder, folder / dtype, "--dtype", dtype) == 0
    return folder


@pytest.fixture
def folder(tmp_path, teachers, corpus, monkeypatch):
    write_workspace(tmp_path)
    configs(tmp_path, teachers, corpus)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def datarc(folder, **changes):
    return yaml.safe_load((folder / "runner.yaml").read_text())["pretrain_expert"]["datarc"] | (
        changes
    )


def adapter(folder, **changes):
    torch.manual_seed(7)
    return UpstreamPretrainExpert(
        datarc(folder, **changes), str(folder / "model.yaml"), device="cpu"
    )


def experts(teachers):
    """s3prl's own upstreams, which know nothing of ours."""
    from s3prl.upstream.hubert.expert import UpstreamExpert as Hubert
    from s3prl.upstream.wavlm.expert import UpstreamExpert as WavLM

    kinds = {"hubert": Hubert, "robust": Hubert, "wavlm": WavLM}
    return {name: kind(str(teachers[name])).eval() for name, kind in kinds.items()}


def alone(expert, sound):
    with torch.no_grad():
        states = expert([torch.from_numpy(sound)])["hidden_states"]
    return torch.stack([states[layer][0] for layer in LAYERS])  # [layer, frame, dim]


# What is stored


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_stored_targets_are_s3prls_of_each_utterance_alone(stored, teachers, corpus, dtype):
    """To the format's own rounding, and not to 0: they were rounded once."""
    reader, names = TargetReader(stored / dtype), [f"u{i}.flac" for i in (0, 5, 11)]
    targets, frames = reader.batch(names).on("cpu")
    assert list(targets) == ["hubert", "robust", "wavlm"]
    for name, expert in experts(teachers).items():
        for i, file in enumerate(names):
            sound, _ = soundfile.read(corpus / "audio" / file, dtype="float32")
            reader.check(file, len(sound))
            want = alone(expert, sound)
            assert frames[i] == want.shape[1]
            got = targets[name][i, :, : frames[i]]
            if dtype == "int8":
                bound = want.abs().amax((1, 2), keepdim=True) / 254 * 1.0001 + 1e-7
            else:
                bound = want.abs() * (2**-11 if dtype == "float16" else 2**-8) + 2**-24
            assert ((got - want).abs() <= bound).all()
            assert (got != want).any()
            assert not targets[name][i, :, frames[i] :].any()


def test_an_excerpt_is_the_same_in_every_epoch_and_for_every_seed(folder, teachers, corpus):
    configs(folder, teachers, corpus, {"sequence_length": 9000}, teacher_path="plain")
    assert cache(folder, "cache", "--seed", "3") == 0
    reader = TargetReader("cache")
    rows = train_loader(
        corpus / "audio", corpus / "tables", ["train"],
        batch_size=3, sequence_length=9000, max_timestep=0, num_workers=0, min_samples=400,
    ).dataset  # fmt: skip
    rows = [row for batch in rows.batches for row in batch]
    every = [
        DistillationDataset(corpus / "audio", rows, 3, 9000, 400, seed=seed, targets=reader)
        for seed in (3, 4)
    ]
    first = every[0][0, 1]
    assert torch.equal(first.waves, every[0][8, 1].waves)
    assert torch.equal(first.waves, every[1][8, 1].waves)
    without = DistillationDataset(corpus / "audio", rows, 3, 9000, 400, seed=3)
    assert torch.equal(first.waves, without[0, 1].waves)
    assert not torch.equal(first.waves, without[8, 1].waves)
    targets, frames = first.targets.on("cpu")
    for name, expert in experts(teachers).items():
        for i, wave in enumerate(first.waves):
            want = alone(expert, wave[: first.lengths[i]].numpy())
            assert torch.allclose(targets[name][i, :, : frames[i]], want, rtol=2**-10, atol=1e-6)


def test_float16_ends_somewhere(folder, capfd, monkeypatch):
    from s3prl_ekd.target_cache import build

    tell = build.targets_of
    monkeypatch.setattr(
        build, "targets_of", lambda *a: lambda w: {n: t * 1e5 for n, t in tell(*a)(w).items()}
    )
    assert cache(folder, "cache") == 2
    said = capfd.readouterr().err
    assert "float16 ends at 65504; build with --dtype bfloat16" in said and "u11.flac" in said
    assert cache(folder, "other", "--dtype", "bfloat16") == 0


# Training


def losses(expert, step=50):
    """Of each batch of epoch 0, in the table's order."""
    expert.eval()
    found = []
    for i in range(len(expert.dataloader.dataset)):
        records = defaultdict(list)
        with torch.no_grad():
            batch = expert.dataloader.dataset[i]
            loss, _ = expert(batch, records, global_step=step, log_step=50)
        found.append((loss.item(), {name: v[0].item() for name, v in records.items()}))
    return found


def of_layers(scalars):
    return [name for name in scalars if "_layer" in name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_batch_of_one_has_the_loss_of_teachers_that_run(folder, stored, dtype):
    """L1 moves by no more than the mean rounding, -log sigmoid of the cosine by no more than the
    angle does; a set's two terms, three sets."""
    cached = adapter(folder, train_batch_size=1, target_cache=str(stored / dtype))
    for teacher in cached.distiller.teachers.values():
        assert not list(teacher.parameters())  # nobody could be run
    live = adapter(folder, train_batch_size=1)
    rounding = 2**-11 if dtype == "float16" else 2**-8
    pairs = zip(losses(cached), losses(live), strict=True)
    for (one, its), (other, theirs) in pairs:
        assert its.keys() == theirs.keys() and len(of_layers(its)) == 3 * 2 * 3
        size = max(value for name, value in theirs.items() if "target_abs" in name)
        assert abs(one - other) <= 3 * rounding * (size + 2) + 1e-5
        for name in its:
            assert abs(its[name] - theirs[name]) <= rounding * (size + 2) + 1e-5, name


def test_frames_behind_an_utterances_end_do_not_count(folder, stored):
    """A padded batch: the mean over each utterance's own frames, worked out alone."""
    expert = adapter(folder, train_batch_size=12, target_cache=str(stored / "float16"))
    expert.eval()
    batch = expert.dataloader.dataset[0]
    with torch.no_grad():
        loss, _ = expert.steps(batch, "cpu", step=1, detail=False)
        out = expert.distiller.student(batch.waves, batch.lengths)
        predictions = expert.distiller.heads(out.last)
    targets, frames = batch.targets.on("cpu")
    want = 0.0
    for name, prediction in predictions.items():
        l1, cosine, count = 0.0, 0.0, 0
        for i in range(12):
            n = min(int(frames[i]), int(out.mask[i].sum()))
            p, t = prediction[i, :, :n], targets[name][i, :, :n]
            l1 += (p - t).abs().mean(-1).sum().item()
            similar = torch.cosine_similarity(p, t, dim=-1)
            cosine -= torch.nn.functional.logsigmoid(similar).sum().item()
            count += n * 2
        want += (l1 + cosine) / count / 3
    assert loss.item() == pytest.approx(want, rel=1e-5)


AVERAGED = {
    "average": {"aggregation": "average"},
    "concat": {"aggregation": "concat"},
    "both": {"aggregation": "average", "targets": {"separate_heads": True}},
    "residual": {"targets": {"residual_heads": True}},
}


@pytest.mark.parametrize("how", AVERAGED)
def test_aggregated_equals_per_teacher(folder, stored, teachers, corpus, how):
    configs(folder, teachers, corpus, teacher_path="plain", **AVERAGED[how])
    assert cache(folder, "aggregated", "--aggregated") == 0
    one = losses(adapter(folder, target_cache="aggregated"))
    other = losses(adapter(folder, target_cache=str(stored / "float16")))
    for (loss, parts), (theirs, named) in zip(one, other, strict=True):
        assert loss == pytest.approx(theirs, rel=2**-9)
        assert not of_layers(parts) and len(of_layers(named)) == 3 * 2 * 3


@pytest.mark.parametrize(
    "model",
    [
        {"targets": {"standardise": "running"}},
        {"targets": {"drop_teachers": 0.5}},
        {"aggregation": "average", "essence": {"keep": 0.5}},
    ],
    ids=str,
)
def test_one_cache_serves_what_changes_over_time(folder, stored, teachers, corpus, model):
    configs(folder, teachers, corpus, teacher_path="plain", **model)
    found = []
    for changes in ({"target_cache": str(stored / "float16")}, {}):
        expert = adapter(folder, train_batch_size=1, **changes)
        expert.train()
        torch.manual_seed(1)
        batch = expert.dataloader.dataset[2]
        found.append(expert(batch, defaultdict(list), global_step=3)[0].item())
    assert found[0] == pytest.approx(found[1], rel=5e-3)


def test_units_of_a_stored_layer(folder, stored, monkeypatch):
    from s3prl_ekd import pretrain_expert
    from s3prl_ekd.essence.units import Units

    centroids = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["essence"] = {"units": "units.safetensors"}
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(pretrain_expert, "load_units", lambda path: Units(centroids, "robust", 4))
    one = losses(adapter(folder, train_batch_size=1, target_cache=str(stored / "float16")))
    other = losses(adapter(folder, train_batch_size=1))
    for (loss, parts), (theirs, named) in zip(one, other, strict=True):
        assert parts["unit_loss"] == pytest.approx(named["unit_loss"], abs=0.05)
        assert loss == pytest.approx(theirs, abs=0.05)
    monkeypatch.setattr(pretrain_expert, "load_units", lambda path: Units(centroids, "robust", 3))
    with pytest.raises(ConfigError, match="essence.units are of layer 3 of robust"):
        adapter(folder, target_cache=str(stored / "float16"))


def test_fewer_teachers_and_layers_from_one_cache(folder, stored, teachers):
    """In another order too; int8, so that the scales are chosen as well."""
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["teachers"] = {
        "wavlm": {"model": str(teachers["wavlm"]), "layers": [4, 2]},
        "hubert": {"model": str(teachers["hubert"]), "layers": [4]},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    expert = adapter(folder, target_cache=str(stored / "int8"))
    some, _ = expert.dataloader.dataset[1].targets.on("cpu")
    every, _ = TargetReader(stored / "int8").batch(expert.dataloader.dataset[1].names).on("cpu")
    assert list(some) == ["wavlm", "hubert"]
    assert torch.equal(some["wavlm"], every["wavlm"].flip(1))
    assert torch.equal(some["hubert"], every["hubert"][:, 1:])


def test_distorted_students_have_clean_targets(folder, stored):
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["distortion"] = {"setup": "setup1"}
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    dataset = adapter(folder, target_cache=str(stored / "float16")).dataloader.dataset
    one, two = dataset[0, 1], dataset[1, 1]
    assert not torch.equal(one.waves, two.waves)
    assert torch.equal(one.targets.values, two.targets.values)
    assert one.teacher_waves is None and one.names == two.names
    clean = TargetReader(stored / "float16").batch(one.names)
    assert torch.equal(one.targets.values, clean.values)


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
            corpus / "audio", corpus / "tables", ["train"],
            batch_size=2, sequence_length=0, max_timestep=0, num_workers=0, min_samples=400,
            targets=TargetReader(stored / "int8"), shuffle=False,
        )  # fmt: skip
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


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.suffix in (".bin", ".json")}


def test_a_killed_build_goes_on_to_the_same_bytes(folder, capfd):
    assert cache(folder, folder / "whole", "--dtype", "int8") == 0
    code = (
        "import sys, time; from s3prl_ekd import cli; from s3prl_ekd.target_cache import writer;"
        "writer.EVERY = -1; add = writer.CacheWriter.add;"
        "writer.CacheWriter.add = lambda *a: (time.sleep(0.2), add(*a));"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = ["cache", "-c", "runner.yaml", "-g", "model.yaml", "-o", "cut", "--dtype", "int8"]
    running = subprocess.Popen([sys.executable, "-c", code, *words])
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
    from s3prl_ekd.target_cache import build

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


# What does not fit


def other_weights(folder, teachers):
    return {"teachers": {"hubert": {"model": str(teachers["robust"]), "layers": [2, 4]}}}


MISFITS = {
    "weights": (other_weights, {}, "teachers.hubert has other weights"),
    "class": (
        lambda folder, t: {"teachers": {"robust": {"model": str(t["wavlm"]), "layers": [2]}}},
        {},
        "teachers.robust has other weights",
    ),
    "layer": (
        lambda folder, t: {"teachers": {"hubert": {"model": str(t["hubert"]), "layers": [2, 3]}}},
        {},
        "teachers.hubert has no target of layer 3 in it; it has 2, 4",
    ),
    "teacher": (
        lambda folder, t: {"teachers": {"wide": {"model": str(t["wide"]), "layers": [2]}}},
        {},
        "there is no teacher wide in it; it has hubert, robust, wavlm",
    ),
    "precision": (
        lambda folder, t: {"teacher_path": "fast", "teacher_precision": "float16"},
        {},
        "teacher_precision is float16 and was float32",
    ),
    "crop": (lambda *_: {}, {"sequence_length": 8000}, "sequence_length is 8000 and was 0"),
    "table": (lambda *_: {}, {"sets": ["half"]}, "the corpus table half is not among those"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_cache_of_something_else_is_refused_by_name(folder, stored, teachers, corpus, what):
    model, data, words = MISFITS[what]
    changed = model(folder, teachers)
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["init"] = {}
    (folder / "model.yaml").write_text(yaml.safe_dump(config | changed))
    shutil.copytree(corpus / "tables", folder / "tables")
    lines = (corpus / "tables/train.csv").read_text().splitlines()
    (folder / "tables/half.csv").write_text("\n".join(lines[:7]) + "\n")
    with pytest.raises(DataError) as told:
        adapter(
            folder, file_path=str(folder / "tables"), target_cache=str(stored / "float16"), **data
        )
    said = str(told.value)
    assert words in said and str(stored / "float16") in said
    assert "build another with: s3prl-ekd cache -c RUNNER.yaml -g MODEL.yaml -o" in said


def test_the_same_teacher_under_another_path_fits(folder, stored, teachers):
    shutil.copy(teachers["hubert"], folder / "renamed.pt")
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["teachers"]["hubert"]["model"] = str(folder / "renamed.pt")
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    adapter(folder, target_cache=str(stored / "float16"))


def test_a_teacher_with_the_same_weights_that_answers_otherwise_is_refused(folder, stored):
    shutil.copytree(stored / "float16", "cache")
    index = read_index(folder / "cache")
    index.key["teachers"]["wavlm"]["answer"][1] *= 1.1
    write_index(folder / "cache", index)
    with pytest.raises(DataError, match="teachers.wavlm answers otherwise"):
        adapter(folder, target_cache="cache")


def test_an_aggregate_serves_no_other(folder, stored, teachers, corpus):
    configs(folder, teachers, corpus, aggregation="average")
    assert cache(folder, "cache", "--aggregated") == 0
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["teachers"]["hubert"]["weight"] = 2.0
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match="it holds aggregated targets, and weights is "):
        adapter(folder, target_cache="cache")
    configs(folder, teachers, corpus, aggregation="concat")
    with pytest.raises(DataError, match="aggregation is concat and was average"):
        adapter(folder, target_cache="cache")
    configs(folder, teachers, corpus, aggregation="average", targets={"standardise": "phi_s"})
    with pytest.raises(ConfigError, match="cannot be stored with targets.standardise"):
        adapter(folder, target_cache="cache")
    configs(folder, teachers, corpus)
    with pytest.raises(DataError, match="aggregation is separate and was average"):
        adapter(folder, target_cache="cache")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"distortion": {"setup": "setup2"}}, "distortion.setup setup2 lets the teachers hear"),
        ({"distortion": {"setup": "same"}}, "distortion.setup same lets the teachers hear"),
        ({"teacher_dropout": True}, "teacher_dropout: true gives other targets"),
        ({"loss": {"mask_padding": False}}, "loss.mask_padding: false has"),
    ],
    ids=str,
)
def test_experiments_without_fixed_targets_are_refused(
    folder, stored, teachers, corpus, model, words
):
    configs(folder, teachers, corpus, **model)
    with pytest.raises(ConfigError, match=words):
        adapter(folder, target_cache=str(stored / "float16"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({}, "with aggregation separate the targets are each teacher's own; leave it out"),
        ({"aggregation": "average", "targets": {"standardise": "running"}}, "targets.standardise"),
        (
            {"targets": {"drop_teachers": 0.5, "residual_heads": True}},
            "cannot be stored with targets.drop_teachers",
        ),
        ({"aggregation": "average", "essence": {"keep": 0.5}}, "essence.keep"),
        ({"teacher_dropout": True}, "teacher_dropout: true"),
    ],
    ids=str,
)
def test_what_cannot_be_aggregated_before(folder, teachers, corpus, model, words, capfd):
    configs(folder, teachers, corpus, **model)
    assert cache(folder, "cache", "--aggregated") == 2
    assert words in capfd.readouterr().err and not (folder / "cache").exists()


def test_another_build_in_the_same_folder_is_refused(folder, stored, capfd):
    shutil.copytree(stored / "float16", "cache")
    assert cache(folder, "cache", "--dtype", "int8") == 2
    said = capfd.readouterr().err
    assert "dtype is int8 and was float16; name another folder, or add --force" in said
    assert cache(folder, "cache", "--dtype", "int8", "--force") == 0
    assert read_index(folder / "cache").dtype == "int8"
    (folder / "full").mkdir()
    (folder / "full/letter.txt").write_text("dear")
    assert cache(folder, "full", "--force") == 2
    assert "holds something else than a target cache (letter.txt)" in capfd.readouterr().err


# Damage


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_damaged_files_are_refused(folder, stored):
    def copy():
        shutil.rmtree("cache", ignore_errors=True)
        shutil.copytree(stored / "int8", "cache")
        return folder / "cache"

    os.truncate(copy() / "targets.bin", 1000)
    with pytest.raises(DataError, match="targets.bin: it has 1000 bytes and should have"):
        adapter(folder, target_cache="cache")
    (copy() / "scales.bin").unlink()
    with pytest.raises(DataError, match="scales.bin: No such file"):
        adapter(folder, target_cache="cache")
    flip(copy() / "utterances.bin", 8)  # a checksum
    with pytest.raises(DataError, match="utterances.bin: its contents have changed"):
        adapter(folder, target_cache="cache")
    for name in ("targets.bin", "scales.bin"):
        flip(copy() / name, 5)
        dataset = adapter(folder, target_cache="cache").dataloader.dataset
        assert "the targets of u11.flac have changed since" in dataset[0].problem
        assert not dataset[1].problem
    flip(copy() / "utterances.json", 4)
    with pytest.raises(DataError, match="utterances.json has changed"):
        adapter(folder, target_cache="cache")
    (copy() / "targets.bin").unlink()
    os.mkfifo(folder / "cache/targets.bin")
    with pytest.raises(DataError, match="it is a pipe or a device"):
        adapter(folder, target_cache="cache")
    for text in (b"", b"{", b"[]", b'{"format": 3}', b"\xff" * 9, b"[" * 9000):
        (copy() / "index.json").write_bytes(text)
        with pytest.raises(DataError, match="index.json.*; build one with: s3prl-ekd cache"):
            adapter(folder, target_cache="cache")
    with pytest.raises(DataError, match="cannot read the index of the target cache nowhere"):
        adapter(folder, target_cache="nowhere")


@pytest.mark.parametrize(
    "spoil",
    [
        {"key": {}},
        {"key": {"contents": "per teacher", "teachers": 3}},
        {"layout": [["hubert", 2, 48], ["robust", 2, 48], ["wavlm", 4, 24]]},
        {"layout": []},
        {"layout": [["hubert", -2, 48]]},
        {"dtype": "float8"},
        {"utterances": "u1.flac"},
        {"utterances": [1, 2]},
        {"digest": 7},
        {"complete": "yes"},
        {"version": 2},
        {"seed": None},
    ],
    ids=str,
)
def test_a_spoiled_index_is_refused(folder, stored, spoil):
    shutil.copytree(stored / "float16", "cache")
    data = json.loads((folder / "cache/index.json").read_text())
    (folder / "cache/index.json").write_text(json.dumps(data | spoil))
    with pytest.raises(DataError, match="damaged|version 2"):
        adapter(folder, target_cache="cache")


def test_audio_that_has_changed_is_refused(folder, stored, teachers, corpus):
    shutil.copytree(corpus / "audio", folder / "audio")
    sound, rate = soundfile.read(corpus / "audio/u4.flac")
    soundfile.write(folder / "audio/u4.flac", sound[:-321], rate)
    expert = adapter(folder, libri_root=str(folder / "audio"), target_cache=str(stored / "float16"))
    problems = [expert.dataloader.dataset[i].problem for i in range(4)]
    assert [bool(problem) for problem in problems].count(True) == 1
    said = next(filter(None, problems))
    assert "u4.flac has 14079 samples to hear and the teachers heard 14400" in said


# The benchmark


def test_the_benchmark_has_a_side_that_runs_no_teacher(tmp_path):
    from s3prl_ekd.evaluate.bench_clock import Clock
    from s3prl_ekd.evaluate.bench_corpus import write_corpus
    from s3prl_ekd.evaluate.bench_sides import SIDES, Plan
    from s3prl_ekd.evaluate.bench_sizes import SIZES as MODELS
    from s3prl_ekd.evaluate.bench_sizes import write_teachers

    write_corpus(tmp_path, 4, 0.5, None)
    plan = Plan(tmp_path, write_teachers(tmp_path, MODELS["tiny"]), "tiny", "cpu", 2)
    ours, side = SIDES["ours"](plan), SIDES["ours-cached"](plan)
    clock = Clock(lambda: (time.perf_counter(),))
    torch.manual_seed(3)
    loss, lengths = ours.step(0, clock)
    torch.manual_seed(3)
    mine, its = side.step(0, clock)
    assert mine == pytest.approx(loss, rel=0.02) and torch.equal(lengths, its)
    assert not list(side.distiller.teachers.parameters())
    assert clock.spent["teacher forward"][0] > 0
    assert 0 < side.difference()["share"] < 2**-11
    # the second one in the same folder, as the process that measures memory has been before
    before = files(tmp_path / "targets-float16")
    SIDES["ours-cached"](plan)
    assert files(tmp_path / "targets-float16") == before


# The layout


def test_blocks_go_in_and_come_out():
    layout = (Block("a", 2, 3), Block("b", 1, 4))
    made = {"a": torch.arange(30.0).view(1, 2, 5, 3), "b": -torch.arange(20.0).view(1, 1, 5, 4)}
    assert (columns(layout), pieces(layout)) == (10, 3)
    flat = joined(made, layout)
    assert flat[2].tolist() == [6, 7, 8, 21, 22, 23, -8, -9, -10, -11]
    back = parted(flat[None], None, layout)
    assert all(torch.equal(back[name], made[name]) for name in made)
    scaled = parted(flat[None], torch.tensor([[1.0, 2.0, 3.0]]), layout)
    assert torch.equal(scaled["a"][:, 1], 2 * made["a"][:, 1])
    assert torch.equal(scaled["b"], 3 * made["b"])
    part = part_of(layout, {"b": [0], "a": [1]})
    assert part == ((Block("b", 1, 4), Block("a", 1, 3)), ((6, 10), (3, 6)), (2, 1))
    assert part_of(layout, {"a": [0, 1], "b": [0]}).spans == ((0, 10),)


def test_an_index_stays_what_it_is(tmp_path, stored):
    index = read_index(stored / "int8")
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    assert dataclasses.replace(index, complete=False) != index
    assert np.dtype(RECORD).itemsize == 12
