"""Configs: every shipped YAML is valid; every mistake is one sentence with its YAML path."""

import argparse
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from s3prl_ekd.commands import fit_units
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.settings import (
    DistillSettings,
    HeadSettings,
    TeacherSettings,
    UnitLossSettings,
)
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import CopySettings, FileSettings, StudentSettings
from s3prl_ekd.distill.teachers import TeacherEnsemble
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.files.config import (
    apply_overrides,
    escape_equals,
    overridden,
    override_option,
    read_yaml,
    to_plain_data,
)
from s3prl_ekd.pretrain.settings import (
    check_pruning_run,
    check_runner_config,
    load_model_config,
    load_runner_config,
    saved_runner_config,
)
from s3prl_ekd.request import PretrainRequest
from s3prl_ekd.workspace import second_step, write_workspace

CONFIGS = Path(__file__).parent.parent / "pretrain_configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))

RUNNER = {
    "runner": {
        "n_epochs": -1,
        "total_steps": 10,
        "gradient_clipping": 5.0,
        "gradient_accumulate_steps": 1,
        "log_step": 2,
        "save_step": 5,
        "max_keep": 2,
    },
    "optimizer": {"name": "AdamW_with_schedule", "lr": 1e-3},
    "pretrain_expert": {
        "datarc": {"libri_root": "a", "file_path": "b", "sets": ["c"], "train_batch_size": 2}
    },
}
FILE_STUDENT = {"kind": "file", "file": "x.pt"}
MODEL = {"teachers": {"one": {"model": "hubert_base"}, "two": {"model": "wavlm", "layers": [1]}}}


def changed(data, path, value):
    """A deep copy of ``data`` with one dotted key set, or removed where value is ``...``."""
    data = yaml.safe_load(yaml.safe_dump(data))
    *parents, last = path.split(".")
    target = data
    for name in parents:
        target = target[name]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return data


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_yaml_is_valid(path):
    load = load_runner_config if path.name.endswith("_runner.yaml") else load_model_config
    load(path)


def test_the_shipped_files_are_found():
    assert {"config_runner.yaml", "config_model.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_yaml_starts_with_its_command(path):
    comment = path.read_text().split("\n\n")[0]
    assert comment.startswith("# ")
    if path.name != "tiny_runner.yaml":
        assert "run_pretrain.py -u ekd" in comment
    if path.parent != CONFIGS:
        assert f"-g pretrain/ekd/{path.parent.name}/{path.name}" in comment


EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))


