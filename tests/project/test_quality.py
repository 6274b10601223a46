"""The accuracy studies of bench/quality: plans, the runs that they ask for, and the page of tables."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ocsfast
from ocsfast.choice.selection import choose
from ocsfast.core.errors import ConfigError
from ocsfast.train.models import build_model

QUALITY = Path(__file__).resolve().parents[2] / "bench/quality"
PLAN = """
tasks:
  digits: {data: digits, arch: resnet20, epochs: 1, subset: 640}
ratios: [0.5]
seeds: [0]
variants:
  random: {kind: random, of: one-cycle}
  thinner, as dear: {kind: thinner, cost: one-cycle}
  shape: {kind: shape, of: one-cycle}
  dense: {kind: dense}
  thinner: {kind: thinner}
  one-cycle: {kind: one-cycle, curve: 5, ema: 0.9, options: {deadline: 0.5}}
  relative: {kind: one-cycle, choice: initial, options: {deadline: 0.5}}
  conventional: {kind: one-cycle, choice: conventional, options: {deadline: 0.5}}
  softmax: {kind: one-cycle, choice: softmax, options: {deadline: 0.5}}
  paper: {kind: one-cycle, paper: cifar}
  twice as dear: {kind: one-cycle, of: one-cycle, cost: 1.6, options: {deadline: 0.5}}
  at the start: {kind: at-start}
  pre-trained: {kind: one-cycle, start: trained, epochs: 0.8, lr: 0.1}
  Torch-Pruning: {kind: torch-pruning, start: trained, cost: 1.4}
  impossible: {kind: one-cycle, options: {max_family_ratio: 0.1}}
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(QUALITY))


def module(name: str) -> Any:
    return importlib.import_module(name)


def written(folder: Path, text: str = PLAN) -> Path:
    (folder / "plan.yaml").write_text(text)
    return folder / "plan.yaml"


def start(folder: Path, *words: str, status: int = 0) -> str:
    command = [sys.executable, str(QUALITY / "run.py"), str(folder / "plan.yaml"), *words]
    done = subprocess.run(
        [*command, "--out", str(folder / "rows.jsonl"), "--work", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr * (status != 0)


def rows_in(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["variant"]: row for row in map(json.loads, lines)}


def test_a_plan_is_run_and_goes_on_where_it_was(tmp_path: Path) -> None:
    written(tmp_path)
    assert start(tmp_path, "--minutes", "0") == ""
    start(tmp_path, "--workers", "2")
    rows = rows_in(tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == len(rows) == 15
    check_costs(dict(rows))
    # The last lines are lost, and one is half written, as where a run is killed: they are made again.
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:13]) + "\n" + lines[13][:40])
    start(tmp_path)
    again = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert again[:13] == lines[:13]
    assert len(again) == 15
    names = ("accuracy", "loss", "macs", "cost", "error")
    for variant, row in rows_in(tmp_path).items():
        assert [row.get(name) for name in names] == [rows[variant].get(name) for name in names]
    assert start(tmp_path) == ""
    written(tmp_path, PLAN.replace("epochs: 1,", "epochs: 2,"))
    assert "of another definition than the plan's" in start(tmp_path, status=2)
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == again


def test_data_that_are_not_there_are_an_error_and_no_result(tmp_path: Path) -> None:
    written(tmp_path, PLAN.replace("data: digits", "data: cifar10"))
    assert "Dataset not found" in start(tmp_path, "--images", "", status=2)
    assert "is not there: python bench/images.py" in start(tmp_path, "--images", "no.pt", status=2)
    assert not rows_in(tmp_path)


def test_a_run_that_breaks_down_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, loop, checked = module("run"), module("loop"), module("checked")
    plan = checked.read(written(tmp_path))
    made = []

    def breaks(one: Any, needed: dict[str, Any]) -> dict[str, Any]:
        if one.variant == "one-cycle":
            raise RuntimeError("out of memory")
        made.append(one.variant)
        return {"accuracy": 1.0, "cost": 1.0}

    bench = loop.Bench(plan, "", tmp_path, torch.device("cpu"))
    monkeypatch.setattr(bench, "run", breaks)
    assert not run.work(plan, bench, tmp_path / "rows.jsonl", tmp_path / "claims", float("inf"))
    assert "thinner" in made
    assert "shape" not in made  # it needs what broke
    assert "one-cycle" not in rows_in(tmp_path)


