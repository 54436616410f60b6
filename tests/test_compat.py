"""The shims: still needed on the pinned set, right in what they do, quiet where all is there."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import os
import pickle
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from s3prl_ekd import compat
from s3prl_ekd.compat import SHIMS, checkpoints, names
from s3prl_ekd.errors import SetupError

from .conftest import run_python

ROOT = Path(__file__).resolve().parents[1]
SHIM = {shim.name: shim for shim in SHIMS}

# What the pinned set lacks. A False that turns True, or the other way round, is news: a shim
# may go, or a pin has moved. None where it is not for us to say.
EXPECTED = {
    "torchaudio": True if torch.version.cuda is None else None,  # a CUDA torch may load it
    "torchaudio.set_audio_backend": True,
    "torchaudio.load": True,
    "torchaudio.info": True,
    "torchaudio.sox_effects": True,
    "huggingface_hub.HfFolder": True,
    "distutils.util.strtobool": False,  # setuptools has it
    "torch.load": True,
}

# In a fresh interpreter: what is missing, what fires, what s3prl can import afterwards.
FRESH = """
import argparse, importlib, io, json, logging, pickle, sys

import s3prl_ekd.compat as compat

report = {"heavy": sorted({"torch", "torchaudio", "s3prl", "soundfile"} & set(sys.modules))}
report["missing"] = {shim.name: shim.missing() for shim in compat.SHIMS}

import torch

file = io.BytesIO()
torch.save({"Args": argparse.Namespace(lr=0.5)}, file)

def loads():
    file.seek(0)
    try:
        return torch.load(file)["Args"].lr
    except pickle.UnpicklingError:
        return "refused"

report["load_before"] = loads()
log = []
logger = logging.getLogger("s3prl_ekd.compat")
logger.setLevel(logging.DEBUG)
logger.addHandler(logging.Handler())
logger.handlers[0].emit = lambda record: log.append([record.levelname, record.getMessage()])
report["first"] = compat.apply()
report["log"] = list(log)

import huggingface_hub, soundfile, torchaudio

def state():
    return (
        dict(vars(torchaudio)),
        set(vars(huggingface_hub)),
        set(torch.serialization.get_safe_globals()),
        dict(sys.modules),
    )

before = state()
report["second"] = compat.apply()
report["unchanged"] = before == state() and len(log) == len(report["log"])
report["missing_after"] = {shim.name: shim.missing() for shim in compat.SHIMS}
report["load_after"] = loads()

failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
report["failed"] = failed
print(json.dumps(report))
"""
MODULES = [
    "s3prl.hub",
    "s3prl.nn",
    "s3prl.run_downstream",
    "s3prl.downstream.runner",
    *(
        f"s3prl.upstream.{family}.hubconf"
        for family in ("hubert", "wavlm", "wav2vec2", "data2vec", "unispeech_sat", "distiller")
    ),
    *(f"s3prl.downstream.{task}.expert" for task in ("asr", "emotion", "ctc")),
]


@pytest.fixture(scope="module")
def fresh() -> dict:
    return json.loads(run_python(FRESH, *MODULES))


@pytest.fixture(scope="module", autouse=True)
def applied():
    compat.apply()


def other_than_pinned() -> str:
    """Which installed versions are not those of constraints.txt; empty if all are."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    wanted = ("torch", "torchaudio", "huggingface_hub", "s3prl", "setuptools")
    have = {name: metadata.version(name).split("+")[0] for name in wanted}
    return ", ".join(f"{n} {v}, not {pins[n]}" for n, v in have.items() if v != pins[n])


# --- all together


def test_importing_compat_loads_nothing_heavy(fresh):
    assert fresh["heavy"] == []


def test_table_names_every_shim():
    assert [shim.name for shim in SHIMS] == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_shim_is_still_needed_on_pinned_versions(fresh, name):
    if different := other_than_pinned():
        pytest.skip(f"not the pinned set: {different}")
    if EXPECTED[name] is None:
        pytest.skip("depends on the CUDA builds of torch and torchaudio")
    assert fresh["missing"][name] is EXPECTED[name]


def test_what_was_missing_fires_and_nothing_is_missing_afterwards(fresh):
    # a torchaudio that does not import lacks everything; imported, it may have some of it
    assert set(fresh["first"]) <= {name for name, missing in fresh["missing"].items() if missing}
    assert not any(fresh["missing_after"].values())
    if not other_than_pinned():
        known = [name for name, missing in EXPECTED.items() if missing]
        assert [name for name in fresh["first"] if EXPECTED[name] is not None] == known


def test_the_log_names_each_shim_that_fired(fresh):
    *each, last = fresh["log"] or [["INFO", ""]]
    assert [text.split(": ")[0] for _, text in each] == fresh["first"]
    assert last[0] == "INFO" and all(name in last[1] for name in fresh["first"])


def test_second_apply_changes_nothing(fresh):
    assert fresh["second"] == fresh["first"]
    assert fresh["unchanged"]


def test_namespace_loads_by_default_only_after_apply(fresh):
    assert fresh["load_after"] == 0.5
    if "torch.load" in fresh["first"]:
        assert fresh["load_before"] == "refused"


def test_s3prl_imports_after_apply(fresh):
    assert fresh["failed"] == {}


