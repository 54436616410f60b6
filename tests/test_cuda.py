"""On a GPU: the results of a CPU or of s3prl, and steps that do not wait for the device.

``python -m pytest -m cuda``; with ``-m slow`` the same tests run on the CPU, to test themselves.
"""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from s3prl.upstream.wav2vec2.wav2vec2_model import ConvFeatureExtractionModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.distill.conv_extractor import ConvExtractor
from s3prl_ekd.distill.student import Student
from s3prl_ekd.pretrain.distributed import distiller_batch, wrap_ddp
from s3prl_ekd.pretrain.optim import fused_adamw
from s3prl_ekd.teachers import load_upstream
from s3prl_ekd.teachers.fast.encoder import fast_encoders
from tools.bench.inputs import SIZES, write_corpus, write_teachers
from tools.bench.trainer_step import TrainerStep
from tools.bench.variants import BenchPlan

from .conftest import saved_states
from .kill_and_resume import flat_values, unequal
from .test_conv_extractor import CASES, exact, gradients

has_cuda = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not has_cuda, reason="needs a CUDA device")],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request):
    """cuda or cpu, in float32 without TF32."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield request.param
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a corpus of four utterances and three teachers of 6 layers."""
    folder = tmp_path_factory.mktemp("steps")
    write_corpus(folder, 4, 1.0)
    return folder, write_teachers(folder, SIZES["tiny"])


@pytest.fixture
def plan(inputs, device):
    folder, teachers = inputs
    return BenchPlan(folder, teachers, "tiny", device, 2)


def losses_of(step, count=4):
    """The losses of the next steps."""
    losses = []
    for index in range(count):
        step.step(index)
        losses += [result.loss for result in step.read()]
    return losses