def test_the_experiments_of_the_paper_are_shipped():
    names = {path.stem for path in EXPERIMENTS}
    kinds = ("average", "concat", "separate")
    wanted = {
        "single_hubert",
        "single_robust",
        "single_wavlm",
        "s3prl_distiller",
        "skill",
        "essence",
    }
    for group in ("hubert_robust", "hubert_wavlm", "robust_wavlm", "three"):
        wanted |= {f"{group}_{kind}" for kind in kinds}
    wanted |= {"robust_setup1", "robust_setup2", "deep_thin"}
    wanted |= {"dp_hubert", "dp_wavlm_plus", "skill_wavlm_plus"}
    wanted |= {"ekd_pruned_average", "ekd_pruned_heads", "ekd_skill_pruned"}
    wanted |= {"three_relation", "three_units", "three_units_only", "three_procrustes"}
    wanted |= {"ekd_pruned_relation"}
    assert wanted <= names


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_a_tiny_experiment_is_the_same_one(path, tmp_path):
    """The same keys below `extends`, sizes aside: the teachers have half as many layers."""
    write_workspace(tmp_path, [f"tiny/{path.stem}"])
    written = tmp_path / "pretrain/ekd/tiny" / path.name
    assert f"-g pretrain/ekd/tiny/{path.name}" in written.read_text().split("\n\n")[0]
    small, large = load_model_config(written).teachers, load_model_config(path).teachers
    assert small.keys() == large.keys()
    for teacher, other in zip(small.values(), large.values(), strict=True):
        halves = [sorted({-(-layer // 2) for layer in target}) for target in other.targets]
        assert [[*target] for target in teacher.targets] == halves
        sizes = {key: getattr(other, key) for key in ("model", "layers", "groups")}
        assert dataclasses.replace(teacher, **sizes) == other
    tiny, full = yaml.safe_load(written.read_text()), yaml.safe_load(path.read_text())
    assert full.pop("extends") == "../config_model.yaml"
    assert tiny.pop("extends") == "../tiny_model.yaml"
    full.pop("teachers", None)
    tiny.pop("teachers", None)
    if "pruning" in full:
        full["pruning"] |= {"sparsity": 0.5, "reach_at": 300, "lr": 0.1}
    for entry in full.get("unit_loss", ()):  # the units of other teachers
        entry["file"] = entry["file"].replace("/", "/tiny_")
    if path.stem == "deep_thin":
        assert full["student"] | {"encoder_attention_heads": 0} == {
            "encoder_layers": 12,
            "encoder_embed_dim": 768 // 2,
            "encoder_ffn_embed_dim": 3072 // 2,
            "encoder_attention_heads": 0,
            "feature_grad_mult": 1.0,
        }
        full["student"] |= {"encoder_layers": 6, "encoder_embed_dim": 192 // 2}
        full["student"] |= {"encoder_ffn_embed_dim": 768 // 2, "encoder_attention_heads": 2}
    assert full == tiny


def typed(text):
    """The `run_pretrain.py` commands in a comment of a YAML file, as lists of arguments."""
    comment = re.sub(r" \\\n#\s+", " ", text.split("\n\n")[0])
    return [shlex.split(c) for c in re.findall(r"run_pretrain\.py (-u ekd .*)", comment)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
@pytest.mark.parametrize("size", ["experiments", "tiny"])
def test_the_command_of_an_experiment_fits_it(path, size, tmp_path):
    write_workspace(tmp_path, [f"{size}/{path.stem}"])
    text = (tmp_path / "pretrain/ekd" / size / path.name).read_text()
    (argv,) = typed(text)
    request = PretrainRequest.parse(argv)
    assert request.passthrough == () and request.expname == path.stem
    run = load_runner_config(tmp_path / (request.config or "pretrain/ekd/config_runner.yaml"))
    model = load_model_config(tmp_path / request.upstream_config)
    check_pruning_run(model, run)
    if model.pruning is None:
        return
    # DPHuBERT's weight decay and clipping; the target sparsity is reached within the run
    assert run.optimizer["weight_decay"] == 0 and run.runner.gradient_clipping == 10
    assert model.pruning.reach_at < run.runner.total_steps
    assert f"s3prl-ekd prune result/pretrain/{path.stem} -o {path.stem}.pt\n" in text


WITH_UNITS = [path for path in EXPERIMENTS if "\nunit_loss:" in path.read_text()]


@pytest.mark.parametrize("path", WITH_UNITS, ids=lambda path: path.name)
@pytest.mark.parametrize("size", ["experiments", "tiny"])
def test_the_comment_of_an_experiment_with_units_makes_their_files(path, size, tmp_path):
    """With a command for each file, of teachers and layers that the experiment has."""
    write_workspace(tmp_path, [f"{size}/{path.stem}"])
    text = (tmp_path / "pretrain/ekd" / size / path.name).read_text()
    model = load_model_config(tmp_path / "pretrain/ekd" / size / path.name)
    comment = re.sub(r" \\\n#\s+", " ", text)
    parser = argparse.ArgumentParser()
    fit_units.configure(parser)
    lines = re.findall(r"# +s3prl-ekd fit-units (.*)", comment)
    made = [parser.parse_args(shlex.split(line)) for line in lines]
    assert [args.output for args in made] == [Path(entry.file) for entry in model.unit_loss]
    assert [args.teacher for args in made] == [*model.teachers]
    for args in made:
        teacher = load_model_config(tmp_path / args.config).teachers[args.teacher]
        assert teacher.model == model.teachers[args.teacher].model
        assert (args.layer,) in model.teachers[args.teacher].targets  # a target cache has it


def test_the_reference_experiment_has_s3prls_loss():
    model = load_model_config(CONFIGS / "experiments/s3prl_distiller.yaml")
    assert model.loss.reduce == "batches" and not model.loss.mask_padding and model.teacher_dropout
    assert not (model.student.masked_norm or model.teacher_masked_norm)


def test_the_default_optimizer_has_distilhuberts_schedule():
    """Learning rate, warm-up and moments of s3prl's distiller, in the run and its tiny version."""
    s3prl, ours = (load_runner_config(CONFIGS / f"{n}_runner.yaml") for n in ("s3prl", "config"))
    assert s3prl.optimizer["name"] == "AdamW_with_schedule"
    assert s3prl.runner.precision == "float32" and ours.runner.precision == "auto"
    for key in ("lr", "warmup_proportion", "betas", "eps"):
        assert ours.optimizer[key] == s3prl.optimizer[key]
    assert ours.optimizer["weight_decay"] == 0.01  # s3prl's, whatever its config has
    for path in CONFIGS.glob("*_runner.yaml"):
        expected = "AdamW_with_schedule" if path.stem == "s3prl_runner" else "FusedAdamW"
        assert load_runner_config(path).optimizer["name"] == expected


def test_dphuberts_values():
    """Those of run.sh in its repository."""
    model = load_model_config(CONFIGS / "experiments/dp_hubert.yaml")
    (teacher,) = model.teachers.values()
    assert teacher.model == "hubert_base" and teacher.layers == (0, 4, 8, 12)
    assert (model.loss.reconstruction, model.loss.cosine, model.loss.cosine_weight) == (
        *("l1", "raw"),
        1,
    )
    pruning = model.pruning
    assert (pruning.sparsity, pruning.reach_at, pruning.lr) == (0.75, 5000, 0.02)
    run = load_runner_config(CONFIGS / "pruning_runner.yaml")
    rate, warmup = run.optimizer["lr"], run.optimizer["warmup_proportion"]
    assert (run.runner.total_steps, rate, warmup * run.runner.total_steps) == (50000, 2e-4, 15000)
    drop = pruning.start_drop
    assert (drop.conv, drop.heads, drop.ffn) == (0.01, 0.01, 0.5)
    assert model.heads == HeadSettings(kind="layerwise")  # shared by all layers but 0
    student = model.student
    dropout = (student.dropout, student.attention_dropout, student.activation_dropout)
    assert (*dropout, student.input_dropout) == (0.1, 0.1, 0.0, 0.1)
    adam = (run.optimizer["betas"], run.optimizer["eps"], run.optimizer["weight_decay"])
    assert adam == ([0.9, 0.999], 1e-8, 0)
    data = run.pretrain_expert.datarc
    assert (run.runner.gradient_clipping, data.max_seconds, data.sequence_length) == (
        *(10, 160),
        250_000,
    )
    text, _ = second_step(to_plain_data(model), "dp_hubert.pt")
    (argv,) = typed(text)
    run = load_runner_config(CONFIGS / "pruning_runner.yaml", PretrainRequest.parse(argv).override)
    rate, warmup = run.optimizer["lr"], run.optimizer["warmup_proportion"]
    assert (run.runner.total_steps, rate, warmup * run.runner.total_steps) == (25000, 1e-4, 5000)


PRUNED = [path for path in EXPERIMENTS if "\npruning:" in path.read_text()]


@pytest.mark.parametrize("path", PRUNED, ids=lambda path: path.name)
def test_the_second_distillation_differs_in_the_student(path, tmp_path):
    first = load_model_config(path)
    file = tmp_path / "my pruned: é.yaml"
    text, command = second_step(to_plain_data(first), str(file.with_suffix(".pt")))
    file.write_text(text)
    second = load_model_config(file)
    assert second.pruning is None
    assert second.student == FileSettings("file", str(file.with_suffix(".pt")))
    changes = {"pruning": first.pruning, "student": first.student}
    assert dataclasses.replace(second, **changes) == first
    (argv,) = typed(file.read_text())
    assert PretrainRequest.parse(argv).upstream_config == str(file)
    assert shlex.split(command)[1:] == argv


def test_the_deep_and_thin_student_has_the_published_size():
    """26.87 M parameters: arXiv 2207.06867, "12-L Half"."""
    text = (CONFIGS / "experiments/deep_thin.yaml").read_text()
    student = Student(load_model_config(CONFIGS / "experiments/deep_thin.yaml").student)
    count = sum(parameter.numel() for parameter in student.parameters())
    assert f"{count:,}" in text and round(count / 1e6, 2) == 26.87


def test_the_default_experiment():
    settings = load_model_config(CONFIGS / "config_model.yaml")
    assert list(settings.teachers) == ["hubert", "robust_hubert", "wavlm"]
    assert {teacher.layers for teacher in settings.teachers.values()} == {(4, 8, 12)}
    assert settings.aggregation == "separate"
    assert settings.loss.cosine_weight == 1.0 and settings.loss.mask_padding
    assert not settings.teacher_dropout


def test_a_config_survives_the_checkpoint():
    settings = load_model_config(CONFIGS / "config_model.yaml")
    assert load_model_config(to_plain_data(settings)) == settings


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("aggregation", "averge", ".aggregation separate average concat 'averge'"),
        ("agregation", "average", "'agregation' aggregation"),
        ("teachers", {}, " teachers"),
        ("teachers", ["hubert"], ".teachers"),
        ("teachers.one.layers", "4,8", ".teachers.one.layers '4,8'"),
        ("teachers.one.layers", [4, "8"], ".teachers.one.layers[1] '8'"),
        ("teachers.one.layers", [True], ".teachers.one.layers[0] True"),
        ("teachers.one.layers", [-1], ".teachers.one layers [-1]"),
        ("teachers.one.layers", [4, 4], ".teachers.one layers [4, 4]"),
        ("teachers.one.model", None, ".teachers.one.model None"),
        ("teachers.one", {"layers": [1]}, ".teachers.one model"),
        ("teachers.a-b", {"model": "x"}, "teachers: 'a-b'"),
        ("teachers.average", {"model": "x"}, "teachers: 'average'"),
        ("teachers.one.weight", -1.0, ".teachers.one weight"),
        ("teachers.one.groups", [], ".teachers.one groups"),
        ("teachers.one.groups", [[1], [1, 2]], ".teachers.one groups"),
        ("teachers.one.groups", [1, 2], ".teachers.one.groups[0] 1"),
        ("targets", {"across_teachers": True}, "targets.across_teachers one 3 two 1"),
        ("heads", {"residual": True}, "heads.residual one 3 two 1"),
        ("heads", {"residual_weight": -1}, ".heads residual_weight -1.0"),
        ("targets", {"drop_teachers": 1.5}, ".targets drop_teachers 1.5"),
        ("targets", {"weight_steps": -1}, ".targets weight_steps -1"),
        ("target_norm", "phi", ".target_norm none mean_std phi_s procrustes 'phi'"),
        ("target_norm", "procrustes", "target_norm: procrustes one 3 two 1"),
        ("target_norm_steps", 0, "target_norm_steps 0"),
        ("teachers.one.final_weight", 0.0, "teachers.one.final_weight targets.weight_steps"),
        ("loss", {"agreement": 0.0}, ".loss agreement 0.0"),
        ("unit_loss", [{"file": "x", "weight": -0.5}], ".unit_loss[0] weight -0.5"),
        ("unit_loss", {"fil": "x"}, ".unit_loss[0] 'fil' file"),
        ("unit_loss", [{"weight": 1.0}], ".unit_loss[0] file"),
        ("unit_loss", [{"file": "x"}, "y"], ".unit_loss[1] 'y'"),
        ("unit_loss", "units.safetensors", ".unit_loss 'units.safetensors'"),
        ("unit_loss", [{"file": "x"}, {"file": "y", "wait": 2}], ".unit_loss[1] 'wait' weight"),
        (
            *("unit_loss", [{"file": "x"}, {"file": "y", "unmasked_weight": 1.0}]),
            "unit_loss[1].unmasked_weight student.mask",
        ),
        ("relation", {"weight": -1}, ".relation weight -1.0"),
        ("relation", {"weight": 1}, "relation one 3 two 1"),
        ("relation", {"window": 1}, ".relation window 1"),
        ("relation", {"window": 50.0}, ".relation.window 50.0"),
        ("relation", {"similarity": "dot"}, ".relation.similarity cosine centred 'dot'"),
        ("relation", {"student_layers": []}, ".relation student_layers"),
        ("relation", {"student_layers": [-1]}, ".relation student_layers"),
        ("relation", {"layers": [1]}, ".relation 'layers' student_layers"),
        ("loss", {"reduce": "mean"}, ".loss.reduce frames batches 'mean'"),
        ("loss", {"weight": -1}, ".loss weight -1.0"),
        ("student", {"mask": {}}, "student.mask unit_loss fit-units student.mask"),
        ("student", {"mask": {"length": 0}}, ".student.mask length 0"),
        ("student", {"mask": {"share": 0}}, ".student.mask share 0.0"),
        ("student", {"mask": {"share": 1.5}}, ".student.mask share 1.5"),
        ("student", {"mask": True}, ".student.mask True"),
        (
            *("student", {"masked_norm": True, "extractor_mode": "layer_norm"}),
            ".student masked_norm extractor_mode: layer_norm",
        ),
        ("teacher_masked_norm", 1, ".teacher_masked_norm 1"),
        ("heads", {"kind": "wide"}, ".heads.kind split linear 'wide'"),
        ("loss", {"reconstruction": "l3"}, ".loss.reconstruction l1 l2 smooth_l1 'l3'"),
        ("distortion", {"setup": "setup3"}, ".distortion.setup clean setup1 setup2 same 'setup3'"),
        ("distortion", {"snr_min": 30.0}, ".distortion snr_min 30.0 snr_max"),
        ("init", {"teacher": "one", "average": ["one", "two"]}, ".init teacher average"),
        ("init", {"teacher": "one", "layers": [0]}, "init.layers 2 1"),
        ("student", {"train_extractor": 0}, ".student.train_extractor 0"),
        ("student", {"train_extractor": False}, "student.train_extractor: false init.teacher"),
        ("student", {"feature_grad_mult": 0}, "student.feature_grad_mult: 0 init.teacher"),
        ("heads", {"kind": "layerwise"}, "heads.kind: layerwise layer 12 of one 0 to 2"),
        ("teachers.keys", {"model": "x"}, "teachers: 'keys'"),
        ("teachers.settings", {"model": "x"}, "teachers: 'settings'"),
        ("teachers.register_hook", {"model": "x"}, "teachers: 'register_hook'"),
        ("aggregation", "average", "aggregation: average one 3 two 1"),
        ("init", {"teacher": "three"}, "init 'three' one, two"),
        ("student", {"encoder_layers": 0}, ".student encoder_layers 0"),
        ("student", {"encoder_layers": 2.0}, ".student.encoder_layers 2.0"),
        ("student", {"encoder_embed_dim": 100}, ".student 100 encoder_attention_heads 12"),
        ("student", {"dropout": 1.5}, ".student dropout 1.5"),
        ("student", {"dropout": float("nan")}, ".student.dropout nan"),
        ("student", {"extractor_conv_feature_layers": "exit()"}, "'exit()'"),
        ("loss", {"cosine_weight": "much"}, ".loss.cosine_weight 'much'"),
        ("loss", {"mask_padding": 1}, ".loss.mask_padding 1"),
        ("loss", 3, ".loss 3"),
        ("student", {"kind": "copi", "of": "one"}, ".student.kind distil copy file 'copi'"),
        ("student", {"kind": 3}, ".student.kind distil copy file 3"),
        ("student", {"kind": "copy"}, ".student of"),
        ("student", {"kind": "copy", "of": "three"}, "student.of 'three' one two"),
        ("student", {"kind": "copy", "of": "one", "encoder_layers": 2}, ".student encoder_layers"),
        ("student", {"kind": "distil", "of": "one"}, ".student 'of'"),
        ("student", {"kind": "file"}, ".student file"),
        ("student", {"kind": "file", "file": 3}, ".student.file 3"),
        ("student", {"kind": "file", "file": "x", "of": "one"}, ".student 'of' file"),
        ("student", "copy", ".student 'copy'"),
        ("pruning", {}, "pruning student.kind: copy"),
        ("heads", {"share": [[0]]}, ".heads share layerwise split"),
        ("heads", {"kind": "layerwise", "share": [[4]]}, "heads.share [8] teachers.one [4]"),
        ("heads", {"kind": "layerwise", "share": [[4, 4]]}, ".heads share"),
    ],
)
def test_a_mistake_in_the_model_config(tmp_path, path, value, parts):
    """The message has the file, the YAML path, what is allowed and the value."""
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(changed(MODEL, path, value)))
    with pytest.raises(ConfigError) as caught:
        load_model_config(file)
    assert_parts(str(caught.value), str(file), parts)


TWO = {"teachers": {name: {"model": "x", "layers": [1, 2]} for name in ("one", "two")}}
UNITS = [{"file": "x"}]


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (
            {"relation": {"weight": 1, "student_layers": [1]}},
            "relation.student_layers 1 2",
        ),
        (
            {"teachers": {"one": {"model": "x"}}, "target_norm": "procrustes"},
            "target_norm: procrustes",
        ),
        (
            {"student": {"mask": {}}, "unit_loss": UNITS, "student_backend": "s3prl"},
            "student.mask student_backend: ours",
        ),
        (
            {"student": {"masked_norm": True}, "student_backend": "s3prl"},
            "student.masked_norm student_backend: ours",
        ),
        (
            {
                "student": {"train_extractor": False},
                "init": {"teacher": "one", "conv": False},
            },
            "student.train_extractor: false init.teacher init.conv",
        ),
        (
            {
                "student": {"kind": "copy", "of": "one", "train_extractor": False},
                "loss": {"feature_penalty": 1.0},
            },
            "loss.feature_penalty student.train_extractor: false",
        ),
        (
            {
                "student": {"encoder_layerdrop": 0.1},
                "heads": {"kind": "layerwise"},
            },
            "heads.kind: layerwise student.encoder_layerdrop 0.1",
        ),
        (
            {"student": {"feature_grad_mult": 0}, "init": {"teacher": "one", "conv": False}},
            "student.feature_grad_mult: 0 init.teacher init.conv",
        ),
        (
            {"init": {"teacher": "one", "conv": False, "encoder": False}},
            "init conv: false encoder: false init.teacher: null",
        ),
        (
            {"teacher_masked_norm": True, "teacher_backend": "s3prl"},
            "teacher_masked_norm teacher_backend: fast teacher_backend: s3prl",
        ),
        (
            {"teacher_masked_norm": True, "teacher_dropout": True},
            "teacher_masked_norm teacher_backend: fast teacher_dropout: true",
        ),
    ],
)
def test_settings_that_exclude_each_other(tmp_path, more, parts):
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump({**TWO, **more}))
    with pytest.raises(ConfigError) as caught:
        load_model_config(file)
    assert_parts(str(caught.value), str(file), parts)
    for key in more:  # each is needed for the mistake, or its value is the mistake
        if key not in ("teachers", "unit_loss", "relation", "init"):
            rest = {k: v for k, v in more.items() if k != key}
            file.write_text(yaml.safe_dump({**TWO, **rest}))
            load_model_config(file)


def test_every_name_that_a_module_uses_is_reserved():
    """Teachers' names are keys of these modules."""
    heads = PredictionHeads(4, {"a": TargetSpec(1, (4,))}, HeadSettings())
    for module in (heads, TeacherEnsemble({})):
        names = {name for name in dir(module) if not name.startswith("_")} - {"a"}
        assert len(names) > 50
        for name in names:
            with pytest.raises(ValueError, match=f"'{name}' is a reserved name"):
                DistillSettings({name: TeacherSettings("x")})


@pytest.mark.parametrize(
    "more, key",
    [
        ({"init": {"layers": [0, 6]}}, "init.layers"),
        ({"heads": {"per_teacher": True}}, "heads.per_teacher"),
        ({"heads": {"residual_weight": 2.0}}, "heads.residual_weight"),
        ({"targets": {"weight_steps": 5}}, "targets.weight_steps"),
        (
            {"init": {"teacher": "one", "encoder": False, "layers": [0, 6]}},
            "init.layers",
        ),
        ({"target_norm_steps": 5}, "target_norm_steps"),
        ({"relation": {"window": 5}}, "relation"),
        (
            {"targets": {"drop_teachers": 0.5}, "teachers": {"one": {"model": "x"}}},
            "targets.drop_teachers",
        ),
        (
            {
                "targets": {"drop_teachers": 0.5},
                "loss": {"weight": 0.0},
                "relation": {"weight": 1.0},
            },
            "targets.drop_teachers",
        ),
        ({"targets": {"drop_teachers": 0.5}}, None),
        (
            {
                "student": {"kind": "copy", "of": "one", "feature_grad_mult": 0},
                "loss": {"feature_penalty": 1.0},
            },
            "loss.feature_penalty",
        ),
        ({}, None),
    ],
)
def test_settings_without_effect_are_named(tmp_path, caplog, more, key):
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump({**TWO, **more}))
    load_model_config(file)
    named = [line for line in caplog.messages if "without effect" in line]
    assert [line.rpartition(" ")[2] for line in named] == ([key] if key else [])


