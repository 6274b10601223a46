"""The programs of examples/, run as they stand and without the length that they tell."""

import gc
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, tmp_path, monkeypatch, capsys, *changes):
    """What the program prints and what it leaves, after replacements in its text."""
    text = (EXAMPLES / name).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    left = runpy.run_path(str(tmp_path / name))
    return capsys.readouterr().out, left


def facts(out, left, ratio):
    """The share that is gone, at which epoch of how many the cut came, and the accuracy."""
    gone = float(re.search(r"([0-9.]+) of the MACs gone", out)[1])
    assert left["report"].stage == "pruned"
    assert ratio <= gone < ratio + 0.05
    accuracy = re.findall(r"accuracy ([0-9.]+)", out)
    return gone, float(accuracy[-1])


@pytest.mark.parametrize(
    ("name", "ratio", "least"),
    [
        ("milestones.py", 0.5, 0.95),
        ("deep_supervision.py", 0.6, 0.9),
        ("distillation.py", 0.5, 0.85),
        ("freezing.py", 0.6, 0.9),
    ],
)
def test_an_example_reaches_its_ratio_and_trains_on(name, ratio, least, tmp_path, monkeypatch, capsys):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60
    out, left = run(name, tmp_path, monkeypatch, capsys)
    _, accuracy = facts(out, left, ratio)
    assert accuracy >= least
    assert not left["report"].cut  # it was trained on
    if name == "deep_supervision.py":
        assert left["model"].aux.out_channels == 3
    if name == "distillation.py":
        assert left["student"].conv3.out_channels == 24
    if name == "freezing.py":
        assert [line.endswith("as it was") for line in out.splitlines()[:8]] == [
            k in (3, 4, 5) for k in range(8)
        ]
        assert left["model"].body[0][0].out_channels < 24


def test_milestones_bound_a_run_of_which_nothing_is_said(tmp_path, monkeypatch, capsys):
    silent = (", epochs=EPOCHS", "")
    out, left = run("milestones.py", tmp_path, monkeypatch, capsys, silent)
    facts(out, left, 0.5)
    epoch = -(-len(left["train"]) // 64)
    assert left["report"].steps <= 7 * epoch  # 0.6 of the ten until the last milestone, or one more


def test_a_run_of_unknown_length_is_told_that_it_was_not_cut(tmp_path, monkeypatch, capsys, caplog):
    silent = (", epochs=EPOCHS", "")
    unknown = ("MultiStepLR(optimizer, milestones=[6, 10])", "StepLR(optimizer, 6)")
    out, left = run("milestones.py", tmp_path, monkeypatch, capsys, silent, unknown)
    assert left["report"].stage != "pruned"
    assert "0.000 of the MACs gone" in out
    left.clear()
    gc.collect()
    first, last = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert first.startswith("nothing tells how long this run is")
    assert "epochs=" in first
    assert last.startswith("the model was never cut: the run ended after")
    assert "epochs=" in last
