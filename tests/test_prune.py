"""Distil and prune a copied student, cut it with `prune`, distil it again; and bad input."""

import dataclasses
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from s3prl_ekd.upstream.expert import UpstreamExpert

from s3prl_ekd import cli
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.pruning.cut import cut, differences
from s3prl_ekd.distill.settings import HeadSettings, TeacherSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import CopySettings
from s3prl_ekd.errors import TeacherError
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student
from s3prl_ekd.teachers import copied_student, load_teachers

from .conftest import (
    STUDENT,
    command,
    edit_yaml,
    error_of,
    saved_states,
    write_configs,
    write_workspace,
)
from .test_cut import largest_difference
from .test_teacher_sources import D2V, HF_SIZE, distilhubert

# The whole way: distil and prune, cut, distil again.

STEPS = 12
DROP = {"conv": 0.6, "heads": 0.7, "ffn": 0.7}  # some units are closed from the start
FIRST = {
    "student": {"kind": "copy", "of": "hubert"},
    "init": {},
    "heads": {"kind": "layerwise"},
    "loss": {"cosine": "raw"},
    "pruning": {"sparsity": 0.3, "reach_at": 1, "lr": 0.02, "start_drop": DROP},
}


def write_model(files, layers=(0, 2, 4), **changes) -> None:
    """``model.yaml``: FIRST with changes."""
    targets = {"hubert": {"model": str(files["hubert"]), "layers": [*layers]}}
    model = {"teachers": targets, **FIRST, **changes}
    Path("model.yaml").write_text(yaml.safe_dump(model))


def write_second(teachers, file="pruned.pt", layers=(0, 2, 4), keep_heads=True, **changes) -> None:
    """``model.yaml`` of the second distillation."""
    student = {"kind": "file", "file": str(file), "keep_heads": keep_heads}
    write_model(teachers, layers, **{"student": student, "pruning": None, **changes})


