"""A student given as a file, a run's folder, a Hugging Face folder, or an id on the Hub."""

import json
import shutil
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Wav2Vec2Config, Wav2Vec2Model

import s3prl_ekd
from s3prl_ekd.cli import main
from s3prl_ekd.downstream.run import check_files, check_same_options, with_pinned_student
from s3prl_ekd.errors import CheckpointError, SetupError
from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.request import DownstreamRequest
from s3prl_ekd.student_file import LoadedStudent, contents, write_student
from s3prl_ekd.superb.cost import build_upstream
from s3prl_ekd.superb.plan import parse_upstream
from s3prl_ekd.teachers.student_source import find_student, pin_student

from .conftest import command, error_of
from .hub_server import commit, connected, serve
from .students import random_student


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """One student as a file, as a run's newest checkpoint, and as a Hugging Face folder."""
    import argparse

    from s3prl_ekd.distill.student_settings import StudentSettings

    from .conftest import STUDENT

    root = tmp_path_factory.mktemp("students")
    loaded = LoadedStudent(random_student(StudentSettings(**STUDENT)), None, {}, {"step": 3})
    write_student(loaded, root / "student.pt")
    run = root / "result/my_run"
    run.mkdir(parents=True)
    for step in (1, 3):
        student = loaded.student if step == 3 else random_student(loaded.student.settings, seed=9)
        states = {
            "Step": step,
            "Args": argparse.Namespace(upstream="ekd"),
            "Config": {},
            "EKD": contents(student, None, {}, {"step": step}),
        }
        torch.save(states, run / f"states-{step}.ckpt")
    assert main(["export", "hf", str(root / "student.pt"), "-o", str(root / "hf")]) == 0
    return root


@pytest.fixture
def hub(places, tmp_path):
    """A Hub with the student, in the first of two versions tagged v1."""
    with serve() as hub:
        hub.repos["org/student"] = {commit(1): places / "hf"}
        with connected(hub.address, tmp_path / "cache"):
            yield hub


SOURCES = ["student.pt", "result/my_run", "result/my_run/states-3.ckpt", "hf", "org/student"]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_hidden_states(places, hub, waves, monkeypatch, source):
    monkeypatch.chdir(places)
    with torch.no_grad():
        expected = s3prl_ekd.load_student("student.pt").student(
            torch.nn.utils.rnn.pad_sequence(waves, batch_first=True),
            torch.tensor([len(wave) for wave in waves]),
        )
        states = build_upstream("ekd_student", source)(waves)["hidden_states"]
    assert len(states) == 3
    for state, other in zip(states, expected.hidden_states, strict=True):
        assert torch.allclose(state, other, atol=1e-5)


@pytest.mark.parametrize("source", ["result/my_run", "org/student"])
def test_commands_take_every_source(places, hub, tmp_path, monkeypatch, source, capsys):
    import numpy as np
    import soundfile

    monkeypatch.chdir(places)
    out = tmp_path / "out"
    out.mkdir()
    soundfile.write(out / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), 16000)
    assert main(["export", "student", source, "-o", str(out / "s.safetensors")]) == 0
    if source == "org/student":
        assert f"org/student@{commit(1)} ->" in capsys.readouterr().out
    weights = s3prl_ekd.load_student(out / "s.safetensors").student.state_dict()
    for name, value in s3prl_ekd.load_student("student.pt").student.state_dict().items():
        assert torch.equal(weights[name], value)
    for kind in ("hf", "superb"):
        assert main(["export", kind, source, "-o", str(out / kind)]) == 0
    assert main(["features", source, str(out / "a.wav"), "-o", str(out / "f.safetensors")]) == 0
    with safe_open(out / "f.safetensors", "pt") as file:
        expected = {"result/my_run": "states-3.ckpt", "org/student": f"org/student@{commit(1)}"}
        assert file.metadata()["checkpoint"] == expected[source]


