"""`s3prl-ekd merge`: the weighted average of students, and which students it refuses."""

import functools
import hashlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from s3prl_ekd.upstream.expert import UpstreamExpert
from safetensors.torch import load_file

from s3prl_ekd import cli
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student_settings import GateSettings, StudentSettings
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.export.merge import Member, merge
from s3prl_ekd.export.model_card import how_made
from s3prl_ekd.files.atomic import atomic_torch_save
from s3prl_ekd.files.run_checkpoints import newest_checkpoint
from s3prl_ekd.files.weights_digest import weights_digest
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student

from .conftest import NO_DROPOUT, edit_yaml, error_of, saved_states
from .students import pruned_student, random_student

START = "5" * 32  # a digest of initial weights
SPECS = {"t": TargetSpec(2, (48,))}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a student file in the current folder; returns the weights by name."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(write_random, Path())


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """A folder with a.pt, b.pt and students that cannot be merged with them."""
    folder = tmp_path_factory.mktemp("refused")
    write = functools.partial(write_random, folder)
    write("a.pt", 1)
    write("b.pt", 2)
    write("other_start.pt", 2, about={"initial_weights": "6" * 32})
    write("old.pt", 2, about={})
    write("wide.pt", 2, encoder_ffn_embed_dim=96)
    write("masked.pt", 2, masked_norm=True)
    write("copied.pt", student=pruned_student())
    cut = {"pruned": {"from": 100, "to": 50, "of": "t"}}  # as in a file of `prune`
    write("cut.pt", about=cut, student=pruned_student())
    write("gated.pt", student=pruned_student(gates=GateSettings()))
    diverged = random_student(StudentSettings(**NO_DROPOUT))
    diverged.backbone.encoder.layers[0].fc1.bias.data[3] = float("nan")
    write("diverged.pt", student=diverged)
    return folder


def write_random(folder, name, seed=0, about=None, student=None, heads=False, **changes):
    if student is None:
        student = random_student(StudentSettings(**{**NO_DROPOUT, **changes}), seed)
    about = {"initial_weights": START, "step": 7} if about is None else about
    loaded = LoadedStudent(student, PredictionHeads(48, SPECS) if heads else None, SPECS, about)
    write_student(loaded, folder / name)
    return {key: tensor.clone() for key, tensor in student.state_dict().items()}


def merged(*argv, output="merged.pt"):
    assert cli.main(["merge", *argv, "-o", output]) == 0
    return load_student(output)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("weights", "shares"),
    [((), (1 / 2, 1 / 2)), (("3", "1"), (3 / 4, 1 / 4)), (("0", "2"), (0, 1))],
)
def test_the_average_by_hand(write, suffix, weights, shares):
    states = [write("a.pt", 1, heads=True), write(f"b{suffix}", 2)]
    options = ("--weights", *weights) if weights else ()
    student = merged("a.pt", f"b{suffix}", *options, output=f"out{suffix}")
    assert student.heads is None and student.targets == {}
    for key, tensor in student.student.state_dict().items():
        expected = [
            sum(share * value for share, value in zip(shares, values, strict=True))
            for values in zip(*(state[key].flatten().tolist() for state in states), strict=True)
        ]
        assert torch.equal(tensor.flatten(), torch.tensor(expected, dtype=torch.float64).float())
    if suffix == ".safetensors":  # readable without this package
        weight = load_file(f"out{suffix}")["student.backbone.encoder.layers.0.fc1.bias"]
        key = "backbone.encoder.layers.0.fc1.bias"
        assert torch.equal(weight, student.student.state_dict()[key])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_students_are_their_average_bit_for_bit(write, count):
    state = write("a.pt", 3)
    student = merged(*["a.pt"] * count, "--weights", *map(str, range(1, count + 1)))
    for key, tensor in student.student.state_dict().items():
        assert torch.equal(tensor, state[key])