def test_an_uncut_network_is_no_result(tmp_path: Path) -> None:
    rows = rows_with(
        tmp_path, "uncut: {kind: one-cycle, options: {deadline: null, max_residual: 1.0e-12}}"
    )
    assert rows["uncut"]["error"].endswith("the network was not cut")


def test_what_needs_a_failed_run_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    rows = rows_with(
        tmp_path,
        "none: {kind: one-cycle, options: {max_family_ratio: 0.1}}",
        "shape: {kind: shape, of: none}",
        "at the start: {kind: at-start}",
    )
    assert rows["shape"]["error"].startswith("StateError: it needs none, which failed: ConfigError: ")
    assert "accuracy" in rows["at the start"]


def rows_with(folder: Path, *variants: str) -> dict[str, dict[str, Any]]:
    """What came of a plan with other variants."""
    head = PLAN[: PLAN.index("variants:")]
    written(folder, head + "variants:\n" + "".join(f"  {variant}\n" for variant in variants))
    start(folder)
    return rows_in(folder)


def check_costs(rows: dict[str, dict[str, Any]]) -> None:
    """What the runs of PLAN must have cost and kept: a dense run is 5 steps."""
    assert "reached" in rows.pop("impossible")["error"]
    dense, one = rows["dense"], rows["one-cycle"]
    assert dense["cost"] == 1
    whole = dense["macs"]
    assert whole == dense["macs_dense"] == 2532992
    for name, row in rows.items():
        assert name == "dense" or 0.45 < row["macs"] / row["macs_dense"] <= 0.5
        assert row["work"] == pytest.approx((row["cost"] - (name in TRAINED)) * 5 * whole)
    assert one["cost"] == pytest.approx(one["cut"] + (1 - one["cut"]) * one["macs"] / whole)
    assert [point[0] for point in one["curve"]] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert one["curve"][-1][1] == one["accuracy"]
    assert one["curve"][-1][3] == one["average"]
    assert 0 <= one["average"] <= 100
    assert rows["random"]["kept"] == rows["shape"]["kept"] == one["kept"]
    assert rows["shape"]["macs"] == rows["random"]["macs"] == one["macs"]
    assert rows["thinner"]["cost"] == pytest.approx(0.5, abs=0.01)
    assert rows["thinner, as dear"]["cost"] == pytest.approx(one["cost"], abs=0.06)  # half a step
    assert rows["twice as dear"]["steps"] == round(5 * 1.6 / one["cost"])
    assert rows["at the start"]["cut"] == 0
    assert rows["at the start"]["steps"] == 5
    assert rows["Torch-Pruning"]["cost"] == pytest.approx(1.4, abs=0.06)
    assert rows["pre-trained"]["steps"] == 4


TRAINED = ("pre-trained", "Torch-Pruning")


