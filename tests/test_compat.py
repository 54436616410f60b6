"""The shims: still needed on the pinned set, right in what they do, quiet where all is there."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import math
import os
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd import compat
from s3prl_ekd.compat import (
    SHIMS,
    audio,
    checkpoints,
    names,
    soundfile_io,
    sox,
    torchaudio_import,
)
from s3prl_ekd.errors import DataError, SetupError

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


def run_python(code: str, *args: str) -> str:
    """The last line that ``code`` prints in an interpreter of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


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


@pytest.fixture
def complete(monkeypatch) -> dict[str, ModuleType]:
    """Stand-ins of packages old enough to have all that s3prl asks for."""
    stubs = {
        name: ModuleType(name)
        for name in (
            "torchaudio",
            "torchaudio.sox_effects",
            "huggingface_hub",
            "distutils",
            "distutils.util",
        )
    }
    for name in ("load", "save", "info", "set_audio_backend"):
        setattr(stubs["torchaudio"], name, lambda *args: None)
    stubs["huggingface_hub"].HfFolder = stubs["huggingface_hub"].Repository = object
    for name, module in stubs.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what torch 2.5 did by itself
    monkeypatch.setattr(compat, "_fired", [])
    return stubs


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


# --- torchaudio without its compiled part


BROKEN = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise OSError("libcudart.so: cannot open shared object file")

sys.meta_path.insert(0, Refuse())
from s3prl_ekd.compat import SHIMS
from s3prl_ekd.errors import SetupError

shim = SHIMS[0]
assert shim.missing()
try:
    shim.apply()
except SetupError as error:
    left = sorted(name for name in sys.modules if name == "torchaudio._extension")
    print(["SetupError", "libcudart" in str(error), left])
    sys.exit()
assert not shim.missing()

import torch, torchaudio
impulse = torch.zeros(1, 6, dtype=torch.float64)
impulse[0, 0] = 1
# y[n] = x[n] + y[n-1] / 2
out = torchaudio.functional.lfilter(
    impulse, torch.tensor([1, -0.5]).double(), torch.tensor([1, 0]).double(), clamp=False
)
try:
    torchaudio.functional.forced_align(
        torch.zeros(1, 4, 3), torch.ones(1, 2, dtype=torch.int32), blank=0
    )
except RuntimeError as error:
    print([out[0].tolist(), "compiled part" in str(error)])