def test_a_source_is_pinned(places, hub, monkeypatch):
    monkeypatch.chdir(places)
    assert pin_student("student.pt") == "student.pt"
    assert pin_student("hf") == "hf"
    assert pin_student("result/my_run") == "result/my_run/states-3.ckpt"
    pinned = pin_student("org/student")
    assert pinned == f"org/student@{commit(1)}"
    request = DownstreamRequest.parse(
        ["-m", "train", "-u", "ekd_student", "-k", "org/student", "-d", "asr", "-n", "x"]
    )
    check_files(request)
    assert with_pinned_student(request).upstream_ckpt == pinned
    hub.repos["org/student"][commit(2)] = places / "hf"
    assert pin_student(pinned) == pinned != pin_student("org/student")


@pytest.mark.parametrize(
    ("given", "recorded", "same"),
    [
        ("student.pt", "student.pt", True),
        ("result/../student.pt", "student.pt", True),
        ("copy.pt", "student.pt", True),
        ("other.pt", "student.pt", False),
        ("result/my_run", "result/my_run/states-3.ckpt", True),
        ("result", "result/my_run/states-3.ckpt", False),
        ("hf", "hf", True),
        ("hf", "result/my_run/states-3.ckpt", False),
        ("org/student", f"org/student@{commit(1)}", True),
        (f"org/student@{commit(2)}", f"org/student@{commit(1)}", False),
        ("org/another", f"org/student@{commit(1)}", False),
    ],
)
def test_the_student_of_a_resumed_run(places, monkeypatch, given, recorded, same):
    """``-k`` may be repeated as it was typed, without the Hub."""
    monkeypatch.chdir(places)
    shutil.copy("student.pt", "copy.pt")
    Path("other.pt").write_bytes(b"another")
    states = {"Args": Namespace(upstream="ekd_student", upstream_ckpt=recorded)}
    request = DownstreamRequest(upstream="ekd_student", upstream_ckpt=given, past_exp="x.ckpt")
    with nullcontext() if same else pytest.raises(SetupError, match=f"-k {given}: .*{recorded}"):
        check_same_options(request, states)


def test_upstreams_of_superb(places, hub, monkeypatch):
    monkeypatch.chdir(places)
    (places / "fbank").mkdir(exist_ok=True)  # a folder with the name of an upstream
    by_text = {
        text: parse_upstream(text)
        for text in (*SOURCES, "me=org/student@main", "me=result/my_run", "fbank")
    }
    names = {text: upstream.name for text, upstream in by_text.items()}
    assert names == {
        "student.pt": "student",
        "result/my_run": "my_run",
        "result/my_run/states-3.ckpt": "states-3",
        "hf": "hf",
        "org/student": "student",
        "me=org/student@main": "me",
        "me=result/my_run": "me",
        "fbank": "fbank",
    }
    assert by_text["fbank"].hub == "fbank" and by_text["fbank"].checkpoint is None
    assert by_text["org/student"].checkpoint == f"org/student@{commit(1)}"
    assert by_text["me=result/my_run"].checkpoint == "result/my_run/states-3.ckpt"
    assert by_text["hf"].digest != parse_upstream("student.pt").digest
    digest = by_text["hf"].digest
    config = places / "hf/config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "hidden_dropout": 0.3}))
    try:
        from s3prl_ekd.superb import plan

        plan._sha256.cache_clear()
        assert parse_upstream("hf").digest != digest
    finally:
        config.write_text(text)
    assert parse_upstream("ekd_student:org/student").checkpoint == f"org/student@{commit(1)}"
    # s3prl's own upstreams would take the newest version each time
    with pytest.raises(SetupError, match="leave out hf_hubert_custom:"):
        parse_upstream("hf_hubert_custom:org/student")


