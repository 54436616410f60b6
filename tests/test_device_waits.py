"""A step does not wait for the device, apart from the points where loss and norm are read."""

import dataclasses

import numpy as np
import pytest
import torch

from s3prl_ekd.data.batch import Batch
from s3prl_ekd.distill.settings import (
    HeadSettings,
    LossSettings,
    RelationSettings,
    TargetSettings,
)
from s3prl_ekd.pretrain.distributed import ProcessGroup
from s3prl_ekd.pretrain.optim import OptimizerStep, fused_adamw, read_steps, warmup_schedule
from s3prl_ekd.pretrain.settings import RunSettings
from s3prl_ekd.pretrain.trainer import Trainer
from s3prl_ekd.teachers.fast.encoder import fast_encoders

from .device_waits import DeviceWaits
from .experiments import batch_of, distiller
from .fake_teachers import MASK, FakeUpstream, fake_distiller, noise, random_units
from .gated_students import gated_settings, gated_student

TOLIST = torch.Tensor.tolist
X = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0, 0].item(),
        lambda x: float(x.sum()),
        lambda x: 1 if x.isnan().any() else 2,
        lambda x: range(x[0, 1].int()),
        lambda x: x[x > 3],
        lambda x: x.tolist(),
        lambda x: x.sum().cpu(),
        lambda x: np.asarray(x),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x + 1),
    ],
)
def test_what_waits_is_found(wait):
    with DeviceWaits() as waits:
        wait(X)
    assert waits.found and all(f"{__file__}:" in text for text in waits.found)
    assert torch.Tensor.tolist is TOLIST


def test_what_does_not_wait():
    lengths = torch.tensor([4, 2, 1])
    with DeviceWaits(host=[lengths]) as waits:
        longest = int((lengths + 1).max())
        mask = torch.arange(4) < lengths[:, None]
        y = X.masked_fill(~mask, 0.0).matmul(X.T)
        y[y > 2] = 1.0
        y = torch.where(y.isfinite(), y, 0.0)[:longest]
        lengths.tolist(), lengths.numpy()
    assert not waits.found


def test_a_wait_in_the_backward_pass_is_found():
    x = X.clone().requires_grad_()
    x.register_hook(lambda gradient: gradient * gradient.sum().item())
    with DeviceWaits() as waits:
        x.square().sum().backward()
    assert len(waits.found) == 1


RUN = RunSettings(10, 1, 1, -1, 5.0, 2, 1)


def optimizer_step(device, kind="FusedAdamW", scaled=False):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 1)}).to(device)
    if kind == "FusedAdamW":
        optimizer = fused_adamw(model, {"lr": 1e-3})
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    schedule = warmup_schedule(optimizer, {}, 10)
    scaler = torch.amp.GradScaler(device, enabled=scaled, init_scale=8.0)
    return OptimizerStep(model, optimizer, schedule, scaler, RUN, ProcessGroup())


def accumulate(step, x, factors=(1.0, 1.0)):
    step.begin()
    for i, factor in enumerate(factors):
        loss = step.model["b"](step.model["a"](x)).square().mean() * factor
        step.backward(loss, Batch(names=[f"u{i}"], waves=x, lengths=torch.ones(3)))
    step.clip()
    return step.update()


@pytest.mark.parametrize("scaled", [False, True])
def test_an_update_does_not_wait(scaled):
    step = optimizer_step("cpu", scaled=scaled)
    with DeviceWaits() as waits:
        accumulate(step, X)
    assert not waits.found
    step = optimizer_step("cpu", kind="AdamW")
    with DeviceWaits() as waits:
        accumulate(step, X)
    assert waits.found  # this optimizer cannot skip a step itself


@pytest.mark.parametrize("scaled", [False, True])
def test_the_fused_optimizer_skips_steps_as_others_do(scaled):
    """The same weights as torch's plain AdamW, which is not called for a step that is skipped."""
    inf = float("inf")
    steps = [(1.0, 1.0), (1.0, inf), (float("nan"), 1.0), (2.0, 1.0)]
    fused, plain = (optimizer_step("cpu", kind, scaled) for kind in ("FusedAdamW", "AdamW"))
    plain.optimizer.param_groups[0]["weight_decay"] = 0.0
    for group in fused.optimizer.param_groups:
        group["weight_decay"] = 0.0
    unread = {step: [accumulate(step, X, factors) for factors in steps] for step in (fused, plain)}
    for one, two in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    assert fused.scaler.get_scale() == plain.scaler.get_scale()
    first, second, third, fourth = results = read_steps(unread[fused])
    assert [result.applied for result in results] == [True, False, False, True]
    assert second.loss == inf and first.loss > 0 and fourth.names == ["u0", "u1"]
    assert second.names == ["u1", "u0"] and third.names == ["u0", "u1"]
    assert {int(state["step"]) for state in fused.optimizer.state.values()} == {2}