"""


def test_torchaudio_works_in_python_where_its_library_does_not_load():
    filtered, refused = json.loads(
        run_python(BROKEN, "torchaudio._extension").replace("True", "true")
    )
    assert filtered == [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert refused


def test_torchaudio_broken_elsewhere_is_one_sentence_and_leaves_no_stand_in():
    assert run_python(BROKEN, "torchaudio.functional") == "['SetupError', True, []]"


def test_torchaudio_that_is_not_installed_is_not_mended(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(ModuleNotFoundError, match="torchaudio"):
        torchaudio_import.IMPORT.missing()


# --- torchaudio.load, save, info


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """[time, channel] = [4000, 2], 16-bit integers."""
    return np.random.default_rng(0).integers(-20000, 20000, (4000, 2)).astype(np.int16)


@pytest.fixture(params=["wav", "flac"])
def recording(request, tmp_path, noise) -> Path:
    path = tmp_path / f"noise.{request.param}"
    soundfile.write(path, noise, 16000, subtype="PCM_16")
    return path


def test_load_gives_the_samples_of_the_file(recording, noise):
    wav, rate = soundfile_io.load(recording)
    assert rate == 16000 and wav.dtype == torch.float32 and wav.is_contiguous()
    assert np.array_equal(wav.numpy(), noise.T / np.float32(32768))


@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"frame_offset": 100}, slice(100, None)),
        ({"num_frames": 50}, slice(0, 50)),
        ({"frame_offset": 3990, "num_frames": 50}, slice(3990, 4000)),
        ({"frame_offset": 9999}, slice(4000, 4000)),
        ({"num_frames": 0}, slice(0, 0)),
    ],
)
def test_load_reads_a_part(recording, noise, arguments, part):
    wav, _ = soundfile_io.load(str(recording), **arguments)
    assert np.array_equal(wav.numpy(), noise[part].T / np.float32(32768))


def test_load_time_first_and_from_memory(recording, noise):
    wav, _ = soundfile_io.load(io.BytesIO(recording.read_bytes()), channels_first=False)
    assert np.array_equal(wav.numpy(), noise / np.float32(32768))


def test_load_keeps_the_integers_of_wav_only(recording, noise):
    wav, _ = soundfile_io.load(recording, normalize=False)
    if recording.suffix == ".wav":
        assert wav.dtype == torch.int16 and np.array_equal(wav.numpy(), noise.T)
    else:
        assert wav.dtype == torch.float32


def test_load_says_which_file(tmp_path):
    with pytest.raises(DataError, match="nowhere.wav is not there"):
        soundfile_io.load(tmp_path / "nowhere.wav")
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(DataError, match="text.wav cannot be read"):
        soundfile_io.load(tmp_path / "text.wav")


@pytest.mark.parametrize("arguments", [{"frame_offset": -1}, {"num_frames": -2}])
def test_load_refuses_negative_counts(recording, arguments):
    with pytest.raises(ValueError, match="0 or more"):
        soundfile_io.load(recording, **arguments)


@pytest.mark.parametrize(
    "name, arguments, subtype",
    [
        ("a.wav", {}, "FLOAT"),
        ("a.wav", {"bits_per_sample": 16}, "PCM_16"),
        ("a.wav", {"bits_per_sample": 8}, "PCM_U8"),
        ("a.wav", {"encoding": "PCM_S"}, "PCM_32"),
        ("a.wav", {"encoding": "ULAW"}, "ULAW"),
        ("a.flac", {}, "PCM_16"),
        ("a.flac", {"bits_per_sample": 8}, "PCM_S8"),
        ("a.ogg", {}, "VORBIS"),
        ("a.opus", {}, "OPUS"),
        ("a.bin", {"format": "wav"}, "FLOAT"),
    ],
)
def test_save_chooses_the_subtype(tmp_path, name, arguments, subtype):
    tone = 0.5 * torch.sin(torch.arange(8000) * 2 * math.pi * 300 / 16000)
    soundfile_io.save(tmp_path / name, tone, 16000, **arguments)  # [time]: one channel
    assert soundfile.info(tmp_path / name).subtype == subtype
    read, rate = soundfile.read(tmp_path / name)
    assert rate == 16000 and read.shape == (8000,)
    assert np.corrcoef(read, tone.numpy())[0, 1] > 0.99


def test_save_keeps_float_and_integer_samples_exactly(tmp_path, noise):
    wav = torch.from_numpy(noise.T.copy())
    soundfile_io.save(tmp_path / "a.wav", wav, 8000)
    assert np.array_equal(soundfile.read(tmp_path / "a.wav", dtype="int16")[0], noise)
    soundfile_io.save(tmp_path / "b.wav", wav.t() / 32768, 8000, channels_first=False)
    assert np.array_equal(soundfile.read(tmp_path / "b.wav")[0], noise / 32768)


@pytest.mark.parametrize(
    "name, wav, arguments, said",
    [
        ("a.xyz", torch.zeros(1, 4), {}, "xyz"),
        ("a.wav", torch.zeros(1, 1, 4), {}, r"\[1, 1, 4\]"),
        ("a.wav", torch.zeros(1, 4, dtype=torch.bool), {}, "bool"),
        ("a.flac", torch.zeros(1, 4), {"encoding": "ULAW"}, "ULAW"),
        ("a.flac", torch.zeros(1, 4), {"bits_per_sample": 64}, "64 bits"),
    ],
)
def test_save_refuses_what_it_cannot_write(tmp_path, name, wav, arguments, said):
    with pytest.raises(DataError, match=said):
        soundfile_io.save(tmp_path / name, wav, 16000, **arguments)


@pytest.mark.parametrize(
    "name, subtype, bits, encoding",
    [
        ("a.wav", "PCM_16", 16, "PCM_S"),
        ("a.wav", "FLOAT", 32, "PCM_F"),
        ("a.flac", "PCM_24", 24, "FLAC"),
        ("a.ogg", "OPUS", 0, "OPUS"),
    ],
)
def test_info(tmp_path, noise, name, subtype, bits, encoding):
    soundfile.write(tmp_path / name, noise, 16000, subtype=subtype)
    assert soundfile_io.info(tmp_path / name) == soundfile_io.AudioMetaData(
        sample_rate=16000,
        num_frames=4000,
        num_channels=2,
        bits_per_sample=bits,
        encoding=encoding,
    )


def test_torchaudio_itself_reads_and_writes(tmp_path, noise):
    import torchaudio

    torchaudio.save(str(tmp_path / "a.wav"), torch.from_numpy(noise.T / np.float32(32768)), 8000)
    wav, rate = torchaudio.load(str(tmp_path / "a.wav"))
    assert rate == 8000 and np.allclose(wav.numpy(), noise.T / 32768, atol=1e-4)
    assert torchaudio.info(str(tmp_path / "a.wav")).num_frames == 4000


@pytest.mark.parametrize("failure", [ImportError, RuntimeError, OSError])
def test_load_is_missing_when_its_decoder_fails(complete, failure):
    def load(uri):
        raise failure("no decoder")

    complete["torchaudio"].load = load
    assert audio.LOAD.missing()


def test_audio_decoder_names_the_library(complete):
    complete["torchaudio"].load = soundfile_io.load
    assert compat.audio_decoder() == (
        f"soundfile {metadata.version('soundfile')} (libsndfile {soundfile.__libsndfile_version__})"
    )


# --- torchaudio.sox_effects


def effects(wav, *chain, rate=16000):
    return sox.apply_effects_tensor(torch.tensor(wav), rate, [list(e) for e in chain])


def test_channels_mix_down_and_repeat():
    stereo = [[0.2, 0.4], [0.6, -0.4]]
    assert torch.allclose(effects(stereo, ("channels", "1"))[0], torch.tensor([[0.4, 0.0]]))
    four = effects(stereo, ("channels", "4"))[0]
    assert torch.equal(four, torch.tensor([stereo[0], stereo[1], stereo[0], stereo[1]]))


def test_norm_scales_all_channels_by_the_loudest_sample():
    wav, _ = effects([[0.1, -0.25], [0.05, 0.0]], ("norm",))
    assert torch.allclose(wav, torch.tensor([[0.4, -1.0], [0.2, 0.0]]))
    wav, _ = effects([[0.1, -0.25]], ("norm", "-20"))  # a tenth
    assert torch.allclose(wav, torch.tensor([[0.04, -0.1]]))
    assert torch.equal(effects([[0.0, 0.0]], ("norm",))[0], torch.zeros(1, 2))


def test_gain_in_decibel_clips_at_full_scale():
    wav, _ = effects([[0.02, -0.5]], ("gain", "20"))
    assert torch.allclose(wav, torch.tensor([[0.2, -1.0]]))


def test_trim_in_seconds_and_samples():
    wav = torch.arange(10.0).unsqueeze(0)
    for chain in (("trim", "0.2", "0.3"), ("trim", "2s", "3s")):
        assert effects(wav.tolist(), chain, rate=10)[0].tolist() == [[2, 3, 4]]
    assert effects(wav.tolist(), ("trim", "0.8"), rate=10)[0].tolist() == [[8, 9]]
    assert effects(wav.tolist(), ("trim", "5"), rate=10)[0].shape == (1, 0)


def sine(hertz: float, rate: int, seconds: float = 0.5) -> torch.Tensor:
    time = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hertz * time).float().unsqueeze(0)


@pytest.mark.parametrize("before, after", [(8000, 16000), (44100, 16000), (16000, 16000)])
def test_rate_resamples_a_tone(before, after):
    import torchaudio

    tone = sine(440, before)
    wav, rate = sox.apply_effects_tensor(tone, before, [["rate", str(after)]])
    assert rate == after and wav.shape == (1, after // 2)
    middle = slice(after // 8, -after // 8)  # away from the edges, where the filter starts
    assert torch.allclose(wav[:, middle], sine(440, after)[:, middle], atol=2e-3)
    assert torch.equal(wav, torchaudio.functional.resample(tone, before, after))


def test_speed_changes_the_rate_and_then_the_pitch():
    tone = sine(400, 16000)
    wav, rate = sox.apply_effects_tensor(tone, 16000, [["speed", "1.1"]])
    assert rate == 17600 and torch.equal(wav, tone)
    wav, rate = sox.apply_effects_tensor(tone, 16000, [["speed", "1.25"], ["rate", "16000"]])
    assert rate == 16000 and wav.shape == (1, 6400)
    assert torch.allclose(wav[:, 800:-800], sine(500, 16000, 0.4)[:, 800:-800], atol=2e-3)


def test_time_first_and_from_a_file(tmp_path, noise):
    soundfile.write(tmp_path / "a.wav", noise, 8000)
    chain = [["channels", "1"], ["trim", "0", "0.1"]]
    mono = noise[:800].mean(axis=1) / 32768
    wav, rate = sox.apply_effects_file(str(tmp_path / "a.wav"), chain)
    assert rate == 8000 and np.allclose(wav.numpy(), mono[None], atol=1e-6)
    wav, _ = sox.apply_effects_file(str(tmp_path / "a.wav"), chain, channels_first=False)
    assert np.allclose(wav.numpy(), mono[:, None], atol=1e-6)


def test_unknown_effect_is_refused_by_name():
    with pytest.raises(SetupError, match="'vad'.*channels, gain, norm, rate, speed, trim"):
        effects([[0.0]], ("rate", "16000"), ("vad", "-T", "0.25"))


@pytest.mark.parametrize(
    "effect",
    [("rate",), ("rate", "fast"), ("trim", "-1"), ("trim", "0", "=5"), ("norm", "1", "2")],
)
def test_arguments_that_are_not_understood(effect):
    with pytest.raises(SetupError, match=f"'{' '.join(effect)}' is not understood"):
        effects([[0.0, 0.0]], effect)


def test_s3prl_finds_the_effects():
    import torchaudio
    from torchaudio.sox_effects import apply_effects_file, apply_effects_tensor

    assert torchaudio.sox_effects.apply_effects_tensor is apply_effects_tensor
    assert callable(apply_effects_file)


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
