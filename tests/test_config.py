"""Configs: every shipped YAML is valid, and each mistake is one sentence with its YAML path."""

import shlex
from pathlib import Path

import pytest
import yaml

from s3prl_ekd.errors import ConfigError
from s3prl_ekd.files.config import (
    apply_overrides,
    escape_equals,
    overridden,
    plain,
    read_yaml,
    typed,
)
from s3prl_ekd.pretrain.settings import load_model_config, load_runner_config
from s3prl_ekd.workspace import write_workspace

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
def test_every_shipped_yaml_says_how_to_launch_it_first(path):
    comment = path.read_text().split("\n\n")[0]
    assert comment.startswith("# ")
    if path.name != "tiny_runner.yaml":
        assert "run_pretrain.py -u ekd" in comment
    if path.parent != CONFIGS:
        assert f"-g pretrain/ekd/{path.parent.name}/{path.name}" in comment


EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))


def test_the_matrix_is_the_papers():
    names = {path.stem for path in EXPERIMENTS}
    kinds = ("average", "concat", "separate")
    wanted = {"single_hubert", "single_robust", "single_wavlm", "reference", "skill", "essence"}
    for group in ("hubert_robust", "hubert_wavlm", "robust_wavlm", "three"):
        wanted |= {f"{group}_{kind}" for kind in kinds}
    wanted |= {"robust_setup1", "robust_setup2"}
    assert wanted <= names


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_a_tiny_experiment_is_the_same_one(path, tmp_path):
    """The same keys below `extends`, the groups of layers aside: the teachers have fewer."""
    write_workspace(tmp_path, [f"tiny/{path.stem}"])
    written = tmp_path / "pretrain/ekd/tiny" / path.name
    assert f"-g pretrain/ekd/tiny/{path.name}" in written.read_text().split("\n\n")[0]
    assert load_model_config(written).teachers.keys() == load_model_config(path).teachers.keys()
    tiny, full = yaml.safe_load(written.read_text()), yaml.safe_load(path.read_text())
    assert full.pop("extends") == "../config_model.yaml"
    assert tiny.pop("extends") == "../tiny_model.yaml"
    if path.stem == "skill":
        for one, size in ((full, 4), (tiny, 2)):  # even thirds of 12 and of 6 layers
            layers = range(1, 3 * size + 1)
            thirds = [list(layers[i : i + size]) for i in range(0, 3 * size, size)]
            assert all(each == {"groups": thirds} for each in one.pop("teachers").values())
    assert full == tiny


def test_the_default_is_the_design():
    settings = load_model_config(CONFIGS / "config_model.yaml")
    assert list(settings.teachers) == ["hubert", "robust_hubert", "wavlm"]
    assert {teacher.layers for teacher in settings.teachers.values()} == {(4, 8, 12)}
    assert settings.aggregation == "separate"
    assert settings.loss.cosine_weight == 1.0 and settings.loss.mask_padding
    assert not settings.teacher_dropout


