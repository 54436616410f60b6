"""The shims: needed with the pinned versions, correct, and inactive where nothing is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import pickle
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from s3prl_ekd import compat
from s3prl_ekd.compat import SHIMS, checkpoints, names
from s3prl_ekd.errors import CheckpointError, SetupError
from s3prl_ekd.system.s3prl_distribution import installation

from .conftest import CreatesFolder, run_python

ROOT = Path(__file__).resolve().parents[1]
SHIM = {shim.name: shim for shim in SHIMS}

# Whether each feature is missing with the pinned versions. If a value changes, a shim can be
# removed or a pin has changed. None: depends on the build.
EXPECTED = {
    "torchaudio": True if torch.version.cuda is None else None,  # a CUDA build may load it
    "torchaudio.set_audio_backend": True,
    "torchaudio.load": True,
    "torchaudio.info": True,
    "torchaudio.sox_effects": True,
    "huggingface_hub.HfFolder": True,
    "distutils.util.strtobool": False,  # setuptools has it
    "torch.load": True,
    "catalyst.data.sampler": True,
}

# Run in a new interpreter: which features are missing, which shims fire, which modules of s3prl can
# be imported afterwards.
REPORT = """
import argparse, importlib, io, json, logging, pickle, sys

import s3prl_ekd.compat as compat

report = {"imported": sorted({"torch", "torchaudio", "s3prl", "soundfile"} & set(sys.modules))}
report["missing"] = {shim.name: shim.missing() for shim in compat.SHIMS}

import torch

file = io.BytesIO()
torch.save({"Args": argparse.Namespace(lr=0.5)}, file)

def loads():
    file.seek(0)
    try:
        return torch.load(file)["Args"].lr
    except pickle.UnpicklingError:
        return "rejected"

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

first_state = state()
report["second"] = compat.apply()
report["unchanged"] = first_state == state() and len(log) == len(report["log"])
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
def report() -> dict:
    return json.loads(run_python(REPORT, *MODULES))


