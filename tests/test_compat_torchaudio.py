"""torchaudio without its compiled extension; its load, save and info through soundfile."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd import compat
from s3prl_ekd.compat import SHIMS, audio, torchaudio_import
from s3prl_ekd.errors import DataError

from .conftest import run_python

SHIM = {shim.name: shim for shim in SHIMS}


BROKEN = """
import importlib, sys

class FailingFinder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise OSError("libcudart.so: cannot open shared object file")

sys.meta_path.insert(0, FailingFinder())
from s3prl_ekd.compat import SHIMS
from s3prl_ekd.errors import SetupError

shim = SHIMS[0]
assert shim.missing()
try:
    shim.apply()
except SetupError as error:
    modules = sorted(name for name in sys.modules if name == "torchaudio._extension")
    print(["SetupError", "libcudart" in str(error), modules])
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
    print([out[0].tolist(), "forced_align" in str(error)])
"""


def test_torchaudio_works_without_its_compiled_extension():
    filtered, raised = json.loads(
        run_python(BROKEN, "torchaudio._extension").replace("True", "true")
    )
    assert filtered == [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert raised


def test_torchaudio_that_fails_elsewhere_raises_and_leaves_no_replacement():
    assert run_python(BROKEN, "torchaudio.functional") == "['SetupError', True, []]"


def test_torchaudio_that_is_not_installed_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(ModuleNotFoundError, match="torchaudio"):
        torchaudio_import.IMPORT.missing()


def test_the_repair_names_the_libraries(monkeypatch):
    """It is given where the shim was applied; without these files torchaudio needs no shim."""
    monkeypatch.setattr(compat, "fired", lambda: ())
    assert compat.torchaudio_repair() == ""
    monkeypatch.setattr(compat, "fired", lambda: ("torchaudio",))
    command = compat.torchaudio_repair().partition("rm ")[2]
    libraries = [path.name for path in Path("/").glob(command.lstrip("/"))]
    lib = Path(importlib.util.find_spec("torchaudio").origin).parent / "lib"
    assert sorted(libraries) == sorted(path.name for path in lib.glob("*torchaudio*.so"))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """[time, channel] = [4000, 2], 16-bit integers."""
    return np.random.default_rng(0).integers(-20000, 20000, (4000, 2)).astype(np.int16)


@pytest.fixture(params=["wav", "flac"])
def recording(request, tmp_path, noise) -> Path:
    path = tmp_path / f"noise.{request.param}"
    soundfile.write(path, noise, 16000, subtype="PCM_16")
    return path


def test_load_returns_the_samples_of_the_file(recording, noise):
    wav, rate = audio.load(recording)
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
    wav, _ = audio.load(str(recording), **arguments)
    assert np.array_equal(wav.numpy(), noise[part].T / np.float32(32768))


def test_load_channels_last_and_from_memory(recording, noise):
    wav, _ = audio.load(io.BytesIO(recording.read_bytes()), channels_first=False)
    assert np.array_equal(wav.numpy(), noise / np.float32(32768))


def test_load_returns_integers_for_wav_only(recording, noise):
    wav, _ = audio.load(recording, normalize=False)
    if recording.suffix == ".wav":
        assert wav.dtype == torch.int16 and np.array_equal(wav.numpy(), noise.T)
    else:
        assert wav.dtype == torch.float32


def test_load_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match=r"missing\.wav"):
        audio.load(tmp_path / "missing.wav")
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(DataError, match=r"text\.wav"):
        audio.load(tmp_path / "text.wav")


@pytest.mark.parametrize("arguments", [{"frame_offset": -1}, {"num_frames": -2}])
def test_load_rejects_negative_counts(recording, arguments):
    with pytest.raises(ValueError, match="frame_offset.*num_frames"):
        audio.load(recording, **arguments)


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
    audio.save(tmp_path / name, tone, 16000, **arguments)  # [time]: one channel
    assert soundfile.info(tmp_path / name).subtype == subtype
    read, rate = soundfile.read(tmp_path / name)
    assert rate == 16000 and read.shape == (8000,)
    assert np.corrcoef(read, tone.numpy())[0, 1] > 0.99


def test_save_keeps_float_and_integer_samples_exactly(tmp_path, noise):
    wav = torch.from_numpy(noise.T.copy())
    audio.save(tmp_path / "a.wav", wav, 8000)
    assert np.array_equal(soundfile.read(tmp_path / "a.wav", dtype="int16")[0], noise)
    audio.save(tmp_path / "b.wav", wav.t() / 32768, 8000, channels_first=False)
    assert np.array_equal(soundfile.read(tmp_path / "b.wav")[0], noise / 32768)


@pytest.mark.parametrize(
    "name, wav, arguments, message",
    [
        ("a.xyz", torch.zeros(1, 4), {}, "xyz"),
        ("a.wav", torch.zeros(1, 1, 4), {}, r"\[1, 1, 4\]"),
        ("a.wav", torch.zeros(1, 4, dtype=torch.bool), {}, "bool"),
        ("a.flac", torch.zeros(1, 4), {"encoding": "ULAW"}, "ULAW"),
        ("a.flac", torch.zeros(1, 4), {"bits_per_sample": 64}, r"\b64\b"),
    ],
)
def test_save_rejects_unsupported_audio(tmp_path, name, wav, arguments, message):
    with pytest.raises(DataError, match=message):
        audio.save(tmp_path / name, wav, 16000, **arguments)


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
    assert audio.info(tmp_path / name) == audio.AudioMetaData(
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
    complete["torchaudio"].load = audio.load
    assert compat.audio_decoder() == (
        f"soundfile {metadata.version('soundfile')} (libsndfile {soundfile.__libsndfile_version__})"
    )
