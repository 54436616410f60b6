"""Pruned students with layer-to-layer heads in the upstream, the exports, `features` and `cost`."""

import json
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd import cli, register
from s3prl_ekd.distill import student_forward
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.pruning import cost
from s3prl_ekd.distill.pruning.cut import cut, gate_values
from s3prl_ekd.distill.settings import HeadSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import GateSettings, StudentSettings
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.export.hidden_set import sandbox
from s3prl_ekd.export.hidden_set.package import package_contents, write_package
from s3prl_ekd.student_file import LoadedStudent, contents, load_student, write_student
from s3prl_ekd.superb.cost import measure_cost

from .conftest import STUDENT, error_of
from .students import pruned_student, random_student

VARIANTS = {
    "hubert": {},
    "hubert large": {
        "layer_norm_first": True,
        "extractor_mode": "layer_norm",
        "normalize": True,
    },
    "wavlm": {"wavlm": True, "feature_scale": True},
    "wavlm large": {
        "wavlm": True,
        "layer_norm_first": True,
        "extractor_mode": "layer_norm",
        "normalize": True,
    },
}
GATES = GateSettings(("conv", "heads", "ffn", "attention", "feed_forward"))
# Layers 0 and 1 are predicted from the same layer, 2 and 3 as a group from the mean of both. The
# first target has a linear layer of its own, the others share one.
TARGETS = {"average": TargetSpec(3, (48,), ((0,), (1,), (2, 3)))}
HEAD = HeadSettings(kind="layerwise")
SAMPLES = {"a": [4000, 7777], "b": [16_000]}


def with_heads(student: Student) -> LoadedStudent:
    """Heads whose weights are not those of the start."""
    heads = PredictionHeads(student.width, TARGETS, HEAD)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return LoadedStudent(student, heads.eval(), TARGETS, {"step": 1})


def upstream(path):
    from s3prl import hub

    register()
    return hub.ekd_student(ckpt=str(path), model_config=None, refresh=False)


def write_and_load_package(loaded, folder, keep_heads):
    """The model of a package, from its own files."""
    folder.mkdir()
    write_package(package_contents(loaded, keep_heads), "a card", folder)
    return load_package(folder)