def test_order_does_not_matter_and_neither_does_the_scale_of_the_weights(write):
    for name, seed in (("a.pt", 1), ("b.pt", 2), ("c.pt", 3)):
        write(name, seed)
    first = merged("a.pt", "b.pt", "c.pt", "--weights", "1", "2", "5").student.state_dict()
    argv = ("c.pt", "a.pt", "b.pt", "--weights", "50", "10", "20")
    for key, tensor in merged(*argv, output="again.pt").student.state_dict().items():
        torch.testing.assert_close(tensor, first[key], rtol=1e-6, atol=1e-8)


def test_the_file_records_what_was_merged(write):
    teachers = {"hubert": {"model": "/home/somebody/hubert.pt", "layers": [4]}}
    about = {"initial_weights": START, "step": 70, "config": {"teachers": teachers}}
    write("a.pt", 1, about=about)
    write("b.pt", 2)
    student = merged("a.pt", "b.pt", "--weights", "1", "3")
    assert student.about["initial_weights"] == START
    parts = student.about["merged"]
    assert [part["file"] for part in parts] == ["a.pt", "b.pt"]
    assert [part["weight"] for part in parts] == [0.25, 0.75]
    assert [part["about"]["step"] for part in parts] == [70, 7]
    assert parts[0]["about"]["config"] == about["config"]
    with open("a.pt", "rb") as file:
        assert parts[0]["sha256"] == hashlib.sha256(file.read()).hexdigest()
    card = how_made(student.about)
    for text in ("`a.pt`", "0.25", "`b.pt`", "0.75", "`hubert.pt`", "70"):
        assert text in card
    assert "somebody" not in card
    # a merged student can be merged: its start is theirs
    twice = merged("merged.pt", "b.pt", output="twice.safetensors")
    assert twice.about["merged"][0]["about"]["merged"] == parts
    assert "`merged.pt`" in how_made(twice.about)


def test_texts_of_a_merged_file_stay_on_their_line_of_the_card():
    part = {"file": "/home/x/<b>\n# title", "weight": "1\n- y", "about": {"step": "<i>"}}
    card = how_made({"merged": [part, None, 3]})
    assert "<" not in card and "/home" not in card
    assert [line.strip()[:1] for line in card.splitlines()] == ["-"] * len(card.splitlines())
    assert how_made({"merged": "x"}) == how_made({})


@pytest.mark.parametrize(
    ("options", "variable"),
    [
        (("a.pt",), r"\b1$"),
        (("a.pt", "b.pt", "--weights", "1"), r"--weights\b.*\b2\b.*\b1$"),
        (("a.pt", "b.pt", "--weights", "1", "nan"), r"--weights\b.*\bnan$"),
        (("a.pt", "b.pt", "--weights", "inf", "1"), r"--weights\b.*\binf 1$"),
        (("a.pt", "b.pt", "--weights", "2", "-1"), r"--weights\b.*\b2 -1$"),
        (("a.pt", "b.pt", "--weights", "0", "0"), r"--weights\b.*\b0 0$"),
        (("a.pt", "b.pt", "--weights", "1e308", "1e308"), r"--weights\b.*\b1e\+308 1e\+308$"),
        (("a.pt", "missing.pt"), r"missing\.pt"),
        (("a.pt", "other_start.pt"), r"a\.pt and other_start\.pt\b.*init\.teacher\b"),
        (("a.pt", "other_start.pt", "--assume-same-start"), r"a\.pt and other_start\.pt\b"),
        (("a.pt", "old.pt", "b.pt"), r"\bold\.pt,.*--assume-same-start"),
        (("old.pt", "a.pt", "other_start.pt", "--assume-same-start"), r"a\.pt and other_start"),
        (("a.pt", "wide.pt"), r"a\.pt and wide\.pt\b.*encoder_ffn_embed_dim \d+ -> 96"),
        (("a.pt", "masked.pt"), r"a\.pt and masked\.pt\b.*masked_norm"),
        (("a.pt", "copied.pt"), r"a\.pt and copied\.pt\b"),
        (("cut.pt", "cut.pt"), r"cut\.pt\b.*\bprune\b"),
        (("copied.pt", "cut.pt", "--assume-same-start"), r"cut\.pt\b.*\bprune\b"),
        (("gated.pt", "gated.pt"), r"gated\.pt\b.*s3prl-ekd prune gated\.pt"),
        (("a.pt", "diverged.pt"), r"\bfc1\.bias\b"),
    ],
)
def test_what_cannot_be_merged(refused, capsys, monkeypatch, options, variable):
    monkeypatch.chdir(refused)
    names = sorted(path.name for path in refused.iterdir())
    error = error_of(capsys, "merge", *options, "-o", "merged.pt")

    assert re.search(variable, error.strip()), error
    assert sorted(path.name for path in refused.iterdir()) == names


