"""Masked norms: hidden states and targets do not depend on padding, in every form of a student."""

import copy
import dataclasses
import importlib.util
import re
from argparse import Namespace

import pytest
import torch
from s3prl_ekd.upstream.expert import UpstreamExpert
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.cli import main
from s3prl_ekd.distill.pruning.cut import cut, gate_values
from s3prl_ekd.distill.settings import DistillSettings, TeacherSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_forward import masked_group_norm
from s3prl_ekd.distill.student_settings import CopySettings, PruningSettings, StudentSettings
from s3prl_ekd.distill.teachers import Teacher, TeacherEnsemble
from s3prl_ekd.downstream.feature_cache import folder_name
from s3prl_ekd.errors import CheckpointError, ConfigError
from s3prl_ekd.export.hidden_set import sandbox
from s3prl_ekd.export.hidden_set.package import package_contents, write_package
from s3prl_ekd.export.onnx import OnnxSession, OnnxStudent, TimeNorm, check, onnx_bytes
from s3prl_ekd.files.formats import CHECKPOINT_PARTS
from s3prl_ekd.student_file import LoadedStudent, contents, load_student, write_student
from s3prl_ekd.superb.cost import measure_cost
from s3prl_ekd.superb.plan import Upstream
from s3prl_ekd.teachers import load_teachers, load_upstream
from s3prl_ekd.teachers.fast.encoder import fast_encoders
from s3prl_ekd.teachers.load import copied_student

from .cache_cases import adapter, cache, files
from .conftest import NO_DROPOUT, edit_yaml
from .gated_students import gated_settings, gated_student
from .students import VARIANTS, pruned_student, random_student
from .test_fast_teachers import KINDS, checkpoint
from .test_feature_cache import ARGS, build
from .test_feature_cache import Runner as S3prlRunner
from .test_validate import load_package

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")),
    reason="onnx and onnxruntime are not installed (the extra onnx)",
)
COUNTS = (24_000, 9_000, 720, 401)  # samples of a batch; the shortest has one frame
SETTINGS = StudentSettings(**NO_DROPOUT)


def masked(student, on=True):
    """A copy of a student with the same weights and ``masked_norm: on``."""
    result = Student(dataclasses.replace(student.settings, masked_norm=on))
    result.load_state_dict(student.state_dict())
    return result.train(student.training)


STUDENTS = {
    **{
        name: lambda changes=changes: random_student(dataclasses.replace(SETTINGS, **changes))
        for name, changes in VARIANTS.items()
        if changes.get("extractor_mode") != "layer_norm"
    },
    "pruned hubert": lambda: pruned_student(feature_scale=True),
    "pruned wavlm": lambda: pruned_student(wavlm=True, layer_norm_first=True, normalize=True),
    "with gates": lambda: gated_student(gated_settings()),
}


def sounds(*counts):
    """Waveforms ``[sample]`` of noise on a constant, which a norm over padding would mix up."""
    generator = torch.Generator().manual_seed(3)
    return [0.05 + 0.1 * torch.randn(count, generator=generator) for count in counts]


def run(student, waves):
    """Hidden states ``[batch, frame, dim]`` of a list of waveforms, and valid frames."""
    out = student(pad_sequence(waves, batch_first=True), torch.tensor([*map(len, waves)]))
    return [*out.hidden_states, out.last], out.mask.sum(1).int().tolist()


def padding_effect(states_of, waves):
    """Largest difference between an utterance's hidden states alone and in a batch, divided by the
    standard deviation of the state alone.

    ``states_of`` gives a list of ``[batch, frame, dim]``, of one utterance without padding.
    """
    worst, together = 0.0, states_of(waves)
    for i, wave in enumerate(waves):
        for alone, batched in zip(states_of([wave]), together, strict=True):
            difference = alone[0] - batched[i, : alone.shape[1]]
            worst = max(worst, float(difference.abs().max() / alone.std()))
    return worst


