"""Malicious files, given to the commands that read a file: each is rejected quickly.

All commands read a kind of file with the same function. So each malicious file is given to one
command, and one of them to each of the other commands.

Rejected: exit code 2, one line that starts with ``error:``, no traceback, and no code in the file
is run. Quickly: within two seconds of CPU time (or on a slower machine 20 times the time of a small
fixed benchmark) and with little memory.
"""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import re
import resource
import signal
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from s3prl_ekd import cli, launch
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.essence.units import load_units
from s3prl_ekd.files import trust
from s3prl_ekd.files.torch_load import safe_load
from s3prl_ekd.student_file import contents

from .conftest import (
    STUDENT,
    safetensors_student,
    write_configs,
    write_librispeech_names,
)

SECONDS, BENCHMARKS, MEGABYTES = 2.0, 20, 500
MARKER = Path("/tmp") / f"s3prl_ekd_marker_{os.getpid()}"
CODE = f"__import__('os').system('touch {MARKER}')"
CONV_CODE = f"[(32,10,5)] * (1 + {CODE})"
TARGETS = {"a": TargetSpec(2, (48,))}


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


class Large:
    def __reduce__(self):
        return bytearray, (10**11,)


def doubled(times=60):
    """Nested lists, each containing the previous one twice: a traversal meets 2 ** times values."""
    data = ["x"]
    for _ in range(times):
        data = [data, data]
    return data


def nested(depth=300):
    data = []
    for _ in range(depth):
        data = [data]
    return data


def write_zip_bomb(path, archive_bytes):
    """Write the archive with a further member that decompresses to 1 GB of zeros."""
    buffer = io.BytesIO(archive_bytes)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"{archive.namelist()[0].split('/')[0]}/data/9", "w") as member:
            for _ in range(32):
                member.write(bytes(1 << 25))
    path.write_bytes(buffer.getvalue())


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """Compressing the member takes a second, so it is done once."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.pt"
    buffer = io.BytesIO()
    torch.save({"format": "x"}, buffer)
    write_zip_bomb(path, buffer.getvalue())
    return path.read_bytes()


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    model = Student(StudentSettings(**STUDENT))
    return contents(model, PredictionHeads(48, TARGETS), TARGETS, {"step": 1})


def write_special(path, kind, bomb):
    """Write a file that does not depend on the command; return False if ``kind`` is not one."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "zip_bomb":
        path.write_bytes(bomb)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"format": Evil()}))
    elif kind == "many_opcodes":
        path.write_bytes(b"\x80\x02" + b"]" * 5_000_000 + b".")
    else:
        return False
    return True


SPECIAL = ("fifo", "device", "folder", "zip_bomb", "pickle", "many_opcodes")


def settings(data, **change):
    return {**data, "settings": {**data["settings"], **change}}


# Name -> a change to the contents of a valid student file.
STUDENTS = {
    "code": lambda data: {**data, "about": Evil()},
    "code_as_key": lambda data: {**data, "student": {"a": {"b": [Evil()]}}},
    "large_object": lambda data: {**data, "about": {"x": Large()}},
    "conv_code": lambda data: settings(data, extractor_conv_feature_layers=CONV_CODE),
    "conv_power": lambda data: settings(data, extractor_conv_feature_layers="[(9**9**9,1,1)]"),
    "wide": lambda data: settings(data, encoder_embed_dim=4 * 10**9),
    "wide_inside": lambda data: settings(data, encoder_ffn_embed_dim=10**7),
    "deep": lambda data: settings(data, encoder_layers=10**6),
    "far_position": lambda data: settings(data, conv_pos=10**6),
    "large_heads": lambda data: {**data, "targets": {"a": {"layers": 10**6, "parts": [10**6]}}},
    "many_heads": lambda data: {
        **data,
        "targets": {f"t{i}": {"layers": 9, "parts": [9]} for i in range(9000)},
    },
    "shape": lambda data: {**data, "student": {"x": torch.zeros(1).expand(10**6, 10**6)}},
    "nested": lambda data: {**data, "about": {"x": nested()}},
    "doubled": lambda data: {**data, "about": {"x": doubled()}},
    "number": lambda data: settings(data, encoder_layers=10**5000),
    "not_finite": lambda data: settings(data, dropout=float("nan")),
    "keys": lambda data: {**data, "about": {"a\nerror: b": 1, 2: 3}},
}


