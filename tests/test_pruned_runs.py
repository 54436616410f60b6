"""Runs whose student is pruned: resuming, processes, cached targets, precision, dev loss, logs."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from tensorboardX.proto import event_pb2
from torch._dynamo.testing import CompileCounter

from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.distill.pruning.cut import cut, gate_values
from s3prl_ekd.distill.pruning.gates import Gate
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import UNITS, GateSettings, PrunedSettings
from s3prl_ekd.errors import SetupError
from s3prl_ekd.essence.units import Units, save_units
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.distributed import distiller_batch, empty_step, has_unused_layers
from s3prl_ekd.pretrain.optim import fused_adamw
from s3prl_ekd.pretrain.trainer import Trainer
from s3prl_ekd.student_file import load_student, write_student

from .cache_cases import adapter, cache
from .conftest import STUDENT, edit_yaml, saved_states
from .gated_students import WAVLM, gated_settings
from .kill_and_resume import flat_values, unequal

COPY = {"kind": "copy", "of": "hubert"}
# Without dropout only the gates are random.
NO_DROPOUT = {**COPY, "dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0}
PRUNING = {"sparsity": 0.4, "reach_at": 1, "units": ["conv", "heads", "ffn", "attention"]}
ADAMW = {"name": "FusedAdamW", "lr": 1e-3, "warmup_proportion": 0.1}


def write_pruning(folder, layers=(0, 2, 4), names=("hubert", "wavlm"), data=None, **model):
    """Change the configs of ``pretrain_folder`` to a student with gates."""
    with edit_yaml(folder / "model.yaml") as config:
        config["teachers"] = {name: config["teachers"][name] for name in names}
        for teacher in config["teachers"].values():
            teacher["layers"] = [*layers]
        config.pop("init", None)
        config |= {"student": COPY, "pruning": PRUNING, "heads": {"kind": "layerwise"}, **model}
    with edit_yaml(folder / "runner.yaml") as config:
        config["optimizer"] = ADAMW
        config["pretrain_expert"]["datarc"] |= data or {}


@pytest.fixture
def folder(pretrain_folder):
    write_pruning(pretrain_folder)
    return pretrain_folder


@pytest.fixture
def dev_table(folder, corpus):
    """``dev.csv`` with three utterances of the corpus, beside ``train.csv``."""
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    for name, part in (("train", rows), ("dev", rows[:4])):
        (folder / f"{name}.csv").write_text("\n".join(part) + "\n")
    with edit_yaml(folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"] |= {"file_path": str(folder), "dev_sets": ["dev"]}


def first_batch(expert):
    return distiller_batch(expert.dataloader.dataset[0], "cpu")


def trained_state(name, file=None):
    """What training changes, as flat values: student with gates, heads, multipliers, optimizer."""
    states = saved_states(name, file)
    keys = ("student", "heads")
    parts = {key: states["EKD"][key] for key in keys}
    parts |= {key: states[key] for key in ("Multipliers", "Optimizer")}
    return dict(flat_values(parts))


# Resuming


def test_a_run_stopped_by_a_signal_and_resumed(folder, pretrain_with, monkeypatch):
    """Equals an uninterrupted one bit for bit; with SIGKILL see ``kill_and_resume.py``."""
    assert pretrain_with("whole", num_workers=1)[0] == 0
    record_step = Trainer.record_step

    def with_signal(self, result):
        record_step(self, result)
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "record_step", with_signal)
        assert pretrain_with("cut")[0] == 128 + signal.SIGTERM
    assert saved_states("cut")["Step"] == 2
    assert pretrain_with("cut", "-a")[0] == 0
    whole, resumed = trained_state("whole"), trained_state("cut")
    assert not unequal(whole, resumed)
    start = trained_state("whole", "states-3.ckpt")
    gates = [name for name in whole if name.endswith("log_alpha")]
    assert len(gates) == 7 + 3 * 4  # conv layers; heads, ffn and attention of 4 layers
    # step 4 changes each gate, and the multipliers
    for name in (*gates, "/Multipliers/first", "/Multipliers/second"):
        assert not torch.equal(start[name], whole[name]), name


# Processes

RANKS = """
import os, sys, torch
from s3prl_ekd import __main__
from s3prl_ekd.pretrain.trainer import Trainer

train = Trainer.train
def and_save(self):
    train(self)
    distiller = self.upstream.distiller
    gates = [gate.values.detach() for _, _, gate in distiller.student.backbone.gates()]
    state = {"weights": distiller.trainable.state_dict(), "drawn": torch.cat(gates)}
    torch.save(state, f"rank{os.environ['RANK']}.pt")
