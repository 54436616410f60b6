"""A command as a typed request: s3prl's own parsers read it as typed; guards are undone."""

import builtins
import functools
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import s3prl_ekd
from s3prl_ekd import launch
from s3prl_ekd.compat import voxceleb1_cache
from s3prl_ekd.downstream.run import downstream_guards
from s3prl_ekd.errors import SetupError
from s3prl_ekd.request import CacheOptions, DownstreamRequest, NoisyTest, PretrainRequest
from s3prl_ekd.workspace import write_workspace

DOWNSTREAM = {
    "short": "-m train -u fbank -d asr -n x -v fold2 -s last -k a.pt -g b.yaml -c c.yaml",
    "long": "--mode=evaluate --evaluate_split dev --upstream=fbank --expdir y --seed 0",
    "passed through": "-m train -n x -f -r -l 3 --upstream_feature_normalize --backend gloo",
    "a dash": "-m train -n x --expdir=-odd --device=cpu -o config.a=-1",
    "twice": "-m train -m evaluate -n x -n y --local_rank 1 --local_rank 2",
    "equals": "-m train -n x -o config.a='b=c',,args.expdir='z'",
}
PRETRAIN = {
    "short": "-u ekd -n x -g g.yaml -c c.yaml -o config.a=1",
    "long": "--upstream=ekd --expname x --expdir y --seed=7 --device cpu --multi_gpu",
}


def read_by_s3prl(monkeypatch, name, argv):
    """The arguments as the parser of s3prl's script gives them."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    script = launch.import_script(name)
    read = getattr(script, f"get_{name.removeprefix('run_')}_args")
    return vars(read()[0])


@pytest.mark.parametrize("text", DOWNSTREAM.values(), ids=DOWNSTREAM)
def test_s3prl_reads_a_downstream_request_as_typed(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for path in ("downstream/asr/config.yaml", "downstream/None/config.yaml", "c.yaml"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")
    typed = text.split()
    argv = DownstreamRequest.parse(typed).argv()
    escaped = [word.replace("'b=c'", r"'b\x3dc'") for word in typed]  # s3prl splits at each sign
    read = functools.partial(read_by_s3prl, monkeypatch, "run_downstream")
    assert read(argv) == read(escaped)


@pytest.mark.parametrize("text", PRETRAIN.values(), ids=PRETRAIN)
def test_s3prl_reads_a_pretrain_request_as_typed(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write_workspace(tmp_path)
    for name in ("c.yaml", "g.yaml"):
        Path(name).write_text("{}")
    read = functools.partial(read_by_s3prl, monkeypatch, "run_pretrain")
    assert read(PretrainRequest.parse(text.split()).argv()) == read(text.split())


def test_a_command_is_read_as_it_was_written():
    request = DownstreamRequest(
        mode="evaluate",
        evaluate_split="dev",
        past_exp="a b/states-1.ckpt",
        override="config.a=1",
        auto_resume=True,
        seed=0,
        noise=NoisyTest("-street", -2.5, 3),
        cache=CacheOptions("-kept", 2.5),
        passthrough=("-f",),
    )
    script, *argv = request.command()
    assert script == "run_downstream.py" and DownstreamRequest.parse(argv) == request
    assert not any("noise" in word or "cache" in word for word in request.argv())


@pytest.mark.parametrize(
    "argv", [["-m", "train", "-e"], ["--seed", "x"], ["--auto_resume=yes"], ["-o", "-p"]]
)
def test_what_cannot_be_read_is_a_sentence(argv):
    with pytest.raises(SetupError, match="the arguments cannot be read: "):
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
def test_the_folder_that_is_written_to(folder, argv):
    assert DownstreamRequest.parse(argv).folder == (folder and Path(folder))


def globals_now():
    from s3prl.upstream.distiller import model

    return (
        *(torch.load, torch.save, builtins.isinstance, list(sys.argv)),
        vars(model).get("eval"),
        getattr(sys.modules.get(voxceleb1_cache.DATASET), "CACHE_PATH", None),
    )


def test_guards_are_undone_whatever_happens(tmp_path):
    torch.save({"Step": 1}, tmp_path / "states-1.ckpt")
    request = DownstreamRequest(mode="train", past_exp=str(tmp_path / "states-1.ckpt"))
    before = globals_now()
    with pytest.raises(ZeroDivisionError), downstream_guards(request):
        assert sys.argv == ["run_downstream.py", *request.argv()]
        assert (torch.load, torch.save) != before[:2]
        subprocess.run([sys.executable, "-c", LOCK, str(tmp_path)], check=True)
        raise ZeroDivisionError
    assert globals_now() == before


LOCK = """
import sys
from s3prl_ekd.errors import SetupError
from s3prl_ekd.system.lock import FolderLock
try:
    FolderLock(sys.argv[1]).__enter__()
except SetupError as error:
    sys.exit("is in use" not in str(error))
sys.exit(1)
"""


@pytest.mark.parametrize("name", ["run_pretrain", "run_downstream"])
def test_three_calls_of_ours_lead_to_s3prls_script(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_workspace(tmp_path)
    package, seen = str(Path(s3prl_ekd.__file__).parent), []

    def main():
        files = (frame.filename for frame in inspect.stack())
        seen.append(sum(file.startswith(package) for file in files))

    script = SimpleNamespace(main=main, Runner=object)
    monkeypatch.setattr(launch, "import_script", lambda name: script)
    command = getattr(launch, name)
    module = importlib.import_module(f"s3prl_ekd.{name.removeprefix('run_')}.run")
    request = PretrainRequest if name == "run_pretrain" else DownstreamRequest
    monkeypatch.setattr(module, "prepare", lambda argv: request(upstream="fbank"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    assert command() == 0 and seen == [3]


@pytest.mark.parametrize(
    "module, argv, said",
    [
        ("downstream", "-m train -u fbank -n x", "name the task"),
        ("downstream", "-m train -u fbank -d asr -n x", "there is no configuration"),
        ("downstream", "-m train --noise a --snr 5", "with -m evaluate only"),
        ("downstream", "-m train -u ekd_student -k none.pt", "there is no such file"),
        ("pretrain", "-u ekd -n x", "is set up in this folder"),
    ],
)
def test_what_was_typed_is_looked_at_before_torch_is_imported(tmp_path, module, argv, said):
    code = (
        f"import sys; from s3prl_ekd.{module}.run import prepare\n"
        "try:\n    prepare(sys.argv[1:])\nexcept Exception as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv.split()], cwd=tmp_path, capture_output=True, text=True
    )
    *sentence, torch_is_there = done.stdout.splitlines()
    assert said in sentence[0] and torch_is_there == "False"