def benchmark_seconds():
    """CPU time to create, pickle, unpickle and traverse 100,000 small objects on this machine.

    It is 0.3 s where the slowest command takes 1.7 s.
    """
    start = time.process_time()
    data = pickle.loads(pickle.dumps([{str(i): [i]} for i in range(100_000)]))
    assert sum(value[0] for item in data for value in item.values()) == 4_999_950_000
    return time.process_time() - start


class Rejected:
    """Runs a command in this process, checks that it fails, and returns its error message."""

    def __init__(self, capsys, monkeypatch):
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *argv):
        argv = [str(argument) for argument in argv]
        self.capsys.readouterr()
        MARKER.unlink(missing_ok=True)
        script = launch.SCRIPTS.get(argv[0])
        self.monkeypatch.setattr(sys, "argv", list(argv))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("timeout"))
        signal.alarm(120)
        gc.collect()
        start = time.process_time()
        try:
            with pytest.raises(SystemExit) as exit_info:
                script() if script else cli.main(argv)
        finally:
            signal.alarm(0)
            seconds = time.process_time() - start
            allowed = SECONDS if seconds < SECONDS else BENCHMARKS * benchmark_seconds()
        output = self.capsys.readouterr()
        lines = [line for line in output.err.splitlines() if line.startswith("error:")]
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
        if "MALICIOUS_LOG" in os.environ:
            with open(os.environ["MALICIOUS_LOG"], "a", encoding="utf-8") as log:
                log.write(f"{seconds:.2f}\t{growth:.0f}\t{argv}\t{lines}\n")
        assert not MARKER.exists()
        assert exit_info.value.code == 2, output.err
        assert len(lines) == 1 and len(lines[0]) < 4000, output.err
        assert "Traceback" not in output.err + output.out
        assert seconds <= allowed and growth < MEGABYTES, (seconds, allowed, growth)
        return lines[0]