def test_a_checkpoint_may_have_settings_without_effect():
    model = {**TWO, "student": {"feature_grad_mult": 0}, "targets": {"weight_steps": 5}}
    assert load_model_config(model).student.feature_grad_mult == 0


@pytest.mark.parametrize("student", [{}, {"kind": "copy", "of": "one"}, FILE_STUDENT])
def test_masked_units_of_every_kind_of_student(student):
    mask = {"length": 5, "share": 0.5}
    model = {**TWO, "student": {**student, "mask": mask}, "unit_loss": UNITS}
    settings = load_model_config(model)
    assert dataclasses.asdict(settings.student.mask) == mask
    assert load_model_config(to_plain_data(settings)) == settings


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("init", {"teacher": "one"}, "init student.kind: distil copy"),
        ("student_backend", "s3prl", "student_backend student.kind: distil"),
        ("student.input_dropout", 1.0, ".student input_dropout 1.0"),
        ("student.feature_grad_mult", 0, "pruning.units conv student.feature_grad_mult 0"),
        ("student.train_extractor", False, "pruning.units conv student.train_extractor true"),
        ("pruning.units", [], ".pruning units []"),
        ("pruning.units", ["ffn", "ffn"], ".pruning units 'ffn', 'ffn'"),
        ("pruning.units", ["fnn"], ".pruning.units[0] conv heads ffn 'fnn'"),
        ("pruning.sparsity", 1, ".pruning sparsity 1.0"),
        ("pruning.by", "flops", ".pruning.by parameters macs 'flops'"),
        ("pruning.reach_at", 0, ".pruning reach_at 0"),
        ("pruning.lr", 0, ".pruning lr 0.0"),
        ("pruning.start_drop", {"ffn": 1}, ".pruning.start_drop ffn 1.0"),
        ("pruning.last_conv", "firm", ".pruning.last_conv hard soft 'firm'"),
    ],
)
def test_a_mistake_in_the_config_of_a_pruned_student(tmp_path, path, value, parts):
    file = tmp_path / "model.yaml"
    model = {**MODEL, "student": {"kind": "copy", "of": "one"}, "pruning": {}}
    file.write_text(yaml.safe_dump(model))
    load_model_config(file)
    file.write_text(yaml.safe_dump(changed(model, path, value)))
    with pytest.raises(ConfigError) as caught:
        load_model_config(file)
    assert_parts(str(caught.value), str(file), parts)


