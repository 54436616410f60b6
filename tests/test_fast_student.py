"""bfloat16, the fused optimizer, recomputation, torch.compile: faster, and the same training."""

import copy
import math
import shutil

import pytest
import torch
import yaml

from s3prl_ekd.distill.settings import StudentSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.files.config import build
from s3prl_ekd.files.run_checkpoints import newest, read_run
from s3prl_ekd.pretrain.optim import fused_adamw, warmup_schedule
from s3prl_ekd.pretrain.tensorboard import read_scalars
from s3prl_ekd.workspace import write_workspace

from .conftest import STUDENT, write_configs


@pytest.fixture
def run(tmp_path, teachers, corpus, monkeypatch, pretrain):
    """Run in this process with keys of the runner config changed; (code, stdout + stderr)."""
    write_workspace(tmp_path)
    write_configs(tmp_path, teachers, corpus)
    monkeypatch.chdir(tmp_path)
    plain = yaml.safe_load((tmp_path / "runner.yaml").read_text())

    def run(name, *words, optimizer=None, device="cpu", **changes):
        config = copy.deepcopy(plain)
        config["runner"].update(changes)
        config["optimizer"] = optimizer or config["optimizer"]
        (tmp_path / "runner.yaml").write_text(yaml.safe_dump(config))
        files = ("-c", "runner.yaml", "-g", "model.yaml") if not words else ()
        return pretrain(*files, "-n", name, "--device", device, *words)

    return run


def student_of(name):
    return read_run(newest(f"result/pretrain/{name}"))["EKD"]["student"]