# The student


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_and_gradients_are_those_of_each_utterance_alone(dtype):
    """torch's group norm of each utterance without its padding, whose contents do not matter."""
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.GroupNorm(5, 5).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=generator)
    torch.nn.init.normal_(norm.bias, generator=generator)
    x = (3 + torch.randn(3, 5, 40, generator=generator)).to(dtype)
    x[1, :, 17:] = 1e4
    x.requires_grad_()
    lengths = [40, 17, 5]
    result = masked_group_norm(norm, x, torch.tensor(lengths))
    parts = [norm(x[i : i + 1, :, :n])[0] for i, n in enumerate(lengths)]
    pick = [torch.randn(part.shape, generator=generator).to(dtype) for part in parts]
    inputs = (x, norm.weight, norm.bias)
    pairs = [(result[i, :, :n], parts[i]) for i, n in enumerate(lengths)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
    sums = [sum((p * pair[k]).sum() for p, pair in zip(pick, pairs, strict=True)) for k in (0, 1)]
    for ours, reference in zip(
        *(torch.autograd.grad(total, inputs, retain_graph=True) for total in sums), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", STUDENTS)
def test_an_utterance_has_the_same_hidden_states_alone_and_in_a_batch(name):
    student, waves = STUDENTS[name](), sounds(*COUNTS)
    with torch.no_grad():
        effect = padding_effect(lambda batch: run(masked(student), batch)[0], waves)
        unmasked = padding_effect(lambda batch: run(student, batch)[0], waves)
    assert effect < 2e-4 and unmasked > 0.05


@pytest.mark.parametrize("name", STUDENTS)
def test_without_padding_values_and_gradients_are_those_of_the_plain_path(name):
    """Of one utterance, and of two of the same length."""
    plain = STUDENTS[name]()
    with_mask = masked(plain)
    for batch in (sounds(9_000), sounds(4_000, 4_000)):
        results = []
        for student in (plain, with_mask):
            student.zero_grad()
            states, frames = run(student, batch)
            sum(state.square().mean() for state in states).backward()
            gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
            results.append((states, frames, gradients))
        (states, frames, gradients), (masked_states, masked_frames, masked_gradients) = results
        assert frames == masked_frames and gradients.keys() == masked_gradients.keys()
        for state, other in zip(states, masked_states, strict=True):
            torch.testing.assert_close(state, other, rtol=1e-6, atol=3e-6)
        for key, value in gradients.items():
            scale = max(1.0, float(value.abs().max()))
            difference = (value - masked_gradients[key]).abs().max()
            assert difference < 3e-6 * scale, key


def test_the_cut_stays_exact():
    student = masked(gated_student(gated_settings()))
    small = cut(student, gate_values(student))
    assert small.settings.masked_norm and small.is_cut
    waves = sounds(9_000, 6_500, 800)
    with torch.no_grad():
        (states, frames), (cut_states, _) = run(student, waves), run(small, waves)
    for i, count in enumerate(frames):
        for state, other in zip(states, cut_states, strict=True):
            difference = (state - other)[i, :count].abs().max()
            assert difference < 1e-5 * max(1, state.abs().max())


@pytest.mark.parametrize(("kind", "pruning"), [("hubert", True), ("wavlm_large", False)])
def test_a_copy_of_a_teacher_has_it_unless_the_extractor_has_layer_norms(kind, pruning, tmp_path):
    torch.save(checkpoint(kind, KINDS[kind]), tmp_path / f"{kind}.pt")
    ensemble = TeacherEnsemble(
        {"t": Teacher(load_upstream(str(tmp_path / f"{kind}.pt"), "here"), (0,), "t")}
    )
    students = [
        copied_student(
            ensemble,
            CopySettings("copy", "t", masked_norm=on),
            PruningSettings() if pruning else None,
        ).eval()
        for on in (True, False)
    ]
    assert students[0].settings.masked_norm == (kind == "hubert")
    waves = sounds(*COUNTS)
    with torch.no_grad():
        effects = [padding_effect(lambda b, s=s: run(s, b)[0], waves) for s in students]
    assert effects[0] < 2e-4
    assert (effects[1] > 0.05) if kind == "hubert" else (effects[0] == effects[1])


def test_activation_checkpointing_gives_the_same_gradients():
    results = []
    for checkpointing in (False, True):
        student = masked(random_student(SETTINGS)).train()
        student.activation_checkpointing = checkpointing
        states, _ = run(student, sounds(9_000, 4_000))
        states[-1].square().mean().backward()
        results.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) > 20
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-7)