def write_second_of_two(files) -> None:
    """``model.yaml`` of a second distillation from two teachers, after a first one from one."""
    names = ("hubert", "robust")
    targets = {name: {"model": str(files[name]), "layers": [0, 2, 4]} for name in names}
    config = yaml.safe_load(Path("model.yaml").read_text())
    student = {"kind": "file", "file": "average.pt"}
    changes = {"teachers": targets, "student": student, "aggregation": "average", "pruning": None}
    Path("model.yaml").write_text(yaml.safe_dump({**config, **changes}))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, teachers, corpus) -> Path:
    """A working folder with the run ``first`` and the cut student ``pruned.pt``; not changed."""
    folder = tmp_path_factory.mktemp("first")
    write_workspace(folder)
    write_configs(folder, teachers, corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_model(teachers)
        with edit_yaml("runner.yaml") as config:
            config["optimizer"] = {"name": "FusedAdamW", "lr": 1e-3, "warmup_proportion": 0.1}
            config["runner"] |= {"total_steps": STEPS, "save_step": 6, "log_step": 3}
        argv = ("-u", "ekd", "-n", "first", "-c", "runner.yaml", "-g", "model.yaml")
        command("run_pretrain.py", *argv, cwd=folder)
        assert cli.main(["prune", "result/pretrain/first", "-o", "pruned.pt"]) == 0
    return folder


@pytest.fixture
def here(first_run, tmp_path, monkeypatch) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(first_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = "result/pretrain/first"


def test_prune(here, capsys, caplog):
    assert cli.main(["prune", RUN, "-o", "again.safetensors"]) == 0
    output = capsys.readouterr()
    again, pruned = load_student("again.safetensors"), load_student("pruned.pt")
    gated = load_student(f"{RUN}/states-{STEPS}.ckpt")
    sizes = again.student.settings
    assert sizes == pruned.student.settings and again.student.is_cut
    assert max(sizes.ffn_dims) < 64 and max(sizes.conv_layers)[0] < 32
    assert largest_difference(gated.student, again.student) < 1e-5
    for key, weight in gated.heads.state_dict().items():
        assert torch.equal(again.heads.state_dict()[key], weight)
    assert again.targets == gated.targets
    before, after = (
        sum(p.numel() for n, p in model.named_parameters() if not n.endswith("log_alpha"))
        for model in (gated.student, again.student)
    )
    expected = {"from": before, "to": after, "of": "hubert", "sparsity": 0.3, "by": "parameters"}
    # two cuts of one student may keep different units, so they do not have a common start
    start = gated.about.pop("initial_weights")
    assert len(start) == 32 and again.about == {**gated.about, "pruned": expected}
    words = output.out.split()
    for text in (f"{before:,}", f"{after:,}", f"{100 * (1 - after / before):.1f}", "30.0"):
        assert text in words
    for layer in range(4):
        assert f"{len(sizes.heads[layer])}/4" in words and f"{sizes.ffn_dims[layer]}/64" in words
    assert all(f"{channels}/32" in words for channels, _, _ in sizes.conv_layers)
    assert Path("again.png").read_bytes().startswith(b"\x89PNG")
    assert abs(1 - after / before - 0.3) < 0.05 and not caplog.records


def test_a_sparsity_that_was_not_reached(here, caplog, capsys):
    loaded = load_student(f"{RUN}/states-{STEPS}.ckpt")
    loaded.about["config"]["pruning"] |= {"sparsity": 0.5, "by": "macs", "seconds": 2.0}
    write_student(loaded, "far.pt")
    assert cli.main(["prune", "far.pt", "-o", "b.pt"]) == 0
    assert "MACs in 2 s" in capsys.readouterr().out
    (record,) = caplog.records
    assert "0.500" in record.getMessage()


def test_prune_compares_on_audio(here, corpus, monkeypatch):
    lengths = []

    def record(gated, small, waves):
        lengths.extend(len(wave) for wave in waves)
        return differences(gated, small, waves)

    monkeypatch.setattr("s3prl_ekd.distill.pruning.cut.differences", record)
    audio = corpus / "audio/u3.flac"
    assert cli.main(["prune", RUN, "-o", "a.pt", "--audio", str(audio)]) == 0
    assert lengths == [soundfile.info(audio).frames]


def test_prune_at_random(here, capsys):
    assert cli.main(["prune", RUN, "-o", "a.pt", "--random", "3"]) == 0
    drawn, pruned = load_student("a.pt"), load_student("pruned.pt")
    assert drawn.about["pruned"] == {**pruned.about["pruned"], "random": 3}
    assert drawn.student.settings.ffn_dims == pruned.student.settings.ffn_dims
    assert "random" in capsys.readouterr().out


def test_prune_without_matplotlib(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["prune", RUN, "-o", "a.pt"]) == 0
    assert "a.png" in capsys.readouterr().out and not Path("a.png").exists()
    assert load_student("a.pt").student.is_cut


def test_the_second_distillation(here, corpus, pretrain, capfd):
    """Its command is the one that `prune` prints; a resumed run ends as an uninterrupted one."""
    with edit_yaml("runner.yaml") as config:
        config["runner"]["eval_step"] = 3
        config["pretrain_expert"]["datarc"] |= {"file_path": "tables", "dev_sets": ["dev"]}
    shutil.copytree(corpus / "tables", "tables")
    shutil.copy("tables/train.csv", "tables/dev.csv")
    assert cli.main(["prune", RUN, "-o", "it's: 25 % #2.pt"]) == 0
    (line,) = (x for x in capfd.readouterr().out.splitlines() if x.startswith("next: "))
    script, *printed = shlex.split(line.removeprefix("next: "))
    assert script == "run_pretrain.py" and "it's: 25 % #2.yaml" in printed
    names = {"NAME": "second", "RUNNER.yaml": "runner.yaml"}
    argv = [names.get(word, word) for word in printed if word not in ("-u", "ekd")]
    code, output = pretrain(*argv, "--device", "cpu")
    assert code in (None, 0), output
    folder = Path("result/pretrain/second")
    assert load_student(folder / "dev-best.ckpt").student.is_cut
    finished, started = saved_states("second"), load_student("pruned.pt")
    assert finished["Step"] == 6  # half of the first run's
    assert finished["Config"]["optimizer"]["lr"] == 5e-4
    assert finished["EKD"]["about"]["pruned"] == started.about["pruned"]
    student = load_student(folder / "states-6.ckpt")
    assert student.student.settings == started.student.settings
    moved = [
        not torch.equal(a, b)
        for a, b in zip(student.student.parameters(), started.student.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2

    for file in folder.glob("*.ckpt"):
        if file.name != "states-3.ckpt":
            file.unlink()
    code, output = pretrain("-n", "second", "-a", "--device", "cpu")
    assert code in (None, 0), output
    resumed = saved_states("second")
    assert resumed["Step"] == 6
    for part in ("student", "heads"):
        for key, value in finished["EKD"][part].items():
            assert torch.equal(resumed["EKD"][part][key], value), key

    waves = [torch.randn(8000), torch.randn(6000)]
    upstream = UpstreamExpert(str(folder / "states-6.ckpt")).eval()
    states = upstream(waves)["hidden_states"]
    assert [tuple(state.shape) for state in states] == [(2, 24, 48)] * 5


# Refusals


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("pruned.pt", "-o", "new.pt"), ["pruned.pt", "gates"]),  # it is cut
        (("distil.pt", "-o", "new.pt"), ["distil.pt", "gates"]),
        (("missing.pt", "-o", "new.pt"), ["missing.pt"]),
        (("pretrain", "-o", "new.pt"), ["pretrain"]),  # a folder without checkpoints
        ((RUN, "-o", "pruned.pt"), ["pruned.pt", "--force"]),
        ((RUN, "-o", "taken.pt"), ["taken.png", "--force"]),
        ((RUN, "-o", "new.png"), ["new.png"]),
        ((RUN, "-o", "new.yaml"), ["new.yaml"]),
        ((RUN, "-o", "new.pt", "--random", "-1"), ["--random", "-1"]),
        ((RUN, "-o", "new.pt", "--random", str(2**64)), ["--random", str(2**64)]),
        ((RUN, "-o", "."), ["-o ."]),
        ((RUN, "-o", "/"), ["-o /"]),
        (("gated.pt", "-o", "gated.pt", "--force"), ["gated.pt", "gates"]),
        ((RUN, "-o", "model.pt", "--force"), ["model.yaml"]),  # a config of the user's
        (("far.pt", "-o", "new.pt"), ["far.pt", "sparsity", "1.5"]),
        (("extends.pt", "-o", "new.pt"), ["extends.pt", "extends"]),
        (("units.pt", "-o", "new.pt"), ["attention"]),  # it has no gates of this kind
        (("not_finite.pt", "-o", "new.pt"), ["not_finite.pt", "nan"]),
        (("not_finite.pt", "-o", "new.pt", "--random", "1"), ["not_finite.pt", "nan"]),
    ],
)
def test_prune_refuses(here, student_settings, capsys, argv, parts):
    write_student(LoadedStudent(Student(student_settings), None, {}, {}), "distil.pt")
    Path("taken.png").touch()
    loaded = load_student(f"{RUN}/states-{STEPS}.ckpt")
    config = loaded.about["config"]
    if argv[0] == "far.pt":
        config["pruning"]["sparsity"] = 1.5
    elif argv[0] == "extends.pt":
        config["extends"] = "model.yaml"
    elif argv[0] == "units.pt":
        config["pruning"]["units"] = ["attention"]
    elif argv[0] == "not_finite.pt":
        loaded.student.backbone.post_extract_proj.bias.data.fill_(float("nan"))
    if argv[0].endswith(".pt") and argv[0] not in ("pruned.pt", "distil.pt", "missing.pt"):
        write_student(loaded, argv[0])
    message = error_of(capsys, "prune", *argv)
    assert all(part in message for part in parts), message
    assert not Path("new.pt").exists()


def test_a_cut_that_changes_hidden_states_is_not_written(here, capsys, monkeypatch):
    def damaged(student, values):
        small = cut(student, values)
        small.backbone.encoder.layers[2].fc2.bias.data[0] += 0.1
        return small

    monkeypatch.setattr("s3prl_ekd.distill.pruning.cut.cut", damaged)
    assert "differs" in error_of(capsys, "prune", RUN, "-o", "new.pt")
    assert not Path("new.pt").exists()


def test_prune_with_norms_over_all_channels(here, capsys):
    loaded = load_student(f"{RUN}/states-{STEPS}.ckpt")
    gates = dataclasses.replace(loaded.student.settings.gates, norms="all")
    settings = dataclasses.replace(loaded.student.settings, gates=gates)
    student = Student(settings).eval()
    student.load_state_dict(loaded.student.state_dict())
    loaded.about["config"]["pruning"]["norms"] = "all"
    write_student(LoadedStudent(student, None, {}, loaded.about), "all.pt")
    assert cli.main(["prune", "all.pt", "-o", "new.pt"]) == 0
    assert "pruning.norms" in capsys.readouterr().out
    config = yaml.safe_load(Path("new.yaml").read_text())
    assert config["student"] == {"kind": "file", "file": "new.pt", "keep_heads": False}
    cut_student = load_student("new.pt").student
    assert largest_difference(student, cut_student) > 1e-3


def test_prune_warns_of_a_run_that_has_not_ended(here, caplog):
    assert cli.main(["prune", f"{RUN}/states-6.ckpt", "-o", "early.pt"]) == 0
    assert any("6 of 12" in record.getMessage() for record in caplog.records)


def test_prune_needs_usable_audio(here, capsys):
    Path("none.wav").write_bytes(b"no audio")
    with pytest.raises(SystemExit) as stop:
        cli.main(["prune", RUN, "-o", "new.pt", "--audio", "none.wav"])
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: --audio")


def two_targets(teachers):
    """Two teachers with different layers."""
    return {
        "hubert": {"model": str(teachers["hubert"]), "layers": [1, 2]},
        "robust": {"model": str(teachers["robust"]), "layers": [2, 3]},
    }


SECOND = {
    "uncut": (lambda t: write_second(t, f"{RUN}/states-{STEPS}.ckpt"), ["states-12.ckpt", "prune"]),
    "another teacher": (
        lambda t: write_second({"hubert": t["robust"]}),
        ["student.file", "pruned.pt", "teachers.hubert.model"],
    ),
    "one teacher more": (
        write_second_of_two,
        ["student.file", "average.pt", "robust"],
    ),
    "more layers": (lambda t: write_second(t, layers=(0, 1, 2, 4)), ["student.file", "4 layers"]),
    "as many other layers": (
        lambda t: write_second(t, layers=(1, 2, 4)),
        ["student.file", "[[0], [2], [4]]", "[[1], [2], [4]]"],
    ),
    "fewer layers": (lambda t: write_second(t, layers=(1, 2)), ["student.file", "3 layers", "2 l"]),
    "other heads": (
        lambda t: write_second(t, heads={"kind": "linear"}),
        ["student.file", "layerwise", "linear"],
    ),
    "as many other layers of linear heads": (
        lambda t: write_second(t, "linear.pt", layers=(1, 2, 4), heads={"kind": "linear"}),
        ["student.file", "linear.pt", "[[0], [2], [4]]", "[[1], [2], [4]]"],
    ),
    "no heads": (lambda t: write_second(t, "headless.pt"), ["student.file", "headless.pt"]),
    "missing": (lambda t: write_second(t, "missing.pt"), ["missing.pt"]),
    "pruning": (
        lambda t: write_second(t, pruning=FIRST["pruning"]),
        ["pruning", "student.kind: copy"],
    ),
}
FIRST_STEP = {
    "optimizer": (lambda t: write_model(t), ["FusedAdamW", "AdamW_with_schedule"]),
    "out of reach": (
        lambda t: write_model(t, pruning={"units": ["heads"], "sparsity": 0.9, "reach_at": 1}),
        ["pruning.sparsity", "0.9", "heads"],
    ),
    "layer drop": (
        lambda t: write_model(t, student={**STUDENT, "encoder_layerdrop": 0.1}, pruning=None),
        ["layerwise", "encoder_layerdrop", "0.1"],
    ),
    "seconds": (
        lambda t: write_model(t, pruning={"by": "macs", "seconds": 0.001}),
        ["seconds", "0.001"],
    ),
    "unknown unit": (lambda t: write_model(t, pruning={"units": ["hedas"]}), ["hedas", "heads"]),
    "no units": (lambda t: write_model(t, pruning={"units": []}), ["units", "[]"]),
    "frozen extractor": (
        lambda t: write_model(t, student={**FIRST["student"], "feature_grad_mult": 0}),
        ["pruning.units", "conv", "feature_grad_mult"],
    ),
    "unequal layers": (
        lambda t: write_model(t, teachers=two_targets(t), aggregation="average"),
        ["layerwise", "average"],
    ),
    "too deep": (
        lambda t: write_model(t, student=STUDENT, pruning=None),  # of 2 layers
        ["layerwise", "layer 4", "0 to 2"],
    ),
    "share": (
        lambda t: write_model(t, heads={"kind": "layerwise", "share": [[0], [2, 3]]}),
        ["heads.share", "[4]", "teachers.hubert"],
    ),
    "distil": (lambda t: write_model(t, student=STUDENT), ["pruning", "student.kind: copy"]),
    "no such teacher": (
        lambda t: write_model(t, student={"kind": "copy", "of": "huber"}),
        ["student.of", "huber", "hubert"],
    ),
}


@pytest.mark.parametrize("case", [*SECOND, *FIRST_STEP])
def test_refused_configs(here, teachers, pretrain, case):
    loaded = load_student("pruned.pt")
    write_student(loaded, "headless.pt", keep_heads=False)
    average = {"average": loaded.targets["hubert"]}
    heads = PredictionHeads(48, average, HeadSettings(kind="layerwise"))
    write_student(LoadedStudent(loaded.student, heads, average, loaded.about), "average.pt")
    linear = PredictionHeads(48, loaded.targets, HeadSettings(kind="linear"))
    targets = {name: dataclasses.replace(spec, members=()) for name, spec in loaded.targets.items()}
    write_student(LoadedStudent(loaded.student, linear, targets, loaded.about), "linear.pt")
    write, parts = {**SECOND, **FIRST_STEP}[case]
    write(teachers)
    if case == "optimizer":
        with edit_yaml("runner.yaml") as config:
            config["optimizer"]["name"] = "AdamW_with_schedule"
    argv = ("-n", "second", "-c", "runner.yaml", "-g", "model.yaml", "--device", "cpu")
    code, output = pretrain(*argv)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1, output
    assert all(part in errors[0] for part in parts), errors[0]
    assert "Traceback" not in output


def train(pretrain, name: str) -> dict:
    """Train a step longer than it saves; return the newest checkpoint."""
    with edit_yaml("runner.yaml") as config:
        config["runner"] |= {"total_steps": 3, "save_step": 2, "log_step": 1}
    argv = ("-n", name, "-c", "runner.yaml", "-g", "model.yaml", "--device", "cpu")
    code, output = pretrain(*argv)
    assert code in (None, 0), output
    return saved_states(name)["EKD"]


def test_a_run_that_ends_before_the_target_is_reached(here, teachers, pretrain, caplog):
    write_model(teachers, pruning={"sparsity": 0.3})
    train(pretrain, "short")
    messages = [record.getMessage() for record in caplog.records]
    assert any("reach_at 5000" in message and " 3," in message for message in messages)


def test_new_heads_for_other_targets(here, teachers, pretrain):
    write_second(teachers, layers=(1, 2), keep_heads=False, heads={"kind": "linear"})
    saved = train(pretrain, "second")
    assert saved["head_kind"] == "linear" and saved["targets"]["hubert"]["layers"] == 2


def test_a_student_of_another_kind_is_trained_further(here, teachers, pretrain):
    plain = {"heads": {}, "pruning": None}
    write_model(teachers, student=STUDENT, **plain)
    first = train(pretrain, "plain")
    newest = f"result/pretrain/plain/states-{3}.ckpt"
    write_second(teachers, newest, **plain)
    assert train(pretrain, "second")["settings"] == first["settings"]


@pytest.mark.parametrize("kind", ["distilhubert", "ekd_student", "data2vec"])
def test_teachers_of_another_layout(tmp_path, student_file, kind):
    path = student_file
    if kind == "distilhubert":
        torch.save(distilhubert(), path := tmp_path / "distil.ckpt")
    elif kind == "data2vec":
        transformers = pytest.importorskip("transformers")
        config = transformers.Data2VecAudioConfig(**{**HF_SIZE, **D2V})
        transformers.Data2VecAudioModel(config).save_pretrained(path := tmp_path / "d2v")
    ensemble = load_teachers({"t": TeacherSettings(str(path), (1,))}, dropout=False)
    with pytest.raises(TeacherError, match=r"student\.of: t\b"):
        copied_student(ensemble, CopySettings("copy", "t"), None)