def assert_parts(message, file, parts):
    """One line that starts with the file and has the parts in this order, as whole words."""
    assert message.startswith(file) and "\n" not in message
    rest, end = message.removeprefix(file), 0
    for part in parts.split():
        start = "" if part.startswith(".") else r"(?<!\w)"
        match = re.compile(rf"{start}{re.escape(part)}(?!\w)").search(rest, end)
        assert match, (part, message)
        end = match.end()


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("runner.total_steps", 5, ".runner total_steps (5) save_step (5)"),
        ("runner.total_steps", "many", ".runner.total_steps 'many'"),
        ("runner.log_step", ..., ".runner log_step"),
        ("runner.log_step", 0, ".runner log_step 0"),
        ("runner.precison", "auto", ".runner 'precison' precision"),
        ("runner.precision", "half", ".runner.precision auto float32 tf32 bfloat16 float16 'half'"),
        ("runner.fp16", "yes", ".runner.fp16 true 'yes'"),
        ("optimizer.name", ..., "optimizer.name FusedAdamW"),
        ("optimizer.lr", "fast", "optimizer.lr 'fast' 2.e-4"),
        ("optimizer.lr", ..., "optimizer.lr 2.e-4"),
        ("optimizer.name", "Adamm", "optimizer.name 'Adamm' AdamW_with_schedule"),
        ("optimizer.eps", "1e-6", "optimizer.eps '1e-6'"),
        ("runner.n_epochs", 3, ".runner n_epochs -1 3 total_steps"),
        ("pretrain_expert", ..., "pretrain_expert"),
        ("pretrain_expert.datarc.sets", [], ".pretrain_expert.datarc sets"),
        ("pretrain_expert.datarc.sets", "train", ".pretrain_expert.datarc.sets 'train'"),
        ("pretrain_expert.datarc.libri_root", ..., ".pretrain_expert.datarc libri_root"),
        ("pretrain_expert.datarc.sequence_length", 100, "sequence_length 400 100"),
        ("pretrain_expert.datarc.loader_timeout", 0.5, "loader_timeout 0.5"),
        ("pretrain_expert.datarc.max_seconds", 1, "max_seconds 1"),
        ("runner.gradient_clipping", 0, ".runner gradient_clipping 0"),
        ("runner.gradient_clipping", -1, ".runner gradient_clipping -1"),
        ("runner.max_keep", 0, ".runner max_keep 0"),
        ("runner.max_nonfinite", 0, ".runner max_nonfinite 0"),
        ("runner.autosave_minutes", -1, ".runner autosave_minutes -1.0"),
        ("runner.autosave_minutes", "often", ".runner.autosave_minutes 'often'"),
        ("runner.eval_step", 5, "runner.eval_step pretrain_expert.datarc.dev_sets"),
        ("runner.eval_step", 0, ".runner eval_step 0"),
        ("runner.max_nonfinit", 3, ".runner 'max_nonfinit' max_nonfinite"),
        ("pretrain_expert.datarc.dev_sets", "dev", ".pretrain_expert.datarc.dev_sets 'dev'"),
        ("pretrain_expert.datarc.dev_sets", ["c"], "dev_sets 'c'"),
    ],
)
def test_a_mistake_in_the_runner_config(tmp_path, path, value, parts):
    file = tmp_path / "runner.yaml"
    file.write_text(yaml.safe_dump(changed(RUNNER, path, value)))
    with pytest.raises(ConfigError) as caught:
        load_runner_config(file)
    assert_parts(str(caught.value), str(file), parts)


