"""YOLO in its own trainer: cut, saved, resumed, read without ocsfast, exported, and trained on."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

os.environ["YOLO_OFFLINE"] = "1"  # before ultralytics is imported: it would look for updates
pytest.importorskip("ultralytics")

from helpers.pictures import write_pictures
from ultralytics import YOLO
from ultralytics.utils import ROOT, YAML
from ultralytics.utils.torch_utils import EarlyStopping, ModelEMA

import ocsfast
from ocsfast import ConfigError
from ocsfast.integrations.ultralytics import PruneCallback, forward

EPOCHS = 6
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def configuration(folder, name="v8/yolov8", width=0.125):
    """A YOLO's own configuration, half as wide as its smallest."""
    config = YAML.load(ROOT / "cfg" / "models" / f"{name}.yaml")
    del config["scales"]
    path = folder / "small.yaml"
    YAML.save(path, {**config, "depth_multiple": 0.33, "width_multiple": width})
    return path


def train(model, prune, folder, data, **options):
    """Train with the pruning added; return the trainer."""
    if prune is not None:
        prune.add_to(model)
    where = {"data": data, "project": folder, "name": "run", "exist_ok": True, "device": "cpu"}
    length = {"epochs": EPOCHS, "batch": 4, "nbs": 8, "warmup_epochs": 1, "close_mosaic": 2}
    rest = {"imgsz": 64, "workers": 0, "amp": False, "plots": False, "save_period": 1}
    given = {} if "resume" in options else {**where, **length, **rest, "verbose": False}
    model.train(**{**given, **options})
    return model.trainer