@pytest.fixture
def rejected(capsys, monkeypatch):
    yield Rejected(capsys, monkeypatch)
    trust.read_option([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teachers, corpus):
    """A folder created by ``init``; all modules that the commands import are imported already."""
    path = tmp_path_factory.mktemp("work")
    previous = Path.cwd()
    cli.main(["init", str(path)])
    os.chdir(path)
    write_configs(path, teachers, corpus)
    write_librispeech_names(path, "train-clean", "train-clean-100", "dev-clean", "test-clean")
    for module in (
        "s3prl.hub",
        "s3prl.run_downstream",
        "s3prl_ekd.export.features",
        "s3prl_ekd.export.huggingface",
        "s3prl_ekd.export.hidden_set.package",
        "s3prl_ekd.superb.cost",
        "s3prl_ekd.commands.superb",
        "s3prl_ekd.teachers.load",
        "transformers",
    ):
        __import__(module)
    gc.collect()
    gc.freeze()  # the modules' objects are not traversed while a command is timed
    yield path
    gc.unfreeze()
    os.chdir(previous)


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A folder for the malicious file; the working folder is ``folder``."""
    monkeypatch.chdir(folder)
    return tmp_path


LIBRI = "config.downstream_expert.datarc.libri_root='.'"
LIBRI += ",,config.downstream_expert.datarc.bucket_file='.'"
TRAIN = ("run_downstream.py", "-m", "train", "-d", "asr", "-n", "x", "-o", LIBRI)
# Command -> its arguments for a student file.
ON_STUDENTS = {
    "export student": lambda file: ("export", "student", file, "-o", f"{file}.out"),
    "prune": lambda file: ("prune", file, "-o", f"{file}.out"),
    "merge": lambda file: ("merge", file, file, "-o", f"{file}.out"),
    "export superb": lambda file: ("export", "superb", file, "-o", f"{file}.out"),
    "export hf": lambda file: ("export", "hf", file, "-o", f"{file}.out"),
    "export onnx": lambda file: ("export", "onnx", file, "-o", f"{file}.out"),
    "features": lambda file: ("features", file, "audio", "-o", f"{file}.out"),
    "cost": lambda file: ("cost", "-u", "ekd_student", "-k", file),
    "run_downstream.py": lambda file: (*TRAIN, "-u", "ekd_student", "-k", file),
}


def pairs(commands, kinds, *more):
    """All kinds with the FIRST command, the FIRST kind with all others, and ``more`` pairs."""
    (first, *others), kinds = commands, list(kinds)
    cases = [(first, kind) for kind in kinds] + [(command, kinds[0]) for command in others]
    return pytest.mark.parametrize(("command", "kind"), [*cases, *more])


@pairs(ON_STUDENTS, [*STUDENTS, *SPECIAL])
def test_students(rejected, here, folder, corpus, student, bomb, command, kind):
    if not (folder / "audio").exists():
        (folder / "audio").symlink_to(corpus / "audio")
    file = here / "evil.pt"
    if not write_special(file, kind, bomb):
        torch.save(STUDENTS[kind](student), file)
    message = rejected(*ON_STUDENTS[command](file))
    if kind.startswith("code") or kind == "pickle":
        assert "posix.system" in message or "nt.system" in message


HEADS = {"pickle": b"\x80\x02cposix\nsystem\n", "large_model": b""}


@pairs([*ON_STUDENTS, "superb", "teachers"], HEADS)
def test_safetensors_students(rejected, here, folder, corpus, student, command, kind):
    """A file that describes a huge model; a pickle with the suffix of a safetensors file."""
    if not (folder / "audio").exists():
        (folder / "audio").symlink_to(corpus / "audio")
    file = here / "evil.safetensors"
    file.write_bytes(safetensors_student(settings(student, encoder_embed_dim=4 * 10**9)))
    with file.open("r+b") as opened:
        opened.write(HEADS[kind])
    argv = ON_STUDENTS.get(command, lambda file: LOCAL["superb"]("ekd_student", file))(file)
    if command == "teachers":
        model, _ = configured(folder)
        model["teachers"]["hubert"]["model"] = str(file)
        (here / "model.yaml").write_text(yaml.safe_dump(model))
        argv = ON_TEACHERS["teachers"](here / "model.yaml")
    assert "evil.safetensors" in rejected(*argv)


def teacher(path, change):
    """The contents of a teacher's checkpoint, changed."""
    data = torch.load(path, weights_only=True)
    change(data)
    return data


TEACHERS = {
    "code": ("hubert", lambda data: data.update(task_cfg=Evil())),
    "conv_code": ("hubert", lambda data: data["model_cfg"].update(conv_feature_layers=CONV_CODE)),
    "conv_code_wavlm": ("wavlm", lambda data: data["cfg"].update(conv_feature_layers=CONV_CODE)),
    "wide": ("hubert", lambda data: data["model_cfg"].update(encoder_embed_dim=4 * 10**6)),
    "deep": ("hubert", lambda data: data["model_cfg"].update(encoder_layers=10**6)),
    "final": ("hubert", lambda data: data["model_cfg"].update(final_dim=10**9)),
    "buckets": ("wavlm", lambda data: data["cfg"].update(num_buckets=10**9)),
    "nested": ("wavlm", lambda data: data.update(x=nested())),
    "doubled": ("wavlm", lambda data: data["cfg"].update(x=doubled())),
    "shape": ("wavlm", lambda data: data["model"].update(x=torch.zeros(1).expand(10**6, 10**6))),
}


def configured(folder):
    """The model config and the runner config of the working folder."""
    model = yaml.safe_load((folder / "model.yaml").read_text())
    runner = yaml.safe_load((folder / "runner.yaml").read_text())
    return model, runner


PRETRAIN = ("run_pretrain.py", "-u", "ekd", "-n", "x", "--device", "cpu")
DATA = ("--data", "audio")
ON_TEACHERS = {
    "run_pretrain.py": lambda model: (*PRETRAIN, "-c", "runner.yaml", "-g", model),
    "teachers": lambda model: ("teachers", "inspect", model, *DATA, "-o", f"{model}.out"),
    "layers": lambda model: ("group-layers", model, *DATA, "-o", f"{model}.out.yaml"),
    "units": lambda model: (
        *("fit-units", model, *DATA, "--teacher", "hubert", "--layer", "2"),
        *("--clusters", "2", "-o", f"{model}.out"),
    ),
}


@pairs(ON_TEACHERS, [*TEACHERS, *SPECIAL])
def test_teachers(rejected, here, folder, corpus, teachers, bomb, command, kind):
    if not (folder / "audio").exists():
        (folder / "audio").symlink_to(corpus / "audio")
    file = here / "evil.pt"
    if not write_special(file, kind, bomb):
        name, change = TEACHERS[kind]
        torch.save(teacher(teachers[name], change), file)
    model, _ = configured(folder)
    model["teachers"]["hubert"]["model"] = str(file)
    (here / "model.yaml").write_text(yaml.safe_dump(model))
    rejected(*ON_TEACHERS[command](here / "model.yaml"))


LOCAL = {
    "cost": lambda name, file: ("cost", "-u", name, "-k", file),
    "run_downstream.py": lambda name, file: (*TRAIN, "-u", name, "-k", file),
    "superb": lambda name, file: (
        *("superb", f"x={name}:{file}", "--tasks", "asr", "--recipes", "tiny"),
        *("--override", f"asr={LIBRI}"),
    ),
}


@pytest.mark.parametrize("command", LOCAL)
def test_s3prls_upstreams_reject_safetensors_files(rejected, here, student, command):
    """s3prl's loader would read the same bytes as a pickle."""
    (here / "s.safetensors").write_bytes(safetensors_student(student))
    assert "s.safetensors" in rejected(*LOCAL[command]("hubert_local", here / "s.safetensors"))


@pairs(LOCAL, ["code", "conv_code", "conv_code_wavlm", "nested", "fifo"])
def test_upstreams_of_s3prl(rejected, here, teachers, bomb, command, kind):
    """``-u hubert_local -k FILE``: the file is rejected before s3prl's loader reads it."""
    file = here / "evil.pt"
    name = "hubert" if kind == "fifo" else TEACHERS[kind][0]
    if not write_special(file, kind, bomb):
        torch.save(teacher(teachers[name], TEACHERS[kind][1]), file)
    rejected(*LOCAL[command](f"{name}_local", file))


def run(student, **change):
    """The contents of a run's checkpoint."""
    args = Namespace(upstream="ekd", expdir="x", expname="x", device="cpu", override=None)
    args.upstream_ckpt = None
    return {"Args": args, "Config": {}, "Step": 1, "EKD": student, "Optimizer": {}, **change}


def run_with_args(student, **change):
    data = run(student, Downstream={})
    vars(data["Args"]).update(change)
    return data


RUNS = {
    "code": lambda student: run(student, Optimizer=Evil(), Downstream={}, Upstream_Config={}),
    "args_code": lambda student: run(student, Args=Evil(), Downstream={}),
    "no_args": lambda student: run(student, Args=3, Downstream={}, Upstream_Config={}),
    "no_config": lambda student: run(student, Config=[1], Downstream={}, Upstream_Config={}),
    "config_code": lambda student: run(
        student,
        Downstream={},
        Upstream_Config={},
        Config={"optimizer": {"name": CODE}, "modelrc": {"select": CODE}},
    ),
    "conv_code": lambda student: run(
        student, Upstream_Config={"student": {"extractor_conv_feature_layers": CONV_CODE}}
    ),
    "doubled": lambda student: run(student, Config=dict(x=doubled()), Downstream={}),
    "doubled_args": lambda student: run_with_args(student, x=doubled()),
    "hub": lambda student: run_with_args(student, hub="huggingface", upstream="user/repository"),
    "from_hub": lambda student: run_with_args(student, from_hf_hub=True),
    "folder": lambda student: run_with_args(student, expdir=None),
    "path": lambda student: run_with_args(student, upstream_ckpt=[1]),
}
ON_RUNS = {
    "run_downstream.py": lambda file: ("run_downstream.py", "-m", "evaluate", "-e", file),
    "run_pretrain.py": lambda file: ("run_pretrain.py", "-e", file, "--device", "cpu"),
    "essence": lambda file: (
        *("essence", "asr", "--teachers", file, "--student-upstream", "fbank"),
        *("-n", "x", "--top-k", "2", "-o", LIBRI),
    ),
}


@pairs(
    ON_RUNS,
    [*RUNS, *SPECIAL],
    ("run_pretrain.py", "conv_code"),
    ("run_pretrain.py", "no_args"),
    ("essence", "from_hub"),
)
def test_runs(rejected, here, student, bomb, command, kind):
    file = here / "states-1.ckpt"
    if not write_special(file, kind, bomb):
        torch.save(RUNS[kind](student), file)
    rejected(*ON_RUNS[command](file))


@pytest.mark.parametrize("kind", ["code", "conv_code"])
def test_upstream_checkpoint_named_in_a_run(rejected, here, student, teachers, kind):
    """With ``-e``, s3prl would load the upstream's checkpoint that the run's checkpoint names."""
    other, file = here / "other.pt", here / "states-1.ckpt"
    torch.save(teacher(teachers["hubert"], TEACHERS[kind][1]), other)
    torch.save(run_with_args(student, upstream="hubert_local", upstream_ckpt=str(other)), file)
    assert "other.pt" in rejected("run_downstream.py", "-m", "evaluate", "-e", file)


YAMLS = {
    "apply": f"a: !!python/object/apply:os.system ['touch {MARKER}']\n",
    "new": f"a: !!python/object/new:os.system ['touch {MARKER}']\n",
    "name": "a: !!python/name:os.system\n",
    "module": "a: !!python/module:os\n",
    "tuple": "a: !!python/tuple [1, 2]\n",
    "aliases": "a0: &a0 [x]\n"
    + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)),
    "itself": "a: &a [*a]\n",
    "merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i + 1}: &a{i + 1} {{'<<': [*a{i}, *a{i}], y{i}: *a{i}}}\n" for i in range(40)),
    "nested": "a: " + "[" * 50_000 + "\n",
    "nested_block": "".join("  " * i + f"a{i}:\n" for i in range(200)),
    "long": "a: '" + "x" * 100_000 + "'\n",
    "large": "a: 1\n" + "# " + "x" * 10**7,
    "many": "a: [" + "1," * 50_000 + "]\n",
    "number": "a: " + "9" * 4000 + "\n",
    "hexadecimal": "a: 0x" + "f" * 4000 + "\n",
    "twice": "a: 1\na: 2\n",
    "keys": "? [1, 2]\n: 3\n",
    "bad_tag": "a: !!int ''\n",
    "escape": 'a: "\\UFFFFFFFF"\n',
    "null": 'a: "x\\0y"\n',
    "line": 'a: "x\\nerror: y"\n',
    "surrogate": 'a: "\\ud800"\n',
    "not_text": b"\xff\xfe\x00",
    "fifo": None,
    "device": None,
    "folder": None,
}
ON_YAMLS = {
    "run_pretrain.py -g": lambda file: (*PRETRAIN, "-c", "runner.yaml", "-g", file),
    "run_pretrain.py -c": lambda file: (*PRETRAIN, "-c", file, "-g", "model.yaml"),
    "run_downstream.py -c": lambda file: (*TRAIN[:-2], "-u", "fbank", "-c", file),
    "superb --recipe": lambda file: ("superb", "fbank", "--recipe", f"asr={file}"),
    "matrix": lambda file: ("sweep", file, "-c", "runner.yaml"),
    "matrix -c": lambda file: ("sweep", "model.yaml", "-c", file),
    "teachers": ON_TEACHERS["teachers"],
    "layers": ON_TEACHERS["layers"],
    "units": ON_TEACHERS["units"],
}