def test_a_warmup_beside_a_scheduler(tmp_path):
    file, config = tmp_path / "runner.yaml", dict(RUNNER)
    config["optimizer"] = {"name": "FusedAdamW", "lr": 1e-3, "warmup_proportion": 0.5}
    file.write_text(yaml.safe_dump(config))
    load_runner_config(file)
    config["scheduler"] = {"name": "constant_schedule"}
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_proportion.* scheduler"):
        load_runner_config(file)
    check_runner_config(config, "a checkpoint of an earlier version")


@pytest.mark.parametrize(
    ("optimizer", "ignored"),
    [
        ({"name": "Adam", "warmup_proportion": 0.1}, "warmup_proportion"),
        ({"name": "AdamW", "betas": [0.9, 0.98], "weight_decay": 0.1}, "betas, weight_decay"),
        ({"name": "BertAdam_with_schedule", "eps": 1e-6, "warmup_proportion": 0.1}, "eps"),
        ({"name": "AdamW_with_schedule", "betas": [0.9, 0.98], "warmup_proportion": 0.1}, None),
    ],
)
def test_arguments_that_s3prls_optimizer_ignores(tmp_path, optimizer, ignored):
    """A new run does not begin with them; the optimizer is the same with other values."""
    file, config = tmp_path / "runner.yaml", {**RUNNER, "optimizer": {**optimizer, "lr": 1e-3}}
    file.write_text(yaml.safe_dump(config))
    check_runner_config(config, "a checkpoint of an earlier version")
    if ignored is None:
        load_runner_config(file)
        return
    with pytest.raises(ConfigError, match=rf"{optimizer['name']} ignores {ignored};"):
        load_runner_config(file)
    import torch
    from s3prl.optimizers import get_optimizer

    module = torch.nn.Linear(2, 2)
    plain = get_optimizer([module], 10, {"name": optimizer["name"], "lr": 1e-3})
    other = get_optimizer([module], 10, {**optimizer, "warmup_proportion": 0.07, "lr": 1e-3})
    for first, second in zip(plain.param_groups, other.param_groups, strict=True):
        numbers = [
            {k: v for k, v in g.items() if k not in ("params", "schedule")} for g in (first, second)
        ]
        assert numbers[0] == numbers[1]