def test_training_does_not_wait_in_the_trainer(pretrain_with, monkeypatch):
    """From the batch on the device to the next one. What the distiller does is not counted."""
    train_step, record_step, snapshot = Trainer.train_step, Trainer.record_step, Trainer.snapshot
    waits = DeviceWaits()

    def watched(method):
        def call(self, *args):
            with waits:
                return method(self, *args)

        return call

    for method in (train_step, record_step, snapshot):
        monkeypatch.setattr(Trainer, method.__name__, watched(method))
    adamw = {"name": "FusedAdamW", "lr": 1e-3}
    options = {"optimizer": adamw, "gradient_accumulate_steps": 2, "precision": "float32"}
    assert pretrain_with("x", **options)[0] == 0
    assert not [text for text in waits.found if "/s3prl_ekd/pretrain/" in text]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scaled", [False, True])
def test_an_update_does_not_wait_on_cuda(scaled):
    step, x = optimizer_step("cuda", scaled=scaled), X.to("cuda")
    accumulate(step, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        unread = [accumulate(step, x, factors) for factors in ((1.0, 1.0), (1.0, float("nan")))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [result.applied for result in read_steps(unread)] == [True, False]


def case(aggregation="separate", loss=None, **more):
    return {"aggregation": aggregation, "loss": LossSettings(**(loss or {})), **more}


CASES = {
    "separate": case(),
    "average": case("average"),
    "concat": case("concat"),
    "residual": case("average", heads=HeadSettings(residual=True)),
    "s3prl's loss": case(loss={"mask_padding": False, "reduce": "batches"}),
    "penalty and agreement": case(loss={"feature_penalty": 0.1, "agreement": 0.5}),
    "teacher dropping": case(targets=TargetSettings(drop_teachers=0.5)),
    "layer by layer": case(heads=HeadSettings(kind="layerwise")),
    "relation": case("average", relation=RelationSettings(weight=1.0)),
    "mean_std": case(target_norm="mean_std", target_norm_steps=1),
    "phi_s": case("average", target_norm="phi_s", target_norm_steps=1),
    "procrustes": case("average", target_norm="procrustes", target_norm_steps=1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_the_distiller_does_not_wait(name, teachers, student_settings, waves):
    """Teachers, student, loss and gradients, after the steps that collect target statistics."""
    settings = student_settings
    if name == "layer by layer":
        settings = dataclasses.replace(settings, encoder_layers=4)
    if name == "separate":
        settings = dataclasses.replace(settings, encoder_layerdrop=0.1, dropout=0.1)
    model = distiller(teachers, settings, ("hubert", "wavlm"), **CASES[name]).train()
    encoders = fast_encoders({n: t.upstream for n, t in model.teachers.items()})
    for teacher_name, encoder in encoders.items():
        model.teachers[teacher_name].encoder = encoder
    batch = batch_of(waves)
    model(batch)[0].backward()  # collects statistics
    counts = model.count(batch.lengths, None, None)
    with DeviceWaits(host=[batch.lengths]) as waits:
        loss, _ = model(batch, step=2, counts=counts)
        loss.backward()
    assert not waits.found


@pytest.mark.parametrize("units", [("conv", "heads", "ffn"), ("heads", "ffn")])
def test_a_pruned_student_does_not_wait(units):
    student = gated_student(gated_settings(units, position_buckets=32, max_distance=80)).train()
    lengths = torch.tensor([6_000, 4_000])
    with DeviceWaits(host=[lengths]) as waits:
        student(torch.randn(2, 6_000), lengths).last.square().sum().backward()
    assert not waits.found


def test_masked_units_do_not_wait():
    upstreams = {"a": FakeUpstream(), "b": FakeUpstream(seed=1)}
    units = [random_units("a", 2), random_units("b", 4)]
    model = fake_distiller(upstreams, units, mask=MASK)
    batch = batch_of(noise(9_000, 7_000))
    spans = torch.zeros(2, model.student.settings.frames(9_000), dtype=torch.bool)
    spans[:, 3:9] = True
    batch = dataclasses.replace(batch, spans=spans)
    counts = model.count(batch.lengths, spans, None)
    with DeviceWaits(host=[batch.lengths]) as waits:
        model(batch, counts=counts)[0].backward()
    assert not waits.found
