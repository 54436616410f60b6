"""tools/zoo_scores.py writes the scores of finished runs into the tiny teachers' cards."""

import json
import re
import shutil

import pytest
import zoo_scores

from s3prl_ekd.teachers import zoo

from .superb_runs import write_run
from .test_report import words

pytestmark = pytest.mark.slow  # of the developers' tools


@pytest.fixture
def cards(tmp_path):
    return shutil.copytree(zoo.card("tiny_wavlm").parent, tmp_path / "cards")


def results(folder):
    """Write runs with a PER of 10 n: in each of 20 utterances the first n of ten words are wrong.

    Seeds 1, 2 and 3 have n - 1, n and n + 1; in reverse order for tiny_hubert_random.
    """
    errors = {
        "tiny_hubert": 5, "tiny_robust_hubert": 3, "tiny_wavlm": 6,
        "tiny_hubert_random": 8, "tiny_wavlm_random": 8, "fbank": 7,
    }  # fmt: skip
    for upstream, n in errors.items():
        sign = -1 if upstream == "tiny_hubert_random" else 1
        for seed in (1, 2, 3):
            wrong = n + sign * (seed - 2)
            pairs = {"clean": words(wrong), "esc10_snr5": words(wrong + 1)}
            if upstream == "tiny_hubert":  # a condition of only one upstream is skipped
                pairs["rain_snr0"] = words(9)
            write_run(folder, upstream, "pr", pairs, seed=seed)
    return folder


def test_only_the_scores_of_a_card_change(tmp_path, cards):
    before = {name: (cards / f"{name}.md").read_text() for name in zoo.TEACHERS}
    arguments = [str(results(tmp_path / "superb")), "--cards", str(cards)]
    for _ in range(2):  # the second time replaces the first result
        assert zoo_scores.main(arguments) == 0
    for name, old in before.items():
        new = (cards / f"{name}.md").read_text()
        assert new.partition(zoo_scores.BEGIN)[0] == old.partition(zoo_scores.BEGIN)[0]
        assert new.partition(zoo_scores.END)[2] == old.partition(zoo_scores.END)[2]
    lines = (cards / "tiny_robust_hubert.md").read_text().splitlines()
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in lines]
    scores = {row[0]: row[1:] for row in rows if len(row) == 3 and "±" in row[-1]}
    # sd 10 over three seeds: 10 / sqrt(3) times Student's t of 2 degrees, 4.303
    assert scores == {
        "tiny_robust_hubert": ["30.0 [5.2, 54.8] ±10.0", "40.0 [15.2, 64.8] ±10.0"],
        "tiny_hubert_random": ["80.0 [55.2, 104.8] ±10.0", "90.0 [65.2, 114.8] ±10.0"],
        "tiny_hubert": ["50.0 [25.2, 74.8] ±10.0", "60.0 [35.2, 84.8] ±10.0"],
        "fbank": ["70.0 [45.2, 94.8] ±10.0", "80.0 [55.2, 104.8] ±10.0"],
    }
    less = {row[0]: row[1] for row in rows if len(row) == 3 and row[1].startswith(("+", "-"))}
    assert less["tiny_hubert_random"] == "-50.0 [-99.7, -0.3]"  # by seed -70, -50, -30: sd 20
    assert less["tiny_hubert"] == "-20.0 [-20.0, -20.0]"
    assert "tiny_hubert_random" not in (cards / "tiny_wavlm.md").read_text().split("## Scores")[1]


def test_missing_runs_marks_or_results_are_an_error(tmp_path, cards, capsys):
    write_run(tmp_path / "superb", "fbank", "pr", words(7))
    argv = [str(tmp_path / "superb"), "--cards", str(cards)]
    old = (cards / "tiny_hubert.md").read_text()
    assert zoo_scores.main(argv) == 2
    assert re.search(r"^error: .*\btiny_hubert\b", capsys.readouterr().err, re.M)
    results(tmp_path / "all")
    (cards / "tiny_hubert.md").write_text(old.replace(zoo_scores.END, ""))
    assert zoo_scores.main([str(tmp_path / "all"), "--cards", str(cards)]) == 2
    assert str(cards / "tiny_hubert.md") in capsys.readouterr().err
    assert zoo_scores.main([str(tmp_path / "none"), "--cards", str(cards)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_runs_with_different_overrides_are_an_error(tmp_path, cards, capsys):
    root = results(tmp_path / "superb")
    for upstream, digest in (("tiny_wavlm", "a"), ("fbank", "b")):
        record = next((root / upstream).glob("pr/*seed1")) / "superb.json"
        values = json.loads(record.read_text())
        record.write_text(json.dumps(values | {"recipe_digest": digest}))
    assert zoo_scores.main([str(root), "--cards", str(cards)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: pr: tiny_wavlm .*\bfbank\b.*--override", error, re.M)


def test_runs_with_different_settings_are_an_error(tmp_path, cards, capsys):
    before = (cards / "tiny_hubert.md").read_text()
    root = results(tmp_path / "superb")
    write_run(root, "tiny_wavlm_random", "pr", {"clean": words(1), "esc10_snr5": words(1)}, seed=4)
    assert zoo_scores.main([str(root), "--cards", str(cards)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: .*\bpr\b.*\btiny_wavlm_random\b.*\btiny_wavlm\b", error, re.M)
    assert (cards / "tiny_hubert.md").read_text() == before
