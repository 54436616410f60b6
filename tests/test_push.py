"""`s3prl-ekd push` against a stand-in of the Hugging Face Hub."""

from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel

import s3prl_ekd
from s3prl_ekd.cli import main
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.superb.plan import parse_upstream

from .conftest import STUDENT, error_of
from .hub_server import commit, connected, serve
from .students import random_student
from .superb_runs import write_run

LICENSE = ("--license", "apache-2.0")
TEACHERS = {
    "hubert": {"model": "hubert_base", "layers": [4]},
    "wavlm": {"model": f"microsoft/wavlm-base-plus@{commit(8)}", "layers": [4]},
    "mine": {"model": "/home/me/secret/mine.pt", "layers": [4]},
    "folder": {"model": "my_teachers/large", "layers": [4]},
}
ABOUT = {
    "step": 7,
    "config": {"teachers": TEACHERS, "aggregation": "average"},
    "data": {"sets": ["train-clean-100", "train-other-500"], "train_batch_size": 4},
}


@pytest.fixture
def student(tmp_path, monkeypatch):
    """``student.pt`` in the working folder."""
    monkeypatch.chdir(tmp_path)
    loaded = LoadedStudent(random_student(StudentSettings(**STUDENT)), None, {}, ABOUT)
    write_student(loaded, "student.pt")
    return Path("student.pt")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve() as hub, connected(hub.address, tmp_path / "cache"):
        hub.token = "hf_secret"
        yield hub


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def write_results(student):
    """Two tasks of the student, and a run of another one of the same name elsewhere."""
    digest = parse_upstream(str(student)).digest
    root = Path("result/superb")
    words = {"1": ("A B C D", "A B C X"), "2": ("A", "A")}  # one error in five words
    for seed in (1, 2):
        write_run(root, "mine", "asr", words, seed=seed, model=digest)
    own = {"model": digest, "recipe": "/home/me/secret/sid.yaml"}
    write_run(root, "mine", "sid", {"1": ("a", "a"), "2": ("a", "b")}, **own)
    write_run(root, "other", "asr", {"1": ("A", "B")}, model="0")


def test_the_uploaded_folder_is_the_student(student, hub, waves, tmp_path, capsys):
    write_results(student)
    argv = ["push", str(student), "me/my-student", *LICENSE]
    assert main(argv) == 0
    files = hub.uploads["me/my-student"]
    assert set(files) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
    }
    assert [created["name"] for created in hub.created] == ["my-student"]
    assert not hub.created[0].get("private") and "visibility" not in hub.created[0]
    printed = capsys.readouterr().out
    for name, contents in files.items():
        assert f"{name} " in printed and f"{len(contents):,} bytes" in printed
    assert files["README.md"].decode() in printed and "hf_secret" not in printed
    for name, contents in files.items():
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(contents)
    model = AutoModel.from_pretrained(tmp_path / "down").eval()
    student_model = s3prl_ekd.load_student(student).student
    with torch.no_grad():
        states = model(waves[0][None], output_hidden_states=True).hidden_states[1:]
        expected = student_model(waves[0][None], torch.tensor([len(waves[0])])).hidden_states[1:]
    for state, other in zip(states, expected, strict=True):
        assert torch.allclose(state, other, atol=1e-5)


def test_the_card(student, hub):
    write_results(student)
    assert main(["push", str(student), "me/my-student", *LICENSE, "--private"]) == 0
    card = hub.uploads["me/my-student"]["README.md"].decode()
    (created,) = hub.created
    assert created.get("private") or created.get("visibility") == "private"
    data = metadata(card)
    results = data.pop("model-index")[0]["results"]
    assert data == {
        "license": "apache-2.0",
        "base_model": ["facebook/hubert-base-ls960", "microsoft/wavlm-base-plus"],
        "datasets": ["openslr/librispeech_asr"],
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["speech", "hubert", "distillation"],
    }
    scores = {r["metrics"][0]["type"]: r["metrics"][0]["value"] for r in results}
    assert scores == {"wer": 20.0, "accuracy": 50.0}
    assert "20.00" in card and "no scores" not in card and "downstream/asr/tiny.yaml" in card
    types = [result["dataset"]["type"] for result in results]
    assert types == ["other", "other"] and "`sid.yaml`" in card
    assert "secret" not in card and "my_teachers" not in card
    assert 'from_pretrained("me/my-student")' in card and "-k me/my-student" in card
    assert f"microsoft/wavlm-base-plus@{commit(8)}" in card
    assert len(ModelCard(card).data.eval_results) == 2  # as the Hub parses it


def test_results_of_every_task_have_a_title(student, hub, capsys):
    digest = parse_upstream(str(student)).digest
    for task in ("ks", "ic"):
        write_run(Path("result/superb"), "mine", task, {"1": ("a", "a")}, model=digest)
    assert main(["push", str(student), "me/s", *LICENSE, "--dry-run"]) == 0
    card = capsys.readouterr().out
    assert "KS: keyword spotting" in card and "IC: intent classification" in card


