"""``copy.deepcopy`` and ``pickle`` of students and of the upstream."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import s3prl_ekd
from s3prl_ekd.distill.aggregation import AGGREGATIONS, TeacherShape
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student_settings import GateSettings, StudentSettings
from s3prl_ekd.student_file import LoadedStudent, write_student

from .conftest import NO_DROPOUT, run_python
from .gated_students import ALL_UNITS, gated_settings, gated_student
from .students import VARIANTS, pruned_student, random_student

STUDENTS = {
    **{
        name: lambda changes=changes: random_student(StudentSettings(**{**NO_DROPOUT, **changes}))
        for name, changes in VARIANTS.items()
    },
    "masked norm": lambda: random_student(StudentSettings(**NO_DROPOUT, masked_norm=True)),
    "pruned": lambda: pruned_student(wavlm=True, normalize=True),
    "gates": lambda: gated_student(gated_settings(ALL_UNITS)),
}


def saved_and_loaded(model):
    """Through ``torch.save``, which pickles modules."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


def run(student, waves):
    lengths = torch.tensor([len(wave) for wave in waves])
    return student(pad_sequence(waves, batch_first=True), lengths).hidden_states


@pytest.mark.parametrize("used", ["new", "evaluated", "trained"])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_copy_is_equal_and_independent(name, used, waves):
    student = STUDENTS[name]()
    if used == "evaluated":
        with torch.no_grad():
            run(student, waves)
    if used == "trained":  # its buffers are then parts of a graph
        run(student.train(), waves)[-1].sum().backward()
        student.eval()
    with torch.no_grad():
        expected = [state.clone() for state in run(student, waves)]
    for make in COPIES.values():
        made = make(student)
        assert not made.training and made.settings == student.settings
        with torch.no_grad():
            assert all(map(torch.equal, run(made, waves), expected))
            for parameter in made.parameters():
                parameter.mul_(1.5)
            assert not torch.allclose(run(made, waves)[-1], expected[-1], atol=1e-3)
            assert all(map(torch.equal, run(student, waves), expected))


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_learns_as_the_student_does(make, waves):
    student = random_student(StudentSettings(**NO_DROPOUT))
    run(student.train(), waves)
    made = make(student)
    for each in (student, made):
        run(each, waves)[-1].square().mean().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert len(gradients) > 20
    assert any(name.endswith("weight_g") for name in gradients)
    for name, parameter in made.named_parameters():
        if name in gradients:
            assert torch.equal(parameter.grad, gradients[name]), name


def test_gates_of_a_copy_are_its_own():
    student = gated_student(
        gated_settings(("conv",), gates=GateSettings(("conv",), "hard", "kept"))
    )
    made = copy.deepcopy(student)
    # the layer norm behind the last conv layer reads the gate of its own student
    (gate,) = made.backbone.layer_norm._gate
    assert gate is made.backbone.feature_extractor.conv_layers[-1].gate


@pytest.fixture
def file(tmp_path):
    specs = AGGREGATIONS["separate"]({"t": TeacherShape(((4,),), 48)}).specs
    student = random_student(StudentSettings(**NO_DROPOUT))
    path = tmp_path / "student.pt"
    write_student(LoadedStudent(student, PredictionHeads(48, specs), specs, {"step": 3}), path)
    return path


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_what_load_student_returns(file, make):
    loaded = s3prl_ekd.load_student(file)
    made = make(loaded)
    assert (made.targets, made.about) == (loaded.targets, loaded.about)
    for part in ("student", "heads"):
        weights, others = (getattr(x, part).state_dict() for x in (loaded, made))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_the_upstream(file, waves, make):
    from s3prl import hub

    s3prl_ekd.register()
    upstream = hub.ekd_student(ckpt=str(file)).eval()
    upstream(waves)  # with gradients
    made = make(upstream)
    for key in ("hidden_states", "hidden_states_and_heads"):
        assert all(map(torch.equal, made(waves)[key], upstream(waves)[key]))


def test_unpickling_in_another_process(file, tmp_path, waves):
    """As a DataLoader worker does that is not forked."""
    student = s3prl_ekd.load_student(file).student
    with torch.no_grad():
        expected = student(waves[0][None], torch.tensor([len(waves[0])])).last.double().sum()
    (tmp_path / "student.pickle").write_bytes(pickle.dumps(student))
    torch.save(waves[0], tmp_path / "wave.pt")
    code = """
import pickle, sys, torch
with open(sys.argv[1] + "/student.pickle", "rb") as file:
    student = pickle.load(file)
wave = torch.load(sys.argv[1] + "/wave.pt")
with torch.no_grad():
    print(student(wave[None], torch.tensor([len(wave)])).last.double().sum().item())
"""
    assert float(run_python(code, str(tmp_path)).split()[-1]) == pytest.approx(
        expected.item(), rel=1e-6
    )
