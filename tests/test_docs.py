"""The documents: they build without a warning, and the configuration reference is complete."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from s3prl_ekd.distill.student_settings import CopySettings, FileSettings, StudentSettings
from s3prl_ekd.files import renamed_keys
from s3prl_ekd.pretrain.settings import KEYS, OPTIMIZERS, ModelFile, RunnerFile
from s3prl_ekd.superb.score import PUBLISHED

from .conftest import REPO

DOCS = REPO / "docs"
NEEDED = ("sphinx", "myst_parser", "furo")


@pytest.fixture(scope="module")
def sphinx():
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; type: pip install '.[docs]'")


@pytest.fixture(scope="module")
def reference(sphinx):
    """docs/settings_reference.py, which is no package."""
    spec = importlib.util.spec_from_file_location(
        "settings_reference", DOCS / "settings_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def html(sphinx, tmp_path_factory):
    """All pages as HTML, with every warning an error."""
    out = tmp_path_factory.mktemp("docs")
    argv = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-n", "-W", "--keep-going"]
    argv += ["-d", str(out / "doctrees"), str(DOCS), str(out / "html")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


# Two small dataclasses, as the settings files write them.
@dataclass(frozen=True)
class Inner:
    """How it is done.

    One more paragraph.
    """

    kind: Literal["fast", "plain"] = "fast"
    """Which *way*."""

    layers: tuple[int, ...] = (4, 8)
    """Layers, see :class:`.Inner` and ``kind``."""


@dataclass(frozen=True)
class Outer:
    teachers: dict[str, Inner]
    """Teachers by name."""

    steps: int
    inner: Inner = field(default_factory=Inner)
    file: str | None = None
    """A path."""

    more: dict[str, Any] = field(default_factory=dict)
    """Passed on."""


def test_entries_of_a_dataclass(reference):
    teachers, steps, inner, file, more = reference.entries(Outer)
    about = "How it is done.\n\nOne more paragraph."
    assert (teachers.path, teachers.description) == (
        "teachers.NAME",
        f"Teachers by name.\n\n{about}",
    )
    assert [each.path for each in teachers.fields] == ["teachers.NAME.kind", "teachers.NAME.layers"]
    assert steps == reference.Entry("steps", "whole number", "required", "")
    assert inner.description == about
    kind, layers = inner.fields
    assert kind == reference.Entry("inner.kind", "fast | plain", "fast", "Which *way*.")
    assert (layers.kind, layers.default) == ("list of whole numbers", "[4, 8]")
    assert file == reference.Entry("file", "text, or null", "null", "A path.")
    assert (more.kind, more.default) == ("mapping", "{}")


# Two kinds of a mapping.
@dataclass(frozen=True)
class Small:
    """A small one."""

    KIND: ClassVar[str] = "small"

    size: int = 1
    """Its size."""


@dataclass(frozen=True)
class Big:
    """A big one."""

    kind: Literal["big"]
    """``big``."""

    size: int = 2
    """Its size."""


@dataclass(frozen=True)
class Either:
    thing: Small | Big = field(default_factory=Small)
    """The thing."""

    more: Small | None = None
    """Another one; null: none."""


def test_entries_of_each_kind(reference):
    thing, more = reference.entries(Either)
    assert thing.description == "The thing."
    small, big = thing.fields
    assert (small.path, big.path) == ("thing: {kind: small}", "thing: {kind: big}")
    assert big.description == "A big one."
    assert [(e.path, e.default) for e in small.fields] == [("thing.size", "1")]
    assert [(e.path, e.default) for e in big.fields] == [
        ("thing.kind", "required"),
        ("thing.size", "2"),
    ]
    assert [e.anchor for e in reference.leaves((thing,))] == [
        "thing.small.size",
        "thing.big.kind",
        "thing.big.size",
    ]
    assert more.description == "Another one; null: none.\n\nA small one."
    assert [e.path for e in more.fields] == ["more.size"]


STUDENTS = {StudentSettings: "distil", CopySettings: "copy", FileSettings: "file"}


def walk(settings, path=""):
    """``(anchor, field)`` of every value, written apart from the directive."""
    hints = typing.get_type_hints(settings)
    for each in dataclasses.fields(settings):
        kind, name = hints[each.name], path + each.name
        if name == "student":
            assert set(typing.get_args(kind)) == STUDENTS.keys()
            for student, word in STUDENTS.items():
                yield from walk(student, f"student.{word}.")
            continue
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
            kind, name = typing.get_args(kind)[1], name + ".NAME"
        if dataclasses.is_dataclass(kind):
            yield from walk(kind, name + ".")
        else:
            yield name, each


@pytest.mark.parametrize("settings", [ModelFile, RunnerFile])
def test_every_setting_is_in_the_reference(settings, reference, html):
    import yaml

    page = (html / "configuration.html").read_text(encoding="utf-8")
    found = {entry.anchor: entry for entry in reference.leaves(reference.entries(settings))}
    expected = dict(walk(settings))
    assert found.keys() == expected.keys() and len(found) > 20
    for path, each in expected.items():
        anchor = f"{settings.__name__}-{path}".lower().replace(".", "-").replace("_", "-")
        assert f'id="{anchor}"' in page, path
        if each.default is not dataclasses.MISSING:
            shown = yaml.safe_load(found[path].default)
            default = [*each.default] if isinstance(each.default, tuple) else each.default
            assert shown == default and type(shown) is type(default), path


@pytest.mark.parametrize("settings", [ModelFile, RunnerFile])
def test_every_setting_has_a_description(settings, reference):
    entries = reference.leaves(reference.entries(settings))
    assert [entry.path for entry in entries if not entry.description] == []


def test_every_optimizer_is_named():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert [name for name in OPTIMIZERS if f"`{name}`" not in text] == []
    assert [key for key in KEYS if key != "name" and f"`{key}`" not in text] == []


def test_every_page_is_built(html):
    for page in DOCS.glob("*.md"):
        assert (html / f"{page.stem}.html").is_file(), page.name
    index = (html / "index.html").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f'href="{page.stem}.html' in index or page.stem == "index", page.name


def test_the_pages_need_no_network(html):
    for page in html.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        for tag in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http'):
            assert tag not in text, page.name


# README and the package's metadata


@pytest.fixture
def metadata(tmp_path):
    """What setup.py gives to setuptools, with or without a public address."""
    for name in ("setup.py", "README.md", "CITATION.cff"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("s3prl_ekd", "upstream", "pretrain_configs", "downstream_recipes"):
        (tmp_path / name).mkdir()
    shutil.copy(REPO / "s3prl_ekd" / "__init__.py", tmp_path / "s3prl_ekd")
    citation = re.sub(r"(?m)^repository-code:.*\n", "", (REPO / "CITATION.cff").read_text())
    code = (
        "import json, runpy, setuptools\n"
        "setuptools.setup = lambda **given: print(json.dumps(given))\n"
        "runpy.run_path('setup.py')\n"
    )

    def run(address=None, readme=None):
        line = f"repository-code: {address}\n" if address else ""
        (tmp_path / "CITATION.cff").write_text(citation + line)
        if readme is not None:
            (tmp_path / "README.md").write_text(readme)
        argv = [sys.executable, "-c", code]
        return json.loads(subprocess.check_output(argv, cwd=tmp_path, text=True))

    return run


README = """\
![a figure](docs/method.svg)
See [the guide](docs/training.md#resume), [s3prl](https://github.com/s3prl/s3prl) and [below](#end).

```yaml
layers: [4](not/a/link)
```
"""


def test_without_a_public_address_relative_links_are_text(metadata):
    given = metadata(readme=README)
    assert given["project_urls"] == {}
    assert given["long_description"].startswith(
        "a figure\nSee the guide, [s3prl](https://github.com/s3prl/s3prl) and [below](#end).\n"
    )
    assert "layers: [4](not/a/link)" in given["long_description"]


def test_with_a_public_address_links_are_absolute(metadata):
    given = metadata("https://example.org/us/s3prl_ekd", README)
    assert given["project_urls"]["Source"] == "https://example.org/us/s3prl_ekd"
    assert given["long_description"].startswith(
        "![a figure](https://example.org/us/s3prl_ekd/raw/HEAD/docs/method.svg)\n"
        "See [the guide](https://example.org/us/s3prl_ekd/blob/HEAD/docs/training.md#resume), "
        "[s3prl](https://github.com/s3prl/s3prl) and [below](#end).\n"
    )
    assert "layers: [4](not/a/link)" in given["long_description"]


def test_the_readme_on_pypi_has_no_relative_link(metadata):
    for given in (metadata(), metadata("https://example.org/us/s3prl_ekd")):
        for target in re.findall(r"\]\(([^)]*)\)", given["long_description"]):
            assert target.startswith(("https://", "#")), target


def test_the_links_of_the_readme_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"):
        text = (REPO / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)]*)\)", text):
            if not target.startswith(("https://", "#")):
                assert (REPO / target.partition("#")[0]).exists(), f"{name}: {target}"


def test_renamed_keys_are_in_the_changelog():
    text = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for old, new in {**renamed_keys.MODEL, **renamed_keys.RUNNER}.items():
        assert any(f"`{old}" in row and f"`{new}" in row.split("|", 2)[2] for row in rows), old


# Numbers and names in README.md


def cells(text, start):
    """The cells of the table row that begins with ``start``."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_published_rows_are_those_of_the_report():
    for name in ("README.md", "docs/students.md"):
        text = (REPO / name).read_text(encoding="utf-8")
        (head,) = [line for line in text.splitlines() if "PR PER" in line and "(M)" in line]
        columns = [cell.strip().split()[0].lower() for cell in head.strip("|").split("|")]
        text = text.partition(head)[2]
        rows = [row for row in PUBLISHED if f"\n| {row.name} |" in text]
        assert len(rows) >= 4
        for row in rows:
            shown = dict(zip(columns, cells(text, row.name), strict=True))
            assert float(shown["parameters"]) == row.parameters, row.name
            assert {task: float(shown[task]) for task in row.metrics} == row.metrics, row.name


@pytest.mark.parametrize("name", ["README.md", "docs/method.md"])
def test_every_experiment_is_in_the_table(name):
    text = (REPO / name).read_text(encoding="utf-8").partition("## Experiments")[2]
    named = set(re.findall(r"`([a-z0-9_*]+)`", text))
    files = {path.stem for path in (REPO / "pretrain_configs/experiments").glob("*.yaml")}
    patterns = {each for each in named if each.endswith("*")}
    for experiment in files:
        assert any(fnmatch.fnmatch(experiment, each) for each in named), experiment
    for each in patterns:
        assert fnmatch.filter(files, each), each


def test_versions_agree():
    from s3prl_ekd import __version__

    citation = (REPO / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
