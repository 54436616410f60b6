"""Cards and printed commands, as typed in a shell in an environment that has what they name.

Neither s3prl_ekd nor its shims are installed there.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from s3prl_ekd.cli import main

from .conftest import make_sound
from .corpora import write_audio
from .documented import FENCE, Snippet
from .environments import make_environment, typed

AWKWARD = "it's 1; $HOME"  # name of a folder


def snippets_of(card: Path) -> list[Snippet]:
    text = card.read_text(encoding="utf-8")
    return [Snippet(match[1], match[2], 0) for match in FENCE.finditer(text)]


def next_line(capsys) -> str:
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("next: ")]
    return line.removeprefix("next: ")


def shape_of_states(card: Path, programs: Path) -> list[int]:
    """Run the Python snippet of a card; the number of hidden states and the size of the last."""
    (snippet,) = [s for s in snippets_of(card) if s.language == "python"]
    code = snippet.text + "\nprint('shape', [len(states), *states[-1].shape])\n"
    output = typed(f"python - <<'END'\n{code}END", card.parent, programs)
    (shape,) = re.findall(r"^shape (.*)$", output, re.MULTILINE)
    return json.loads(shape)


@pytest.fixture(scope="module")
def transformers_environment(tmp_path_factory):
    """What the card of ``export hf`` names."""
    folder = tmp_path_factory.mktemp("transformers") / "venv"
    return make_environment(folder, "torch", "transformers", "safetensors")


@pytest.fixture
def hf_export(student_file, tmp_path, capsys):
    """The folder, and the command that ``export hf`` prints."""
    out = tmp_path / AWKWARD
    assert main(["export", "hf", str(student_file), "-o", str(out)]) == 0
    return out, next_line(capsys)


def test_the_card_of_a_hugging_face_folder(hf_export, transformers_environment):
    folder, _ = hf_export
    # 2 layers and their input; 2 waveforms, 49 frames in a second
    assert shape_of_states(folder / "README.md", transformers_environment) == [3, 2, 49, 48]


def remove_libraries(programs: Path, command: str) -> None:
    """Do in another environment what doctor says for this one: ``rm .../torchaudio/lib/...``."""
    (site,) = programs.parent.glob("lib/python*/site-packages")
    installed = (site / "torchaudio").resolve()
    (site / "torchaudio").unlink()
    shutil.copytree(installed, site / "torchaudio")
    assert command.startswith(f"rm {installed}/")
    typed(command.replace(str(installed), str(site / "torchaudio")), site, programs)


@pytest.mark.slow
def test_a_torchaudio_for_another_torch(hf_export, tmp_path, capsys):
    """Where it does not import, doctor and export hf print a command that repairs it."""
    programs = make_environment(
        tmp_path / "venv", "torch", "torchaudio", "transformers", "safetensors"
    )
    folder, command = hf_export
    works = "HubertModel(" in typed(f"{command} 2>&1 || true", tmp_path, programs)
    main(["doctor", str(tmp_path), "--json"])
    repair = json.loads(capsys.readouterr().out)["audio"]["torchaudio_repair"]
    assert bool(repair) != works
    main(["doctor", str(tmp_path)])
    assert ("rm " in capsys.readouterr().out) != works
    if works:
        pytest.skip("this environment's torchaudio belongs to its torch")
    remove_libraries(programs, repair[repair.index("rm ") :])
    assert "HubertModel(" in typed(command, tmp_path, programs)


def test_after_export_onnx(student_file, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    out = tmp_path / AWKWARD / "s.onnx"
    assert main(["export", "onnx", str(student_file), "-o", str(out)]) == 0
    programs = make_environment(tmp_path / "venv", "onnxruntime", "numpy")
    # layer, batch, frame, dim
    assert typed(next_line(capsys), tmp_path, programs).strip() == "(3, 1, 49, 48)"


def test_after_features(student_file, tmp_path, capsys, monkeypatch):
    write_audio(tmp_path / "audio/a.wav", make_sound(0.5))
    out = tmp_path / AWKWARD / "f.safetensors"
    out.parent.mkdir()
    argv = ["features", str(student_file), str(tmp_path / "audio"), "-o", str(out)]
    assert main(argv) == 0
    programs = make_environment(tmp_path / "venv", "torch", "safetensors")
    assert "a.wav#0" in typed(next_line(capsys), tmp_path, programs)
    from s3prl_ekd.commands import features

    (example,) = re.findall(r"^  (python .*)$", features.__doc__, re.MULTILINE)
    _, option, code = shlex.split(example)
    assert option == "-c"
    shutil.copy(out, tmp_path / "dev.safetensors")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "a.wav#0" in capsys.readouterr().out
