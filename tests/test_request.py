"""Typed requests: s3prl's parsers read the same values; guards are undone on exit."""

import builtins
import functools
import importlib
import inspect
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import s3prl_ekd
from s3prl_ekd import launch
from s3prl_ekd.compat import voxceleb1_cache
from s3prl_ekd.downstream.run import downstream_guards
from s3prl_ekd.errors import SetupError
from s3prl_ekd.request import (
    CacheOptions,
    DownstreamRequest,
    NoisyTest,
    PretrainRequest,
    check_seed,
)
from s3prl_ekd.workspace import write_workspace

DOWNSTREAM = {
    "short": "-m train -u fbank -d asr -n x -v fold2 -s last -k a.pt -g b.yaml -c c.yaml",
    "long": "--mode=evaluate --evaluate_split dev --upstream=fbank --expdir y --seed 0",
    "other options": "-m train -n x -f -r -l 3 --upstream_feature_normalize --backend gloo",
    "a dash": "-m train -n x --expdir=-odd --device=cpu -o config.a=-1",
    "twice": "-m train -m evaluate -n x -n y --local_rank 1 --local_rank 2",
    "equals": "-m train -n x -o config.a='b=c',,args.expdir='z'",
}
PRETRAIN = {
    "short": "-u ekd -n x -g g.yaml -c c.yaml -o config.a=1",
    "long": "--upstream=ekd --expname x --expdir y --seed=7 --device cpu --multi_gpu",
}


def read_by_s3prl(monkeypatch, name, argv):
    """The arguments as parsed by s3prl's script."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    script = launch.import_script(name)
    read = getattr(script, f"get_{name.removeprefix('run_')}_args")
    return vars(read()[0])


@pytest.mark.parametrize("text", DOWNSTREAM.values(), ids=DOWNSTREAM)
def test_s3prl_parses_a_downstream_request_like_the_command(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for path in ("downstream/asr/config.yaml", "downstream/None/config.yaml", "c.yaml"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")
    command = text.split()
    argv = DownstreamRequest.parse(command).argv()
    escaped = [word.replace("'b=c'", r"'b\x3dc'") for word in command]  # s3prl splits at each =
    read = functools.partial(read_by_s3prl, monkeypatch, "run_downstream")
    assert read(argv) == read(escaped)


@pytest.mark.parametrize("text", PRETRAIN.values(), ids=PRETRAIN)
def test_s3prl_parses_a_pretrain_request_like_the_command(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write_workspace(tmp_path)
    for name in ("c.yaml", "g.yaml"):
        Path(name).write_text("{}")
    read = functools.partial(read_by_s3prl, monkeypatch, "run_pretrain")
    assert read(PretrainRequest.parse(text.split()).argv()) == read(text.split())


def test_parse_inverts_command():
    request = DownstreamRequest(
        mode="evaluate",
        evaluate_split="dev",
        past_exp="a b/states-1.ckpt",
        override="config.a=1",
        auto_resume=True,
        seed=0,
        noise=NoisyTest("-street", -2.5, 3),
        cache=CacheOptions("-cache", 2.5),
        upstream_layer_selection=-1,
        upstream_trainable=True,
        upstream_feature_normalize=True,
        upstream_refresh=True,
        passthrough=("--verbose",),
    )
    script, *argv = request.command()
    assert script == "run_downstream.py" and DownstreamRequest.parse(argv) == request
    argv = request.argv()
    assert not any("noise" in argument or "cache" in argument for argument in argv)


@pytest.mark.parametrize(
    ("option", "argv"),
    [
        ("-e", ["-m", "train", "-e"]),
        ("--seed", ["--seed", "x"]),
        ("--seed", ["--seed=-1"]),
        ("--seed", ["--seed", str(2**32)]),
        ("--auto_resume", ["--auto_resume=yes"]),
        ("-o", ["-o", "-p"]),
    ],
)
def test_invalid_arguments(option, argv):
    with pytest.raises(SetupError, match=rf"argument (-\w/)?{option}\b"):
        DownstreamRequest.parse(argv)


@pytest.mark.parametrize(
    "folder, argv",
    [
        ("z", ["-n", "x", "-p", "y", "-o", "args.expdir='z'"]),
        ("y", ["-n", "x", "-p", "y", "-e", "e/states-1.ckpt"]),
        ("result/downstream/x", ["-n", "x", "-e", "e/states-1.ckpt"]),
        ("e", ["-e", "e/states-1.ckpt"]),
        (None, []),
    ],
)
def test_folder(folder, argv):
    assert DownstreamRequest.parse(argv).folder == (folder and Path(folder))


def patched_globals():
    from s3prl.upstream.distiller import model

    return (
        *(torch.load, torch.save, builtins.isinstance, list(sys.argv)),
        vars(model).get("eval"),
        getattr(sys.modules.get(voxceleb1_cache.DATASET), "CACHE_PATH", None),
    )


def test_guards_are_undone_after_an_exception(tmp_path):
    torch.save({"Step": 1}, tmp_path / "states-1.ckpt")
    request = DownstreamRequest(mode="train", past_exp=str(tmp_path / "states-1.ckpt"))
    before = patched_globals()
    with pytest.raises(ZeroDivisionError), downstream_guards(request):
        assert sys.argv == ["run_downstream.py", *request.argv()]
        assert (torch.load, torch.save) != before[:2]
        subprocess.run([sys.executable, "-c", LOCK, str(tmp_path)], check=True)
        raise ZeroDivisionError
    assert patched_globals() == before


LOCK = """
import sys
from s3prl_ekd.errors import SetupError
from s3prl_ekd.system.lock import FolderLock
try:
    FolderLock(sys.argv[1]).__enter__()