# Keys of version 0.1: the same settings, and one warning for each.

OLD_MODEL = {
    **MODEL,
    "teachers": {name: {"model": name, "groups": [[1], [2]]} for name in ("one", "two")},
    "aggregation": "groups",
    "targets": {
        "separate_heads": True,
        "across_teachers": True,
        "residual_heads": True,
        "residual_weight": 0.5,
        "standardise": "running",
        "standardise_steps": 7,
        "drop_teachers": 0.5,
    },
    "essence": {"keep": 0.5, "units": "units.safetensors", "unit_weight": 2.0},
    "teacher_path": "plain",
}
NEW_MODEL = {
    **OLD_MODEL,
    "aggregation": "separate",
    "targets": {"drop_teachers": 0.5, "across_teachers": True},
    "heads": {"per_teacher": True, "residual": True, "residual_weight": 0.5},
    "target_norm": "mean_std",
    "target_norm_steps": 7,
    "loss": {"agreement": 0.5},
    "unit_loss": {"file": "units.safetensors", "weight": 2.0},
    "teacher_backend": "s3prl",
}
del NEW_MODEL["essence"], NEW_MODEL["teacher_path"]
OLD_RUNNER = {**RUNNER, "runner": {**RUNNER["runner"], "recompute": True, "last_minutes": 3}}
NEW_RUNNER = {
    **RUNNER,
    "runner": {**RUNNER["runner"], "activation_checkpointing": True, "autosave_minutes": 3},
}
NEW_NAMES = {
    "teacher_path: plain": "teacher_backend: s3prl",
    "targets.standardise: running": "target_norm: mean_std",
    "targets.standardise_steps": "target_norm_steps",
    "targets.separate_heads": "heads.per_teacher",
    "targets.residual_heads": "heads.residual",
    "targets.residual_weight": "heads.residual_weight",
    "essence.keep": "loss.agreement",
    "essence.units": "unit_loss.file",
    "essence.unit_weight": "unit_loss.weight",
    "aggregation: groups": "aggregation: separate",
    "runner.recompute": "runner.activation_checkpointing",
    "runner.last_minutes": "runner.autosave_minutes",
}


def warned(caplog, file):
    """Old name -> new name, of each warning about a file; none may come twice."""
    messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    pairs = [
        re.findall("`([^`]+)`", message) for message in messages if message.startswith(f"{file}:")
    ]
    assert len(pairs) == len({old for old, _ in pairs})
    return dict(pairs)


def test_old_keys_of_the_model_config(tmp_path, caplog):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(yaml.safe_dump(OLD_MODEL))
    new.write_text(yaml.safe_dump(NEW_MODEL))
    assert load_model_config(old) == load_model_config(new)
    load_model_config(old)
    expected = {old: new for old, new in NEW_NAMES.items() if not old.startswith("runner.")}
    assert warned(caplog, old) == expected and warned(caplog, new) == {}


def test_old_keys_of_the_runner_config(tmp_path, caplog):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(yaml.safe_dump(OLD_RUNNER))
    new.write_text(yaml.safe_dump(NEW_RUNNER))
    assert load_runner_config(old) == load_runner_config(new)
    expected = {old: new for old, new in NEW_NAMES.items() if old.startswith("runner.")}
    assert warned(caplog, old) == expected and warned(caplog, new) == {}


def test_old_keys_in_overrides(tmp_path, caplog):
    """They count more than the file, under either name."""
    path = tmp_path / "runner.yaml"
    for runner in (OLD_RUNNER, NEW_RUNNER):
        path.write_text(yaml.safe_dump(runner))
        for key in ("last_minutes", "autosave_minutes"):
            settings = load_runner_config(path, f"config.runner.{key}=9,,config.runner.log_step=1")
            assert settings.runner.autosave_minutes == 9 and settings.runner.log_step == 1
    assert warned(caplog, "-o") == {"config.runner.last_minutes": "config.runner.autosave_minutes"}


@pytest.mark.parametrize(
    ("old", "precision"),
    [
        ({"fp16": True}, "float16"),
        ({"fp16": False}, "float32"),
        ({"bf16": True}, "bfloat16"),
        ({"fp16": False, "bf16": True}, "bfloat16"),
        ({"fp16": True, "bf16": False}, "float16"),
        ({"fp16": False, "bf16": False}, "float32"),
        ({}, "auto"),
    ],
    ids=str,
)
def test_the_old_keys_of_the_precision(tmp_path, old, precision, caplog):
    """In a file and by ``-o``, with one warning each; a checkpoint without them is float32."""
    path = tmp_path / "runner.yaml"
    path.write_text(yaml.safe_dump(changed(RUNNER, "runner", {**RUNNER["runner"], **old})))
    assert load_runner_config(path).runner.precision == precision
    assert len(warned(caplog, str(path))) == bool(old)
    path.write_text(yaml.safe_dump(RUNNER))
    text = ",,".join(f"config.runner.{key}={value}" for key, value in old.items())
    assert load_runner_config(path, text).runner.precision == precision
    assert len(warned(caplog, "-o")) == bool(old)
    config = saved_runner_config(changed(RUNNER, "runner", {**RUNNER["runner"], **old}))
    assert config["runner"]["precision"] == (precision if old else "float32")


