"""The upstream ``ekd_student`` in s3prl."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import s3prl_ekd
from s3prl_ekd.distill.aggregation import AGGREGATIONS, TeacherShape
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student import Student
from s3prl_ekd.errors import CheckpointError, SetupError
from s3prl_ekd.student_file import LoadedStudent, write_student


@pytest.fixture
def write_file(student_settings, tmp_path):
    """Write a student file; returns its path and the student."""

    def write_file(aggregation="separate", widths=(48, 48), heads=True, suffix="safetensors"):
        torch.manual_seed(0)
        shapes = {f"t{i}": TeacherShape(((2,), (4,)), width) for i, width in enumerate(widths)}
        specs = AGGREGATIONS[aggregation](shapes).specs
        student = Student(student_settings)
        loaded = LoadedStudent(student, PredictionHeads(48, specs), specs, {})
        path = tmp_path / f"{aggregation}{len(widths)}{heads}.{suffix}"
        write_student(loaded, path, keep_heads=heads)
        return path, loaded

    return write_file


def hub_entry(path):
    from s3prl import hub

    s3prl_ekd.register()
    return hub.ekd_student(ckpt=str(path), model_config=None, refresh=False)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_hidden_states_are_the_students(write_file, waves, suffix):
    path, loaded = write_file(suffix=suffix)
    upstream = hub_entry(path).eval()
    result = upstream(waves)
    lengths = torch.tensor([len(wave) for wave in waves])
    loaded.student.eval()
    out = loaded.student(pad_sequence(waves, batch_first=True), lengths)
    assert type(result["hidden_states"]) is list and len(result["hidden_states"]) == 3
    for state, expected in zip(result["hidden_states"], out.hidden_states, strict=True):
        assert torch.allclose(state, expected, atol=1e-6)
    assert upstream.get_downsample_rates("hidden_states") == 320
    assert abs(round(16000 / 320) - result["hidden_states"][0].shape[1]) < 5


@pytest.mark.parametrize(("aggregation", "extra"), [("separate", 4), ("average", 2), ("concat", 4)])
def test_head_predictions_follow_the_hidden_states(write_file, waves, aggregation, extra):
    path, loaded = write_file(aggregation)
    result = hub_entry(path).eval()(waves)
    states = result["hidden_states_and_heads"]
    assert type(states) is list and len(states) == 3 + extra
    assert {state.shape for state in states} == {(3, 49, 48)}
    lengths = torch.tensor([len(wave) for wave in waves])
    loaded.student.eval(), loaded.heads.eval()
    out = loaded.student(pad_sequence(waves, batch_first=True), lengths)
    predictions = loaded.heads(out)
    first = next(iter(predictions.values()))[:, 0, :, :48]  # first set, first layer, first teacher
    assert torch.allclose(states[3], first, atol=1e-6)


@pytest.mark.parametrize(
    "read",
    [
        lambda result, key: result[key],
        lambda result, key: result.get(key),
        lambda result, key: dict(result)[key],
        lambda result, key: {**result}[key],
        lambda result, key: list(result.values())[-1],
        lambda result, key: dict(result.items())[key],
    ],
)
def test_heads_of_a_frozen_student_run_only_if_they_are_read(write_file, waves, read):
    path, _ = write_file()
    upstream, key, calls = hub_entry(path).eval(), "hidden_states_and_heads", []
    upstream.heads.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        result = upstream(waves)
    assert isinstance(result, dict) and key in result and len(result) == 3
    assert result.get("other") is None and len(result["hidden_states"]) == 3 and not calls
    states = read(result, key)  # with gradients, as in s3prl's Featurizer
    assert len(states) == 7 and not any(state.requires_grad for state in states)
    assert result[key] is result.get(key) and len(calls) == 1
    trained = upstream(waves)  # as with -f
    assert type(trained) is dict and trained[key][-1].requires_grad
    for state, expected in zip(states, trained[key], strict=True):
        assert torch.equal(state, expected)


def test_no_key_without_heads_of_the_students_width(write_file, waves):
    path, _ = write_file(heads=False)
    upstream = hub_entry(path)
    assert "hidden_states_and_heads" not in upstream(waves)
    wide, _ = write_file(widths=(48, 64))
    assert "hidden_states_and_heads" not in hub_entry(wide)(waves)


def test_selecting_missing_heads_is_rejected(write_file):
    from s3prl_ekd.downstream.run import prepare
    from s3prl_ekd.errors import CheckpointError, SetupError

    argv = ["-u", "ekd_student", "-s", "hidden_states_and_heads", "--device", "cpu", "-m", "train"]
    with_heads, _ = write_file()
    with pytest.raises(SetupError, match="-d"):  # of a later check
        prepare([*argv, "-k", str(with_heads)])
    for path, message in (
        (write_file(heads=False)[0], "hidden_states_and_heads.*separate2False"),
        (write_file(widths=(48, 64))[0], r"hidden_states_and_heads.*\[48, 64\].*\b48\b"),
    ):
        with pytest.raises(CheckpointError, match=message):
            prepare([*argv, "-k", str(path)])


def test_short_waveforms(write_file):
    path, _ = write_file()
    for samples in (1, 100, 399, 400, 800):
        states = hub_entry(path).eval()([torch.randn(samples), torch.randn(1)])["hidden_states"]
        assert all(torch.isfinite(state).all() for state in states)


def test_in_s3prls_newer_api(write_file):
    from s3prl.nn import Featurizer, S3PRLUpstream

    path, _ = write_file()
    s3prl_ekd.register()
    upstream = S3PRLUpstream("ekd_student", path_or_url=str(path)).eval()
    assert upstream.num_layers == 3 and upstream.hidden_sizes == [48] * 3
    states, lengths = upstream(torch.randn(2, 16000), torch.tensor([16000, 8000]))
    features, _ = Featurizer(upstream)(states, lengths)
    assert features.shape == (2, 50, 48) and lengths[0].tolist() == [50, 25]


def test_in_the_runners_featurizer_frozen_and_fine_tuned(write_file, waves):
    from s3prl.upstream.interfaces import Featurizer

    path, _ = write_file()
    upstream = hub_entry(path)
    for selection, layers in (("hidden_states", 3), ("hidden_states_and_heads", 7)):
        featurizer = Featurizer(upstream, selection, upstream_device="cpu")
        assert featurizer.layer_num == layers
        upstream.train()  # as with -f
        features = featurizer(waves, upstream(waves))
        # round(samples / 320), at most the number of frames
        assert [len(f) for f in features] == [49, 39, 22]
        sum(f.square().mean() for f in features).backward()
        used = [p for p in upstream.student.parameters() if p.grad is not None]
        assert len(used) > 40 and any(p.grad.abs().sum() > 0 for p in used)
        upstream.zero_grad()


def test_no_layer_is_dropped_during_fine_tuning(write_file, student_settings, waves, tmp_path):
    import dataclasses

    settings = dataclasses.replace(student_settings, encoder_layerdrop=0.9)
    path = tmp_path / "drop.pt"
    write_student(LoadedStudent(Student(settings), None, {}, {}), path)
    upstream = hub_entry(path).train()
    assert {len(upstream(waves)["hidden_states"]) for _ in range(20)} == {3}


def test_registering_twice_and_over_another_entry(monkeypatch):
    from s3prl import hub

    s3prl_ekd.register()
    first = hub.ekd_student
    s3prl_ekd.register()
    assert hub.ekd_student is first and "ekd_student" in hub.options()
    monkeypatch.setattr(hub, "ekd_student", lambda: None)
    with pytest.raises(SetupError, match=r"s3prl\.hub.*ekd_student"):
        s3prl_ekd.register()


def test_without_a_checkpoint():
    from s3prl import hub

    s3prl_ekd.register()
    with pytest.raises(CheckpointError, match="ekd_student.*-k STUDENT"):
        hub.ekd_student()


def test_heads_that_are_read_later_are_computed_as_in_the_forward(write_file):
    """Under the autocast of the forward; copies are plain dicts."""
    path, _ = write_file()
    upstream, waves = hub_entry(path).eval(), [torch.randn(4_000)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = upstream(waves)
        expected = list(upstream(waves)["hidden_states_and_heads"])
    copied = copy.copy(out)  # reads the heads after the block
    assert type(copied) is dict
    for states in (copied, out):
        ours = states.pop("hidden_states_and_heads")
        assert "hidden_states_and_heads" not in states
        for state, other in zip(ours, expected, strict=True):
            assert torch.equal(state, other)


def test_available_names_follow_s3prls_convention(write_file):
    """Names that need a path end with _custom, _local or _url; the others build without one."""
    from s3prl.nn import S3PRLUpstream

    s3prl_ekd.register()
    everything = set(S3PRLUpstream.available_names())
    without_path = set(S3PRLUpstream.available_names(only_registered_ckpt=True))
    students = {f"ekd_student{suffix}" for suffix in ("", "_custom", "_local", "_url")}
    assert students | {"hubert_base", "tiny_hubert"} <= everything
    assert everything - without_path >= students
    assert {"hubert_base", "tiny_hubert", "tiny_hubert_random"} <= without_path
    # s3prl's own rule, for all names but the short one
    suffixes = ("_local", "_url", "_gdriveid", "_custom")
    assert without_path == {n for n in everything - {"ekd_student"} if not n.endswith(suffixes)}
    path, _ = write_file()
    upstream = S3PRLUpstream("ekd_student_custom", path_or_url=str(path))
    assert upstream.num_layers == 3
