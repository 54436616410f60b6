"""``target_norm: procrustes`` against scipy, and its statistics over batches and processes."""

import dataclasses
import re
import threading

import pytest
import torch
import torch.distributed as dist

from s3prl_ekd.distill.aggregation import TeacherShape
from s3prl_ekd.distill.batch import CachedTargets
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.distill.procrustes import procrustes
from s3prl_ekd.distill.settings import DistillSettings, TeacherSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.target_norm import TargetNorm
from s3prl_ekd.errors import ConfigError, TeacherError
from s3prl_ekd.hidden_states.fingerprint import check_aggregated

from .experiments import batch_of, distiller, ensemble

WIDTH, TARGETS = 12, 2
LENGTHS = ((40, 33), (7, 2), (25, 31), (40, 1))  # frames of each utterance of four batches


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(width, seed):
    return torch.linalg.qr(noise(width, width, seed=seed)).Q


def batches(names=("a", "b", "c"), fill=0.0):
    """Correlated targets of several teachers, which differ in basis, mean and scale.

    Yields for each batch ``{teacher: [batch, target, frame, dim]}`` and the mask; padded frames
    have the value ``fill``.
    """
    mix = noise(TARGETS, WIDTH, WIDTH, seed=1)
    for number, lengths in enumerate(LENGTHS):
        shape = (len(lengths), TARGETS, max(lengths), WIDTH)
        common = noise(*shape, seed=10 + number) @ mix
        mask = torch.arange(shape[2]) < torch.tensor(lengths)[:, None]
        states = {}
        for i, name in enumerate(names):
            own = noise(*shape, seed=100 * (i + 1) + number)
            values = (common @ rotation(WIDTH, 7 + i) + 0.7 * own) * 3.0**i + 5.0 * i
            states[name] = torch.where(mask[:, None, :, None], values, fill)
        yield states, mask.float()


def shapes(*names, width=WIDTH):
    return {name: TeacherShape(tuple((i,) for i in range(TARGETS)), width) for name in names}


def norm_of(*names, steps=4):
    return TargetNorm(shapes(*names), "procrustes", steps)


def valid_frames(name, target):
    """All valid frames of the batches, ``[frame, dim]`` in float64."""
    pairs = [(states[name][:, target], mask.bool()) for states, mask in batches()]
    return torch.cat([states[mask] for states, mask in pairs]).double()


def centred(frames):
    """Frames minus their mean, divided by the root of the mean variance of the dimensions."""
    frames = frames - frames.mean(0)
    return frames / frames.var(0, correction=0).mean().sqrt()


@pytest.mark.parametrize("fill", [0.0, 1e6, float("nan")])
def test_running_statistics_give_scipys_rotation_of_all_frames(fill):
    """Batches of unequal numbers of frames, with arbitrary values in the padding."""
    linalg = pytest.importorskip("scipy.linalg")
    norm = norm_of("a", "b", "c")
    for states, mask in batches(fill=fill):
        norm(states, mask)
    results = [(norm.eval()(states, mask), mask.bool()) for states, mask in batches(fill=fill)]
    for target in range(TARGETS):
        reference = centred(valid_frames("a", target))
        for name in "abc":
            expected = centred(valid_frames(name, target))
            if name != "a":
                matrix, _ = linalg.orthogonal_procrustes(expected.numpy(), reference.numpy())
                expected = expected @ torch.from_numpy(matrix)
            result = torch.cat([states[name][:, target][mask] for states, mask in results])
            assert torch.allclose(result.double(), expected, atol=1e-5)


def test_the_rotation_brings_a_teacher_nearer_to_the_reference():
    norm, plain = norm_of("a", "b"), TargetNorm(shapes("a", "b"), "mean_std", 9)
    for states, mask in batches(("a", "b")):
        norm(states, mask), plain(states, mask)
    states, mask = next(iter(batches(("a", "b"))))
    distances = []
    for module in (norm, plain):
        result = module.eval()(states, mask)
        difference = (result["a"] - result["b"]).transpose(1, 2)[mask.bool()]
        distances.append(difference.square().mean().item())
    assert distances[0] < 0.4 * distances[1]