@pairs(ON_YAMLS, YAMLS)
def test_yaml(rejected, here, folder, corpus, command, kind):
    if not (folder / "audio").exists():
        (folder / "audio").symlink_to(corpus / "audio")
    file, text = here / "evil.yaml", YAMLS[kind]
    if not write_special(file, kind, b""):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    rejected(*ON_YAMLS[command](file))


MODELS = {
    "conv_code": {"student": {**STUDENT, "extractor_conv_feature_layers": CONV_CODE}},
    "conv_code_list": {"student": {**STUDENT, "extractor_conv_feature_layers": [[1, 2, 3]]}},
    "wide": {"student": {**STUDENT, "encoder_embed_dim": 4 * 10**8}},
    "deep": {"student": {**STUDENT, "encoder_layers": 10**6}},
    "far_position": {"student": {**STUDENT, "conv_pos": 10**9}},
    "not_finite": {"student": {**STUDENT, "dropout": float("nan")}},
    "device": {"teachers": {"hubert": {"model": "/dev/zero"}}},
    "null": {"teachers": {"hubert": {"model": "a\0b"}}},
    "extends_device": {"extends": "/dev/zero"},
    "extends_code": {"extends": CODE},
    "teachers_of_nothing": {"extends": "model.yaml", "teachers": [[1]]},
    "name": {"teachers": {CODE: {"model": "hubert_base"}}},
}


