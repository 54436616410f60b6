"""Pruning a copied student: the cut, the command `prune`, and the second distillation."""

import dataclasses
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from s3prl_ekd.upstream.expert import UpstreamExpert

from s3prl_ekd import cli
from s3prl_ekd.distill.conv_layers import parse_conv_layers
from s3prl_ekd.distill.pruning.cut import cut, differences, gate_values
from s3prl_ekd.distill.pruning.sparsity import SparsityTerm
from s3prl_ekd.distill.settings import TeacherSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import (
    CopySettings,
    GateSettings,
    PrunedSettings,
    PruningSettings,
)
from s3prl_ekd.errors import ConfigError, TeacherError
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student
from s3prl_ekd.teachers import copied_student, load_teachers

from .conftest import (
    CONV,
    STUDENT,
    command,
    edit_yaml,
    error_of,
    saved_states,
    write_configs,
    write_workspace,
)
from .test_teacher_sources import D2V, HF_SIZE, distilhubert

ALL_UNITS = ("conv", "heads", "ffn", "attention", "feed_forward")
BASE = PrunedSettings(
    conv_layers=parse_conv_layers(CONV),
    extractor_mode="default",
    conv_bias=False,
    normalize_waveforms=False,
    encoder_embed_dim=48,
    encoder_attention_heads=4,
    heads=((0, 1, 2, 3),) * 5,
    ffn_dims=(64,) * 5,
    conv_pos=16,
    conv_pos_groups=4,
    activation_fn="gelu",
    layer_norm_first=False,
)
LARGE = {
    "extractor_mode": "layer_norm",
    "conv_bias": True,
    "normalize_waveforms": True,
    "layer_norm_first": True,
}
WAVLM = {"position_buckets": 32, "max_distance": 80}
LAYOUTS = {"base": {}, "large": LARGE, "wavlm": WAVLM, "wavlm large": {**LARGE, **WAVLM}}


def student_with_gates(gates: GateSettings, **changes) -> Student:
    """In eval mode, with random weights and about half of the units closed: all heads of layer 1,
    all feed-forward units of layer 3; of whole modules those of layers 4 and 5."""
    torch.manual_seed(0)
    scale = gates.last_conv == "soft"
    student = Student(dataclasses.replace(BASE, gates=gates, feature_scale=scale, **changes)).eval()
    none_left = {("heads", 0), ("ffn", 2), ("attention", 3), ("feed_forward", 4)}
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if weight.dim() == 1 and not name.endswith(("log_alpha", "scale.weight")):
                weight.add_(0.3 * torch.randn_like(weight))  # biases and norms count
        for unit, layer, gate in student.backbone.gates():
            gate.log_alpha.normal_(0, 2)
            if unit in ("attention", "feed_forward"):
                gate.log_alpha.fill_(2)
            if (unit, layer) in none_left:
                gate.log_alpha.fill_(-20)
    return student