@pytest.mark.parametrize("reflected", [False, True])
def test_a_rotated_scaled_and_shifted_copy_becomes_the_reference(reflected):
    """So that the average of both equals each."""
    matrix = rotation(WIDTH, 3)
    matrix[:, 0] *= 1 if (torch.det(matrix) < 0) == reflected else -1
    norm = norm_of("a", "b")
    for states, mask in batches(("a",)):
        states["b"] = states["a"] @ matrix * 3 + 5
        result = norm(states, mask)
    valid = mask.bool()
    first, second = (result[name].transpose(1, 2)[valid] for name in "ab")
    assert torch.allclose(first, second, atol=1e-4)
    assert torch.allclose((first + second) / 2, first, atol=1e-4)
    assert (states["a"] - states["b"]).abs().mean() > 1


def test_procrustes_by_hand():
    # columns of x'y: y = (x2, -x1), a quarter turn
    quarter = torch.tensor([[0.0, -2.0], [3.0, 0.0]])
    expected = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    assert torch.allclose(procrustes(quarter[None])[0], expected, atol=1e-6)
    # a dimension whose sign differs is reflected
    assert torch.allclose(
        procrustes(torch.diag(torch.tensor([4.0, -0.1]))[None])[0],
        torch.diag(torch.tensor([1.0, -1.0])),
        atol=1e-6,
    )


def test_the_reference_is_the_first_teacher():
    """It is centred and scaled, but not rotated."""
    for names in ("abc", "cba"):
        norm = norm_of(*names)
        for states, mask in batches():
            norm({name: states[name] for name in names}, mask)
        result = norm.eval()(states, mask)
        for name in "abc":
            flat = result[name].transpose(1, 2)[mask.bool()].flatten(1)
            before = states[name].transpose(1, 2)[mask.bool()].flatten(1)
            parallel = torch.corrcoef(torch.stack([flat[:, 0], before[:, 0]]))[0, 1].item()
            assert (parallel > 1 - 1e-5) == (name == names[0])


def test_statistics_are_frozen_after_their_steps_and_in_evaluation():
    data = list(batches(("a", "b")))
    norm = norm_of("a", "b", steps=2)
    norm.eval()(*data[0])
    assert norm.seen == 0 and all(not value.any() for value in norm.moments["b"].mean)
    norm.train()
    for states, mask in data[:2]:
        norm(states, mask)
    frozen = {name: value.clone() for name, value in norm.state_dict().items()}
    expected = norm(*data[3])["b"]
    for states, mask in data[2:]:
        norm(states, mask)
    assert all(torch.equal(value, frozen[name]) for name, value in norm.state_dict().items())
    assert torch.equal(norm.eval()(*data[3])["b"], expected)


def test_a_resumed_norm_equals_an_uninterrupted_one():
    """Stopped between two computations of the rotation, at steps 2 and 4."""
    data = list(batches())
    norm, resumed = norm_of("a", "b", "c"), norm_of("a", "b", "c")
    for states, mask in data[:3]:
        norm(states, mask)
    resumed.load_state_dict(norm.state_dict())
    for training in (False, True, False):
        pair = [module.train(training)(*data[3]) for module in (norm, resumed)]
        assert all(torch.equal(pair[0][name], pair[1][name]) for name in "abc")