@pytest.mark.parametrize("kind", MODELS)
def test_model_configs(rejected, here, folder, kind):
    model, _ = configured(folder)
    if "extends" in MODELS[kind]:
        (here / "model.yaml").write_text(yaml.safe_dump(model))
        model = {}
    (here / "evil.yaml").write_text(yaml.safe_dump({**model, **MODELS[kind]}))
    rejected(*ON_YAMLS["run_pretrain.py -g"](here / "evil.yaml"))


RUNNERS = {
    "optimizer": {"optimizer": {"name": CODE, "lr": 1.0}},
    "scheduler": {"scheduler": {"name": CODE}},
    "rate": {"optimizer": {"name": "Adam", "lr": float("inf")}},
    "no_rate": {"optimizer": {"name": "Adam", "lr": None}},
}


@pytest.mark.parametrize("kind", RUNNERS)
def test_runner_configs(rejected, here, folder, kind):
    _, runner = configured(folder)
    (here / "evil.yaml").write_text(yaml.safe_dump({**runner, **RUNNERS[kind]}))
    rejected(*ON_YAMLS["run_pretrain.py -c"](here / "evil.yaml"))


OVERRIDES = {
    "rate": f"config.optimizer.lr={CODE}",
    "name": f"config.optimizer.name={CODE}",
    "list": f"config.runner.total_steps=[{CODE}]",
    "argument": f"args.device={CODE}",
    "key": f"config.{CODE}.x=1",
    "power": "config.runner.total_steps=9**9**9**9",
    "digits": "config.runner.total_steps=" + "9" * 5000,
    "brackets": "config.runner=" + "[" * 5000,
}