def assert_near(actual, expected, tolerance):
    """Equal up to ``tolerance`` times the largest absolute value of each tensor, and 1e-6: the
    gradients of the keys' biases are zero except for rounding."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = (actual[name].double().cpu() - value.double().cpu()).abs().max()
        assert difference <= tolerance * value.abs().max() + 1e-6, name


def student_results(student, waves, device):
    """Hidden states and gradients of a padded batch."""
    lengths = torch.tensor([len(wave) for wave in waves])
    output = student(pad_sequence(waves, batch_first=True).to(device), lengths)
    valid = output.last * output.mask[..., None]
    weight = torch.randn(valid.shape, generator=torch.Generator().manual_seed(0))
    student.zero_grad()
    (valid * weight.to(device)).sum().backward()  # a norm has made the mean square constant
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return {"last": valid.detach(), **grads}


def test_hidden_states_and_gradients_of_the_student_equal_those_of_a_cpu(
    device, student_settings, waves
):
    student = Student(student_settings).train()
    expected = student_results(student, waves, "cpu")
    assert_near(student_results(student.to(device), waves, device), expected, 2e-4)


def test_a_compiled_student_has_the_same_hidden_states_and_gradients(
    device, student_settings, waves
):
    student = Student(student_settings).train().to(device)
    expected = student_results(student, waves, device)
    student.compile(dynamic=True)
    try:
        assert_near(student_results(student, waves, device), expected, 2e-4)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("case", CASES)
def test_the_conv_extractor_equals_convolutions_in_float64(device, case):
    layers, mode, bias = CASES[case]
    torch.manual_seed(0)
    module = ConvFeatureExtractionModel(layers, 0.0, mode, bias).to(device)
    waves = 0.1 * torch.randn(3, 9_000, device=device) + 0.3
    actual = ConvExtractor(module)(waves, torch.tensor([9_000] * 3))
    features, expected = exact(module, waves)
    own = gradients(module, actual)
    if mode == "default" and bias:  # the norm subtracts it
        own.pop("conv_layers.0.0.bias"), expected.pop("conv_layers.0.0.bias")
    assert_near({"features": actual.detach()}, {"features": features.detach()}, 1e-5)
    assert_near(own, expected, 1e-4)


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_fast_teachers_equal_s3prls_experts(device, teachers, waves, kind):
    upstream = load_upstream(str(teachers[kind]), kind).eval().requires_grad_(False).to(device)
    encoder = fast_encoders({kind: upstream})[kind]
    waves = [wave.to(device) for wave in waves]
    lengths = [len(wave) for wave in waves]
    with torch.no_grad():
        actual = encoder.hidden_states(pad_sequence(waves, batch_first=True), lengths, (0, 2, 4))
        expected = [state.clone() for state in upstream(waves)["hidden_states"]]
    assert_near(actual, {layer: expected[layer] for layer in (0, 2, 4)}, 2e-5)


def test_losses_in_bfloat16_are_close_to_those_in_float32(plan):
    torch.manual_seed(0)
    expected = losses_of(TrainerStep(plan, "float32"))
    actual = losses_of(TrainerStep(plan, "bfloat16" if plan.device == "cuda" else "float32"))
    assert all(map(math.isfinite, actual))
    assert actual == pytest.approx(expected, rel=0.03)


def test_losses_with_cached_targets_are_close_to_those_with_teachers(plan):
    expected = losses_of(TrainerStep(plan))
    assert losses_of(TrainerStep(plan, cache="int8")) == pytest.approx(expected, rel=0.03)


def test_a_step_does_not_wait_for_the_device(plan):
    step = TrainerStep(plan, "bfloat16" if plan.device == "cuda" else "float32")
    losses_of(step, 3)
    if plan.device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(4):
            step.step(index)
    finally:
        if plan.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    step.read()
    assert step.trainer.progress.step == 7


def test_a_step_that_is_not_finite_changes_no_weight(plan):
    step = TrainerStep(plan)
    losses_of(step, 2)
    model = step.trainer.upstream.model
    before = copy.deepcopy(model.state_dict())
    waves = step.batches[0].waves.clone()
    waves[0, :400] = math.nan
    step.batches[0] = step.batches[0]._replace(waves=waves)
    step.step(0)
    step.read()
    assert step.trainer.progress.skipped == 1
    assert not unequal(dict(model.state_dict()), dict(before))
    step.step(1)
    assert unequal(dict(model.state_dict()), dict(before))


def test_fused_adamw_equals_adamw_in_float64(device):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(7, 5), "b": nn.LayerNorm(5)})
    twin = copy.deepcopy(model).double()
    optimizer = fused_adamw(model.to(device), {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6})
    matrices = [twin["a"].weight]
    vectors = [twin["a"].bias, twin["b"].weight, twin["b"].bias]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, eps=1e-6, fused=False, foreach=False)
    for _ in range(5):
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            gradient = torch.randn(own.shape)
            own.grad, other.grad = gradient.to(device), gradient.double()
        optimizer.step()
        reference.step()
    assert_near(dict(model.state_dict()), dict(twin.state_dict()), 1e-6)


@pytest.fixture
def deterministic(monkeypatch):
    """Deterministic kernels, where torch has them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_resumed_run_ends_with_the_same_weights(
    device, deterministic, pretrain_folder, pretrain_script
):
    options = {"total_steps": 4, "save_step": 2, "log_step": 1}
    more = ",,".join(f"config.runner.{key}={value}" for key, value in options.items())
    argv = ("-u", "ekd", "-n", "x", "--device", device)
    code, output = pretrain_script(*argv, "-c", "runner.yaml", "-g", "model.yaml", "-o", more)
    assert code == 0, output
    expected = saved_states("x")
    folder = pretrain_folder / "result/pretrain/x"
    for path in folder.glob("*.ckpt"):
        if saved_states("x", path.name)["Step"] != 2:
            path.unlink()
    assert saved_states("x")["Step"] == 2
    code, output = pretrain_script(*argv, "-a")
    assert code == 0, output
    actual = saved_states("x")
    assert actual["Step"] == expected["Step"] == 4
    for part in ("EKD", "Optimizer"):
        values = [dict(flat_values(states[part])) for states in (actual, expected)]
        assert len(values[0]) > 50 and not unequal(*values)


def test_a_step_over_nccl_has_the_same_gradients(plan, tmp_path):
    """DistributedDataParallel with one process; gloo on a CPU."""
    step = TrainerStep(plan)
    distiller, batch = step.trainer.upstream.distiller, step.batches[0]

    def results(module):
        torch.manual_seed(0)  # dropout
        distiller.zero_grad()
        loss, _ = module(distiller_batch(batch, plan.device), step=1, detail=False, counts=None)
        loss.backward()
        named = distiller.trainable.named_parameters()
        return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in named if p.requires_grad}}

    expected = results(distiller)
    backend = "cpu:gloo,cuda:nccl" if plan.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        value = torch.ones(3, device=plan.device)
        dist.all_reduce(value)
        assert value.tolist() == [1, 1, 1]
        assert_near(results(wrap_ddp(distiller, plan.device)), expected, 1e-4)
    finally:
        dist.destroy_process_group()
