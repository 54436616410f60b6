"""bfloat16, fused AdamW, activation checkpointing, torch.compile: faster, same training results."""

import math
import re
import shutil

import pytest
import torch

from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.files.config import from_plain_data
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.optim import fused_adamw, warmup_schedule

from .conftest import NO_DROPOUT, STUDENT, edit_yaml, saved_states


@pytest.fixture
def run(pretrain_folder, pretrain):
    """Pretrain in this process with changed keys of the runner config; (exit code, output)."""
    default = (pretrain_folder / "runner.yaml").read_text()

    def run(name, *argv, optimizer=None, device="cpu", **changes):
        (pretrain_folder / "runner.yaml").write_text(default)
        with edit_yaml("runner.yaml") as config:
            config["runner"].update(changes)
            config["optimizer"] = optimizer or config["optimizer"]
        files = ("-c", "runner.yaml", "-g", "model.yaml") if not argv else ()
        return pretrain(*files, "-n", name, "--device", device, *argv)

    return run


def student_of(name):
    return saved_states(name)["EKD"]["student"]


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_activation_checkpointing_changes_neither_loss_nor_gradients():
    torch.manual_seed(0)
    settings = from_plain_data(StudentSettings, {**STUDENT, "encoder_layerdrop": 0.0}, "test")
    student = Student(settings).train()
    waves, lengths = torch.randn(2, 8000), torch.tensor([8000, 5000])

    def gradients():
        torch.manual_seed(1)  # dropout is on
        student.zero_grad()
        student(waves, lengths).last.square().mean().backward()
        return {n: w.grad.clone() for n, w in student.named_parameters() if w.grad is not None}

    expected, names = gradients(), list(student.state_dict())
    expected_bytes = saved_bytes(student, waves, lengths)
    student.activation_checkpointing = True
    recomputed = gradients()
    assert expected.keys() == recomputed.keys() and len(expected) > 20
    assert all(torch.equal(expected[name], recomputed[name]) for name in expected)
    assert list(student.state_dict()) == names
    assert saved_bytes(student, waves, lengths) < 0.7 * expected_bytes


def saved_bytes(student, waves, lengths):
    """Bytes that a forward saves for the backward."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student(waves, lengths)
    return total


def test_activation_checkpointing_in_a_run(run):
    assert run("default")[0] == 0 and run("recomputed", activation_checkpointing=True)[0] == 0
    assert largest_difference(student_of("default"), student_of("recomputed")) == 0


def change_model(**changes):
    with edit_yaml("model.yaml") as model:
        for name, value in changes.items():
            if isinstance(value, dict):
                value = {**model.get(name, {}), **value}
            model[name] = value


def test_s3prls_forward_trains_the_same(run):
    assert run("ours")[0] == 0
    change_model(student_backend="s3prl")
    assert run("s3prl")[0] == 0
    assert largest_difference(student_of("ours"), student_of("s3prl")) < 1e-5


def test_settings_that_s3prls_forward_lacks_are_rejected(run):
    change_model(student_backend="s3prl")
    code, output = run("x", activation_checkpointing=True)
    assert code == 2 and "runner.activation_checkpointing" in output and "student_backend" in output
    wide = STUDENT["extractor_conv_feature_layers"].replace("32,2,2)] * 2", "32,2,2)] + [(48,2,2)]")
    change_model(student={"extractor_conv_feature_layers": wide}, init={})
    code, output = run("x")
    assert code == 2 and "student_backend" in output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="slow on a CPU")
def test_bfloat16_trains_nearly_the_same(run):
    assert run("float32", log_step=1, device="cuda")[0] == 0
    assert run("bf16", log_step=1, precision="bfloat16", device="cuda")[0] == 0
    float32, bf16 = (read_scalars(f"result/pretrain/{name}") for name in ("float32", "bf16"))
    losses = [list(scalars["ekd/train-loss_mean"].values()) for scalars in (float32, bf16)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    weights = student_of("bf16")
    assert all(w.dtype == torch.float32 for w in weights.values())
    # the targets do not depend on it
    tags = [name for name in float32 if "target_abs" in name]
    assert tags and all(float32[name] == bf16[name] for name in tags)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_student_trains_the_same(run):
    change_model(student=NO_DROPOUT)
    changes = {"total_steps": 3, "save_step": 2, "log_step": 1}
    assert run("default", **changes)[0] == 0
    code, output = run("compiled", compile=True, **changes)
    assert code == 0, output
    default, compiled = student_of("default"), student_of("compiled")
    assert default.keys() == compiled.keys() and largest_difference(default, compiled) < 1e-4


# The optimizer

FUSED = {
    "name": "FusedAdamW",
    "lr": 1e-3,
    "weight_decay": 0.1,
    "betas": [0.8, 0.9],
    "eps": 1e-7,
    "warmup_proportion": 0.5,
}


def test_fused_adamw_follows_the_formula():
    """Loshchilov and Hutter, algorithm 2, in float64; no weight decay for biases and norms."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    model[2].requires_grad_(False)
    expected = {
        n: w.detach().clone().double() for n, w in model.named_parameters() if w.requires_grad
    }
    first = {name: torch.zeros_like(w) for name, w in expected.items()}  # moments
    second = {name: torch.zeros_like(w) for name, w in expected.items()}
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
                mean = first[name] / (1 - 0.8**step)
                root = (second[name] / (1 - 0.9**step)).sqrt() + 1e-7
                expected[name] = expected[name] * (1 - rate * decay) - rate * mean / root
        optimizer.step()
        schedule.step()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(weight.double(), expected[name], atol=1e-6), name
    assert len(optimizer.state) == 4  # no state for frozen parameters


def test_fused_adamw_resumes_exactly(run):
    assert run("complete", optimizer=FUSED)[0] == 0
    assert run("resumed", optimizer=FUSED)[0] == 0
    shutil.rmtree("resumed", ignore_errors=True)
    for name in ("states-6.ckpt", "last.ckpt"):
        shutil.move(f"result/pretrain/resumed/{name}", f"{name}.away")
    code, output = run("resumed", "-a")
    assert code == 0, output
    assert largest_difference(student_of("complete"), student_of("resumed")) == 0
    rates = read_scalars("result/pretrain/complete")["ekd/train-lr"]
    assert rates[6] < rates[4] and math.isclose(rates[2], 1e-3, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decoy": 1}, "weight_decoy"),
        ({"betas": [0.9]}, r"betas.*\[0\.9\]"),
        ({"weight_decay": -1}, r"weight_decay.*-1"),
        ({"warmup_proportion": 2}, "warmup_proportion"),
    ],
)
def test_invalid_optimizer_settings_are_rejected(run, changes, message):
    code, output = run("x", optimizer={**FUSED, **changes})
    assert code == 2 and re.search(message, output)