def widths(model):
    return [tuple(p.shape) for p in model.parameters()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder, data, and the first run: its callback, and what its trainer ended with."""
    folder = tmp_path_factory.mktemp("yolo")
    data = write_pictures(folder / "data")
    prune, model = PruneCallback(0.5), YOLO(configuration(folder))
    trainer = train(model, prune, folder, data)
    return folder, data, prune, trainer


def checkpoint(folder, epoch):
    return folder / "run" / "weights" / f"epoch{epoch}.pt"


def test_it_cuts_and_trains_on(made):
    folder, _, prune, trainer = made
    report = prune.run.report
    assert report.stage == "pruned"
    assert 2 * report.cost <= report.cost_dense
    # 4 batches an epoch, 2 in a step but for the first epoch, which warms up.
    taken = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert taken == {prune.run.pruner.config.total_steps}
    last = YOLO(trainer.last).model
    assert widths(trainer.model) == widths(trainer.ema.ema) == widths(last)
    assert widths(YOLO(trainer.best).model) == widths(last)
    assert not hasattr(trainer.ema.ema, "ocsfast_run")
    # The average goes on being one: of the last two epochs, both after the cut.
    before = YOLO(checkpoint(folder, EPOCHS - 2)).model
    assert widths(before) == widths(last)
    pairs = zip(before.named_parameters(), last.parameters(), strict=True)
    same = [name for (name, a), b in pairs if a.dim() == 4 and torch.equal(a, b)]
    assert same == ["model.22.dfl.conv.weight"]  # which is not trained


def renew_average(trainer):
    trainer.ema = ModelEMA(trainer.model)


@pytest.mark.parametrize("epoch", [1, EPOCHS - 2])
def test_it_resumes_before_and_after_the_cut(made, epoch, tmp_path):
    folder, data, prune, trainer = made
    model, again = YOLO(checkpoint(folder, epoch)), PruneCallback(0.5)
    uncut = hasattr(model.model, "ocsfast_run")
    assert uncut == (epoch == 1)
    if uncut:  # as the trainer does where it goes back to its last checkpoint
        model.add_callback("on_train_epoch_start", renew_average)
    resumed = train(model, again, folder, data, resume=True, save_dir=str(tmp_path))
    assert resumed.start_epoch == epoch + 1
    assert again.run.report.stage == "pruned"
    if uncut:
        assert widths(resumed.model) == widths(resumed.ema.ema)
        assert again.run.pruner.t_cut == prune.run.pruner.t_cut
        assert 2 * again.run.report.cost <= again.run.report.cost_dense
    else:
        assert widths(resumed.model) == widths(resumed.ema.ema) == widths(trainer.model)
        assert again.run.pruner is None


ALONE = """
import sys
sys.modules["ocsfast"] = None  # it cannot be imported
import torch
from ultralytics import YOLO
images = torch.load(sys.argv[1])
torch.save([YOLO(path).model.eval()(images)[0] for path in sys.argv[3:]], sys.argv[2])
"""


def test_its_checkpoints_are_read_without_ocsfast(made, tmp_path):
    folder, *_ = made
    torch.save(IMAGES, tmp_path / "images.pt")
    paths = [checkpoint(folder, epoch) for epoch in (0, EPOCHS - 1)]  # before the cut, after it
    words = map(str, (tmp_path / "images.pt", tmp_path / "out.pt", *paths))
    command = [sys.executable, "-c", ALONE, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = [YOLO(path).model.eval()(IMAGES)[0] for path in paths]
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), wanted)


def test_it_exports_and_fuses_what_is_left(made):
    *_, trainer = made
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = YOLO(trainer.best)
    plain = model.model.float().eval()
    with torch.no_grad():
        wanted = plain(IMAGES)[0]
        torch.testing.assert_close(plain.fuse(verbose=False)(IMAGES)[0], wanted, rtol=1e-4, atol=1e-3)
    path = YOLO(trainer.best).export(format="onnx", imgsz=64, batch=2, simplify=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-3)


def test_it_trains_a_cut_model_on(made, tmp_path):
    _, data, _, trainer = made
    prune = PruneCallback(0.5)
    after = train(YOLO(trainer.best), prune, tmp_path, data, epochs=1)
    assert widths(after.model) == widths(trainer.model)
    assert prune.run.report.stage == "pruned"
    names = {name for name, p in after.model.named_parameters() if not p.requires_grad}
    assert all(".dfl" in name for name in names)


def test_data_with_other_classes_are_refused_for_a_cut_model(made, tmp_path):
    _, data, _, trainer = made
    other = tmp_path / "other.yaml"
    YAML.save(other, {**YAML.load(data), "names": ["red", "blue", "green"]})
    with pytest.raises(ConfigError, match="cut model with 2 classes, the data have 3"):
        train(YOLO(trainer.best), PruneCallback(0.5), tmp_path, other)


def test_a_run_by_the_clock_has_to_say_how_long_it_is(made, tmp_path):
    folder, data, *_ = made
    with pytest.raises(ConfigError, match=r"time=1.*total_steps= to PruneCallback"):
        train(YOLO(folder / "small.yaml"), PruneCallback(0.5), tmp_path, data, time=1)


def test_early_stopping_counts_from_the_cut_on():
    prune = PruneCallback(0.5)
    trainer = SimpleNamespace(ema=None, stopper=EarlyStopping(patience=2))
    for epoch, fitness in enumerate((0.5, 0.4, 0.3, 0.2)):
        trainer.epoch = epoch
        prune.on_train_epoch_end(trainer)
        assert not trainer.stopper(epoch + 1, fitness)


def test_a_pupil_is_refused(made, tmp_path):
    _, data, _, trainer = made
    small = YOLO(configuration(tmp_path))
    with pytest.raises(ConfigError, match="distill_model=: its loss compares feature maps"):
        train(small, PruneCallback(0.5), tmp_path, data, distill_model=str(trainer.best))


QUICK = ("11/yolo11-seg",)
SLOW = (
    *("v5/yolov5", "v9/yolov9t", "v10/yolov10n", "26/yolo26"),
    *("11/yolo11", "11/yolo11-pose", "11/yolo11-obb", "11/yolo11-cls"),
)
SHRINKING = (*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))


@pytest.mark.parametrize("name", SHRINKING)
def test_all_of_a_model_can_shrink(name, tmp_path):
    model = YOLO(configuration(tmp_path, name)).model.requires_grad_(True)
    facts = ocsfast.inspect(model, IMAGES, ratio=0.5, forward=forward)
    assert facts.largest_ratio > 0.85
    assert facts.prunable > 0.998