def load_package(folder):
    spec = spec_from_file_location("package_expert", folder / "expert.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.UpstreamExpert(str(folder / "model.pt")).eval()


@torch.no_grad()
def expected_states(loaded, waves):
    """The hidden states of a padded batch, and the three predictions of the heads, by hand."""
    lengths = torch.tensor([len(wave) for wave in waves])
    states = loaded.student(pad_sequence(waves, batch_first=True), lengths).hidden_states
    first, shared = loaded.heads["average"].projections.values()
    predictions = [first(states[0]), shared(states[1]), shared((states[2] + states[3]) / 2)]
    return states, predictions


def assert_equal(states, expected):
    assert len(states) == len(expected)
    for state, reference in zip(states, expected, strict=True):
        torch.testing.assert_close(state, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_hidden_states_in_upstream_and_package(tmp_path, waves, variant):
    loaded = with_heads(pruned_student(**VARIANTS[variant]))
    states, predictions = expected_states(loaded, waves)
    assert len(states) == 4 and all(state.std() > 0.1 for state in states)
    for suffix in ("pt", "safetensors"):
        write_student(loaded, tmp_path / f"student.{suffix}")
        outputs = upstream(tmp_path / f"student.{suffix}").eval()(waves)
        assert_equal(outputs["hidden_states"], states)
        assert_equal(outputs["hidden_states_and_heads"], states + predictions)
    package = write_and_load_package(loaded, tmp_path / "heads", True)
    assert_equal(package(waves)["hidden_states"], states + predictions)
    package = write_and_load_package(loaded, tmp_path / "none", False)
    assert_equal(package(waves)["hidden_states"], states)
    assert_equal(package([waves[2][:100]])["hidden_states"], short_states(loaded, waves[2][:100]))


def short_states(loaded, wave):
    """Of a waveform shorter than a frame, which is padded to one."""
    wave = F.pad(wave, (0, 400 - len(wave)))[None]
    return loaded.student(wave, torch.tensor([400])).hidden_states


@pytest.mark.parametrize("variant", VARIANTS)
def test_cost_of_packages(tmp_path, variant):
    """Parameters and MACs are those by which a student is pruned, and all parameters are used."""
    loaded = with_heads(pruned_student(**VARIANTS[variant]))
    settings = loaded.student.settings
    widths = cost.full_widths(settings)
    parameters = cost.parameters(settings, widths)
    lengths = [samples for bucket in SAMPLES.values() for samples in bucket]
    products = sum(cost.macs(settings, widths, samples) for samples in lengths)
    bare = measure_cost(write_and_load_package(loaded, tmp_path / "none", False), SAMPLES)
    assert (bare["parameters"], bare["unused"]) == (parameters, 0)
    assert bare["macs_products"] == products == bare["macs"]
    assert parameters == sum(value.numel() for value in loaded.student.parameters())
    full = measure_cost(write_and_load_package(loaded, tmp_path / "heads", True), SAMPLES)
    assert (full["parameters"], full["unused"]) == (parameters + 2 * (48 * 48 + 48), 0)
    frames = sum((samples - 400) // 320 + 1 for samples in lengths)
    assert full["macs_products"] == products + 3 * 48 * 48 * frames


def test_a_student_that_is_no_copy_with_layerwise_heads(tmp_path, waves):
    """With norms first, no head reads the encoder's output, so its norm is left out."""
    settings = StudentSettings(**{**STUDENT, "encoder_layers": 3, "layer_norm_first": True})
    loaded = with_heads(random_student(settings))
    states, predictions = expected_states(loaded, waves)
    package = write_and_load_package(loaded, tmp_path / "package", True)
    with torch.no_grad():
        assert_equal(package(waves)["hidden_states"], states + predictions)
    expected = sum(p.numel() for m in (loaded.student, loaded.heads) for p in m.parameters())
    cost = measure_cost(package, {"a": [4000]})
    assert (cost["parameters"], cost["unused"]) == (expected - 2 * 48, 0)


def test_commands(tmp_path, capsys, waves):
    loaded = with_heads(pruned_student(**VARIANTS["wavlm large"]))
    path = tmp_path / "student.pt"
    write_student(loaded, path)
    states, _ = expected_states(loaded, waves)
    count = sum(value.numel() for value in loaded.student.parameters())

    bare = tmp_path / "bare.safetensors"
    assert cli.main(["export", "student", str(path), "-o", str(bare), "--heads", "drop"]) == 0
    assert f"{count:,} parameters" in capsys.readouterr().out
    outputs = upstream(bare).eval()(waves)
    assert "hidden_states_and_heads" not in outputs
    assert_equal(outputs["hidden_states"], states)

    report = tmp_path / "cost.json"
    argv = ["-u", "ekd_student", "-k", str(bare), "-o", str(report)]
    assert cli.main(["cost", *argv]) == 0
    found = json.loads(report.read_text())
    assert (found["parameters"], found["unused"]) == (count, 0)

    soundfile.write(tmp_path / "a.wav", waves[2].numpy(), 16_000, subtype="FLOAT")
    features = tmp_path / "features"
    assert cli.main(["features", str(path), str(tmp_path / "a.wav"), "-o", str(features)]) == 0
    alone, _ = expected_states(loaded, waves[2:])
    written = load_file(features)
    names = [f"{tmp_path}/a.wav#{layer}" for layer in range(4)]
    assert_equal([written[name] for name in names], [state[0] for state in alone])

    package = tmp_path / "package"
    argv = [str(path), "-o", str(package), "--heads", "drop"]
    assert cli.main(["export", "superb", *argv]) == 0
    card = (package / "README.md").read_text()
    assert f"| {count:,} |" in card and "| 2, 0, 3 |" in card and "| 40, 17, 0 |" in card
    with torch.no_grad():
        assert_equal(load_package(package)(waves)["hidden_states"], states)


def test_packages_are_valid(tmp_path):
    loaded = with_heads(pruned_student(**VARIANTS["wavlm large"]))
    write_and_load_package(loaded, tmp_path / "package", True)
    outcomes, cost = sandbox.validate(tmp_path / "package", {"short": [16_000]})
    assert {outcome.status for outcome in outcomes if outcome.name != "gpu"} == {"pass"}, outcomes
    assert cost["unused"] == 0


@pytest.mark.parametrize("variant", ["hubert", "wavlm large"])
def test_a_student_with_gates(tmp_path, capsys, waves, variant):
    """The upstream runs it with fixed gates; it cannot become a package before it is cut."""
    loaded = with_heads(pruned_student(gates=GATES, **VARIANTS[variant]))
    with torch.no_grad():
        for _, _, gate in loaded.student.backbone.gates():
            gate.log_alpha.normal_(1, 3)
    smaller = cut(loaded.student, gate_values(loaded.student))
    states, _ = expected_states(LoadedStudent(smaller, loaded.heads, TARGETS, {}), waves)
    checkpoint = tmp_path / "states-5.ckpt"
    data = contents(loaded.student, loaded.heads, TARGETS, {"step": 5})
    torch.save({"EKD": data, "Step": 5}, checkpoint)
    for suffix in ("pt", "safetensors"):
        file = tmp_path / f"student.{suffix}"
        assert cli.main(["export", "student", str(checkpoint), "-o", str(file)]) == 0
        assert not load_student(file).student.is_cut
        for path in (checkpoint, file):
            model = upstream(path).eval()
            with torch.no_grad():
                assert_equal(model(waves)["hidden_states"], states)
                assert_equal(model(waves)["hidden_states"], states)
    for argv in (
        ("export", "superb", checkpoint, "-o", tmp_path / "package"),
        ("cost", "-u", "ekd_student", "-k", checkpoint),
    ):
        error = error_of(capsys, *argv)
        assert str(checkpoint) in error and "s3prl-ekd prune" in error
    assert not (tmp_path / "package").exists()
    with pytest.raises(CheckpointError, match="fine-tuning"):
        upstream(checkpoint).train()(waves)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fine_tuning_through_the_upstream(tmp_path, waves, variant):
    loaded = with_heads(pruned_student(**VARIANTS[variant]))
    write_student(loaded, tmp_path / "student.pt")
    model = upstream(tmp_path / "student.pt").train()  # as with -f
    states = model(waves)["hidden_states_and_heads"]
    sum((state * torch.randn_like(state)).sum() for state in states).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("wavlm", [False, True])
@torch.no_grad()
def test_attention_without_torchs_function(monkeypatch, waves, wavlm):
    """torch 1.13 lacks scaled_dot_product_attention."""
    loaded = with_heads(pruned_student(wavlm=wavlm))
    assert student_forward.attend is F.scaled_dot_product_attention
    states, _ = expected_states(loaded, waves)
    monkeypatch.setattr(student_forward, "attend", student_forward.attend_in_steps)
    assert_equal(expected_states(loaded, waves)[0], states)
