"""Runs with relations, units of two teachers, masked spans and a common basis, by the commands."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from s3prl_ekd import cli
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.essence.units import Units, load_units, save_units, upstream_digest
from s3prl_ekd.files.config import to_plain_data
from s3prl_ekd.files.config_diff import config_differences, describe_changes
from s3prl_ekd.pretrain.curves import read_scalars, teacher_curves
from s3prl_ekd.pretrain.distributed import distiller_batch, has_unused_layers
from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert
from s3prl_ekd.pretrain.settings import load_model_config
from s3prl_ekd.pretrain.sweep import SweepRun
from s3prl_ekd.pretrain.trainer import Trainer
from s3prl_ekd.student_file import load_student
from s3prl_ekd.teachers.load import load_upstream

from .cache_cases import adapter, cache, datarc
from .conftest import NO_DROPOUT, edit_yaml, saved_states
from .kill_and_resume import SHARED_MODEL, flat_values, unequal, write_units

SPANS = {"length": 4, "share": 0.5}
# a distil student that is not random in training
STILL = {**NO_DROPOUT, "mask": SPANS, "masked_norm": True}
FREE = {"aggregation": "separate", "target_norm": "none"}  # no statistics, which count batches


@pytest.fixture
def folder(pretrain_folder):
    """Two teachers, full utterances, and the units files of both."""
    write_units(pretrain_folder)
    change_model(pretrain_folder, **SHARED_MODEL)
    with edit_yaml(pretrain_folder / "model.yaml") as model:
        del model["teachers"]["robust"]
    with edit_yaml(pretrain_folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"]["sequence_length"] = 0
    return pretrain_folder


def change_model(folder, **changes):
    """Replace sections of ``model.yaml``."""
    with edit_yaml(folder / "model.yaml") as model:
        model |= changes


def everything(name, file=None):
    """The states of a checkpoint that training changes, as flat values."""
    states = saved_states(name, file)
    keys = ("Standardiser", "UnitHead", "MaskEmbedding", "Optimizer")
    parts = {key: states[key] for key in keys}
    return dict(flat_values({**parts, **{k: states["EKD"][k] for k in ("student", "heads")}}))


def first_batch(expert):
    return distiller_batch(expert.dataloader.dataset[0], "cpu")


# Resuming


def test_a_run_stopped_before_and_after_its_statistics_are_frozen(
    folder, pretrain_with, monkeypatch
):
    """Equals an uninterrupted one bit for bit; with SIGKILL see ``kill_and_resume.py``. The
    statistics are frozen after 4 of 6 steps."""
    change_model(folder, target_norm_steps=4)
    assert pretrain_with("whole", log_step=1)[0] == 0
    record_step, stops = Trainer.record_step, [2, 5]

    def with_signal(self, result):
        record_step(self, result)
        if self.progress.step in stops:
            stops.remove(self.progress.step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "record_step", with_signal)
    assert pretrain_with("cut")[0] == 128 + signal.SIGTERM
    assert saved_states("cut")["Step"] == 2 and saved_states("cut")["Standardiser"]["seen"] == 2
    assert pretrain_with("cut", "-a")[0] == 128 + signal.SIGTERM
    assert saved_states("cut")["Step"] == 5 and saved_states("cut")["Standardiser"]["seen"] == 4
    assert pretrain_with("cut", "-a")[0] == 0
    whole = everything("whole")
    assert not unequal(whole, everything("cut"))
    # training moves what is compared: the rotation of the second teacher, both heads, the vector
    early = everything("whole", "states-3.ckpt")
    for name in (
        "/Standardiser/cross.wavlm.rotation",
        "/UnitHead/hubert_layer2.weight",
        "/UnitHead/wavlm_layer4.weight",
        "/MaskEmbedding/vector",
    ):
        assert not torch.equal(early[name], whole[name]), name
    check_tags(read_scalars("result/pretrain/whole"))


def check_tags(scalars):
    """Relation and units have their own scalars, which are not taken for a teacher's layers."""
    units = ("loss", "accuracy")
    for name in ("hubert_layer2", "wavlm_layer4"):
        for unit in units:
            assert list(scalars[f"ekd/train-{name}/unit_{unit}"]) == [1, 2, 3, 4, 5, 6]
    assert "ekd/train-wavlm_layer4/unit_loss_unmasked" in scalars
    assert "ekd/train-hubert_layer2/unit_loss_unmasked" not in scalars
    assert "ekd/train-relation" in scalars
    curves = teacher_curves(scalars)
    assert {name: set(layers) for name, layers in curves.items()} == {
        "hubert": {"2", "4"},
        "wavlm": {"2", "4"},
    }


