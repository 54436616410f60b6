"""Train all stages of a zoo, one after the other; each resumes from its checkpoint.

ZOO/recipe.json                recipe and digest of the corpus, checked at each start
ZOO/noise/                     synthetic noise
ZOO/recorded_noise/            copies of --noise
ZOO/units-mfcc.npz, units-hubert_1.npz, units-prosody.npz, units-phones.npz
ZOO/STAGE/checkpoint.pt, log.json, curves.png
ZOO/random/tiny_*.pt           random initialisation of each exported model
ZOO/tiny_*.pt                  one file for each teacher: tiny_hubert.pt, tiny_speaker.pt ...
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from s3prl_ekd.errors import ConfigError, SetupError
from s3prl_ekd.files.atomic import atomic_file
from s3prl_ekd.teachers.zoo import TEACHERS as SHIPPED_FILES

from . import checkpoint
from .corpus import Corpus
from .export import export
from .labels import FrameLabels, describe_labels, load_labels, make_labels, save_labels
from .mfcc import mfcc
from .models import MaskedPredictor
from .noises import RECORDED_NOISE, copy_recordings, make_synthetic_noise
from .phones import phone_labels
from .prosody import prosody
from .recipe import STAGES, TeacherRecipe, TrainingStage, changed_keys, required_stages, stage_steps
from .trainer import TrainingOptions, train

logger = logging.getLogger(__name__)


def make_zoo(
    teachers: tuple[str, ...],
    corpus: Corpus,
    recipe: TeacherRecipe,
    zoo: Path,
    options: TrainingOptions,
    stop: Callable[[int], bool] = lambda step: False,
    noise: Sequence[Path] = (),
) -> dict[str, Path] | None:
    """Train these teachers and the stages that they depend on.

    Args:
        teachers: of :data:`recipe.TEACHERS`.
        corpus, recipe, options: see :func:`trainer.train`.
        zoo: the output folder, see the module docstring.
        stop: see :func:`trainer.train`.
        noise: recordings for RobustHuBERT's input, added to the synthetic noise.

    Returns:
        Teacher -> file; None if stopped before the end.

    Raises:
        ConfigError: recipe, corpus or noise have changed since the first start.
        EkdError: see :func:`trainer.train` and :func:`labels.make_labels`.
    """
    write_or_check_recipe(zoo, corpus, recipe)
    stages = required_stages(teachers)
    distorted = [stage for stage in stages if stage.input_kind == "distorted"]
    if distorted:
        already_trained = any((zoo / stage.name / "checkpoint.pt").exists() for stage in distorted)
        copy_recordings(noise, zoo / RECORDED_NOISE, already_trained)
    files: dict[str, Path] = {}
    for stage in stages:
        if stage.input_kind != "clean":
            make_synthetic_noise(corpus, zoo / "noise", recipe.seed)
        labels = None
        if stage.units:
            labels = load_or_make_labels(stage.units, corpus, recipe, zoo, options)
        targets = describe_labels(labels) if labels else "pairs of excerpts"
        logger.info("%s: %d steps; %s", stage.name, stage_steps(recipe, stage), targets)

        def export_random_init(model: MaskedPredictor, stage: TrainingStage = stage) -> None:
            if stage.file:
                export(model, zoo / "random" / stage.file)

        model = train(
            stage, recipe, corpus, labels, zoo, options, stop, at_start=export_random_init
        )
        if model is None:
            return None
        if stage.file:
            files[stage.name] = zoo / stage.file
            size = export(model, files[stage.name])
            logger.info("%s: %s, %.2f MB", stage.name, files[stage.name], size / 1e6)
    return files


def write_or_check_recipe(zoo: Path, corpus: Corpus, recipe: TeacherRecipe) -> None:
    """Write ``recipe.json``, or compare recipe and corpus with it if it exists.

    Raises:
        ConfigError: they differ.
        SetupError: cannot write to the folder.
    """
    record = {"recipe": recipe.as_json(), "corpus": corpus.digest}
    path = zoo / "recipe.json"
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            changed = changed_keys(old, record)
        except (ValueError, AttributeError):
            raise ConfigError(f"cannot read {path}; use another folder with -o") from None
        if changed:
            raise ConfigError(
                f"{zoo}: recipe or corpus have changed: {', '.join(changed)}; use the same folders "
                "and options to resume, or another folder with -o"
            )
        return
    try:
        zoo.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps(record, indent=1).encode())
    except OSError as error:
        raise SetupError(f"cannot write to {zoo}: {error.strerror}") from None


def load_or_make_labels(
    name: str, corpus: Corpus, recipe: TeacherRecipe, zoo: Path, options: TrainingOptions
) -> FrameLabels:
    """Read ``units-NAME.npz``, or compute it: clusters of MFCC, of prosody, or of the middle
    layer of a stage or of a shipped teacher; or phones."""
    path = zoo / f"units-{name}.npz"
    if path.exists():
        return load_labels(path, corpus)
    if name == "phones":
        labels = phone_labels(corpus)
        save_labels(labels, path)
        return labels
    settings = recipe.units
    if name in ("mfcc", "prosody"):
        clusters, features = settings.mfcc_clusters, {"mfcc": mfcc, "prosody": prosody}[name]
    else:
        if name in SHIPPED_FILES:
            model = MaskedPredictor("hubert", recipe, 1)
            checkpoint.load_shipped(name, model)
        else:
            source = STAGES[name]
            source_labels = load_labels(zoo / f"units-{source.units}.npz", corpus)
            model = MaskedPredictor(source.family, recipe, source_labels.classes)
            checkpoint.load_model(zoo / name / "checkpoint.pt", name, model)
        model.to(options.device).eval()
        clusters = settings.hidden_clusters

        def features(wave):
            return model.layer(wave.to(options.device), settings.layer)

    labels = make_labels(corpus, features, clusters, settings.frames, recipe.seed, name)
    save_labels(labels, path)
    return labels
