"""``s3prl-ekd features``: hidden states of audio files in a safetensors file."""

import hashlib
import io
import os

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

import s3prl_ekd
from s3prl_ekd.cli import main
from s3prl_ekd.commands.features import choose_device
from s3prl_ekd.distill.student import Student
from s3prl_ekd.errors import ConfigError, DataError
from s3prl_ekd.export.features import choose_layers, collect_audio, write_features
from s3prl_ekd.files.safetensors_file import SafetensorsWriter
from s3prl_ekd.student_file import LoadedStudent, write_student

from .conftest import command, make_sound, run_python


@pytest.fixture
def student(student_settings, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "student.pt"
    write_student(LoadedStudent(Student(student_settings), None, {}, {}), path)
    return path


@pytest.fixture
def audio(tmp_path):
    """Two good files, one too short for a frame, three bad ones."""
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


def test_equals_the_upstream_on_each_file_alone(student, audio, tmp_path):
    done = command("features", student, audio, "-o", "f.safetensors", cwd=tmp_path)
    found = load_file(tmp_path / "f.safetensors")
    names = ("one.flac", "sub/zwei é.wav", "short.wav")
    assert set(found) == {f"{name}#{layer}" for name in names for layer in range(3)}

    from s3prl import hub

    s3prl_ekd.register()
    upstream = hub.ekd_student(ckpt=str(student)).eval()
    for name in names:
        wave = torch.from_numpy(soundfile.read(audio / name, dtype="float32")[0])
        with torch.no_grad():
            states = upstream([wave])["hidden_states"]
        for layer, state in enumerate(states):
            got = found[f"{name}#{layer}"]
            assert got.dtype == torch.float32 and got.shape == state.shape[1:]
            assert torch.allclose(got, state[0], atol=1e-6)
    assert found["one.flac#0"].shape == ((11200 - 400) // 320 + 1, 48)

    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        about = file.metadata()
    assert about["sample_rate"] == "16000" and about["stride"] == "320"
    assert about["layers"] == "0,1,2" and about["dim"] == "48"
    assert about["checkpoint_sha256"] == hashlib.sha256(student.read_bytes()).hexdigest()
    assert str(tmp_path) not in str(about)

    assert "left out: 3 files" in done.stdout
    skipped = (tmp_path / "f.safetensors.skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["empty.flac", "nan.wav", "text.wav"]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_and_chosen_layers(student, audio, tmp_path, dtype, bound):
    files = collect_audio([str(audio / "one.flac")])
    whole, half = tmp_path / "whole", tmp_path / "half"
    write_features(student, files, whole)
    write_features(student, files, half, layers="0,2", dtype=dtype)
    (key,) = files
    found, exact = load_file(half), load_file(whole)
    assert set(found) == {f"{key}#0", f"{key}#2"}
    for name, value in found.items():
        assert value.dtype == dtype
        assert torch.allclose(value.float(), exact[name], rtol=bound, atol=bound)
    assert half.stat().st_size < 0.5 * whole.stat().st_size


def test_a_value_too_large_for_float16_makes_a_bad_file(student_settings, audio, tmp_path):
    student = Student(student_settings)
    with torch.no_grad():
        student.backbone.encoder.layers[1].final_layer_norm.weight.fill_(1e6)
    path = tmp_path / "large.pt"
    write_student(LoadedStudent(student, None, {}, {}), path)
    files = collect_audio([str(audio / "one.flac")])
    with pytest.raises(DataError, match="float16; --dtype float32"):
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


def test_names_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.wav", "a/b/y.FLAC", "a/notes.txt", "c/x.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(collect_audio(["a"])) == ["b/y.FLAC", "x.wav"]
    assert list(collect_audio(["./a/x.wav", "c/x.wav"])) == ["a/x.wav", "c/x.wav"]
    (tmp_path / "list").write_text("c/x.wav\n\n  a/x.wav\n")
    assert list(collect_audio([], [tmp_path / "list"])) == ["c/x.wav", "a/x.wav"]
    with pytest.raises(DataError, match="would both be called x.wav"):
        collect_audio(["a", "c"])
    with pytest.raises(DataError, match="no audio files"):
        (tmp_path / "none").mkdir()
        collect_audio(["none"])
    with pytest.raises(DataError, match="cannot read the list"):
        collect_audio([], [tmp_path / "gone"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="not UTF-8"):
        collect_audio([], [tmp_path / "binary"])


@pytest.mark.skipif(os.name == "nt", reason="names there are always text")
def test_a_name_that_is_no_text_is_a_bad_file(student, audio, tmp_path):
    strange = os.fsencode(audio) + b"/\xff.wav"
    with open(strange, "wb") as file, open(audio / "short.wav", "rb") as source:
        file.write(source.read())
    written = write_features(student, collect_audio([str(audio)]), tmp_path / "f", skip_bad=True)
    assert written.files == 3 and len(written.bad) == 4
    assert any("not a UTF-8 name" in why for _, why in written.bad)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{audio}", "--on-bad-audio", "error"], "empty.flac: it is empty"),
        (["{audio}/text.wav"], "none of the 1 files is good"),
        (["{audio}/gone.wav"], "gone.wav: there is no such file"),
        (["{audio}/one.flac", "--max-seconds", "0.5"], "1 s long, more than --max-seconds 0.5"),
        (["{audio}/one.flac", "--max-seconds", "nan"], "--max-seconds is nan"),
        (["{audio}/one.flac", "--layers", "7"], "there is no layer 7"),
        (["{audio}/one.flac", "--device", "meta"], "--device meta is not known"),
        ([], "name audio files or folders"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(
    student, audio, tmp_path, capsys, words, sentence
):
    output = tmp_path / "out" / "f.safetensors"
    with pytest.raises(SystemExit) as left:
        main(["features", str(student), *(w.format(audio=audio) for w in words), "-o", str(output)])
    assert left.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_what_is_there_stays(student, audio, tmp_path, capsys):
    output = tmp_path / "f.safetensors"
    output.write_text("mine")
    words = ["features", str(student), str(audio / "one.flac"), "-o", str(output)]
    with pytest.raises(SystemExit):
        main(words)
    assert "add --force" in capsys.readouterr().err and output.read_text() == "mine"
    with pytest.raises(SystemExit):  # a run that fails does not take the old file with it
        main([*words[:2], str(audio / "text.wav"), *words[3:], "--force"])
    assert output.read_text() == "mine"
    assert main([*words, "--force"]) == 0
    assert len(load_file(output)) == 3


def test_a_device_that_is_not_there():
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="cannot be used"):
        choose_device("xpu:9" if torch.cuda.is_available() else "cuda:9")


def test_the_file_is_one_of_safetensors():
    """Any order and dtype, keys that stay away, names of all kinds."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        'b "quoted" é\n': torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, 1, generator=generator).half(),
        "long" * 100: torch.randn(2, 2, 2, generator=generator).bfloat16(),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 3, generator=generator).T,
    }
    file = io.BytesIO()
    features = SafetensorsWriter(file, [*tensors, "stays away"], {"k": "v"})
    for key, value in tensors.items():
        features.add(key, value)
    features.finish()
    found = load(file.getvalue())
    assert set(found) == set(tensors)
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value)
    start = 8 + int.from_bytes(file.getvalue()[:8], "little")
    assert start % 8 == 0


def test_more_names_than_a_header_holds():
    with pytest.raises(DataError, match="600,000 tensors are more"):
        SafetensorsWriter(io.BytesIO(), (f"{i:010}" for i in range(600_000)), {})


def test_a_key_that_was_not_announced():
    features = SafetensorsWriter(io.BytesIO(), ["a"], {})
    features.add("another" * 200, torch.zeros(1))
    with pytest.raises(ValueError, match="not announced"):
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