@pytest.mark.parametrize("recorded", [{}, {"initial_weights": START}])
def test_files_without_a_record_of_their_start_are_merged_on_request(write, recorded, capsys):
    """The assumption does not become a record: the merged file has none either."""
    a, b = write("a.pt", 1, about=recorded), write("b.pt", 2, about={"initial_weights": 3})
    student = merged("a.pt", "b.pt", "--assume-same-start")
    assert "--assume-same-start" in capsys.readouterr().out
    assert "initial_weights" not in student.about and student.about["assumed_same_start"] is True
    key = "backbone.post_extract_proj.bias"
    torch.testing.assert_close(student.student.state_dict()[key], (a[key] + b[key]) / 2)
    write("c.pt", 3)
    assert "merged.pt" in error_of(capsys, "merge", "merged.pt", "c.pt", "-o", "no.pt")
    again = merged("merged.pt", "c.pt", "--assume-same-start", output="again.pt")
    assert "initial_weights" not in again.about


def test_students_that_were_regularised_differently_are_merged(write):
    a = write("a.pt", 1, dropout=0.0, feature_grad_mult=0.1)
    b = write("b.pt", 2, dropout=0.2, feature_grad_mult=0.0, encoder_layerdrop=0.1)
    student = merged("a.pt", "b.pt").student
    settings = student.settings
    assert (settings.dropout, settings.feature_grad_mult, settings.encoder_layerdrop) == (0, 0.1, 0)
    key = "backbone.encoder.layers.1.fc2.weight"
    torch.testing.assert_close(student.state_dict()[key], (a[key] + b[key]) / 2)
    of_copies = [pruned_student(seed) for seed in (1, 2)]
    object.__setattr__(of_copies[1].settings, "input_dropout", 0.3)
    for name, copy in zip("cd", of_copies, strict=True):
        write(f"{name}.pt", student=copy)
    assert merged("c.pt", "d.pt", output="copies.pt").student.settings.input_dropout == 0


def test_existing_files_are_replaced_only_with_force(write, capsys, tmp_path):
    state = write("a.pt", 1)
    write("b.pt", 2)
    (tmp_path / "out.pt").write_bytes(b"x")
    assert "--force" in error_of(capsys, "merge", "a.pt", "b.pt", "-o", "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == b"x"
    merged("a.pt", "a.pt", "--force", output="out.pt")
    error = error_of(capsys, "merge", "a.pt", "b.pt", "--force", "-o", tmp_path / "b.pt")
    assert str(tmp_path / "b.pt") in error
    assert "folder" in error_of(capsys, "merge", "a.pt", "b.pt", "-o", "folder/..")
    for key, tensor in load_student("out.pt").student.state_dict().items():
        assert torch.equal(tensor, state[key])


def test_copied_students_of_one_cut_are_merged(write):
    pruned = {"from": 100, "to": 50}
    states = []
    for seed in (1, 2):
        about = {"initial_weights": START, "pruned": pruned}
        student = pruned_student(seed, wavlm=True, feature_scale=True)
        states.append(write(f"{seed}.pt", about=about, student=student))
    student = merged("1.pt", "2.pt")
    assert student.about["pruned"] == pruned
    for key, tensor in student.student.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][key] + states[1][key]) / 2)


def test_merges_of_merges_end_before_the_file_cannot_be_read(write):
    """The limit is 50 levels of nesting; each merge adds three."""
    write("a.pt")
    student = first = load_student("a.pt")
    path = Path("a.pt")
    with pytest.raises(ConfigError, match=r"\b50 levels\b"):
        for _ in range(20):
            student = merge([Member(path, student), Member(path, first)])
    write_student(student, "deep.safetensors")
    assert load_student("deep.safetensors").about == student.about