def largest_difference(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


def test_recomputing_changes_neither_loss_nor_gradients():
    torch.manual_seed(0)
    settings = build(StudentSettings, {**STUDENT, "encoder_layerdrop": 0.0}, "test")
    student = Student(settings).train()
    waves, lengths = torch.randn(2, 8000), torch.tensor([8000, 5000])

    def gradients():
        torch.manual_seed(1)  # dropout is on
        student.zero_grad()
        student(waves, lengths).last.square().mean().backward()
        return {n: w.grad.clone() for n, w in student.named_parameters() if w.grad is not None}

    before, names = gradients(), list(student.state_dict())
    kept = saved_bytes(student, waves, lengths)
    student.recompute = True
    after = gradients()
    assert before.keys() == after.keys() and len(before) > 20
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(student.state_dict()) == names
    assert saved_bytes(student, waves, lengths) < 0.5 * kept


def saved_bytes(student, waves, lengths):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student(waves, lengths)
    return total


def test_recomputing_in_a_run(run):
    assert run("plain")[0] == 0 and run("again", recompute=True)[0] == 0
    assert largest_difference(student_of("plain"), student_of("again")) == 0


def change_model(**changes):
    with open("model.yaml") as file:
        model = yaml.safe_load(file)
    for name, value in changes.items():
        if isinstance(value, dict):
            value = {**model.get(name, {}), **value}
        model[name] = value
    with open("model.yaml", "w") as file:
        yaml.safe_dump(model, file)


def test_s3prls_forward_trains_the_same(run):
    assert run("ours")[0] == 0
    change_model(student_backend="s3prl")
    assert run("s3prl")[0] == 0
    assert largest_difference(student_of("ours"), student_of("s3prl")) == 0


def test_what_s3prls_forward_cannot_do_is_refused(run):
    change_model(student_backend="s3prl")
    code, said = run("x", recompute=True)
    assert code == 2 and "runner.recompute" in said and "student_backend" in said
    wide = STUDENT["extractor_conv_feature_layers"].replace("32,2,2)] * 2", "32,2,2)] + [(48,2,2)]")
    change_model(student={"extractor_conv_feature_layers": wide}, init={})
    code, said = run("x")
    assert code == 2 and "student_backend" in said


def test_bfloat16_is_float32_on_a_cpu(run, caplog):
    assert run("plain")[0] == 0 and run("bf16", bf16=True)[0] == 0
    assert "runner.bf16 needs a CUDA device: training in float32" in caplog.text
    assert largest_difference(student_of("plain"), student_of("bf16")) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bfloat16 needs a CUDA device")
def test_bfloat16_trains_nearly_the_same(run):
    assert run("plain", log_step=1, device="cuda")[0] == 0
    assert run("bf16", log_step=1, bf16=True, device="cuda")[0] == 0
    one, two = (read_scalars(f"result/pretrain/{name}") for name in ("plain", "bf16"))
    losses = [list(each["ekd/train-loss_mean"].values()) for each in (one, two)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    weights = student_of("bf16")
    assert all(w.dtype == torch.float32 for w in weights.values())
    # what the teachers say does not depend on it
    sizes = [name for name in one if "target_abs" in name]
    assert sizes and all(one[name] == two[name] for name in sizes)


def test_bfloat16_teachers_are_refused_on_a_cpu(run):
    model = yaml.safe_load(open("model.yaml"))
    open("model.yaml", "w").write(yaml.safe_dump({**model, "teacher_precision": "bfloat16"}))
    code, said = run("x")
    assert code == 2 and "teacher_precision: bfloat16 needs a CUDA device, and this is cpu" in said


def test_both_halves_are_refused(run):
    code, said = run("x", fp16=True, bf16=True)
    assert code == 2 and "fp16 and bf16 are both true" in said


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_student_trains_the_same(run):
    still = "dropout", "attention_dropout", "activation_dropout"
    model = yaml.safe_load(open("model.yaml"))
    model["student"].update(dict.fromkeys(still, 0.0))
    open("model.yaml", "w").write(yaml.safe_dump(model))
    changes = {"total_steps": 3, "save_step": 2, "log_step": 1}
    assert run("plain", **changes)[0] == 0
    code, said = run("compiled", compile=True, **changes)
    assert code == 0, said
    one, two = student_of("plain"), student_of("compiled")
    assert one.keys() == two.keys() and largest_difference(one, two) < 1e-4


# The optimizer

FUSED = {
    "name": "FusedAdamW",
    "lr": 1e-3,
    "weight_decay": 0.1,
    "betas": [0.8, 0.9],
    "eps": 1e-7,
    "warmup_proportion": 0.5,
}


def test_its_steps_are_those_of_the_formula():
    """Loshchilov and Hutter, algorithm 2, by hand; biases and norms do not decay."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    model[2].requires_grad_(False)
    mine = {n: w.detach().clone().double() for n, w in model.named_parameters() if w.requires_grad}
    first = {name: torch.zeros_like(w) for name, w in mine.items()}
    second = {name: torch.zeros_like(w) for name, w in mine.items()}
    optimizer = fused_adamw(model, FUSED)
    schedule = warmup_schedule(optimizer, FUSED, total_steps=4)
    for step, rate in enumerate((0.5e-3, 1e-3, 1e-3, 0.5e-3), start=1):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.zero_grad()
        model(torch.ones(4, 3) * step).square().sum().backward()
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                gradient = weight.grad.double()
                decay = 0.1 if name == "0.weight" else 0.0
                first[name] = 0.8 * first[name] + 0.2 * gradient
                second[name] = 0.9 * second[name] + 0.1 * gradient**2
                up = first[name] / (1 - 0.8**step)
                root = (second[name] / (1 - 0.9**step)).sqrt() + 1e-7
                mine[name] = mine[name] * (1 - rate * decay) - rate * up / root
        optimizer.step()
        schedule.step()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(weight.double(), mine[name], atol=1e-6), name
    assert len(optimizer.state) == 4  # nothing is kept for what is not trained


def test_it_trains_and_goes_on_exactly(run):
    assert run("whole", optimizer=FUSED)[0] == 0
    assert run("cut", optimizer=FUSED)[0] == 0
    shutil.rmtree("resumed", ignore_errors=True)
    for name in ("states-6.ckpt", "last.ckpt"):
        shutil.move(f"result/pretrain/cut/{name}", f"{name}.away")
    code, said = run("cut", "-a")
    assert code == 0, said
    assert largest_difference(student_of("whole"), student_of("cut")) == 0
    rates = read_scalars("result/pretrain/whole")["ekd/train-lr"]
    assert rates[6] < rates[4] and math.isclose(rates[2], 1e-3, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said_of_it"),
    [
        ({"weight_decoy": 1}, "weight_decoy: FusedAdamW has no such setting"),
        ({"betas": [0.9]}, r"betas is \[0.9\]; two numbers from 0 to 1"),
        ({"weight_decay": -1}, "weight_decay is -1; a number of 0 or more"),
        ({"warmup_proportion": 2}, "warmup_proportion is more than 1"),
    ],
)
def test_a_setting_that_is_none(run, changes, said_of_it):
    import re

    code, said = run("x", optimizer={**FUSED, **changes})
    assert code == 2 and re.search(said_of_it, said)