@pytest.mark.parametrize("sets", [["train-clean"], ["train-clean-100", "mine"], ["dev-clean"]])
def test_other_tables_are_not_called_librispeech(sets, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    about = {**ABOUT, "data": {"sets": sets, "train_batch_size": 4}}
    student = LoadedStudent(random_student(StudentSettings(**STUDENT)), None, {}, about)
    write_student(student, "other.pt")
    assert main(["push", "other.pt", "me/s", *LICENSE, "--dry-run"]) == 0
    data = metadata("---\n" + capsys.readouterr().out.split("---\n", 1)[1])
    assert "datasets" not in data and "language" not in data


def test_given_facts_replace_those_of_the_run(student, hub, capsys):
    facts = ["--dataset", "me/a", "--dataset", "me/b", "--language", "de"]
    assert main(["push", str(student), "me/s", *LICENSE, *facts, "--dry-run"]) == 0
    data = metadata("---\n" + capsys.readouterr().out.split("---\n", 1)[1])
    assert data["datasets"] == ["me/a", "me/b"] and data["language"] == ["de"]
    assert "model-index" not in data


@pytest.mark.parametrize("offline", [False, True])
def test_a_dry_run_uploads_nothing(student, hub, tmp_path, capsys, offline):
    option = [] if offline else ["--dry-run"]
    with connected(hub.address, tmp_path / "cache", offline=offline):
        assert main(["push", str(student), "me/s", *option]) == 0
    printed = capsys.readouterr().out
    assert not hub.requests and not hub.uploads
    assert "nothing was uploaded" in printed and "model.safetensors" in printed
    assert ("HF_HUB_OFFLINE" in printed) == offline
    assert list(tmp_path.iterdir()) == [tmp_path / "student.pt"]


def test_results_under_two_names_are_not_mixed_up(student, hub, capsys):
    """The same file may have been evaluated with two recipes."""
    write_results(student)
    digest = parse_upstream(str(student)).digest
    write_run(Path("result/superb"), "again", "asr", {"1": ("A", "B")}, model=digest)
    argv = ("push", str(student), "me/s", "--dry-run", "--results", "result/superb")
    error = error_of(capsys, *argv)
    assert "again" in error and "mine" in error


def test_results_of_another_file_are_not_taken(student, hub, capsys):
    write_results(student)
    loaded = s3prl_ekd.load_student(student)
    with torch.no_grad():
        next(loaded.student.parameters()).add_(1e-3)
    write_student(loaded, "later.pt")
    assert main(["push", "later.pt", "me/s", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "mine, other" in printed and "model-index" not in printed
    (Path("result/superb/mine/sid/lr0.001-seed1337") / "superb.json").write_text("{")
    assert main(["push", "later.pt", "me/s", "--dry-run"]) == 0
    assert "the card has no scores" in capsys.readouterr().out
    write_results(student)
    argv = ("push", "later.pt", "me/s", "--dry-run", "--results", "result/superb")
    assert "mine, other" in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["student.pt", "me/s"], "--license"),
        (["student.pt", "s", *LICENSE], "ORG/NAME"),
        (["student.pt", "me/s@v1", *LICENSE], "ORG/NAME"),
        (["student.pt", "../s", *LICENSE], "ORG/NAME"),
        (["student.pt", "me/s", "--license", "a b: c"], "--license"),
        (["student.pt", "me/s", *LICENSE, "--dataset", "x\n- y"], "--dataset"),
        (["student.pt", "me/s", *LICENSE, "--language", "English"], "--language"),
        (["nothing.pt", "me/s", *LICENSE], "nothing.pt"),
        (["student.pt", "me/s", *LICENSE, "--results", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(student, hub, capsys, argv, part):
    assert part in error_of(capsys, "push", *argv)
    assert not hub.requests


def test_a_login_that_may_not_write(student, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    error = error_of(capsys, "push", str(student), "me/s", *LICENSE)
    assert "nothing was uploaded" in error and "hf auth login" in error and "hf_other" not in error
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in error_of(capsys, "push", str(student), "me/s", *LICENSE)
    assert not hub.uploads


def test_without_a_network(student, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with connected("http://127.0.0.1:9", tmp_path / "cache"):
        error = error_of(capsys, "push", str(student), "me/s", *LICENSE)
    assert "nothing was uploaded" in error and "network" in error


def test_a_pushed_student_is_a_student(student, hub, tmp_path):
    """The way back: pushed, then taken by its id."""
    main(["push", str(student), "me/my-student", *LICENSE])
    folder = tmp_path / "repository"
    folder.mkdir()
    for name, contents in hub.uploads["me/my-student"].items():
        (folder / name).write_bytes(contents)
    hub.repos["me/my-student"] = {commit(1): folder}
    weights = s3prl_ekd.load_student("me/my-student").student.state_dict()
    for name, value in s3prl_ekd.load_student(student).student.state_dict().items():
        assert torch.equal(value, weights[name])
