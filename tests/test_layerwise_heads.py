"""Layer-to-layer heads: the identity at the start, shared layers, groups, several teachers."""

import pytest
import torch

from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads, check_layers
from s3prl_ekd.distill.settings import DistillSettings, HeadSettings, TeacherSettings
from s3prl_ekd.distill.student_forward import StudentOutput
from s3prl_ekd.distill.student_settings import CopySettings, StudentSettings
from s3prl_ekd.errors import ConfigError, TeacherError
from s3prl_ekd.files.config import from_plain_data
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student

from .gated_students import gated_settings, gated_student, noise

WIDTH = 6
DPHUBERT = ((0,), (4,), (8,), (12,))


def output(layers=12, width=WIDTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(2, 5, width, generator=generator) for _ in range(layers + 1)]
    return StudentOutput(states[0], states, states[-1], torch.ones(2, 5))


def heads(members, parts=(WIDTH,), **settings):
    spec = TargetSpec(len(members), parts, members)
    return PredictionHeads(WIDTH, {"t": spec}, HeadSettings("layerwise", **settings))


def test_at_the_start_the_predictions_are_the_students_layers():
    out = output()
    predicted = heads(DPHUBERT)(out)["t"]
    expected = torch.stack([out.hidden_states[i] for i in (0, 4, 8, 12)], dim=1)
    assert torch.equal(predicted, expected)


def changed_targets(module):
    """For each linear layer, the targets whose prediction changes with it."""
    out, changed = output(), []
    before = module(out)["t"]
    for projection in module["t"].projections.values():
        projection.bias.data += 1
        different = (module(out)["t"] != before).flatten(2).any(2).any(0)
        changed.append(different.nonzero()[:, 0].tolist())
        projection.bias.data -= 1
    return changed


def test_layer_0_has_its_own_linear_layer_and_the_others_share_one():
    module = heads(DPHUBERT)
    assert changed_targets(module) == [[0], [1, 2, 3]]
    assert sum(p.numel() for p in module.parameters()) == 2 * (WIDTH * WIDTH + WIDTH)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (((0, 4, 8, 12),), [[0, 1, 2, 3]]),
        (((0, 8), (4, 12)), [[0, 2], [1, 3]]),
        (((12,), (8,), (4,), (0,)), [[0], [1], [2], [3]]),
    ],
)
def test_groups_of_layers_share_a_linear_layer(share, expected):
    assert changed_targets(heads(DPHUBERT, share=share)) == expected


def test_a_group_is_predicted_from_its_mean_or_its_last_layer():
    """The order of a group's layers does not matter."""
    out = output()
    members = ((0,), (1, 2, 3), (12, 7))
    mean = heads(members)(out)["t"]
    last = heads(members, of_group="last")(out)["t"]
    states = out.hidden_states
    torch.testing.assert_close(mean[:, 1], (states[1] + states[2] + states[3]) / 3)
    torch.testing.assert_close(mean[:, 2], (states[7] + states[12]) / 2)
    assert torch.equal(last[:, 1], states[3])
    assert torch.equal(last[:, 2], states[12])
    assert torch.equal(last[:, 0], mean[:, 0])


def test_each_part_of_a_concatenation_starts_as_the_identity():
    """A part of another width cannot."""
    out = output()
    predicted = heads(((4,), (8,)), parts=(WIDTH, 4, WIDTH))(out)["t"]
    assert predicted.shape == (2, 2, 5, WIDTH + 4 + WIDTH)
    for i, layer in enumerate((4, 8)):
        first, other, second = predicted[:, i].split((WIDTH, 4, WIDTH), dim=-1)
        assert torch.equal(first, out.hidden_states[layer])
        assert torch.equal(second, out.hidden_states[layer])
        assert other.std() > 0.1


def test_gradients_reach_each_layer():
    out = output()
    for state in out.hidden_states:
        state.requires_grad_()
    heads(((0,), (4,), (5, 6)))(out)["t"].square().sum().backward()
    reached = [i for i, state in enumerate(out.hidden_states) if state.grad is not None]
    assert reached == [0, 4, 5, 6]


def test_a_student_with_too_few_layers_is_refused():
    specs = {"t": TargetSpec(2, (WIDTH,), ((0,), (3, 9)))}
    student = StudentSettings(encoder_layers=9)
    check_layers(specs, student)
    with pytest.raises(TeacherError, match="layer 9"):
        check_layers(specs, StudentSettings(encoder_layers=8))


def test_a_student_that_skips_layers_is_refused():
    specs = {"average": TargetSpec(1, (WIDTH,), ((2,),))}
    with pytest.raises(TeacherError, match="encoder_layerdrop is 0.1"):
        check_layers(specs, StudentSettings(encoder_layerdrop=0.1))


@pytest.mark.parametrize("members", [((0,),), ((0,), (-1,)), ((0,), ())])
def test_layers_of_targets_in_a_file_are_checked(members):
    with pytest.raises(ValueError, match="members"):
        TargetSpec(2, (WIDTH,), members)


def test_teachers_of_different_layers_are_refused():
    with pytest.raises(TeacherError, match="separate"):
        check_layers({"average": TargetSpec(2, (WIDTH,))}, StudentSettings(encoder_layers=12))


def experiment(layers=(0, 4), **head_settings):
    return DistillSettings(
        {"t": TeacherSettings("x", layers)},
        "separate",
        student=CopySettings("copy", "t"),
        heads=HeadSettings("layerwise", **head_settings),
    )


def test_every_target_needs_a_group():
    experiment(share=((0,), (4,)))
    with pytest.raises(ValueError, match=r"\[4\].*of teachers\.t"):
        experiment(share=((0,), (3,)))


@pytest.mark.parametrize("share", [[[0, 4], [4]], [[0, -1]], [[0, 0]]])
def test_groups_are_disjoint(share):
    with pytest.raises(ConfigError, match="share"):
        from_plain_data(HeadSettings, {"kind": "layerwise", "share": share}, "heads")


def test_other_heads_share_nothing():
    with pytest.raises(ConfigError, match="split"):
        from_plain_data(HeadSettings, {"kind": "split", "share": [[0]]}, "heads")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_heads_are_read_from_a_student_file(suffix, tmp_path):
    student = gated_student(gated_settings(units=()))
    specs = {
        "average": TargetSpec(3, (24,), ((0,), (1, 2), (3,))),
        "concat": TargetSpec(2, (24, 10), ((2,), (3,))),
    }
    settings = HeadSettings("layerwise", ((0, 1, 2), (3,)), "last")
    module = PredictionHeads(24, specs, settings)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / f"student.{suffix}"
    write_student(LoadedStudent(student, module, specs, {}), path)
    read = load_student(path)
    assert read.heads.settings == settings
    assert {n: s.members for n, s in read.targets.items()} == {
        n: s.members for n, s in specs.items()
    }
    waves, lengths = noise(4_000)
    with torch.no_grad():
        expected, predicted = (
            module(student(waves, lengths)),
            read.heads(read.student(waves, lengths)),
        )
    for name, value in expected.items():
        assert torch.equal(predicted[name], value)