NEEDLES = {
    "torchaudio": "import torchaudio",
    "torchaudio.load": "torchaudio.",
    "torchaudio.set_audio_backend": "torchaudio.set_audio_backend(",
    "torchaudio.info": "torchaudio.info(",
    "torchaudio.sox_effects": "from torchaudio.sox_effects import",
    "huggingface_hub.HfFolder": "HfFolder",
    "distutils.util.strtobool": "from distutils.util import strtobool",
    "torch.load": "torch.load(",
}


@pytest.mark.skipif(metadata.version("s3prl") != "0.4.18", reason="line numbers of s3prl 0.4.18")
@pytest.mark.parametrize("name, place", [(s.name, place) for s in SHIMS for place in s.needed_by])
def test_needed_by_points_at_the_line(name, place):
    file, number = place.split(":")
    source = Path(importlib.util.find_spec("s3prl").origin).parent / file
    assert NEEDLES[name] in source.read_text(encoding="utf-8").splitlines()[int(number) - 1]


# --- nothing fires where everything exists


def test_nothing_fires_where_everything_exists(complete):
    before = {name: dict(vars(module)) for name, module in complete.items()}
    named = list(torch.serialization.get_safe_globals())
    assert compat.apply() == ()
    assert {name: dict(vars(module)) for name, module in complete.items()} == before
    assert list(torch.serialization.get_safe_globals()) == named


@pytest.mark.parametrize(
    "module, attribute, name",
    [
        ("torchaudio", "set_audio_backend", "torchaudio.set_audio_backend"),
        ("torchaudio", "load", "torchaudio.load"),
        ("torchaudio", "info", "torchaudio.info"),
        ("huggingface_hub", "HfFolder", "huggingface_hub.HfFolder"),
        ("huggingface_hub", "Repository", "huggingface_hub.HfFolder"),
    ],
)
def test_exactly_the_missing_thing_fires(complete, module, attribute, name):
    delattr(complete[module], attribute)
    assert compat.apply() == (name,)
    assert hasattr(complete[module], attribute)


# --- names


def test_hub_names_raise_a_sentence_when_used(complete):
    hub = complete["huggingface_hub"]
    del hub.HfFolder, hub.Repository
    names.HUGGINGFACE_HUB.apply()
    with pytest.raises(SetupError, match="HfFolder.get_token does not exist"):
        hub.HfFolder.get_token()
    with pytest.raises(SetupError, match="leave out --hub huggingface"):
        hub.Repository("folder", clone_from="model")
    assert not hasattr(hub.Repository, "__wrapped__")  # looked at, not used


def test_strtobool_without_any_distutils(monkeypatch):
    for name in ("distutils", "distutils.util", "setuptools"):
        monkeypatch.setitem(sys.modules, name, None)
    assert names.DISTUTILS.missing()
    names.DISTUTILS.apply()
    assert not names.DISTUTILS.missing()
    strtobool = importlib.import_module("distutils.util").strtobool
    assert strtobool is names.strtobool
    assert [strtobool(word) for word in ("y", "Yes", "TRUE", "on", "1")] == [1] * 5
    assert [strtobool(word) for word in ("n", "No", "FALSE", "off", "0")] == [0] * 5
    with pytest.raises(ValueError, match="'maybe'"):
        strtobool("maybe")


# --- torch.load


@pytest.fixture
def named():
    """Name the classes, as the shim does, on a torch that does not need it too."""
    new = [
        known
        for known in compat.checkpoint_globals()
        if known not in torch.serialization.get_safe_globals()
    ]
    with torch.serialization.safe_globals(new):
        yield


@pytest.fixture(params=["optimizers", "s3prl.optimizers"])
def schedule(request, monkeypatch):
    """s3prl's schedule, from a module of either name: its own copy of s3prl's source."""
    spec = importlib.util.spec_from_file_location(
        "optimizers", importlib.util.find_spec("s3prl.optimizers").origin
    )
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        if request.param == "optimizers":
            patch.setitem(sys.modules, "optimizers", module)
            spec.loader.exec_module(module)
        yield importlib.import_module(request.param).WarmupLinearSchedule(warmup=0.5, t_total=10)


def test_pretrain_checkpoint_loads_with_weights_only(tmp_path, named, schedule, monkeypatch):
    args = argparse.Namespace(upstream="ekd", local_rank=None, seed=1337)
    groups = [{"lr": 2e-4, "schedule": schedule}]
    path = tmp_path / "states-1.ckpt"
    torch.save({"Args": args, "Step": 1, "Optimizer": {"param_groups": groups}}, path)
    monkeypatch.delitem(sys.modules, "optimizers", raising=False)  # as outside s3prl's folder
    states = torch.load(path, map_location="cpu", weights_only=True)
    assert states["Args"] == args
    loaded = states["Optimizer"]["param_groups"][0]["schedule"]
    # up to 1 at half of 10 steps, down to 0 at the end
    assert [loaded.get_lr(step) for step in (1, 5, 8, 10)] == pytest.approx([0.2, 1, 0.4, 0])
    assert "optimizers" not in sys.modules

    again = io.BytesIO()
    torch.save(states, again)
    again.seek(0)
    twice = torch.load(again, weights_only=True)["Optimizer"]["param_groups"][0]["schedule"]
    assert type(twice) is importlib.import_module("s3prl.optimizers").WarmupLinearSchedule


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoint_with_another_class_is_still_refused(tmp_path, named):
    torch.save({"Args": argparse.Namespace(), "x": Evil(tmp_path / "evil")}, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not (tmp_path / "evil").exists()
    if checkpoints.TORCH_LOAD.name in compat.fired():  # and so by default
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "a.ckpt")