def test_a_model_of_another_kind_as_an_upstream(tmp_path, waves):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    network = Wav2Vec2Model(config).eval()
    network.save_pretrained(tmp_path / "w2v")
    with torch.no_grad():
        states = build_upstream("ekd_student", str(tmp_path / "w2v"))([waves[0]])["hidden_states"]
        expected = network(waves[0][None], output_hidden_states=True).hidden_states
    for state, other in zip(states, expected, strict=True):
        assert torch.allclose(state, other, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("nothing.pt", ["nothing.pt", "no such file"]),
        ("empty", ["states-*.ckpt", "empty"]),
        ("org/nothing", ["org/nothing", "hf auth login"]),
        ("org/student@v9", ["org/student", "v9"]),
    ],
)
def test_a_student_that_cannot_be_found(places, hub, tmp_path, monkeypatch, source, parts, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as error:
        find_student(source)
    commands = (
        ["export", "hf", source, "-o", "out"],
        ["features", source, "a.wav", "-o", "out"],
        ["cost", "-u", "ekd_student", "-k", source],
    )
    messages = [str(error.value)]
    for argv in commands:
        (tmp_path / "a.wav").touch()
        messages.append(error_of(capsys, *argv))
    for message in messages:
        assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()
    with pytest.raises((CheckpointError, SetupError)):
        parse_upstream(source if "/" in source or "." in source else f"./{source}")


def test_a_pinned_folder_of_a_run_that_was_moved(places, tmp_path):
    run = shutil.copytree(places / "result/my_run", tmp_path / "run")
    pinned = pin_student(str(run))
    shutil.rmtree(run)
    with pytest.raises(CheckpointError, match="no such file"):
        find_student(pinned)


@pytest.mark.slow
def test_superb_of_a_run_and_of_the_hub(places, superb_workspace, tmp_path):
    """The same student from both places, the second evaluated by what the first's record names."""
    env = {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    run = places / "result/my_run"
    override = "sid=config.downstream_expert.datarc.train_batch_size=4"
    options = ("--tasks", "sid", "--recipes", "tiny", "--steps", "sid=8", "--override", override)
    with serve() as hub:
        hub.repos["org/student"] = {commit(1): places / "hf"}
        argv = ("superb", f"a={run}", "b=org/student", *options, "-o", str(tmp_path / "out"))
        command(*argv, cwd=superb_workspace, HF_ENDPOINT=hub.address, **env)
        recorded = {}
        for name in "ab":
            (folder,) = (tmp_path / "out" / name / "sid").iterdir()
            record = json.loads((folder / "superb.json").read_text())
            assert record["finished"]
            states = read_checkpoint(next(folder.glob("*.ckpt")))
            assert states["Args"].upstream_ckpt == record["checkpoint"]
            recorded[name] = record["checkpoint"], record["dev"]["value"]
        assert recorded["a"][0] == str(run / "states-3.ckpt")
        assert recorded["b"][0] == f"org/student@{commit(1)}"
        assert recorded["a"][1] == recorded["b"][1]
        # a run of s3prl's script, whose record keeps the commit
        argv = ("-m", "train", "-u", "ekd_student", "-k", "org/student", "-d", "voxceleb1")
        more = f"{override.partition('=')[2]},,config.runner.total_steps=2"
        more += ",,config.runner.eval_step=1,,config.runner.save_step=1,,config.runner.log_step=1"
        argv += ("-c", "downstream/voxceleb1/tiny.yaml", "-p", str(tmp_path / "c"), "-o", more)
        command("run_downstream.py", *argv, cwd=superb_workspace, HF_ENDPOINT=hub.address, **env)
    checkpoint = next((tmp_path / "c").glob("states-*.ckpt"))
    assert read_checkpoint(checkpoint)["Args"].upstream_ckpt == f"org/student@{commit(1)}"
    argv = ("-m", "evaluate", "-t", "test", "-e", str(checkpoint))
    done = command(
        "run_downstream.py", *argv, cwd=superb_workspace, **env, HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert "test" in done.stdout  # with no Hub: the commit is in the cache