def test_a_change_of_units_on_resume_is_named(folder, pretrain_with):
    """A list counts as one value; what is changed in it is readable."""
    assert pretrain_with("x")[0] == 0
    with edit_yaml(folder / "model.yaml") as model:
        model["unit_loss"][1]["weight"] = 3.0
        model["relation"]["window"] = 50
    code, output = pretrain_with("x", "-a")
    error = only_error(output)
    assert code == 2 and "relation.window 20 -> 50" in error
    assert "unit_loss[1].weight 1.0 -> 3.0" in error
    with edit_yaml(folder / "model.yaml") as model:
        model["relation"]["window"] = 20
        del model["unit_loss"][1]
        model["unit_loss"][0] = "hubert.safetensors"
    code, output = pretrain_with("x", "-a")
    assert code == 2 and "unit_loss[0]: expected a mapping" in only_error(output)


def only_error(output):
    """The one line of an error message."""
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "Traceback" not in output
    return line


def test_lists_of_sections_are_compared_by_section():
    two = [{"file": "a", "weight": 1.0}, {"file": "b", "weight": 1.0}]
    changed = [two[0], {"file": "b", "weight": 2.0}]
    assert config_differences({"u": two, "n": [1, 2]}, {"u": changed, "n": [1, 3]}) == {
        "u[1].weight": (1.0, 2.0),
        "n": ([1, 2], [1, 3]),
    }
    shorter = config_differences({"u": two}, {"u": two[:1]})
    assert shorter == {"u[1].file": ("b", "(not set)"), "u[1].weight": (1.0, "(not set)")}
    added = config_differences({"u": []}, {"u": two[:1]})
    assert added == {"u[0].file": ("(not set)", "a"), "u[0].weight": ("(not set)", 1.0)}
    assert "u[1].weight 1.0 -> 2.0" in describe_changes(
        config_differences({"u": two}, {"u": changed})
    )


# Processes