@pytest.mark.parametrize("old", [{"fp16": True, "bf16": True}, {"fp16": True, "precision": "auto"}])
def test_contradicting_keys_of_the_precision(tmp_path, old):
    path = tmp_path / "runner.yaml"
    path.write_text(yaml.safe_dump(changed(RUNNER, "runner", {**RUNNER["runner"], **old})))
    with pytest.raises(ConfigError, match=r"runner\.yaml.*runner\.fp16.*runner\.precision"):
        load_runner_config(path)
    path.write_text(yaml.safe_dump(RUNNER))
    text = ",,".join(f"config.runner.{key}={value!r}" for key, value in old.items())
    with pytest.raises(ConfigError, match=r"-o.*runner\.fp16.*runner\.precision"):
        load_runner_config(path, text)


def test_an_old_and_a_new_name_of_one_key(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({**MODEL, "teacher_path": "fast", "teacher_backend": "s3prl"}))
    with pytest.raises(ConfigError, match="teacher_path.*teacher_backend"):
        load_model_config(path)


def test_an_old_and_a_new_name_in_one_override(tmp_path):
    path = tmp_path / "runner.yaml"
    path.write_text(yaml.safe_dump(RUNNER))
    text = "config.runner.last_minutes=3,,config.runner.autosave_minutes=9"
    with pytest.raises(ConfigError, match="-o.*last_minutes.*autosave_minutes"):
        load_runner_config(path, text)


@pytest.mark.parametrize("rest", [{"keep": 1.0, "foo": 2}, {"foo": 2}, None, [1]])
def test_unknown_keys_of_an_old_section(tmp_path, rest):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({**MODEL, "essence": rest}))
    with pytest.raises(ConfigError, match=r"model\.yaml\.essence.*loss\.agreement.*unit_loss"):
        load_model_config(path)
    path.write_text(yaml.safe_dump({**MODEL, "essence": {}}))
    assert load_model_config(path) == load_model_config(MODEL)


def test_the_old_aggregation_groups_needs_groups_of_every_teacher(tmp_path):
    """After the config is merged with the one that it extends."""
    one = {"one": {"model": "x", "groups": [[1], [2]]}, "two": {"model": "y"}}
    new = write(
        tmp_path, base={"teachers": one, "aggregation": "groups"}, new={"extends": "base.yaml"}
    )
    with pytest.raises(ConfigError, match=r"new\.yaml.*teachers\.two\.groups"):
        load_model_config(new)
    over = {"extends": "base.yaml", "teachers": {"two": {"groups": [[3]]}}}
    settings = load_model_config(write(tmp_path, new=over))
    assert settings.aggregation == "separate" and settings.teachers["two"].targets == ((3,),)
    over = {"extends": "base.yaml", "aggregation": "separate"}
    assert load_model_config(write(tmp_path, new=over)).aggregation == "separate"