def test_a_compiled_student_computes_the_same(monkeypatch):
    """With a mock of torch.compile, which takes a minute on a CPU."""
    calls = []

    def compile_(function, **options):
        def compiled(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    student, waves = masked(random_student(SETTINGS)), sounds(9_000, 4_000)
    compiled = masked(student)
    compiled.compile(dynamic=True)
    with torch.no_grad():
        expected, states = run(student, waves)[0], run(compiled, waves)[0]
    assert calls == ["extract", "encode"]
    for ours, other in zip(states, expected, strict=True):  # eager: products of matrices
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_statistics_are_float32_under_autocast():
    """bfloat16 has 8 bits: a mean of 100 and a deviation of 1 would leave nothing of a channel."""
    norm = torch.nn.GroupNorm(4, 4)
    x = (100 + torch.randn(2, 4, 500, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = masked_group_norm(norm, x, torch.tensor([500, 300]))
    assert result.dtype == torch.bfloat16
    expected = norm(x[1:, :, :300].float())
    torch.testing.assert_close(result[1:, :, :300].float(), expected, rtol=2**-8, atol=1e-3)


def test_a_student_in_bfloat16_does_not_depend_on_padding():
    student, waves = random_student(SETTINGS), sounds(*COUNTS[:2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        effects = [
            padding_effect(lambda b, s=s: [x.float() for x in run(s, b)[0]], waves)
            for s in (masked(student), student)
        ]
    assert effects[0] < 0.1 < 0.2 < effects[1]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_student_file_stores_it_as_version_3(tmp_path, suffix, monkeypatch):
    plain = random_student(SETTINGS)
    for student, version in (
        (plain, 1),
        (masked(plain), 3),
        (masked(pruned_student(), on=False), 2),
        (masked(pruned_student()), 3),
    ):
        data = contents(student, None, {}, {})
        assert data["version"] == version
        assert data["settings"].get("masked_norm", False) == (version == 3)
        path = tmp_path / f"{version}.{suffix}"
        write_student(LoadedStudent(student, None, {}, {}), path)
        loaded = load_student(path).student
        assert loaded.settings.masked_norm == (version == 3)
        waves = sounds(9_000, 4_000)
        with torch.no_grad():
            pairs = zip(run(loaded, waves)[0], run(student.eval(), waves)[0], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    # as in s3prl_ekd 0.2 before masked norms
    monkeypatch.setitem(CHECKPOINT_PARTS, "EKD", 2)
    monkeypatch.setattr("s3prl_ekd.student_file.VERSION", 2)
    with pytest.raises(CheckpointError) as error:
        load_student(path)
    assert re.search(r"version 3\b.*\b1 to 2\b", str(error.value))
    assert not load_student(tmp_path / f"2.{suffix}").student.settings.masked_norm


@pytest.mark.parametrize("on", [True, False])
def test_a_second_distillation_keeps_the_files_norm(cache_folder, on):
    student = masked(random_student(SETTINGS), on)
    write_student(LoadedStudent(student, None, {}, {}), cache_folder / "first.pt")
    with edit_yaml(cache_folder / "model.yaml") as config:
        config["student"] = {"kind": "file", "file": "first.pt", "keep_heads": False}
        config["teachers"] = {"hubert": config["teachers"]["hubert"]}
        del config["init"]
    second = adapter(cache_folder).distiller.student
    assert second.settings.masked_norm is on
    waves = sounds(9_000, 4_000)
    with torch.no_grad():
        pairs = zip(run(second.eval(), waves)[0], run(student, waves)[0], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"student": {"extractor_mode": "layer_norm"}}, ("student", "layer_norm")),
        ({"student_backend": "s3prl"}, ("student.masked_norm", "student_backend")),
    ],
)
def test_settings_that_contradict_it_are_refused(cache_folder, settings, names):
    with edit_yaml(cache_folder / "model.yaml") as config:
        config["student"] |= {"masked_norm": True} | settings.pop("student", {})
        config |= settings
    with pytest.raises(ConfigError) as error:
        adapter(cache_folder)
    message = str(error.value)
    assert "\n" not in message and "masked_norm" in message
    assert all(name in message for name in names)


def test_macs_and_parameters_do_not_change(tmp_path):
    costs = []
    for on in (False, True):
        path = tmp_path / f"{on}.pt"
        write_student(LoadedStudent(masked(random_student(SETTINGS), on), None, {}, {}), path)
        costs.append(measure_cost(UpstreamExpert(path).eval(), {"a": [16_000, 4_321]}))
    assert costs[0] == costs[1] and costs[0]["macs"] > 0


# Exports


@pytest.mark.parametrize("frames", [1, 64, 700])
def test_the_norm_of_onnx_graphs_equals_that_of_the_student(frames):
    norm = torch.nn.GroupNorm(6, 6)
    torch.nn.init.normal_(norm.weight)
    x = 3 + torch.randn(3, 6, frames, generator=torch.Generator().manual_seed(frames))
    lengths = torch.tensor([frames, -(-frames // 2), 1])
    with torch.no_grad():
        ours, reference = TimeNorm(norm).masked(x, lengths), masked_group_norm(norm, x, lengths)
    for i, count in enumerate(lengths):
        a, b = ours[i, :, :count], reference[i, :, :count]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_the_module_traced_for_onnx_equals_the_student():
    """Needs no onnx."""
    student = masked(random_student(SETTINGS))
    traced, waves = OnnxStudent(student).eval(), sounds(*COUNTS)
    with torch.no_grad():
        expected, frames = run(student, waves)
        states, counts = traced(pad_sequence(waves, batch_first=True), torch.tensor(COUNTS))
    assert counts.tolist() == frames
    torch.testing.assert_close(states, torch.stack(expected[:-1]), rtol=0, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("name", ["default", "pruned hubert", "pruned wavlm"])
def test_onnxruntime_gives_the_same_hidden_states_alone_and_in_a_batch(name):
    student, effects = STUDENTS[name](), []
    for on in (True, False):
        session = OnnxSession(onnx_bytes(masked(student, on)), threads=1)
        if on:
            assert check(masked(student), session) < 1e-4

        def states_of(waves, session=session):
            batch = pad_sequence(waves, batch_first=True), torch.tensor([*map(len, waves)])
            return [*torch.from_numpy(session(*batch)[0])]

        effects.append(padding_effect(states_of, sounds(*COUNTS)))
    assert effects[0] < 2e-4 and effects[1] > 0.05


@pytest.mark.parametrize("name", ["default", "pruned hubert without scale"])
def test_transformers_gives_the_hidden_states_of_single_utterances(name, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    student = random_student(SETTINGS) if name == "default" else pruned_student()
    outputs, waves = {}, sounds(9_000, 4_000)
    for on in (True, False):
        path, folder = tmp_path / f"{on}.pt", tmp_path / f"hf{on}"
        write_student(LoadedStudent(masked(student, on), None, {}, {}), path)
        assert main(["export", "hf", str(path), "-o", str(folder)]) == 0
        outputs[on] = capsys.readouterr().out
        assert ("masked_norm" in (folder / "README.md").read_text()) is on
    assert "masked_norm" in outputs[True] and "masked_norm" not in outputs[False]
    model = transformers.AutoModel.from_pretrained(tmp_path / "hfTrue").eval()
    with torch.no_grad():
        for wave in waves:
            last = run(masked(student), [wave])[0][-1]
            torch.testing.assert_close(
                model(wave[None]).last_hidden_state, last, rtol=1e-5, atol=1e-5
            )
    # back again: transformers cannot store it
    again = tmp_path / "again.pt"
    assert main(["export", "student", str(tmp_path / "hfTrue"), "-o", str(again)]) == 0
    assert not load_student(again).student.settings.masked_norm


@pytest.mark.parametrize("name", ["default", "no projection", "pruned wavlm"])
def test_a_hidden_set_package_equals_the_student(name, tmp_path):
    loaded = LoadedStudent(masked(STUDENTS[name]()), None, {}, {})
    (tmp_path / "package").mkdir()
    write_package(package_contents(loaded, keep_heads=False), "a card", tmp_path / "package")
    expert, waves = load_package(tmp_path / "package"), sounds(*COUNTS)
    with torch.no_grad():
        states, expected = expert(waves)["hidden_states"], run(loaded.student, waves)[0][:-1]
        for state, reference in zip(states, expected, strict=True):
            scale = max(1.0, float(reference.abs().max()))
            torch.testing.assert_close(state, reference, rtol=0, atol=1e-5 * scale)
        assert padding_effect(lambda batch: expert(batch)["hidden_states"], waves) < 2e-4


def test_an_exported_package_is_valid_and_its_batches_equal_single_utterances(tmp_path):
    student = masked(random_student(SETTINGS))
    write_student(LoadedStudent(student, None, {}, {}), tmp_path / "student.pt")
    path, folder = str(tmp_path / "student.pt"), str(tmp_path / "package")
    assert main(["export", "superb", path, "-o", folder]) == 0
    outcomes, cost = sandbox.validate(tmp_path / "package", {"short": [16_000]})
    results = {outcome.name: outcome for outcome in outcomes}
    assert {outcome.status for outcome in outcomes} <= {"pass", "skip"}, outcomes
    numbers = re.findall(r"\d[\d.]*(?:e[-+]?\d+)?", results["batching"].reason)
    assert len(numbers) == 1 and float(numbers[0]) < 1e-3  # one number: equal within rounding


# Downstream


@pytest.fixture
def student_files(tmp_path):
    """Student files of equal weights: masked_norm -> path."""
    paths = {on: tmp_path / f"{on}.pt" for on in (True, False)}
    for on, path in paths.items():
        write_student(LoadedStudent(masked(random_student(SETTINGS), on), None, {}, {}), path)
    return paths


def test_results_of_both_kinds_never_mix(student_files):
    """Neither in a cache of hidden states, also under a URL, nor in a benchmark's records."""
    for ckpt in (None, "https://example.org/student.pt"):
        names = []
        for on in (True, False, True):
            upstream = UpstreamExpert(student_files[on]).eval()
            path = str(student_files[on]) if ckpt is None else ckpt
            args = Namespace(**{**ARGS, "upstream": "ekd_student", "upstream_ckpt": path})
            names.append(folder_name(args, upstream, "hidden_states"))
        assert names[0] == names[2] != names[1]
    digests = [Upstream("s", "ekd_student", str(path)).digest for path in student_files.values()]
    assert digests[0] != digests[1]


def test_cached_hidden_states_equal_those_of_padded_batches(tmp_path, student_files, monkeypatch):
    """Up to float16, for a student with the norm."""
    effects = {}
    for on, path in student_files.items():
        upstream = UpstreamExpert(path).eval()
        monkeypatch.setattr("tests.test_feature_cache.hubert_local", lambda ckpt, u=upstream: u)
        changed = {"upstream_ckpt": str(path)}
        waves = sounds(16_000, 9_000, 4_000)
        cached = build(tmp_path / "cache", **changed).features(waves)
        uncached = S3prlRunner(Namespace(**{**ARGS, **changed}), {}).features(waves)
        worst = 0.0
        for features, reference in zip(cached, uncached, strict=True):
            # the Featurizer adds a frame of padding to the uncached ones
            difference = features - reference[: len(features)]
            worst = max(worst, float(difference.abs().max() / features.std()))
        effects[on] = worst
    assert effects[True] < 5e-3 and effects[False] > 0.05


# Teachers


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory):
    folder, upstreams = tmp_path_factory.mktemp("kinds"), {}
    for kind in ("hubert", "hubert_normalised", "hubert_large", "wav2vec2", "wavlm"):
        torch.save(checkpoint(kind, KINDS[kind]), folder / f"{kind}.pt")
        upstreams[kind] = load_upstream(str(folder / f"{kind}.pt"), "here").eval()
    return upstreams


def teacher_states(encoder):
    """Layer 2 and 4 of a fast encoder, as a function of a list of waveforms."""

    def states_of(waves):
        padded, lengths = pad_sequence(waves, batch_first=True), [*map(len, waves)]
        return [*encoder.hidden_states(padded, lengths, (2, 4)).values()]

    return states_of


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "kind", ["hubert", "hubert_normalised", "hubert_large", "wav2vec2", "wavlm"]
)
def test_targets_are_the_same_alone_and_in_a_batch(upstreams, kind, precision):
    plain, with_mask = (
        teacher_states(fast_encoders({"t": upstreams[kind]}, precision, masked_norm=on)["t"])
        for on in (False, True)
    )
    waves = sounds(16_000, 9_000, 3_000)
    for a, b in zip(plain(waves[:1]), with_mask(waves[:1]), strict=True):
        assert torch.equal(a, b)
    effect, unmasked = padding_effect(with_mask, waves), padding_effect(plain, waves)
    assert effect < {"float32": 2e-4, "float16": 0.03, "bfloat16": 0.25}[precision]
    if kind != "hubert_large":  # layer norms instead of a group norm
        assert unmasked > max(0.05, 3 * effect)


def test_teachers_with_equal_extractors_still_share_its_features(upstreams):
    encoders = fast_encoders(
        {"a": upstreams["hubert"], "b": copy.deepcopy(upstreams["hubert"])}, masked_norm=True
    )
    assert encoders["a"].extractor is encoders["b"].extractor


@pytest.mark.parametrize("kind", ["student", "hugging face"])
def test_a_teacher_without_a_fast_encoder_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "student.pt"
    write_student(LoadedStudent(random_student(SETTINGS), None, {}, {}), path)
    if kind == "hugging face":
        pytest.importorskip("transformers")
        assert main(["export", "hf", str(path), "-o", str(tmp_path / "folder")]) == 0
        path = tmp_path / "folder"
    settings = {"small": TeacherSettings(str(path), (1, 2))}
    with pytest.raises(ConfigError) as error:
        load_teachers(settings, False, masked_norm=True)
    message = str(error.value)
    assert "\n" not in message and "teachers.small" in message and "masked_norm" in message
    assert load_teachers(settings, False)["small"].encoder is None


def test_slow_teachers_are_refused_by_the_settings():
    teachers = {"a": TeacherSettings("x", (1,))}
    for changes in ({"teacher_backend": "s3prl"}, {"teacher_dropout": True}):
        with pytest.raises(ValueError, match="teacher_masked_norm"):
            DistillSettings(teachers, "separate", teacher_masked_norm=True, **changes)


# The target cache


def set_masked(folder, on):
    with edit_yaml(folder / "model.yaml") as config:
        config["teacher_masked_norm"] = on


def differences(folder, capfd):
    """The printed differences to padded batches, in percent: mean of each teacher."""
    out = capfd.readouterr().out
    return [float(value) for value in re.findall(r"mean ([\d.]+)%", out)]


def test_live_targets_equal_cached_ones(cache_folder, capfd):
    """In padded batches, with caches built either way, which are equal and accepted by either run:
    a cache has the targets of single utterances."""
    caches = {}
    with edit_yaml(cache_folder / "model.yaml") as config:
        del config["teachers"]["robust"]
    for on in (True, False):
        set_masked(cache_folder, on)
        assert cache(cache_folder, cache_folder / f"cache{on}") == 0
        caches[on] = files(cache_folder / f"cache{on}")
        printed = differences(cache_folder, capfd)
        assert len(printed) == 2
        assert max(printed) < 0.1 if on else min(printed) > 1
    assert caches[True] == caches[False]
    largest = {}
    for on in (True, False):
        set_masked(cache_folder, on)
        cached = adapter(cache_folder, target_cache=f"cache{not on}")
        live = adapter(cache_folder).distiller.teachers
        batch = cached.dataloader.dataset[0]
        stored = batch.targets.on("cpu")
        waves = [wave[:n] for wave, n in zip(batch.waves, batch.lengths.tolist(), strict=True)]
        assert len({*map(len, waves)}) > 1
        largest[on] = 0.0
        for name, targets in live(waves).items():
            for i, count in enumerate(stored.frames.tolist()):
                expected = stored.values[name][i, :, :count]
                difference = (targets[i, :, :count] - expected).abs().max()
                largest[on] = max(largest[on], float(difference / expected.abs().max()))
    assert largest[True] < 2e-3 and largest[False] > 0.05