def unpinned_versions() -> str:
    """The installed versions that differ from constraints.txt, as text; empty if none does."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    packages = ("torch", "torchaudio", "huggingface_hub", "setuptools")
    installed = {name: metadata.version(name).split("+")[0] for name in packages}
    (claim,) = installation().claims  # s3prl or espnet-s3prl
    installed[claim.name] = claim.version
    return ", ".join(
        f"{n} {v}, not {pins.get(n, 's3prl')}" for n, v in installed.items() if v != pins.get(n)
    )


# --- all shims


def test_importing_compat_imports_none_of_the_packages_it_patches(report):
    assert report["imported"] == []


def test_expected_lists_every_shim():
    assert [shim.name for shim in SHIMS] == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_shim_is_still_needed_on_pinned_versions(report, name):
    if different := unpinned_versions():
        pytest.skip(f"not the pinned versions: {different}")
    if EXPECTED[name] is None:
        pytest.skip("depends on the CUDA builds of torch and torchaudio")
    assert report["missing"][name] is EXPECTED[name]


def test_shims_of_missing_features_fire_and_nothing_is_missing_afterwards(report):
    # a torchaudio that cannot be imported lacks every attribute; once imported, it may have some
    assert set(report["first"]) <= {name for name, missing in report["missing"].items() if missing}
    assert not any(report["missing_after"].values())
    if not unpinned_versions():
        expected = [name for name, missing in EXPECTED.items() if missing]
        assert [name for name in report["first"] if EXPECTED[name] is not None] == expected


def test_the_log_names_each_shim_that_fired(report):
    *details, summary = report["log"] or [["INFO", ""]]
    assert [text.split(": ")[0] for _, text in details] == report["first"]
    assert summary[0] == "INFO" and all(name in summary[1] for name in report["first"])


def test_second_apply_changes_nothing(report):
    assert report["second"] == report["first"]
    assert report["unchanged"]


def test_namespace_loads_by_default_only_after_apply(report):
    assert report["load_after"] == 0.5
    if "torch.load" in report["first"]:
        assert report["load_before"] == "rejected"


def test_s3prl_imports_after_apply(report):
    assert report["failed"] == {}


NEEDLES = {
    "torchaudio": "import torchaudio",
    "torchaudio.load": "torchaudio.",
    "torchaudio.set_audio_backend": "torchaudio.set_audio_backend(",
    "torchaudio.info": "torchaudio.info(",
    "torchaudio.sox_effects": "from torchaudio.sox_effects import",
    "huggingface_hub.HfFolder": "HfFolder",
    "distutils.util.strtobool": "from distutils.util import strtobool",
    "torch.load": "torch.load(",
    "catalyst.data.sampler": "from catalyst.data.sampler import",
}


@pytest.mark.skipif(
    not str(installation()).startswith("s3prl 0.4.18"), reason="line numbers of s3prl 0.4.18"
)
@pytest.mark.parametrize("name, line", [(s.name, line) for s in SHIMS for line in s.needed_by])
def test_needed_by_points_at_a_line_that_uses_the_feature(name, line):
    file, number = line.split(":")
    source = Path(importlib.util.find_spec("s3prl").origin).parent / file
    assert NEEDLES[name] in source.read_text(encoding="utf-8").splitlines()[int(number) - 1]


# --- no shim fires if nothing is missing


def test_no_shim_fires_if_nothing_is_missing(complete):
    modules = {name: dict(vars(module)) for name, module in complete.items()}
    safe_globals = list(torch.serialization.get_safe_globals())
    assert compat.apply() == ()
    assert {name: dict(vars(module)) for name, module in complete.items()} == modules
    assert list(torch.serialization.get_safe_globals()) == safe_globals


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
def test_only_the_shim_of_the_missing_attribute_fires(complete, module, attribute, name):
    delattr(complete[module], attribute)
    assert compat.apply() == (name,)
    assert hasattr(complete[module], attribute)


# --- names


def test_removed_hub_classes_raise_when_used(complete):
    hub = complete["huggingface_hub"]
    del hub.HfFolder, hub.Repository
    names.HUGGINGFACE_HUB.apply()
    with pytest.raises(SetupError, match=r"HfFolder\.get_token"):
        hub.HfFolder.get_token()
    with pytest.raises(SetupError, match=r"Repository.*--hub huggingface"):
        hub.Repository("folder", clone_from="model")
    assert not hasattr(hub.Repository, "__wrapped__")  # inspection does not raise


def test_strtobool_without_any_distutils(monkeypatch):
    for name in ("distutils", "distutils.util", "setuptools"):
        monkeypatch.setitem(sys.modules, name, None)
    assert names.DISTUTILS.missing()
    names.DISTUTILS.apply()
    assert not names.DISTUTILS.missing()
    strtobool = importlib.import_module("distutils.util").strtobool
    assert strtobool is names.strtobool
    assert [strtobool(text) for text in ("y", "Yes", "TRUE", "on", "1")] == [1] * 5
    assert [strtobool(text) for text in ("n", "No", "FALSE", "off", "0")] == [0] * 5
    with pytest.raises(ValueError, match="'maybe'"):
        strtobool("maybe")


# --- torch.load


@pytest.fixture
def safe_globals():
    """Add the classes to torch's safe globals, also with a torch that the shim leaves alone."""
    missing = [
        cls
        for cls in compat.checkpoint_globals()
        if cls not in torch.serialization.get_safe_globals()
    ]
    with torch.serialization.safe_globals(missing):
        yield


@pytest.fixture(params=["optimizers", "s3prl.optimizers"])
def schedule(request, monkeypatch):
    """s3prl's schedule, from ``s3prl.optimizers`` or from a copy imported as ``optimizers``."""
    spec = importlib.util.spec_from_file_location(
        "optimizers", importlib.util.find_spec("s3prl.optimizers").origin
    )
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        if request.param == "optimizers":
            patch.setitem(sys.modules, "optimizers", module)
            spec.loader.exec_module(module)
        yield importlib.import_module(request.param).WarmupLinearSchedule(warmup=0.5, t_total=10)


def test_pretrain_checkpoint_loads_with_weights_only(tmp_path, safe_globals, schedule, monkeypatch):
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

    resaved = io.BytesIO()
    torch.save(states, resaved)
    resaved.seek(0)
    reloaded = torch.load(resaved, weights_only=True)["Optimizer"]["param_groups"][0]["schedule"]
    assert type(reloaded) is importlib.import_module("s3prl.optimizers").WarmupLinearSchedule


def test_checkpoint_with_another_class_is_still_rejected(tmp_path, safe_globals):
    torch.save(
        {"Args": argparse.Namespace(), "x": CreatesFolder(tmp_path / "evil")}, tmp_path / "a.ckpt"
    )
    with pytest.raises((pickle.UnpicklingError, CheckpointError), match="mkdir"):
        torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not (tmp_path / "evil").exists()
    if checkpoints.TORCH_LOAD.name in compat.fired():  # also without weights_only=True
        with pytest.raises((pickle.UnpicklingError, CheckpointError)):
            torch.load(tmp_path / "a.ckpt")