def test_old_keys_over_new_ones_in_an_extended_config(tmp_path):
    """A difference with old keys to a base with new ones, and the reverse."""
    over = {"extends": "base.yaml", "essence": {"keep": 0.25}, "teacher_path": "fast"}
    settings = load_model_config(write(tmp_path, base=NEW_MODEL, new=over))
    assert settings.loss.agreement == 0.25 and settings.teacher_backend == "fast"
    assert settings.unit_loss[0].file == "units.safetensors"
    over = {"extends": "base.yaml", "loss": {"agreement": 0.25}, "teacher_backend": "fast"}
    assert load_model_config(write(tmp_path, base=OLD_MODEL, new=over)) == settings


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1, 2", "line 1"),
        ("- 1\n- 2\n", "x.yaml"),
        ("", "x.yaml"),
        ("a: 1\nb: 2\na: 3\n", "'a'.*line 3"),
        ("a: !!python/object/apply:os.getcwd []\n", "x.yaml"),
        ("\x00", "x.yaml"),
    ],
)
def test_a_file_that_is_not_a_config(tmp_path, text, part):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=part):
        read_yaml(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml"):
        read_yaml(tmp_path / "none.yaml")


def write(folder, **files):
    for name, data in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return folder / "new.yaml"


def test_extends_merges_the_keys_that_differ(tmp_path):
    base = {**MODEL, "loss": {"cosine_weight": 2.0, "mask_padding": False}}
    over = {"extends": "base.yaml", "teachers": ["two"], "loss": {"cosine_weight": 3.0}}
    settings = load_model_config(write(tmp_path, base=base, new=over))
    assert list(settings.teachers) == ["two"] and settings.teachers["two"].layers == (1,)
    assert settings.loss.cosine_weight == 3.0 and not settings.loss.mask_padding


def test_extends_merges_teachers_given_as_a_mapping(tmp_path):
    over = {"extends": "base.yaml", "teachers": {"two": {"layers": [5]}}}
    settings = load_model_config(write(tmp_path, base=MODEL, new=over))
    assert settings.teachers["two"].model == "wavlm" and settings.teachers["two"].layers == (5,)
    assert settings.teachers["one"].model == "hubert_base"


def test_extends_selects_teachers_and_changes_one(tmp_path):
    over = {"extends": "base.yaml", "teachers": [{"two": {"layers": [0, 5]}}, "one"]}
    settings = load_model_config(write(tmp_path, base=MODEL, new=over))
    assert list(settings.teachers) == ["two", "one"]
    assert settings.teachers["two"] == TeacherSettings("wavlm", layers=(0, 5))
    assert settings.teachers["one"] == TeacherSettings("hubert_base")


A, B = UnitLossSettings("a"), UnitLossSettings("b", 2.0)


@pytest.mark.parametrize(
    ("base", "over", "result"),
    [
        ([{"file": "a"}], {}, (A,)),
        ([], [{"file": "a"}], (A,)),
        ([{"file": "a"}], [{"file": "b", "weight": 2.0}], (B,)),  # a list replaces a list
        ([{"file": "b", "weight": 2.0}], [], ()),
        ([{"file": "a"}], {"file": "b", "weight": 2.0}, (B,)),
        ({"file": "b", "weight": 1.0}, {"weight": 2.0}, (B,)),  # mappings merge, as in version 0.1
        ({"weight": 2.0}, {"file": "b"}, (B,)),
        ({"file": "a"}, [{"file": "a"}, {"file": "b", "weight": 2.0}], (A, B)),
    ],
)
def test_units_in_an_extended_config(tmp_path, base, over, result):
    new = {"extends": "base.yaml", **({"unit_loss": over} if over != {} else {})}
    settings = load_model_config(write(tmp_path, base={**MODEL, "unit_loss": base}, new=new))
    assert settings.unit_loss == result


@pytest.mark.parametrize(
    ("base", "over", "result"),
    [
        ({"units": "b"}, {"unit_weight": 2.0}, (B,)),
        ({"unit_weight": 2.0}, {"units": "b"}, (B,)),
        ({"unit_weight": 2.0}, {}, ()),
        ({"units": "b", "unit_weight": 2.0}, {"units": None}, ()),
    ],
)
def test_old_keys_of_units_in_two_files(tmp_path, base, over, result):
    """Version 0.1 merged the mapping `essence` of both files; a weight alone had no effect."""
    new = {"extends": "base.yaml", "essence": over}
    settings = load_model_config(write(tmp_path, base={**MODEL, "essence": base}, new=new))
    assert settings.unit_loss == result
    single = {**base, **over}
    assert load_model_config({**MODEL, "essence": single}).unit_loss == result  # of a checkpoint


def test_an_old_key_of_units_and_a_list_of_units(tmp_path):
    model = {**MODEL, "essence": {"units": "a"}, "unit_loss": [{"file": "b"}]}
    with pytest.raises(ConfigError, match=r"new\.yaml.*essence\.units.*unit_loss"):
        load_model_config(write(tmp_path, new=model))


SIZE = {"encoder_layers": 3, "encoder_embed_dim": 96}
COPY = {"kind": "copy", "of": "one", "dropout": 0.5}


@pytest.mark.parametrize(
    ("base", "over", "student"),
    [
        (SIZE, {"encoder_layers": 1}, StudentSettings(encoder_layers=1, encoder_embed_dim=96)),
        (
            SIZE,
            {"kind": "distil", "encoder_layers": 1},
            StudentSettings(encoder_layers=1, encoder_embed_dim=96),
        ),
        (SIZE, {"kind": "copy", "of": "two"}, CopySettings("copy", "two")),
        (SIZE, {"kind": "file", "file": "x.pt"}, FileSettings("file", "x.pt")),
        (COPY, {"of": "two"}, CopySettings("copy", "two", dropout=0.5)),
        (COPY, {"kind": "copy", "of": "two"}, CopySettings("copy", "two", dropout=0.5)),
        (COPY, {"kind": "file", "file": "x.pt"}, FileSettings("file", "x.pt")),
        (COPY, {"kind": "distil"}, StudentSettings()),
    ],
)
def test_extends_replaces_a_student_of_another_kind(tmp_path, base, over, student):
    """Only a student of the same kind keeps settings of the base, its init and its pruning."""
    more = {"init": {"teacher": "one"}} if base is SIZE else {"pruning": {"sparsity": 0.5}}
    model = {**MODEL, "student": base, **more}
    settings = load_model_config(
        write(tmp_path, base=model, new={"extends": "base.yaml", "student": over})
    )
    assert settings.student == student
    same = type(student) is (StudentSettings if base is SIZE else CopySettings)
    assert bool(settings.init.sources or settings.pruning) == same


@pytest.mark.parametrize(
    ("over", "parts"),
    [
        ({"extends": "none.yaml"}, "none.yaml"),
        ({"extends": "base.yaml", "teachers": [{"ten": {}}]}, "teachers.*'ten'.*one, two"),
        ({"extends": "base.yaml", "teachers": [{"one": {"x": 1}}]}, "teachers.one.*'x'"),
        ({"extends": "base.yaml", "teachers": [{"one": 3}]}, "teachers.one.*3"),
        ({"extends": "base.yaml", "teachers": [{"one": {}, "two": {}}]}, "teachers.*'two'"),
        ({"extends": 3}, "new.yaml.extends.*3"),
        ({"extends": "new.yaml"}, "new.yaml.extends.*new.yaml"),
        ({"extends": "base.yaml", "teachers": ["ten"]}, "teachers.*'ten'.*one, two"),
        ({"extends": "base.yaml", "loss": {"x": 1}}, "new.yaml.loss.*'x'"),
    ],
)
def test_a_mistake_in_an_extended_config(tmp_path, over, parts):
    with pytest.raises(ConfigError, match=parts):
        load_model_config(write(tmp_path, base=MODEL, new=over))


def test_overrides_equal_s3prls():
    # Independent: s3prl's own override() on the same data.
    from argparse import Namespace

    from s3prl.utility.helper import override

    text = "config.runner.total_steps=7,,config.optimizer.lr=1e-4,,config.a.b='x',,config.s=[1, 2]"
    theirs = yaml.safe_load(yaml.safe_dump(RUNNER))
    override(text, Namespace(), theirs)
    assert apply_overrides(RUNNER, text) == theirs
    assert RUNNER["runner"]["total_steps"] == 10


def test_the_overridden_keys():
    text = "config.runner.total_steps=7,, config.a.b = 'x',,args.expdir='config.y'"
    assert overridden(text) == {"runner.total_steps", "a.b"}
    assert overridden(None) == overridden("") == frozenset()


@pytest.mark.parametrize(
    "value", ["a=b", "/data/lr=1e-4/x", "it's = 1", 'q"=\\', ["a=b", "c,d=$e"], ("=", 1)]
)
def test_values_with_equals_signs(value):
    """In quotes they are read as they are; s3prl's script gets them in its own notation, and what
    we print can be typed in a shell."""
    from argparse import Namespace

    from s3prl.utility.helper import override

    text = f"config.a.b=1,, config.c={value!r}"
    theirs = {}
    override(escape_equals(text), Namespace(), theirs)
    assert apply_overrides({}, text) == theirs == {"a": {"b": 1}, "c": value}
    _, word = shlex.split(override_option("c", value))
    override(word, Namespace(), printed := {})
    assert list(printed["c"]) == list(value)


@pytest.mark.parametrize(
    "text", ["total_steps=3", "config.a", "config.a=b=c", "config.a=1,config.b=2"]
)
def test_an_override_that_s3prl_could_not_read(text):
    with pytest.raises(ConfigError, match="-o"):
        apply_overrides(RUNNER, text)