@pytest.mark.parametrize("kind", ["student", "superb", "hf"])
def test_a_merged_student_can_be_exported(write, kind, capsys, tmp_path):
    write("a.pt", 1)
    write("b.pt", 2)
    merged("a.pt", "b.pt")
    out = "out.safetensors" if kind == "student" else "out"
    assert cli.main(["export", kind, "merged.pt", "-o", out]) == 0
    if kind == "student":
        assert load_student(out).about == load_student("merged.pt").about
        return
    assert "`b.pt`" in (tmp_path / "out/README.md").read_text()


def test_a_teacher_of_weight_0_gives_the_first_weights(pretrain_with, pretrain_folder):
    """Runs with other teachers, seeds and aggregations begin with the weights of one teacher."""
    config = yaml.safe_load((pretrain_folder / "model.yaml").read_text())

    def distil(name, teacher, seed, **changes):
        with edit_yaml(pretrain_folder / "model.yaml") as model:
            first = {**config["teachers"]["hubert"], "weight": 0}
            model["teachers"] = {"hubert": first, teacher: config["teachers"][teacher]}
            model |= {"init": {"teacher": "hubert"}, **changes}
        code, output = pretrain_with(name, "--seed", seed, total_steps=2, save_step=1, log_step=1)
        assert code == 0, output

    distil("a", "robust", "1", aggregation="separate")
    distil("b", "wavlm", "2", aggregation="average")
    assert merged("result/pretrain/a", "result/pretrain/b").about["initial_weights"]


def test_runs_with_different_teachers_and_one_start_are_merged(pretrain_with, pretrain_folder):
    """First weights drawn with one seed, in runs with different teachers."""
    config = yaml.safe_load((pretrain_folder / "model.yaml").read_text())

    def distil(name, teacher, seed):
        with edit_yaml(pretrain_folder / "model.yaml") as model:
            model["teachers"] = {teacher: config["teachers"][teacher]}
            model.pop("init", None)
        code, output = pretrain_with(name, "--seed", seed, total_steps=2, save_step=1, log_step=1)
        assert code == 0, output
        return saved_states(name)["EKD"]["about"]["initial_weights"]

    start = distil("a", "hubert", "1")
    assert distil("b", "wavlm", "1") == start
    student = merged("result/pretrain/a", "result/pretrain/b")
    teachers = [list(part["about"]["config"]["teachers"]) for part in student.about["merged"]]
    assert teachers == [["hubert"], ["wavlm"]]
    waves = [0.1 * torch.randn(8000), 0.1 * torch.randn(5000)]
    with torch.no_grad():
        states = UpstreamExpert("merged.pt").eval()(waves)["hidden_states"]
    assert len(states) == 3 and all(state.isfinite().all() for state in states)

    assert distil("c", "hubert", "2") != start
    with pytest.raises(SystemExit) as stop:
        merged("result/pretrain/a", "result/pretrain/c", output="no.pt")
    assert stop.value.code == 2 and not Path("no.pt").exists()


def test_the_record_of_the_first_weights(write, pretrain_folder, pretrain_with, pretrain):
    """It is the digest of the file that the run starts from, and a resumed run keeps it."""
    write("start.pt", 4)
    with edit_yaml("model.yaml") as model:
        model["student"] = {"kind": "file", "file": "start.pt", "keep_heads": False}
        del model["init"]
    code, output = pretrain_with("x", total_steps=2, save_step=1, log_step=1)
    assert code == 0, output
    states = saved_states("x")
    student = random_student(StudentSettings(**NO_DROPOUT), 4)
    assert states["EKD"]["about"]["initial_weights"] == weights_digest(student)

    states["EKD"]["about"]["initial_weights"] = START
    atomic_torch_save(states, newest_checkpoint("result/pretrain/x"))
    code, output = pretrain("-n", "x", "-a", "-o", "config.runner.total_steps=3", "--device", "cpu")
    assert code == 0, output
    resumed = saved_states("x")
    assert resumed["Step"] == 3 and resumed["EKD"]["about"]["initial_weights"] == START