def largest_difference(student: Student, other: Student) -> float:
    """Over valid frames of a padded batch, absolute."""
    generator = torch.Generator().manual_seed(1)
    waves = torch.randn(2, 8000, generator=generator)
    lengths = torch.tensor([8000, 5000])
    waves[1, 5000:] = 0
    with torch.no_grad():
        ours, theirs = student(waves, lengths), other(waves, lengths)
    assert torch.equal(ours.mask, theirs.mask) and len(ours.hidden_states) > 4
    valid = ours.mask.bool()
    pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
    return max((a - b)[valid].abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("units", [ALL_UNITS[:3], ALL_UNITS, ("ffn",), ("conv",)], ids="-".join)
@pytest.mark.parametrize("last_conv", ["hard", "soft"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cutting_changes_nothing(layout, last_conv, units):
    student = student_with_gates(GateSettings(units, last_conv), **LAYOUTS[layout])
    smaller = cut(student, gate_values(student))
    assert smaller.is_cut and not smaller.training
    assert largest_difference(student, smaller) < 1e-5
    sizes = smaller.settings
    if "conv" in units:
        assert all(0 < channels < 32 for channels, _, _ in sizes.conv_layers)
    if "heads" in units:
        assert sizes.heads[0] == () and 0 < sum(map(len, sizes.heads)) < 16
    if "ffn" in units:
        assert sizes.ffn_dims[2] == 0 and 0 < sizes.ffn_dims[0] < 64
    if "attention" in units:
        assert sizes.heads[3] == () and sizes.ffn_dims[4] == 0


@pytest.mark.parametrize("layout", ["base", "large"])
def test_norms_over_all_channels_are_not_exact(layout):
    gates = GateSettings(("conv",), norms="all")
    student = student_with_gates(gates, **LAYOUTS[layout])
    assert largest_difference(student, cut(student, gate_values(student))) > 1e-2
    student = student_with_gates(dataclasses.replace(gates, units=("ffn",)), **LAYOUTS[layout])
    assert largest_difference(student, cut(student, gate_values(student))) < 1e-5


def test_differences():
    student = student_with_gates(GateSettings(("ffn",)))
    other = student_with_gates(GateSettings(("ffn",)))
    with torch.no_grad():
        for model in (student, other):
            model.backbone.encoder.layers[-1].final_layer_norm.weight.fill_(1)
            model.backbone.encoder.layers[-1].final_layer_norm.bias.fill_(0)
        other.backbone.encoder.layers[-1].final_layer_norm.bias[0] = 0.5  # one of 48 dimensions
    *same, last = differences(student, other, torch.randn(2, 4000))
    assert same == [(0.0, 0.0)] * 5  # the states before the last are equal
    assert last == pytest.approx((0.5, 0.5 / 48**0.5), rel=1e-3)  # the states have variance 1


def test_random_units():
    student = student_with_gates(GateSettings(ALL_UNITS[:3]))
    values = gate_values(student)
    drawn, again, other = (gate_values(student, seed) for seed in (1, 1, 2))
    for key, value in values.items():
        assert drawn[key].unique().tolist() in ([0], [1], [0, 1])
        assert drawn[key].sum() == (value > 0).sum()
        assert torch.equal(drawn[key], again[key])
    assert any(not torch.equal(drawn[key], other[key]) for key in values)
    sizes, random_sizes = (cut(student, v).settings for v in (values, drawn))
    assert random_sizes.conv_layers == sizes.conv_layers
    assert random_sizes.ffn_dims == sizes.ffn_dims
    assert [*map(len, random_sizes.heads)] == [*map(len, sizes.heads)]


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
    expected = {"from": before, "to": after, "sparsity": 0.3, "by": "parameters"}
    assert again.about == {**gated.about, "pruned": expected}
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


def test_prune_on_audio_and_at_random(here, corpus, capsys):
    audio = str(corpus / "audio/u3.flac")
    assert cli.main(["prune", RUN, "-o", "a.pt", "--audio", audio, "--random", "3"]) == 0
    drawn, pruned = load_student("a.pt"), load_student("pruned.pt")
    assert drawn.about["pruned"] == {**pruned.about["pruned"], "random": 3}
    assert drawn.student.settings.ffn_dims == pruned.student.settings.ffn_dims
    assert "random" in capsys.readouterr().out


def test_prune_without_matplotlib(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["prune", RUN, "-o", "a.pt"]) == 0
    assert "a.png" in capsys.readouterr().out and not Path("a.png").exists()
    assert load_student("a.pt").student.is_cut


def test_the_second_distillation(here, pretrain, capfd):
    """Its config is the one that `prune` prints; a resumed run ends as an uninterrupted one."""
    with edit_yaml("runner.yaml") as config:
        config["runner"] |= {"total_steps": 6, "save_step": 3}
    assert cli.main(["prune", RUN, "-o", "it's: 25 % #2.pt"]) == 0
    (line,) = (x for x in capfd.readouterr().out.splitlines() if x.startswith("next: "))
    script, *printed = shlex.split(line.removeprefix("next: "))
    assert script == "run_pretrain.py" and "it's: 25 % #2.yaml" in printed
    names = {"NAME": "second", "RUNNER.yaml": "runner.yaml"}
    argv = [names.get(word, word) for word in printed if word not in ("-u", "ekd")]
    code, output = pretrain(*argv, "--device", "cpu")
    assert code in (None, 0), output
    folder = Path("result/pretrain/second")
    finished, started = saved_states("second"), load_student("pruned.pt")
    assert finished["Step"] == 6
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
        (("far.pt", "-o", "new.pt"), ["far.pt", "sparsity", "1.5"]),
        (("not_finite.pt", "-o", "new.pt"), ["not_finite.pt", "nan"]),
    ],
)
def test_prune_refuses(here, student_settings, capsys, argv, parts):
    write_student(LoadedStudent(Student(student_settings), None, {}, {}), "distil.pt")
    Path("taken.png").touch()
    if argv[0] in ("far.pt", "not_finite.pt"):
        loaded = load_student(f"{RUN}/states-{STEPS}.ckpt")
        if argv[0] == "far.pt":
            loaded.about["config"]["pruning"]["sparsity"] = 1.5
        else:
            loaded.student.backbone.post_extract_proj.bias.data.fill_(float("nan"))
        write_student(loaded, argv[0])
    message = error_of(capsys, "prune", *argv)
    assert all(part in message for part in parts), message
    assert not Path("new.pt").exists()


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
        lambda t: write_model(t, pruning={"units": ["heads"], "sparsity": 0.9}),
        ["pruning.sparsity", "0.9", "heads"],
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


def test_a_kind_of_unit_that_the_student_lacks():
    pruning = PruningSettings(units=("heads", "ffn"), sparsity=0.1)
    student = Student(dataclasses.replace(BASE, heads=((),) * 5, gates=pruning.gates))
    with pytest.raises(ConfigError, match="pruning.units.*heads"):
        SparsityTerm(student, pruning)


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
