"""``s3prl-ekd features``: hidden states of audio files in a safetensors file."""

import hashlib
import io
import os
import re

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

import s3prl_ekd
from s3prl_ekd.cli import main
from s3prl_ekd.distill.student import Student
from s3prl_ekd.errors import ConfigError, DataError
from s3prl_ekd.export.features import choose_layers, collect_audio, write_features
from s3prl_ekd.files.safetensors_file import SafetensorsWriter
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.system.devices import choose_device

from .conftest import command, make_sound, run_python


@pytest.fixture
def audio(tmp_path):
    """Two good files, one too short for a frame, three bad files."""
    root = tmp_path / "audio"
    (root / "sub").mkdir(parents=True)
    soundfile.write(root / "one.flac", make_sound(0.7, seed=1), 16000)
    soundfile.write(root / "sub" / "zwei é.wav", make_sound(0.4, seed=2), 16000)
    soundfile.write(root / "short.wav", make_sound(0.01, seed=3), 16000)
    soundfile.write(
        root / "nan.wav", np.full(1600, np.nan, dtype=np.float32), 16000, subtype="FLOAT"
    )
    (root / "empty.flac").touch()
    (root / "text.wav").write_text("not audio")
    return root


def test_features_equal_the_upstream_on_single_files(student_file, audio, tmp_path):
    result = command("features", student_file, audio, "-o", "f.safetensors", cwd=tmp_path)
    features = load_file(tmp_path / "f.safetensors")
    names = ("one.flac", "sub/zwei é.wav", "short.wav")
    assert set(features) == {f"{name}#{layer}" for name in names for layer in range(3)}

    from s3prl import hub

    s3prl_ekd.register()
    upstream = hub.ekd_student(ckpt=str(student_file)).eval()
    for name in names:
        wave = torch.from_numpy(soundfile.read(audio / name, dtype="float32")[0])
        with torch.no_grad():
            states = upstream([wave])["hidden_states"]
        for layer, state in enumerate(states):
            feature = features[f"{name}#{layer}"]
            assert feature.dtype == torch.float32 and feature.shape == state.shape[1:]
            assert torch.allclose(feature, state[0], atol=1e-6)
    assert features["one.flac#0"].shape == ((11200 - 400) // 320 + 1, 48)

    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["sample_rate"] == "16000" and metadata["stride"] == "320"
    assert metadata["layers"] == "0,1,2" and metadata["dim"] == "48"
    assert metadata["checkpoint_sha256"] == hashlib.sha256(student_file.read_bytes()).hexdigest()
    assert str(tmp_path) not in str(metadata)

    assert re.search(r"\b3\b.*f\.safetensors\.skipped\.txt", result.stdout)
    skipped = (tmp_path / "f.safetensors.skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["empty.flac", "nan.wav", "text.wav"]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_and_selected_layers(student_file, audio, tmp_path, dtype, bound):
    files = collect_audio([str(audio / "one.flac")])
    single, half = tmp_path / "single", tmp_path / "half"
    write_features(student_file, files, single)
    write_features(student_file, files, half, layers="0,2", dtype=dtype)
    (key,) = files
    features, exact = load_file(half), load_file(single)
    assert set(features) == {f"{key}#0", f"{key}#2"}
    for name, value in features.items():
        assert value.dtype == dtype
        assert torch.allclose(value.float(), exact[name], rtol=bound, atol=bound)
    assert half.stat().st_size < 0.5 * single.stat().st_size


def test_a_file_with_a_value_too_large_for_float16_is_bad(student_settings, audio, tmp_path):
    student = Student(student_settings)
    with torch.no_grad():
        student.backbone.encoder.layers[1].final_layer_norm.weight.fill_(1e6)
    path = tmp_path / "large.pt"
    write_student(LoadedStudent(student, None, {}, {}), path)
    files = collect_audio([str(audio / "one.flac")])
    with pytest.raises(DataError, match="float16.*--dtype float32"):
        write_features(path, files, tmp_path / "f", dtype=torch.float16)
    assert not (tmp_path / "f").exists()
    assert write_features(path, files, tmp_path / "f").files == 1


def test_layers():
    assert choose_layers("all", 3) == [0, 1, 2]
    assert choose_layers("last", 3) == [2]
    assert choose_layers("2,0", 3) == [2, 0]
    for text in ("3", "-1", "0,0", "first", "", "1,,2"):
        with pytest.raises(ConfigError, match="--layers"):
            choose_layers(text, 3)


def test_file_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.wav", "a/b/y.FLAC", "a/notes.txt", "c/x.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(collect_audio(["a"])) == ["b/y.FLAC", "x.wav"]
    assert list(collect_audio(["./a/x.wav", "c/x.wav"])) == ["a/x.wav", "c/x.wav"]
    (tmp_path / "list").write_text("c/x.wav\n\n  a/x.wav\n")
    assert list(collect_audio([], [tmp_path / "list"])) == ["c/x.wav", "a/x.wav"]
    with pytest.raises(DataError, match=r"\ba/x\.wav\b.*\bc/x\.wav\b"):
        collect_audio(["a", "c"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"\.flac"):
        collect_audio(["empty"])
    with pytest.raises(DataError, match=r"\bgone\b"):
        collect_audio([], [tmp_path / "gone"])
    with pytest.raises(DataError, match="--audio-root"):
        collect_audio(["a"], audio_root=tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="binary.*UTF-8"):
        collect_audio([], [tmp_path / "binary"])


@pytest.mark.skipif(os.name == "nt", reason="file names are always text on Windows")
def test_a_file_name_that_is_not_utf8_is_bad(student_file, audio, tmp_path):
    path = os.fsencode(audio) + b"/\xff.wav"
    with open(path, "wb") as file, open(audio / "short.wav", "rb") as source:
        file.write(source.read())
    written = write_features(
        student_file, collect_audio([str(audio)]), tmp_path / "f", skip_bad=True
    )
    assert written.files == 3 and len(written.bad) == 4
    assert any("UTF-8" in reason for _, reason in written.bad)


@pytest.mark.parametrize(
    ("options", "variable"),
    [
        (["{audio}", "--on-bad-audio", "error"], r"empty\.flac"),
        (["{audio}/text.wav"], r"text\.wav"),
        (["{audio}/gone.wav"], r"gone\.wav"),
        (["{audio}/one.flac", "--max-seconds", "0.5"], r"one\.flac.*--max-seconds 0\.5"),
        (["{audio}/one.flac", "--max-seconds", "nan"], r"--max-seconds.*\bnan\b"),
        (["{audio}/one.flac", "--layers", "7"], r"--layers.*\b7\b"),
        (["{audio}/one.flac", "--device", "meta"], r"--device.*\bmeta\b"),
        ([], "--list"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_file(
    student_file, audio, tmp_path, capsys, options, variable
):
    output = tmp_path / "out" / "f.safetensors"
    argv = ["features", str(student_file), *(option.format(audio=audio) for option in options)]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "-o", str(output)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(variable, error)
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_an_existing_file_is_kept(student_file, audio, tmp_path, capsys):
    output = tmp_path / "f.safetensors"
    output.write_text("old")
    argv = ["features", str(student_file), str(audio / "one.flac"), "-o", str(output)]
    with pytest.raises(SystemExit):
        main(argv)
    assert "--force" in capsys.readouterr().err and output.read_text() == "old"
    with pytest.raises(SystemExit):  # a run that fails keeps the old file
        main([*argv[:2], str(audio / "text.wav"), *argv[3:], "--force"])
    assert output.read_text() == "old"
    assert main([*argv, "--force"]) == 0
    assert len(load_file(output)) == 3


def test_an_unavailable_device():
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="(xpu|cuda):9"):
        choose_device("xpu:9" if torch.cuda.is_available() else "cuda:9")


def test_the_file_is_read_by_safetensors():
    """Tensors in any order and dtype, announced keys without a tensor, special names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        'b "quoted" é\n': torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, 1, generator=generator).half(),
        "long" * 100: torch.randn(2, 2, 2, generator=generator).bfloat16(),
        "none": torch.zeros(0, 4),
        "transposed": torch.randn(4, 3, generator=generator).T,
    }
    file = io.BytesIO()
    features = SafetensorsWriter(file, [*tensors, "never added"], {"k": "v"})
    for key, value in tensors.items():
        features.add(key, value)
    features.finish()
    loaded = load(file.getvalue())
    assert set(loaded) == set(tensors)
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value)
    start = 8 + int.from_bytes(file.getvalue()[:8], "little")
    assert start % 8 == 0


def test_too_many_names_for_the_header():
    with pytest.raises(DataError, match="600,000"):
        SafetensorsWriter(io.BytesIO(), (f"{i:010}" for i in range(600_000)), {})


def test_a_key_that_was_not_announced():
    features = SafetensorsWriter(io.BytesIO(), ["a"], {})
    features.add("another" * 200, torch.zeros(1))
    with pytest.raises(ValueError):
        features.finish()


def test_memory_does_not_grow_with_the_file(tmp_path):
    code = """
import resource, sys, torch
from s3prl_ekd.files.safetensors_file import SafetensorsWriter
with open(sys.argv[1], "wb") as file:
    features = SafetensorsWriter(file, map(str, range(100)), {})
    features.add("0", torch.zeros(250, 1000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(1, 100):
        features.add(str(i), torch.full((250, 1000), float(i)))
    features.finish()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    pytest.importorskip("resource", reason="Windows has no getrusage")
    grown = int(run_python(code, str(tmp_path / "f")))  # kB on Linux, bytes on macOS
    assert (tmp_path / "f").stat().st_size > 99_000_000
    assert grown < 20_000 * (1024 if os.uname().sysname == "Darwin" else 1)
    with safe_open(tmp_path / "f", "pt") as file:
        assert file.get_tensor("99")[-1, -1] == 99