def test_a_run_comes_after_those_it_needs() -> None:
    for path in sorted((QUALITY / "plans").glob("*.yaml")):
        plan, seen = module("checked").read(path), set()
        waiting = list(plan.runs())
        assert len(set(waiting)) == len(waiting)
        for run in waiting * 2:  # what is written before what it needs has its turn in the next round
            if run not in seen and all(need in seen for need in plan.needs(run)):
                seen.add(run)
        assert seen == set(waiting), path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("arch: resnet20", "arch: resnet21", "task digits: arch 'resnet21': choose from digits_resnet"),
        ("data: digits", "data: digit", "unknown data set 'digit'"),
        ("subset: 640", "subsets: 640", "subsets is unknown (did you mean subset?)"),
        ("subset: 640", "subset: many", "subset: 'many' is not a whole number"),
        ("subset: 640", "subset: -1", "subset -1: it must be at least 0"),
        ("kind: thinner}", "kind: thiner}", "variant thinner: kind 'thiner': choose from dense"),
        ("of: one-cycle}", "of: two-cycle}", "needs the pruned variant 'two-cycle'"),
        ("of: one-cycle}", "of: Torch-Pruning}", "what torch-pruning leaves is in no families"),
        ("kind: shape, of: one-cycle", "kind: shape", "needs the pruned variant ''"),
        ("kind: shape, of: one-cycle", "kind: shape, of: shape", "does not make before it"),
        ("cost: one-cycle", "cost: dense", "needs the pruned variant 'dense'"),
        ("cost: one-cycle", "cost: -1", "cost -1: it must be above 0"),
        ("cost: one-cycle", "cost: true", "cost: True is not expected here"),
        ("cost: 1.4", "cost: 1.0", "cost 1: it must be above 1"),
        ("cost: 1.4", "cost: 1.4, normalizer: max", "normalizer 'max': choose from mean, none"),
        ("kind: thinner}", "kind: thinner, normalizer: none}", "normalizer means nothing to thinner"),
        ("epochs: 0.8", "epochs: 0", "epochs and lr must be above 0"),
        ("epochs: 0.8", "cost: 1.4", "say epochs and not cost"),
        ("max_family_ratio", "max_ratio", "max_ratio= is not an option"),
        ("{max_family_ratio: 0.1}", "[0.1]", "options: [0.1] is not a mapping"),
        ("{max_family_ratio: 0.1}", "{total_steps: 5}", "total_steps= is not for a plan to say"),
        ("{max_family_ratio: 0.1}", "{keep: conv}", "keep= is not for a plan to say"),
        ("kind: thinner}", "kind: thinner, ema: 0.9}", "ema means nothing to thinner"),
        ("kind: dense}", "kind: dense, start: trained}", "start means nothing to dense"),
        ("choice: softmax", "choice: softmin", "choice 'softmin': choose from initial"),
        ("paper: cifar", "paper: mnist", "paper 'mnist': choose from cifar"),
        ("ratios: [0.5]", "ratios: [1.5]", "ratio 1.5: it must be between 0 and 1"),
        ("ratios: [0.5]", "ratios: 0.5", "ratios: a list is expected, as [0.5]"),
        ("ratios: [0.5]", "ratios: [half]", "ratios: 'half' is not a number"),
        ("seeds: [0]", "seeds: [0.7]", "seeds: 0.7 is not a whole number"),
        ("seeds: [0]", "seeds: []", "the plan has no runs"),
        ("seeds: [0]", "", "a plan has tasks, ratios, seeds, variants"),
        ("kind: at-start", "kind: at-start, seeds: [7]", "seeds has 7, which the plan has not"),
        ("kind: torch-pruning, start: trained", "kind: torch-pruning", "start: trained"),
        ("  dense: {kind: dense}\n", "", "needs a variant of kind dense"),
        ("  dense: {kind: dense}", "  d: {kind: dense}\n  e: {kind: dense}", "one variant may be dense"),
        ("  dense: {kind: dense}", "  thinner: {kind: dense}", "'thinner' stands twice"),
        ("  dense: {kind: dense}", "  1.5: {kind: dense}", "variants has 1.5: a name is expected"),
        (
            "seeds: [0]\nvariants:",
            "seeds: [0, 1]\nvariants:\n  b: {kind: one-cycle, seeds: [1]}\n  a: {kind: shape, of: b}",
            "which the plan does not make before it",
        ),
        ("tasks:", "tasks: [", "cannot be read"),
        (
            "tasks:\n  digits: {data: digits, arch: resnet20, epochs: 1, subset: 640}",
            "tasks:",
            "tasks is None",
        ),
    ],
)
def test_a_mistake_in_a_plan_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in PLAN
    with pytest.raises(ConfigError) as caught:
        module("checked").read(written(tmp_path, PLAN.replace(old, new)))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("arch", ["resnet20", "vgg16_quarter", "vit_tiny"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_a_thinner_network_is_thinner_everywhere_by_one_share(arch: str, ratio: float) -> None:
    networks = module("networks")
    torch.manual_seed(0)
    model = build_model(arch, 10, 3, 16)
    families = ocsfast.group(model, torch.zeros(2, 3, 16, 16))
    macs = networks.macs_of(families)
    budget = int((1 - ratio) * macs(families.sizes))
    kept = networks.uniform_widths(families, budget)
    assert 0.96 * budget < macs(kept) <= budget
    low = max((n - 1) / size for n, size in zip(kept, families.sizes, strict=True))
    high = min((n + 1) / size for n, size in zip(kept, families.sizes, strict=True))
    assert low < high  # one share, rounded
    networks.with_widths(model, families, kept)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    # The weights are those that a constructor draws for these widths, not crops of wider layers.
    if arch != "vit_tiny":
        for layer in model.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.weight.numel() > 2000:
                drawn = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
                assert float(layer.weight.detach().std()) == pytest.approx(drawn, rel=0.1)


def test_torch_pruning_ranks_by_a_layers_mean_or_by_raw_norms() -> None:
    networks = module("networks")
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(4)))
    with torch.no_grad():
        model[0].weight *= 100
    kept = {
        name: [
            layer.out_features
            for layer in networks.torch_pruned(model, (16,), 4 * 16 * 16 * 3 // 4, name).children()
        ]
        for name in ("mean", "none")
    }
    assert kept["none"][0] == 16  # they have by far the largest norms
    assert kept["mean"][0] < 16
    # What ranks last is all of the others: Torch-Pruning leaves a layer whole that would go whole.
    with pytest.raises(ConfigError, match="of the MACs at least"):
        networks.torch_pruned(model, (16,), 4 * 16 * 16 // 10, "none")


def test_images_are_read_from_an_unpacked_archive(tmp_path: Path) -> None:
    plans, loop = module("plan"), module("loop")
    pixels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(40) % 10
    torch.save({"train": (pixels, labels), "test": (pixels[:10], labels[:10])}, tmp_path / "images.pt")
    task = plans.Task(data="cifar10", arch="resnet20", subset=20, size=8)
    data = loop.data_of(task, str(tmp_path / "images.pt"), torch.device("cpu"))
    assert (len(data.train), len(data.test), len(data.classes), data.shape) == (20, 10, 10, (3, 8, 8))
    mean = torch.cat([images for images, _ in data.train.batches(20)]).mean()
    assert abs(float(mean)) < 1e-5  # normalised by these images' own statistics
    other = plans.Task(data="cifar10", arch="resnet20")
    with pytest.raises(ConfigError, match="images of 8 pixels, the plan wants 32"):
        loop.data_of(other, str(tmp_path / "images.pt"), torch.device("cpu"))


def test_choices_of_others_are_theirs() -> None:
    choices = module("choices")
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(*two) for two in ((4, 8), (8, 16), (16, 2))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 4)
    pruner = ocsfast.attach(model, 0.08, optimizer=optimizer, example_inputs=x, total_steps=100)
    scores = torch.rand(24)
    ranked = choices.conventional(pruner).ranking.ranked(scores)
    rows = [layer.weight.square().mean(1).sqrt() for layer in (model[0], model[1])]
    torch.testing.assert_close(ranked, torch.cat(rows).detach())
    now = choose(pruner._parts.aim, pruner._parts.hooks.coupled.bound).scores
    relative = choices.initial(pruner).ranking.ranked(now)
    torch.testing.assert_close(relative[:8].mean(), torch.tensor(1.0))
    torch.testing.assert_close(relative[8:].mean(), torch.tensor(1.0))
    # A neuron of the first layer costs 4 + 16 MACs, of the second 8 + 2.
    flops = torch.tensor([20e-6, 10e-6], dtype=torch.float64)
    worth = choices.softmax(pruner).ranking.ranked(torch.ones(24))[[0, 8]]
    torch.testing.assert_close(worth, (1 - flops.softmax(0)).float())


def made_up(variant: str, seed: int, accuracy: float, ratio: float = 0.5) -> dict[str, Any]:
    left = 100 * (1 - ratio)
    numbers = {"accuracy": accuracy, "macs": left, "macs_dense": 100, "cost": 0.6}
    numbers |= {"work": 300.0 if ratio == 0 else 180.0, "cpu_seconds": 20.0 if ratio == 0 else 15.0}
    return {"task": "digits", "variant": variant, "ratio": ratio, "seed": seed, **numbers}


def test_differences_are_paired_by_seed() -> None:
    page = module("page")
    rows = [made_up("thinner", seed, 50 + 10 * seed) for seed in range(4)]
    rows += [made_up("one-cycle", seed, 52 + 10 * seed + (seed == 2)) for seed in range(3)]
    rows.append({**made_up("one-cycle", 3, 0.0), "error": "StateError: the loss is not finite"})
    spec = {"tasks": ["digits"], "ratios": [0.5], "variants": ["thinner", "one-cycle"]}
    lines = page.table(rows, {**spec, "against": ["thinner"]}).splitlines()
    # 2, 2 and 3: mean 2.33, its standard error 0.577 / sqrt(3), and 4.303 of these are less.
    assert lines[2] == "| digits | 0.5 | thinner | 4 | 65.0 ± 12.9 |  | 0.500 | 0.60 |  |"
    cells = ["digits", "0.5", "one-cycle", "3, 1 failed", "62.3 ± 10.5", "**+2.3 ± 0.3**", "0.500"]
    assert lines[3] == f"| {' | '.join(cells)} | 0.60 |  |"
    # Of a run that took three quarters of the dense run's time for 0.6 of its work; and of one that
    # began where that ended, which adds 1 to both.
    rows.append(made_up("dense", 0, 70.0, ratio=0.0))
    assert page.table(rows, {**spec, "against": []}).splitlines()[2].endswith("| 0.60 | 0.75 |")
    rows[0]["cost"] += 1
    assert page.time_of(rows, {0: rows[0]}) == "1.75"
    assert page.time_of(rows, {0: rows[0] | {"device": "cuda"}}) == ""  # several runs share a card
    assert page.difference([1.0, 2.0, 4.9]) == "+2.6 ± 1.2"
    assert page.difference([1.0, 1.0]) == "+1.0 ± 0.0"  # two are never sure
    assert page.difference([]) == ""


def test_variants_stand_beside_one() -> None:
    page = module("page")
    rows = [made_up(name, seed, 50 + seed) for name in ("one-cycle", "l1") for seed in range(3)]
    rows = [row | {"accuracy": row["accuracy"] + 2 * (row["variant"] == "l1")} for row in rows]
    rows += [row | {"task": "cifar", "cost": 0.7} for row in rows if row["seed"] < 2]
    spec = {"tasks": ["digits", "cifar"], "ratios": [0.5], "variants": ["l1"], "beside": "one-cycle"}
    page.require_known(rows, spec)
    lines = page.beside(rows, {**spec, "names": {"cifar": "CIFAR"}}).splitlines()
    head = ["", "seeds", "digits, 50 %: less one-cycle", "cost", "CIFAR, 50 %: less one-cycle", "cost"]
    assert lines[0] == f"| {' | '.join(head)} |"
    assert lines[2] == "| l1 | 3; 2 | **+2.0 ± 0.0** | 0.60 | +2.0 ± 0.0 | 0.70 |"
    with pytest.raises(ConfigError, match="beside has 'l2'"):
        page.require_known(rows, spec | {"beside": "l2"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- quality: {results: cpu, facts: true} -->\ntext", "1 marks of tables and 0 ends"),
        ("<!-- quality: {results: cpu, facts: true}-->\n<!-- end -->", "1 marks of tables and 1 ends"),
        ("<!-- quality: {results: nosuch, facts: true} -->\n<!-- end -->", "no results of nosuch"),
        ("<!-- quality: {results: cpu, tasks: [x]} -->\n<!-- end -->", "tasks has 'x'"),
        ("<!-- quality: {results: cpu, tasks: [], variants: []} -->\n<!-- end -->", "ratios is missing"),
    ],
)
def test_a_mistake_in_a_mark_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        module("page").filled(text, plots=False)
    assert said in str(caught.value)


def test_the_pages_are_what_the_results_say() -> None:
    page = module("page")
    for path in page.PAGES:
        text = path.read_text()
        assert page.MARK.search(text), path
        assert page.filled(text, plots=False) == text, path