@pairs(["run_pretrain.py", "run_downstream.py"], OVERRIDES)
def test_overrides(rejected, here, command, kind):
    argv = (*PRETRAIN, "-c", "runner.yaml", "-g", "model.yaml", "-o", OVERRIDES[kind])
    if command == "run_downstream.py":
        argv = (*TRAIN[:-1], f"{LIBRI},,{OVERRIDES[kind]}", "-u", "not_in_s3prl")
    rejected(*argv)


def test_s3prl_does_not_evaluate_overrides(here, monkeypatch):
    """Even if one passes our checks."""
    from s3prl_ekd.compat import no_eval

    no_eval.block_eval()
    from s3prl.utility.helper import override

    config = {}
    override(f"config.a={CODE},,config.b=[1, 2],,config.c='x',,config.d=word", None, config)
    assert config == {"a": CODE, "b": [1, 2], "c": "x", "d": "word"}
    assert not MARKER.exists()


@pairs(["run_pretrain.py", "prepare"], ["fifo", "device", "folder"])
def test_tables_and_manifests(rejected, here, folder, command, kind):
    write_special(here / "train.csv", kind, b"")
    _, runner = configured(folder)
    runner["pretrain_expert"]["datarc"]["file_path"] = str(here)
    (here / "runner.yaml").write_text(yaml.safe_dump(runner))
    argv = (*PRETRAIN, "-c", here / "runner.yaml", "-g", "model.yaml")
    if command == "prepare":
        argv = ("prepare", "asr", here / "train.csv", "-o", here / "out")
    rejected(*argv)


HF = {"model_type": "hubert", "hidden_size": 48, "num_hidden_layers": 1, "conv_dim": [8] * 7}
JSONS = {
    "nested": "[" * 100_000,
    "nested_objects": '{"a":' * 100_000,
    "not_finite": '{"format": NaN}',
    "digits": '{"format": ' + "9" * 5000 + "}",
    "large": " " * 10**7,
    "twice": '{"format": 1, "format": 1}',
    "list": "[]",
    "wide": json.dumps({**HF, "hidden_size": 12 * 10**7}),
    "deep": json.dumps({**HF, "num_hidden_layers": 10**6, "hidden_size": 12}),
    "conv": json.dumps({**HF, "conv_dim": [CODE] * 7}),
    "fifo": None,
}