Trainer.train = and_save
__main__.process()
"""


def in_two_processes(folder, *argv):
    (folder / "ranks.py").write_text(RANKS)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ranks.py")
    done = subprocess.run(
        [sys.executable, *torchrun, "run_pretrain.py", "-u", "ekd", "--device", "cpu", *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_of_which_one_has_only_bad_audio(folder, corpus):
    """Batches of one utterance; each second one is missing. No target is of the last layer."""
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    (folder / "some.csv").write_text("\n".join([*rows[:3], "9,no.flac,8000,"]) + "\n")
    data = {"file_path": str(folder), "sets": ["some"], "on_bad_audio": "skip"}
    student = {**COPY, "feature_grad_mult": 0}
    pruning = {**PRUNING, "units": ["heads", "ffn"], "sparsity": 0.1}
    write_pruning(
        folder, (0, 2), data={**data, "train_batch_size": 1}, student=student, pruning=pruning
    )
    one, two = in_two_processes(folder, "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")
    assert any(name.endswith("log_alpha") for name in one["weights"])
    assert not unequal(one["weights"], two["weights"])
    assert not torch.equal(one["drawn"], two["drawn"])
    bad = (folder / "result/pretrain/x/bad_audio.tsv").read_text().splitlines()
    assert bad[1].split("\t")[2] == "4"  # 6 steps of 2 batches are 4 epochs of 3 batches


def test_ddp_expects_the_weights_without_a_gradient(folder):
    norm_first = {**STUDENT, "encoder_layers": 4, "layer_norm_first": True}
    cases = [
        ((0, 2, 4), {}),
        ((0, 2), {}),
        ((0, 2), {"heads": {"kind": "split"}}),
        ((0, 4), {"student": norm_first, "pruning": None}),
    ]
    found = []
    for layers, model in cases:
        write_pruning(folder, layers, **model)
        expert = adapter(folder).train()
        distiller = expert.distiller
        distiller(first_batch(expert), step=3)[0].backward()
        unused = any(w.grad is None for w in distiller.trainable.parameters() if w.requires_grad)
        assert has_unused_layers(distiller) == unused
        found.append(unused)
    assert found == [False, True, False, True]


def test_an_empty_step_has_a_gradient_for_each_trained_weight(folder):
    """With weights that are not trained: the conv extractor, and the scale of ``last_conv: soft``
    of a student with gates on conv channels."""
    frozen = {"student": {**COPY, "feature_grad_mult": 0}}
    for model in (
        {**frozen, "pruning": {**PRUNING, "units": ["ffn"], "sparsity": 0.1}},
        {"pruning": {**PRUNING, "last_conv": "soft"}},
    ):
        write_pruning(folder, **model)
        expert = adapter(folder)
        loss = empty_step(expert.distiller)
        loss.backward()
        gradients = {n: w.grad for n, w in expert.model.named_parameters() if w.requires_grad}
        assert loss == 0 and len(gradients) < len([*expert.model.parameters()])
        assert all((g == 0).all() for g in gradients.values())


# Cached targets


@pytest.mark.parametrize(
    "aggregation", ["separate", pytest.param("average", marks=pytest.mark.slow)]
)
def test_training_from_cached_targets(folder, pretrain_with, capfd, aggregation):
    """Pruning, and distilling the cut student, with the losses of running the teachers."""
    write_pruning(
        folder,
        data={"sequence_length": 0, "train_batch_size": 1},  # padding changes teachers' outputs
        student=NO_DROPOUT,
        aggregation=aggregation,
    )
    options = ("--aggregated",) if aggregation == "average" else ()
    assert cache(folder, folder / "cache", *options) == 0
    for step in ("one", "two"):
        if step == "two":
            loaded = load_student("result/pretrain/one-run/states-6.ckpt")
            loaded.student = cut(loaded.student, gate_values(loaded.student))
            write_student(loaded, "pruned.pt")
            file = {"kind": "file", "file": "pruned.pt"}
            write_pruning(folder, student=file, pruning=None, aggregation=aggregation)
        assert pretrain_with(f"{step}-run", log_step=1)[0] == 0
        use = "config.pretrain_expert.datarc.target_cache='cache'"
        assert pretrain_with(f"{step}-cached", "-o", use, log_step=1)[0] == 0
        losses = [
            list(read_scalars(f"result/pretrain/{step}-{how}")["ekd/train-loss_mean"].values())
            for how in ("run", "cached")
        ]
        assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)


# Accumulation, activation checkpointing, torch.compile, precision


def test_gates_are_drawn_once_for_each_batch(folder, pretrain_with, monkeypatch):
    drawn, sampled = [], Gate.sampled
    monkeypatch.setattr(Gate, "sampled", lambda self: drawn.append(self) or sampled(self))
    options = {"gradient_accumulate_steps": 2, "total_steps": 3, "save_step": 2}
    for name in ("stored", "recomputed"):
        drawn.clear()
        recompute = name == "recomputed"
        assert pretrain_with(name, activation_checkpointing=recompute, **options)[0] == 0
        assert len(drawn) == 3 * 2 * (7 + 3 * 4)  # steps, batches, gates of conv and 4 layers
    assert not unequal(trained_state("stored"), trained_state("recomputed"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_student_has_the_same_gradients_whatever_its_gates():
    torch.manual_seed(0)
    settings = PrunedSettings(
        conv_layers=((8, 10, 5), (8, 8, 8), (8, 8, 8)),
        extractor_mode="layer_norm",
        conv_bias=True,
        normalize_waveforms=True,
        encoder_embed_dim=8,
        encoder_attention_heads=2,
        heads=((0, 1),),
        ffn_dims=(12,),
        conv_pos=4,
        conv_pos_groups=2,
        activation_fn="gelu",
        layer_norm_first=False,
        position_buckets=8,
        max_distance=16,
        gates=GateSettings(UNITS),
    )
    student = Student(settings)
    waves, lengths = torch.randn(2, 4000), torch.tensor([4000, 3000])

    def results(seed, training):
        student.train(training).zero_grad()
        torch.manual_seed(seed)
        output = student(waves, lengths)
        (output.last.square().mean() + output.features.square().mean()).backward()
        gradients = {name: weight.grad for name, weight in student.named_parameters()}
        return {**{n: g for n, g in gradients.items() if g is not None}, "last": output.last}

    calls = [(seed, mode) for mode in (True, False) for seed in range(3)]
    expected = [results(*call) for call in calls]
    student.compile(dynamic=True)
    for (seed, training), values in zip(calls, expected, strict=True):
        # the values of gates are an input of the compiled functions, not a part of them
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            compiled = results(seed, training)
        assert values.keys() == compiled.keys()
        assert training == any(name.endswith("log_alpha") for name in values)
        for name, value in values.items():
            assert torch.allclose(compiled[name], value, rtol=1e-3, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, WAVLM], ids=["hubert", "wavlm"])
def test_a_compiled_student_with_gates_takes_any_length(changes):
    """Two graphs, and one of them once more when a second length shows that lengths vary."""
    torch._dynamo.reset()
    student, counter = Student(gated_settings(**changes)), CompileCounter()
    student.compile(dynamic=True, backend=counter)
    for samples in (8000, 7200, 6400, 9600, 5000, 12345):
        waves, lengths = torch.randn(2, samples), torch.tensor([samples, samples - 1000])
        student(waves, lengths).last.square().mean().backward()
    assert counter.frame_count <= 3


def test_a_step_that_is_not_finite_changes_nothing(folder, pretrain_with, monkeypatch):
    """Neither weights, gates nor multipliers."""
    forward = EnsembleDistiller.forward

    def spoiled(self, *args, step=1, **kwargs):
        loss, logs = forward(self, *args, step=step, **kwargs)
        return (loss * torch.nan if step == 3 else loss), logs

    monkeypatch.setattr(EnsembleDistiller, "forward", spoiled)
    assert pretrain_with("x", total_steps=4, save_step=1, log_step=1)[0] == 0
    two, three, four = (trained_state("x", f"states-{step}.ckpt") for step in (2, 3, 4))
    weights = [name for name in two if not name.startswith("/Optimizer/param_groups")]
    changed = unequal(*({n: s[n] for n in weights} for s in (two, three)))
    assert not changed and len(unequal(three, four)) > 40


# Dev loss and logs


def test_gates_in_eval_mode_are_fixed(folder):
    expert = adapter(folder)
    batch = first_batch(expert)
    expert.eval()
    state = torch.get_rng_state()
    losses = [float(expert.distiller(batch, step=5)[0]) for _ in range(2)]
    assert losses[0] == losses[1] and torch.equal(state, torch.get_rng_state())
    # 1 % of 32 conv channels and of 4 heads, less than half a gate, and sigmoid(-1.6) = 17 % of
    # the 64 feed-forward units are closed (see test_gates for the constants)
    for unit, _, gate in expert.distiller.student.backbone.gates():
        assert int((gate.values == 0).sum()) == {"ffn": 11}.get(unit, 0)
    expert.train()
    losses = [float(expert.distiller(batch, step=5)[0].detach()) for _ in range(2)]
    assert losses[0] != losses[1]


def test_the_best_checkpoint_is_one_of_the_final_sparsity(folder, dev_table, pretrain_with):
    still = {**PRUNING, "lr": 1e-7}  # the sparsity stays that of the start
    start = float(adapter(folder).distiller.sparsity.expected())  # up to 0.001: another seed
    for name, sparsity, is_saved in (("above", start + 0.02, False), ("near", start + 0.005, True)):
        write_pruning(folder, pruning={**still, "sparsity": sparsity})
        assert pretrain_with(name)[0] == 0
        assert list(read_scalars(f"result/pretrain/{name}")["ekd/dev-loss"]) == [3, 6]
        assert os.path.exists(f"result/pretrain/{name}/dev-best.ckpt") == is_saved


def test_sparsity_in_tensorboard_and_in_the_progress_bar(folder, pretrain_with):
    write_pruning(folder, pruning={**PRUNING, "reach_at": 4})
    code, output = pretrain_with("x", log_step=1)
    assert code == 0
    scalars = read_scalars("result/pretrain/x")
    expected, target, first, second, term = (
        scalars[f"ekd/train-sparsity/{name}"]
        for name in ("expected", "target", "lambda1", "lambda2", "term")
    )
    assert target == pytest.approx({1: 0.0, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.4, 6: 0.4})
    assert first[1] == second[1] == 0 and second[6] > second[2] > 0
    for step, excess in ((s, expected[s] - target[s]) for s in expected):
        value = first[step] * excess + second[step] * excess**2
        assert term[step] == pytest.approx(value, abs=1e-6)
    shown = re.findall(r"sparsity (\d\.\d+)\D+(\d\.\d+)", output)
    assert (f"{expected[4]:.3f}", f"{target[4]:.3f}") in shown

    # a picture of the widths at each save
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    pictures = dict(images("result/pretrain/x"))
    assert sorted(pictures) == [("ekd/widths", 3), ("ekd/widths", 6)]
    for image in pictures.values():
        pixels = imread(io.BytesIO(image.encoded_image_string))  # [row, column, channel]
        assert pixels.shape == (image.height, image.width, image.colorspace)
        blue = ((pixels[..., :3] * 255).round() == (0x3B, 0x6E, 0xA5)).all(-1)
        assert 0.02 < blue.mean() < 0.5  # the bars of what is kept


def images(folder):
    """``((tag, step), image)`` of each image in a TensorBoard file."""
    (path,) = (p for p in os.scandir(folder) if p.name.startswith("events"))
    data, offset = open(path, "rb").read(), 0
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 8], "little")
        event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + size])
        offset += 12 + size + 4
        for value in event.summary.value:
            if value.WhichOneof("value") == "image":
                yield (value.tag, event.step), value.image


# Options of the loss and of the data


OPTIONS = {
    "wavlm": {"student": {"kind": "copy", "of": "wavlm"}},
    "target norm": {"target_norm": "mean_std"},
    "phi-s": {"target_norm": "phi_s"},
    "feature penalty": {"loss": {"feature_penalty": 0.1}},
    "dropping": {"targets": {"drop_teachers": 0.5}},
    "agreement": {"loss": {"agreement": 0.5}},
    "average": {"aggregation": "average", "heads": {"kind": "layerwise", "per_teacher": True}},
    "residual": {"aggregation": "average", "heads": {"kind": "layerwise", "residual": True}},
    "concat": {"aggregation": "concat"},
    "split": {"heads": {"kind": "split"}},
    "distortion": {"distortion": {"setup": "setup2", "babble": True}},
    "teacher dropout": {"teacher_dropout": True},
    "soft": {"pruning": {**PRUNING, "last_conv": "soft", "norms": "all"}},
    "units": {"unit_loss": {"file": "units.safetensors", "weight": 1.0}},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_with_an_option_trains_every_weight(folder, option):
    if option == "units":
        torch.manual_seed(0)
        save_units(Units(torch.randn(5, 48), "hubert", 2), folder / "units.safetensors")
    write_pruning(folder, **OPTIONS[option])
    expert = adapter(folder)
    expert.train()
    weights = {name: w for name, w in expert.model.named_parameters() if w.requires_grad}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    expert.distiller.sparsity.multipliers.first.data.fill_(0.1)  # else drawn gates of 1 have none
    optimizer = fused_adamw(expert.model, ADAMW, expert.settings.pruning)
    loss, logs = expert.distiller(first_batch(expert), step=3)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and torch.isfinite(logs["sparsity/expected"])
    unchanged = [n for n, weight in weights.items() if torch.equal(before[n], weight)]
    assert not unchanged


# Refusals


def test_another_optimizer_is_refused(folder, pretrain_with, monkeypatch):
    """Before teachers are loaded."""
    monkeypatch.setattr("s3prl_ekd.pretrain.expert.load_teachers", lambda *_: 1 / 0)
    code, output = pretrain_with("x", optimizer={"name": "AdamW_with_schedule", "lr": 1e-3})
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and "AdamW_with_schedule" in error and "FusedAdamW" in error
    assert not os.path.exists("result/pretrain/x")


def test_s3prls_own_runner_is_refused(folder):
    expert = adapter(folder)
    with pytest.raises(SetupError, match=r"run_pretrain\.py -u ekd"):
        expert(expert.dataloader.dataset[0], defaultdict(list))