def test_a_config_survives_the_checkpoint():
    settings = load_model_config(CONFIGS / "config_model.yaml")
    assert load_model_config(plain(settings)) == settings


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("aggregation", "averge", "aggregation: 'averge' is not known; use one of: separate"),
        ("agregation", "average", "unknown key 'agregation' \\(did you mean aggregation\\?\\)"),
        ("teachers", {}, "teachers is empty"),
        ("teachers", ["hubert"], "teachers: a mapping is expected"),
        ("teachers.one.layers", "4,8", "teachers.one.layers: a list is expected"),
        ("teachers.one.layers", [4, "8"], "layers\\[1\\]: a whole number is expected, not '8'"),
        ("teachers.one.layers", [True], "layers\\[0\\]: a whole number is expected, not True"),
        ("teachers.one.layers", [-1], "distinct numbers from 0 up"),
        ("teachers.one.layers", [4, 4], "distinct numbers from 0 up"),
        ("teachers.one.model", None, "teachers.one.model: text is expected, not None"),
        ("teachers.one", {"layers": [1]}, "teachers.one: the key model is missing"),
        ("teachers.a-b", {"model": "x"}, "'a-b' cannot be a teacher's name"),
        ("teachers.average", {"model": "x"}, "'average' cannot be a teacher's name"),
        ("teachers.one.weight", -1.0, "weight and final_weight must be 0 or more"),
        ("teachers.one.groups", [], "groups is empty"),
        ("teachers.one.groups", [[1], [1, 2]], "distinct layers from 0 up, each in one group"),
        ("teachers.one.groups", [1, 2], "groups\\[0\\]: a list is expected, not 1"),
        ("aggregation", "groups", "needs teachers.one.groups"),
        ("targets", {"across_teachers": True}, "one has 3, two has 1"),
        ("targets", {"residual_heads": True}, "targets.residual_heads goes layer by layer"),
        ("targets", {"drop_teachers": 1.5}, "drop_teachers is 1.5; 0 to 1"),
        ("targets", {"standardise": "phi"}, "use one of: none, running, phi_s"),
        ("teachers.one.final_weight", 0.0, "final_weight needs targets.weight_steps"),
        ("essence", {"keep": 0.0}, "keep is 0.0; above 0"),
        ("heads", {"kind": "wide"}, "use one of: split, linear"),
        ("loss", {"reconstruction": "l3"}, "use one of: l1, l2, smooth_l1"),
        ("distortion", {"setup": "setup3"}, "use one of: clean, setup1, setup2, same"),
        ("distortion", {"snr_min": 30.0}, "snr_min \\(30.0\\) is above snr_max"),
        ("init", {"teacher": "one", "average": ["one", "two"]}, "teacher or average, not both"),
        ("init", {"teacher": "one", "layers": [0]}, "names 1 layers and the student has 2"),
        ("teachers.keys", {"model": "x"}, "'keys' cannot be a teacher's name"),
        ("aggregation", "average", "one has 3, two has 1"),
        ("init", {"teacher": "three"}, "there is no teacher 'three'; use one of: one, two"),
        ("student", {"encoder_layers": 0}, "student: encoder_layers is 0; 1 or more"),
        ("student", {"encoder_layers": 2.0}, "encoder_layers: a whole number is expected"),
        ("student", {"encoder_embed_dim": 100}, "cannot be divided by encoder_attention_heads"),
        ("student", {"dropout": 1.5}, "dropout is 1.5; 0 up to below 1"),
        ("student", {"dropout": float("nan")}, "a finite number is expected"),
        ("student", {"extractor_conv_feature_layers": "exit()"}, "triples"),
        ("loss", {"cosine_weight": "much"}, "cosine_weight: a number is expected, not 'much'"),
        ("loss", {"mask_padding": 1}, "mask_padding: true or false is expected, not 1"),
        ("loss", 3, "loss: a mapping of settings is expected"),
    ],
)
def test_a_mistake_in_the_model_config(tmp_path, path, value, said):
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(changed(MODEL, path, value)))
    with pytest.raises(ConfigError, match=said) as caught:
        load_model_config(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("runner.total_steps", 5, "total_steps \\(5\\) must be greater than save_step \\(5\\)"),
        ("runner.total_steps", "many", "runner.total_steps: a whole number is expected"),
        ("runner.log_step", ..., "runner: the key log_step is missing"),
        ("runner.log_step", 0, "log_step is 0; 1 or more"),
        ("runner.fp_16", True, "unknown key 'fp_16' \\(did you mean fp16\\?\\)"),
        ("optimizer.name", ..., "optimizer.name is missing"),
        ("optimizer.lr", "fast", "optimizer.lr is the text 'fast'; a number is expected"),
        ("optimizer.lr", ..., "optimizer.lr is missing"),
        ("optimizer.name", "Adamm", "optimizer.name is 'Adamm'; use one of: AdamW_with_schedule"),
        ("optimizer.eps", "1e-6", "optimizer.eps is the text '1e-6'"),
        ("runner.n_epochs", 3, "n_epochs is 3; put -1 and say total_steps"),
        ("pretrain_expert", ..., "the key pretrain_expert is missing"),
        ("pretrain_expert.datarc.sets", [], "sets is empty"),
        ("pretrain_expert.datarc.sets", "train", "sets: a list is expected, not 'train'"),
        ("pretrain_expert.datarc.libri_root", ..., "the key libri_root is missing"),
        ("pretrain_expert.datarc.sequence_length", 100, "sequence_length is 100 samples"),
        ("runner.max_keep", 0, "max_keep is 0; 1 or more"),
        ("runner.max_nonfinite", 0, "max_nonfinite is 0; 1 or more"),
        ("runner.last_minutes", -1, "last_minutes is -1.0; 0 or more"),
        ("runner.last_minutes", "often", "last_minutes: a number is expected, not 'often'"),
        ("runner.eval_step", 5, "eval_step is set and there is nothing to measure on"),
        ("runner.eval_step", 0, "eval_step is 0; 1 or more"),
        ("runner.max_nonfinit", 3, "unknown key 'max_nonfinit' \\(did you mean max_nonfinite"),
        ("pretrain_expert.datarc.dev_sets", "dev", "dev_sets: a list is expected, not 'dev'"),
        ("pretrain_expert.datarc.dev_sets", ["c"], "dev_sets names 'c', which sets has too"),
    ],
)
def test_a_mistake_in_the_runner_config(tmp_path, path, value, said):
    file = tmp_path / "runner.yaml"
    file.write_text(yaml.safe_dump(changed(RUNNER, path, value)))
    with pytest.raises(ConfigError, match=said):
        load_runner_config(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2", "is not valid YAML at line"),
        ("- 1\n- 2\n", "holds no settings"),
        ("", "holds no settings"),
        ("a: 1\nb: 2\na: 3\n", "'a' is written twice \\(line 3\\)"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, said):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_yaml(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def write(folder, **files):
    for name, data in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return folder / "new.yaml"


def test_extends_is_a_difference(tmp_path):
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


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"extends": "none.yaml"}, "none.yaml: No such file"),
        ({"extends": 3}, "new.yaml.extends: the path of a YAML file is expected, not 3"),
        ({"extends": "new.yaml"}, "extends another file itself; one level is allowed"),
        ({"extends": "base.yaml", "teachers": ["ten"]}, "no teacher 'ten'; it has: one, two"),
        ({"extends": "base.yaml", "loss": {"x": 1}}, "new.yaml.loss: unknown key 'x'"),
    ],
)
def test_a_mistake_in_what_is_extended(tmp_path, over, said):
    with pytest.raises(ConfigError, match=said):
        load_model_config(write(tmp_path, base=MODEL, new=over))


def test_overrides_are_what_s3prl_makes_of_them():
    # Independent: s3prl's own override() on the same data.
    from argparse import Namespace

    from s3prl.utility.helper import override

    text = "config.runner.total_steps=7,,config.optimizer.lr=1e-4,,config.a.b='x',,config.s=[1, 2]"
    theirs = yaml.safe_load(yaml.safe_dump(RUNNER))
    override(text, Namespace(), theirs)
    assert apply_overrides(RUNNER, text) == theirs
    assert RUNNER["runner"]["total_steps"] == 10


def test_the_keys_that_are_overridden():
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
    _, word = shlex.split(typed("c", value))
    override(word, Namespace(), printed := {})
    assert list(printed["c"]) == list(value)


@pytest.mark.parametrize(
    "text", ["total_steps=3", "config.a", "config.a=b=c", "config.a=1,config.b=2"]
)
def test_an_override_that_s3prl_could_not_read(text):
    with pytest.raises(ConfigError, match="-o"):
        apply_overrides(RUNNER, text)