def in_two_processes(folder, name, *argv):
    """Run with torchrun and gloo; return the file that each rank writes at the end."""
    (folder / "ranks.py").write_text(RANKS)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ranks.py")
    files = ("-c", "runner.yaml", "-g", "model.yaml")
    done = subprocess.run(
        [
            *(sys.executable, *torchrun, "run_pretrain.py", "-u", "ekd", "--device", "cpu"),
            *("-n", name, *files, *argv),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unused" not in done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


RANKS = """
import os, sys, torch
from s3prl_ekd import __main__
from s3prl_ekd.pretrain.trainer import Trainer

train = Trainer.train
def and_save(self):
    train(self)
    distiller = self.upstream.distiller
    norm = {} if distiller.target_norm is None else distiller.target_norm.state_dict()
    torch.save({**distiller.trainable.state_dict(), **norm}, f"rank{os.environ['RANK']}.pt")
Trainer.train = and_save
__main__.process()
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_two_accumulated_batches(folder, pretrain_with):
    """With layer-to-layer heads. Spans of a second, so that some batches have no masked frame."""
    long = {"student": {**STILL, "mask": {"length": 50, "share": 1.0}}}
    heads = {"kind": "layerwise"}
    for name, model in {
        "top": {"heads": heads},  # the heads use layer 2, which is the highest
        "below": {"heads": heads, "layers": [1]},  # ours have layers 1 and 2; units use both
        "weightless": {"loss": {"weight": 0.0}},
    }.items():
        layers = model.pop("layers", [1, 2])
        change_model(folder, **{**SHARED_MODEL, **FREE, **long, **model, "init": {}})
        with edit_yaml(folder / "model.yaml") as config:
            for teacher in config["teachers"].values():
                teacher["layers"] = layers
        data = {"config.pretrain_expert.datarc.train_batch_size": 2}
        over = ",,".join(f"{key}={value}" for key, value in data.items())
        one, two = in_two_processes(folder, name, "-o", over)
        assert not unequal(one, two)
        more = f"{over},,config.runner.gradient_accumulate_steps=2"
        assert pretrain_with(f"{name}-alone", "-o", more)[0] == 0
        start, end = (saved_states(f"{name}-alone", f"states-{step}.ckpt") for step in (3, 6))
        alone, before = everything_flat(end), everything_flat(start)
        both = everything_flat(saved_states(name))
        assert alone.keys() == both.keys()
        for key, value in alone.items():
            assert torch.allclose(value, both[key], rtol=0, atol=2e-5), (name, key)
        # every part moves by much more than that
        for part in ("student", "UnitHead/hubert_layer2", "UnitHead/wavlm_layer4", "MaskEmb"):
            moved = [
                (alone[key] - before[key]).abs().max() for key in alone if key.startswith(part)
            ]
            assert max(moved) > 2e-4, (name, part)
        loss = [read_scalars(f"result/pretrain/{run}") for run in (name, f"{name}-alone")]
        assert loss[0].keys() == loss[1].keys()
        for tag, points in loss[0].items():
            assert loss[1][tag] == pytest.approx(points, rel=2e-3, abs=1e-5), (name, tag)


def everything_flat(states):
    parts = {key: states[key] for key in ("UnitHead", "MaskEmbedding")}
    parts |= {key: states["EKD"][key] for key in ("student", "heads")}
    return {
        key.removeprefix("/"): value
        for key, value in flat_values(parts)
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.slow
def test_both_processes_have_the_same_rotations(folder, corpus):
    """Also if one has only bad audio: batches of one utterance, each second one is missing."""
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    (folder / "some.csv").write_text("\n".join([*rows[:3], "9,no.flac,8000,"]) + "\n")
    with edit_yaml(folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"] |= {
            "file_path": str(folder),
            "sets": ["some"],
            "on_bad_audio": "skip",
            "train_batch_size": 1,
        }
    change_model(folder, target_norm_steps=4)
    one, two = in_two_processes(folder, "x")
    assert not unequal(one, two)
    rotation = one["cross.wavlm.rotation"]
    assert not torch.allclose(rotation, torch.eye(48).expand_as(rotation), atol=0.1)
    assert torch.allclose(rotation @ rotation.mT, torch.eye(48).expand_as(rotation), atol=1e-4)
    assert one["seen"] == 4 and not one["moments.hubert.left_out"]


LAYERWISE = {"kind": "layerwise"}
NORM_FIRST = {**NO_DROPOUT, "layer_norm_first": True}
UNUSED = {
    # layers of the targets, settings, whether weights of the student have no gradient
    "units": ([0, 1], {"relation": {}}, False),
    "relation": ([0, 1], {"relation": {"weight": 1.0, "student_layers": [0, 1]}}, True),
    "relation at the top": ([0, 1], {"relation": {"weight": 1.0, "student_layers": [1, 2]}}, False),
    "neither": ([0, 1], {"relation": {}}, True),
    "pre-norm": ([1, 2], {"relation": {"weight": 1.0}, "student": NORM_FIRST}, True),
    "no distillation loss": ([1, 2], {"relation": {"weight": 1.0}, "loss": {"weight": 0.0}}, True),
    "relation at the top alone": (
        [1, 2],
        {"relation": {"weight": 1.0, "student_layers": [1, 2]}, "loss": {"weight": 0.0}},
        False,
    ),
}


@pytest.mark.parametrize("case", UNUSED)
def test_ddp_expects_the_weights_without_a_gradient(folder, case):
    """DistributedDataParallel fails if it does not expect them."""
    layers, model, expected = UNUSED[case]
    more = {} if case == "units" else {"student": NO_DROPOUT, "unit_loss": []}
    change_model(folder, **{**FREE, "heads": LAYERWISE, "init": {}, **more, **model})
    with edit_yaml(folder / "model.yaml") as config:
        for teacher in config["teachers"].values():
            teacher["layers"] = layers
    expert = adapter(folder).train()
    distiller = expert.distiller
    distiller(first_batch(expert), step=3)[0].backward()
    unused = any(w.grad is None for w in distiller.trainable.parameters() if w.requires_grad)
    assert has_unused_layers(distiller) == unused == expected


# Target caches


def test_training_from_cached_targets(folder, pretrain_with):
    """With the losses of running the teachers, whose masked norms make padding irrelevant."""
    change_model(folder, student=STILL)
    assert cache(folder, folder / "cache") == 0
    use = "config.pretrain_expert.datarc.target_cache='cache'"
    for name, options in (("run", ()), ("cached", ("-o", use))):
        assert pretrain_with(name, *options, log_step=1)[0] == 0
    run, cached = (read_scalars(f"result/pretrain/{name}") for name in ("run", "cached"))
    assert run.keys() == cached.keys()
    for name in ("loss_mean", "relation", "hubert_layer2/unit_loss", "wavlm_layer4/unit_loss"):
        values = [list(scalars[f"ekd/train-{name}"].values()) for scalars in (run, cached)]
        assert len(values[0]) == 6 and values[1] == pytest.approx(values[0], rel=2e-3), name


@pytest.mark.parametrize("key", ["relation", "unit_loss", "target_norm"])
def test_aggregated_targets_are_refused_before_they_are_computed(folder, monkeypatch, capfd, key):
    off = {"relation": {}, "unit_loss": [], "target_norm": "none"}
    change_model(folder, student=NO_DROPOUT, **off)
    assert cache(folder, folder / "aggregated", "--aggregated") == 0
    student = STILL if key == "unit_loss" else NO_DROPOUT
    change_model(folder, **{key: SHARED_MODEL[key], "student": student})
    monkeypatch.setattr("s3prl_ekd.teachers.load_teachers", lambda *_: 1 / 0)
    monkeypatch.setattr("s3prl_ekd.pretrain.expert.load_teachers", lambda *_: 1 / 0)
    capfd.readouterr()
    assert cache(folder, folder / "new", "--aggregated") == 2
    assert re.search(rf"error: .*\b{key}\b.*--aggregated", capfd.readouterr().err)
    assert not (folder / "new").exists()
    with pytest.raises(Exception, match=rf"\b{key}\b"):
        adapter(folder, target_cache="aggregated")


# Pruned students


def test_a_pruned_student_is_distilled_again_with_the_same_terms(folder, pretrain_with, capfd):
    """`prune` writes the config of the second distillation."""
    free = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0}
    change_model(
        folder,
        student={"kind": "copy", "of": "hubert", "mask": SPANS, "masked_norm": True, **free},
        pruning={"sparsity": 0.2, "reach_at": 1, "start_drop": {"ffn": 0.7}},
        heads=LAYERWISE,
        init={},
    )
    adamw = {"name": "FusedAdamW", "lr": 1e-3, "warmup_proportion": 0.1}
    assert pretrain_with("first", optimizer=adamw)[0] == 0
    assert cli.main(["prune", "result/pretrain/first", "-o", "pruned.pt"]) == 0
    first, second = load_model_config("model.yaml"), load_model_config("pruned.yaml")
    for key in ("relation", "unit_loss", "target_norm", "teacher_masked_norm", "teachers"):
        assert getattr(second, key) == getattr(first, key), key
    assert second.student.mask == first.student.mask and second.pruning is None
    shutil.copy("pruned.yaml", "model.yaml")
    command = shlex.split(re.findall(r"next: run_pretrain.py (.*)", capfd.readouterr().out)[0])
    assert pretrain_with("second", *command[command.index("-o") :])[0] == 0
    student = load_student("result/pretrain/second/states-3.ckpt").student
    assert student.settings.masked_norm and student.is_cut
    scalars = read_scalars("result/pretrain/second")
    assert "ekd/train-wavlm_layer4/unit_loss_unmasked" in scalars


# Sweeps


def test_a_sweep_runs_again_if_a_shared_target_changes(folder):
    digests = set()
    for changes in (
        {},
        {"relation": {**SHARED_MODEL["relation"], "window": 21}},
        {"unit_loss": SHARED_MODEL["unit_loss"][:1]},
        {"unit_loss": [{**SHARED_MODEL["unit_loss"][0], "unmasked_weight": 0.5}]},
        {"unit_loss": SHARED_MODEL["unit_loss"][:1], "student": NO_DROPOUT},
        {"student": {**STILL, "mask": {"length": 5}}},
        {"teacher_masked_norm": False},
        {"target_norm": "phi_s"},
        {"loss": {"weight": 0.5}},
    ):
        change_model(folder, **{**SHARED_MODEL, "loss": {}, **changes})
        digests.add(SweepRun(folder / "model.yaml", folder / "runner.yaml", 1, "").digest)
    assert len(digests) == 9


# Mistakes


def other_units(folder, **changes):
    values = {"teacher": "wavlm", "layer": 4, "width": 48, **changes}
    centroids = torch.zeros(values.pop("clusters", 3), values.pop("width"))
    save_units(Units(centroids, **values), folder / "wavlm.safetensors")


MISTAKES = {
    # what is changed, parts of the message
    "missing": (lambda f: (f / "wavlm.safetensors").unlink(), ["wavlm.safetensors"]),
    "damaged": (
        lambda f: (f / "wavlm.safetensors").write_bytes(b"\xff" * 100),
        ["wavlm.safetensors"],
    ),
    "not of fit-units": (
        lambda f: save_file({"centroids": torch.zeros(2, 2)}, f / "wavlm.safetensors"),
        ["wavlm.safetensors"],
    ),
    "other teacher": (
        lambda f: other_units(f, teacher="robust"),
        ["unit_loss[1].file", "'robust'", "hubert, wavlm"],
    ),
    "other width": (lambda f: other_units(f, width=64), ["unit_loss[1].file", "64", "48"]),
    "other layer": (lambda f: other_units(f, layer=9), ["unit_loss[1].file", "9", "4"]),
    "negative layer": (
        lambda f: other_units(f, layer=-1),
        ["wavlm.safetensors", "-1"],
    ),
    "no clusters": (
        lambda f: other_units(f, clusters=0),
        ["wavlm.safetensors", "0"],
    ),
    "text": ({"unit_loss": "hubert.safetensors"}, ["unit_loss"]),
    "number": ({"unit_loss": 3}, ["unit_loss", "3"]),
    "texts": ({"unit_loss": ["hubert.safetensors"]}, ["unit_loss[0]"]),
    "window": ({"relation": {"weight": 1.0, "window": 1}}, ["relation", "window", "1"]),
    "student_layers": (
        {"relation": {"weight": 1.0, "student_layers": [1, 3]}},
        ["relation.student_layers", "3", "2"],
    ),
    "no student_layers": (
        {"relation": {"weight": 1.0, "student_layers": []}},
        ["student_layers"],
    ),
    "one student layer": (
        {"relation": {"weight": 1.0, "student_layers": [1]}},
        ["relation.student_layers", "1", "2"],
    ),
    "layer drop": (
        {"student": {**STILL, "encoder_layerdrop": 0.1}},
        ["relation", "student.encoder_layerdrop"],
    ),
    "share": ({"student": {**STILL, "mask": {"share": 0}}}, ["student.mask", "share", "0"]),
    "mask without units": ({"unit_loss": []}, ["student.mask", "unit_loss"]),
    "mask is a number": ({"student": {**STILL, "mask": 0.8}}, ["student.mask", "0.8"]),
    "unmasked_weight": (
        {"student": NO_DROPOUT},
        ["unit_loss[1].unmasked_weight", "student.mask"],
    ),
    "s3prl's student": (
        {"student": {**STILL, "mask": None}, "unit_loss": [], "student_backend": "s3prl"},
        ["student.masked_norm", "student_backend: ours"],
    ),
    "s3prl's student and mask": (
        {"student": {**STILL, "masked_norm": False}, "student_backend": "s3prl"},
        ["student.mask", "student_backend: ours"],
    ),
    "s3prl's teachers": ({"teacher_backend": "s3prl"}, ["teacher_masked_norm", "fast"]),
    "procrustes": ({"target_norm": "procrustes", "teachers": "wide"}, ["procrustes", "wavlm"]),
    "layers": (
        {**FREE, "teachers": "layers"},
        ["relation", "hubert", "2", "wavlm", "1"],
    ),
    "reduce": ({"loss": {"reduce": "frame"}}, ["loss.reduce", "frames", "batches", "'frame'"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_sentence(folder, pretrain_with, teachers, name):
    change, parts = MISTAKES[name]
    if callable(change):
        change(folder)
    else:
        kind = change.get("teachers")
        change_model(folder, **{key: value for key, value in change.items() if key != "teachers"})
        with edit_yaml(folder / "model.yaml") as model:
            if kind == "wide":
                model["teachers"]["wavlm"]["model"] = str(teachers["wide"])
                model |= {"aggregation": "separate"}
            elif kind == "layers":
                model["teachers"]["wavlm"]["layers"] = [4]
    code, output = pretrain_with("x")
    error = only_error(output)
    assert code == 2
    for part in parts:
        assert part in error, error


# Backends


def test_the_backends_agree(folder):
    """s3prl's teachers and student give the loss of ours, for one utterance without spans."""
    with edit_yaml(folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"]["train_batch_size"] = 1
    losses = {}
    units = [{"file": entry["file"]} for entry in SHARED_MODEL["unit_loss"]]
    for teacher in ("fast", "s3prl"):
        for student in ("ours", "s3prl"):
            change_model(
                folder,
                student=NO_DROPOUT,
                unit_loss=units,
                teacher_masked_norm=False,
                teacher_backend=teacher,
                student_backend=student,
            )
            expert = adapter(folder).train()
            loss, logs = expert.distiller(first_batch(expert), step=3)
            loss.backward()
            gradient = torch.cat([w.grad.flatten() for w in expert.model.parameters()])
            values = [logs["relation"], logs["hubert_layer2/unit_loss"]]
            losses[teacher, student] = torch.stack([loss.detach(), *values, gradient.norm()])
    ours = losses.pop(("fast", "ours"))
    for backends, values in losses.items():
        torch.testing.assert_close(values, ours, rtol=1e-4, atol=1e-6, msg=str(backends))


def test_activation_checkpointing_with_masked_spans(folder, pretrain_with):
    assert pretrain_with("plain")[0] == 0
    assert pretrain_with("less-memory", activation_checkpointing=True)[0] == 0
    plain, less = everything("plain"), everything("less-memory")
    assert plain.keys() == less.keys()
    names = [name for name in plain if name.startswith(("/student", "/UnitHead", "/MaskEmb"))]
    assert len(names) > 20
    for name in names:
        assert torch.allclose(plain[name], less[name], rtol=0, atol=1e-6), name


@pytest.mark.slow
def test_a_compiled_student_with_masked_spans():
    """Masked norms and spans, of batches of any lengths, with the gradients of eager mode. Graphs
    are traced but not compiled to C++, which takes minutes."""
    torch.manual_seed(0)
    student = Student(StudentSettings(**{**NO_DROPOUT, "masked_norm": True}))
    vector = torch.nn.Parameter(torch.rand(48))
    found = []
    for compiled in (False, True):
        if compiled:
            student.compile(dynamic=True, backend="aot_eager")
        gradients = []
        for seed, sizes in enumerate(([8000, 5000], [12000, 9000, 700])):
            generator = torch.Generator().manual_seed(seed)
            waves = 0.1 * torch.randn(len(sizes), sizes[0], generator=generator)
            lengths = torch.tensor(sizes)
            waves *= torch.arange(sizes[0]) < lengths[:, None]
            frames = int(student.settings.frames(lengths).max())
            spans = torch.rand(len(sizes), frames, generator=generator) < 0.4
            student.zero_grad()
            vector.grad = None
            output = student(waves, lengths, (spans, vector))
            (output.last * output.mask[..., None]).square().mean().backward()
            weights = [w.grad for w in student.parameters() if w.grad is not None]
            gradients.append(torch.cat([g.flatten() for g in (*weights, vector.grad)]))
        found.append(gradients)
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def test_units_of_other_weights_or_of_another_name(folder, teachers):
    """A file of the same name with other weights is another model; a renamed file is the same."""
    units, file = load_units("hubert.safetensors"), "hubert.safetensors"
    path = folder / "mine.pt"
    with edit_yaml(folder / "model.yaml") as model:
        model["teachers"]["hubert"]["model"] = str(path)
    shutil.copy(teachers["hubert"], path)
    units.model = "renamed.pt"
    units.weights = upstream_digest(load_upstream(str(path), "here"))
    save_units(units, file)
    expert = adapter(folder)
    shutil.copy(teachers["robust"], path)
    units.model = "mine.pt"
    save_units(units, file)
    with pytest.raises(ConfigError, match=r"unit_loss\[0\].file .*mine.pt.*weights.*fit-units"):
        adapter(folder)
    config = to_plain_data(expert.settings)  # of a run that is resumed
    UpstreamPretrainExpert(datarc(folder), config, device="cpu")
    units.weights = ""  # a file of an earlier version
    save_units(units, file)
    adapter(folder)
    units.model = "renamed.pt"
    save_units(units, file)
    with pytest.raises(ConfigError, match=r"unit_loss\[0\].file .*renamed.pt.*mine.pt"):
        adapter(folder)


@pytest.mark.slow
def test_units_of_fit_units_in_a_run(folder, corpus, pretrain_with, monkeypatch, capfd):
    """From the command that fits them to the step that predicts them, with s3prl's teachers."""
    pytest.importorskip("sklearn")
    for teacher, layer in (("hubert", 1), ("wavlm", 3)):  # not among the targets
        argv = ["fit-units", "model.yaml", "--teacher", teacher, "--layer", str(layer)]
        data = ["--clusters", "4", "--data", str(corpus / "audio"), "--utterances", "3"]
        output = ["--device", "cpu", "--force", "-o", f"{teacher}.safetensors"]
        assert cli.main([*argv, *data, *output]) == 0
        units = load_units(f"{teacher}.safetensors")
        assert (units.teacher, units.layer, units.clusters) == (teacher, layer, 4)
    change_model(folder, teacher_backend="s3prl", teacher_masked_norm=False)
    assert pretrain_with("x")[0] == 0
    scalars = read_scalars("result/pretrain/x")
    for name in ("hubert_layer1", "wavlm_layer3"):
        assert 0 < scalars[f"ekd/train-{name}/unit_loss"][2] < 3  # 4 units: ln 4 = 1.39 by chance
    # a target cache has only the layers of the targets
    change_model(folder, teacher_backend="fast")
    assert cache(folder, folder / "cache") == 0
    capfd.readouterr()
    use = "config.pretrain_expert.datarc.target_cache='cache'"
    code, output = pretrain_with("y", "-o", use)
    assert code == 2 and "unit_loss[0].file" in only_error(output)