@pytest.mark.parametrize("value", [1e20, 1e9, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_frame_with_a_huge_value_is_left_out(name, value):
    """Of the reference or of another teacher: the rotation is that without this frame."""
    spoilt, other = norm_of("a", "b"), norm_of("a", "b")
    for number, (states, mask) in enumerate(batches(("a", "b"))):
        without = mask.clone()
        if number == 2:
            without[1, 4] = 0
        other(states, without)
        states = {n: s.clone() for n, s in states.items()}
        if number == 2:
            states[name][1, 0, 4, 3] = value
        spoilt(states, mask)
    states, mask = next(iter(batches(("a", "b"))))
    results = [norm.eval()(states, mask) for norm in (spoilt, other)]
    # the other teacher's mean still has the frame
    assert torch.allclose(results[0]["b"], results[1]["b"], atol=0.1)
    exact = [norm.cross["b"].rotation for norm in (spoilt, other)]
    assert torch.equal(*exact)
    assert spoilt.left_out() == {f"{name}/frames_left_out": 1.0}


def test_targets_that_do_not_vary():
    norm = norm_of("a", "b")
    for states, mask in batches(("a", "b")):
        states["b"][:, 0] = 4.0
        result = norm(states, mask)
    assert result["b"][:, 0].abs().max() < 1e-5 and result["b"].isfinite().all()
    assert result["b"][:, 1].transpose(0, 1)[mask.bool().T].var() > 0.1


def test_teachers_of_different_widths_are_refused():
    with pytest.raises(TeacherError, match="procrustes.*a has 12, b has 8"):
        TargetNorm({**shapes("a"), **shapes("b", width=8)}, "procrustes", 5)


def test_one_teacher_is_refused():
    with pytest.raises(ValueError, match="target_norm: procrustes"):
        DistillSettings({"a": TeacherSettings("x")}, target_norm="procrustes")
    two = {"a": TeacherSettings("x", (4, 8)), "b": TeacherSettings("y", (4,))}
    with pytest.raises(ValueError, match="procrustes.*a has 2, b has 1"):
        DistillSettings(two, target_norm="procrustes")


def correlations(caplog, reference, teacher):
    """The two correlations that are logged for targets ``[frame, dim]``."""
    caplog.clear()
    norm = TargetNorm(
        {name: TeacherShape(((1,),), reference.shape[-1]) for name in ("a", "b")}, "procrustes", 1
    )
    with caplog.at_level("INFO"):
        norm({"a": reference[None, None], "b": teacher[None, None]}, torch.ones(1, len(reference)))
    (line,) = [text for text in caplog.messages if "correlation" in text]
    assert re.match(r"teacher b: .* a ", line)
    return [float(number) for number in re.findall(r"-?\d\.\d+", line)]


def test_the_logged_correlations_by_hand(caplog):
    frames = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    third = torch.tensor([[0.5, 0.75**0.5], [-(0.75**0.5), 0.5]])  # a rotation by 60 degrees
    assert correlations(caplog, frames, 2 * frames + 7) == [1, 1]
    assert correlations(caplog, frames, frames @ quarter) == [0, 1]
    assert correlations(caplog, frames, frames @ third * 9) == [0.5, 1]
    assert correlations(caplog, frames, -frames) == [-1, 1]
    # one of two dimensions is the reference's, the other is uncorrelated with both of its
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    half = torch.stack([square[:, 0], square[:, 0] * square[:, 1]], dim=1)
    assert correlations(caplog, square, half) == [0.5, 0.5]
    # of the reference's variances 1 and 9, only the smaller dimension is shared
    wide = square * torch.tensor([1.0, 3.0])
    assert correlations(caplog, wide, half) == [round(1 / 20**0.5, 3), round(1 / 20**0.5, 3)]


# Several processes


class Threads:
    """Two threads that stand for two processes: an all_gather through shared memory."""

    def __init__(self, monkeypatch):
        self.rank = threading.local()
        self.barrier = threading.Barrier(2, timeout=20)
        self.sent = [None, None]
        self.shapes = ([], [])  # of the gathered tensors, by rank
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank.value)
        monkeypatch.setattr(dist, "all_gather", self.all_gather)

    def all_gather(self, gathered, tensor):
        rank = self.rank.value
        self.shapes[rank].append((tensor.shape, tensor.dtype))
        self.sent[rank] = tensor
        self.barrier.wait()
        for place, sent in zip(gathered, self.sent, strict=True):
            place.copy_(sent)
        self.barrier.wait()

    def run(self, *functions):
        errors = []

        def start(rank, function):
            self.rank.value = rank
            try:
                function()
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=start, args=item) for item in enumerate(functions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors


def test_processes_have_the_statistics_of_all_frames(monkeypatch):
    """Also if one of them has no utterance in a step."""
    alone = norm_of("a", "b", steps=3)
    data = list(batches(("a", "b")))
    ranks = norm_of("a", "b", steps=3), norm_of("a", "b", steps=3)
    threads = Threads(monkeypatch)

    def first():
        for i in (0, 2):
            ranks[0](*data[i])
        ranks[0].empty_step()

    def second():
        ranks[1](*data[1])
        ranks[1].empty_step()
        ranks[1](*data[3])

    threads.run(first, second)
    assert threads.shapes[0] == threads.shapes[1] and len(threads.shapes[0]) > 3 * 4
    states = [norm.state_dict() for norm in ranks]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    monkeypatch.undo()

    for states, mask in data:
        alone.moments["a"].update(states["a"], mask)
        alone.moments["b"].update(states["b"], mask)
        alone.cross["b"].update(states["b"], states["a"], mask)
    alone.cross["b"].solve()
    assert ranks[0].moments["b"].count == alone.moments["b"].count == 179
    for name, states in alone.eval()(*data[0]).items():
        assert torch.allclose(ranks[0].eval()(*data[0])[name], states, atol=1e-5)


# In an experiment


def test_cached_targets_are_rotated_as_computed_ones_are(teachers, student_settings, waves):
    """After training with average targets, the loss of a batch is the same for both."""
    loaded = ensemble(teachers, "hubert", "wavlm")
    settings = DistillSettings(
        {name: TeacherSettings("x", (2, 4)) for name in loaded},
        "average",
        target_norm="procrustes",
        target_norm_steps=2,
        student=student_settings,
    )
    batch = batch_of(waves)
    targets = loaded(waves)
    torch.manual_seed(0)
    student = Student(student_settings)
    with torch.no_grad():
        frames = student(batch.waves, batch.lengths).mask.sum(1)
    losses = []
    for cached in (None, CachedTargets(targets, frames)):
        torch.manual_seed(1)
        ours = EnsembleDistiller(loaded, student, settings).train()
        data = dataclasses.replace(batch, cached_targets=cached)
        for _ in range(3):
            loss, logs = ours(data, detail=True)
        losses.append(loss.item())
        assert ours.target_norm.seen == 2
        assert {"t1/l1_layer2", "t1/cosine_layer4"} <= logs.keys()
    assert losses[0] == losses[1]


def test_the_statistics_leave_out_padding_but_not_masked_spans(teachers, student_settings, waves):
    ours = distiller(teachers, student_settings, ["hubert", "wavlm"], target_norm="procrustes")
    batch = batch_of(waves)
    spans = torch.zeros(3, 49, dtype=torch.bool)
    spans[:, 3:9] = True
    ours.trainable["mask_embedding"] = torch.nn.Module()
    ours.trainable["mask_embedding"].vector = torch.nn.Parameter(torch.rand(48))
    ours.train()(dataclasses.replace(batch, spans=spans))
    assert ours.target_norm.moments["t0"].count == 49 + 38 + 21
    assert ours.target_norm.cross["t1"].count == 49 + 38 + 21


def test_aggregated_targets_cannot_be_cached():
    teachers = {"a": TeacherSettings("x"), "b": TeacherSettings("y")}
    with pytest.raises(ConfigError, match=r"\btarget_norm\b.*--aggregated"):
        check_aggregated(DistillSettings(teachers, "average", target_norm="procrustes"))


@pytest.mark.parametrize("kind", ["mean_std", "phi_s", "procrustes"])
def test_statistics_and_targets_are_float32_under_autocast(kind):
    """Sums of squares over these frames are above 65504, the largest number of float16."""
    generator = torch.Generator().manual_seed(0)
    teachers = {n: 6 * torch.randn(4, 1, 700, 32, generator=generator) for n in ("t0", "t1")}
    shapes = {name: TeacherShape(((1,),), 32) for name in teachers}
    results = []
    for dtype in (None, torch.float16, torch.bfloat16):
        norm = TargetNorm(shapes, kind, 10).train()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            results.append(norm(teachers, torch.ones(4, 700)))
    for result in results[1:]:
        for name, expected in results[0].items():
            assert result[name].dtype == torch.float32
            assert torch.equal(result[name], expected)