except SetupError as error:
    sys.exit(sys.argv[1] not in str(error))
sys.exit(1)
"""


@pytest.mark.parametrize("name", ["run_pretrain", "run_downstream"])
def test_three_frames_of_ours_above_s3prls_script(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_workspace(tmp_path)
    package, counts = str(Path(s3prl_ekd.__file__).parent), []

    def main():
        files = (frame.filename for frame in inspect.stack())
        counts.append(sum(file.startswith(package) for file in files))

    script = SimpleNamespace(main=main, Runner=object)
    monkeypatch.setattr(launch, "import_script", lambda name: script)
    command = getattr(launch, name)
    module = importlib.import_module(f"s3prl_ekd.{name.removeprefix('run_')}.run")
    request = PretrainRequest if name == "run_pretrain" else DownstreamRequest
    monkeypatch.setattr(module, "prepare", lambda argv: request(upstream="fbank"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    assert command() == 0 and counts == [3]


@pytest.mark.parametrize(
    "module, argv, text",
    [
        ("downstream", "-m train -u fbank -n x", "-d asr"),
        ("downstream", "-m train -u fbank -d asr -o args.expname='x'", "-n"),
        ("downstream", "-m train -u fbank -d asr -n x", "downstream/asr/config.yaml"),
        ("downstream", "-m train --noise a --snr 5", "-m evaluate"),
        ("downstream", "-m train -u ekd_student -k none.pt", "none.pt"),
        ("pretrain", "-u ekd -n x", "s3prl-ekd init ."),
    ],
)
def test_options_are_checked_before_torch_is_imported(tmp_path, module, argv, text):
    code = (
        f"import sys; from s3prl_ekd.{module}.run import prepare\n"
        "try:\n    prepare(sys.argv[1:])\nexcept Exception as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *argv.split()], cwd=tmp_path, capture_output=True, text=True
    )
    message, torch_imported = result.stdout.splitlines()
    assert text in message and torch_imported == "False"


def test_a_resumed_run_has_the_seed_of_its_checkpoint():
    states = {"Args": Namespace(seed=3)}
    with pytest.raises(SetupError, match=r"--seed 7\b.*\b3\b"):
        check_seed(PretrainRequest(seed=7, past_exp="states-1.ckpt"), states)
    for seed in (None, 3):
        check_seed(PretrainRequest(seed=seed, past_exp="states-1.ckpt"), states)