MODELS_OF_HF = [("export student", kind) for kind in ("wide", "deep", "conv", "fifo")]


@pairs(["report", "predict-zip", "export student"], JSONS, *MODELS_OF_HF)
def test_json(rejected, here, command, kind):
    folder = here / "lr0.1-seed1"
    folder.mkdir()
    name = "config.json" if command == "export student" else "superb.json"
    if not write_special(folder / name, kind, b""):
        (folder / name).write_text(JSONS[kind])
    if command == "export student" and kind == "fifo":
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(HF))
        os.mkfifo(folder / "model.safetensors")
    elif command == "export student":
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    output = () if command == "report" else ("-o", here / "out")
    rejected(*command.split(), folder, *output)


def safetensors(shape, header_bytes=None):
    entries = {"centroids": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    data = json.dumps(entries).encode()
    return (header_bytes or len(data)).to_bytes(8, "little") + data + bytes(4)


@pytest.mark.parametrize(
    "data", [safetensors([10**9, 10**9]), safetensors([1], 10**12), safetensors([2**63, 4]), b"x"]
)
def test_shapes_in_safetensors(rejected, here, data):
    """The weights of a Hugging Face folder; units' centroids are read by the same function."""
    (here / "config.json").write_text(json.dumps(HF))
    (here / "model.safetensors").write_bytes(data)
    rejected("export", "student", here, "-o", here / "out.pt")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_units(here / "model.safetensors")


def test_trust_checkpoint(here, capsys):
    """The option loads a file with (harmless) code; without it the file is rejected."""
    torch.save({"x": Evil()}, here / "old.ckpt")
    MARKER.unlink(missing_ok=True)
    assert trust.read_option(["-e", "a"]) == ["-e", "a"] and not trust.trusted()
    with pytest.raises(CheckpointError, match="posix.system.*--trust-checkpoint"):
        safe_load(here / "old.ckpt")
    assert not MARKER.exists()
    try:
        assert (
            trust.read_option(["-e", "--trust-checkpoint", "a"]) == ["-e", "a"] and trust.trusted()
        )
        assert safe_load(here / "old.ckpt") == {"x": 0}
        assert MARKER.exists()
        assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    finally:
        trust.read_option([])
        MARKER.unlink(missing_ok=True)
    assert not trust.trusted() and "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("wav2vec.wav2vec_model", "conv_aggregator_layers"),
        ("multires_hubert.hubert_model", "override_encoder_layers"),
        ("lighthubert.lighthubert.lighthubert", "conv_feature_layers"),
        ("hubert.hubert_model", "conv_feature_layers"),
    ],
)
def test_evals_of_layers_are_replaced(module, name):
    """s3prl's line stays, but ``eval`` in its module is ours."""
    import importlib

    from s3prl_ekd import compat
    from s3prl_ekd.compat import no_eval
    from s3prl_ekd.errors import ConfigError

    compat.apply()
    no_eval.block_eval()
    loaded = importlib.import_module(f"s3prl.upstream.{module}")
    assert f"eval(cfg.{name})" in Path(loaded.__file__).read_text()
    assert loaded.eval("[(512, 10, 5)] + [(512, 3, 2)] * 2")[1:] == [(512, 3, 2)] * 2
    with pytest.raises(ConfigError):
        loaded.eval(CODE)
    assert not MARKER.exists()


def test_read_layers_reads_lists_of_numbers():
    from s3prl_ekd.compat.no_eval import read_layers

    assert read_layers("[4, 4, 4]") == [4, 4, 4]


@pytest.mark.parametrize("key", ["feat_type", "utter_module", "ObjectiveLoss"])
def test_code_in_the_yaml_of_an_upstream(tmp_path, key):
    from s3prl_ekd.downstream.run import check_upstream_paths
    from s3prl_ekd.errors import ConfigError

    config = tmp_path / "upstream.yaml"
    config.write_text(yaml.safe_dump({"kaldi": {key: "fbank"}}))
    check_upstream_paths("baseline_local", None, str(config))
    config.write_text(yaml.safe_dump({"kaldi": {key: CODE}}))
    with pytest.raises(ConfigError, match=rf"kaldi\.{key}\b.*{re.escape(CODE[:15])}"):
        check_upstream_paths("baseline_local", None, str(config))
