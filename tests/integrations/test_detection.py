"""torchvision's detectors: grouped, proved, cut, trained and run, and the page that shows how."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.choices import portion, predicted_macs
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import ops
from torchvision.models import resnet
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet, faster_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD

import ocsfast
from ocsfast.core.errors import OcsfastError
from ocsfast.core.families import Families
from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import group
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.proof.weights import randomize
from ocsfast.grouping.scope import Scope

PAGE = Path(__file__).parents[2] / "docs" / "detectors.md"
SIDE = 64
WIDTH = 32  # of the pyramid


class Narrow(resnet.Bottleneck):
    expansion = 1  # residual widths of 64, 128, 256 and 512


def narrow_resnet(**options: Any) -> resnet.ResNet:
    return resnet.ResNet(Narrow, [2, 1, 2, 1], width_per_group=8, **options)


def pyramid(width: int = WIDTH, **options: Any) -> BackboneWithFPN:
    body = narrow_resnet(**options)
    names = {f"layer{k}": str(k - 1) for k in range(1, 5)}
    return BackboneWithFPN(body, names, [64, 128, 256, 512], width)


class Rescaled(nn.Module):
    """The first map is normalized over its channels and rescaled by a parameter, as in SSD with VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, 4, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1))
        self.second = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 20, 3, 2, 1), nn.ReLU())
        self.scale_weight = nn.Parameter(torch.ones(16) * 20)
        self.out_channels = [16, 20]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        scaled = self.scale_weight.view(1, -1, 1, 1) * F.normalize(x)
        return {"0": scaled, "1": self.second(x)}


SIZES = {"min_size": SIDE, "max_size": SIDE}
# Every proposal and detection is kept, so that the model's own cost at inference is known.
BOXES = {**SIZES, "rpn_post_nms_top_n_test": 6, "box_detections_per_img": 3, "box_score_thresh": 0.0}


def box_head() -> dict[str, nn.Module]:
    return {
        "box_head": faster_rcnn.TwoMLPHead(WIDTH * 49, 40),
        "box_predictor": faster_rcnn.FastRCNNPredictor(40, 3),
    }


def rescaled_ssd() -> nn.Module:
    return SSD(Rescaled(), DefaultBoxGenerator([[2], [2]]), (SIDE, SIDE), 3, score_thresh=0.0)


def frozen_faster_rcnn() -> nn.Module:
    backbone = pyramid(norm_layer=ops.FrozenBatchNorm2d)
    for name, parameter in backbone.body.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
    return FasterRCNN(backbone, **BOXES, **box_head())


def faster_rcnn_without_pyramid() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, WIDTH, 3, 2, 1))
    body.out_channels = WIDTH
    anchors = AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),))
    return FasterRCNN(body, rpn_anchor_generator=anchors, **BOXES, **box_head())


def faster_rcnn_with_convolutions() -> nn.Module:
    head = faster_rcnn.FastRCNNConvFCHead((WIDTH, 7, 7), [24, 24], [40], norm_layer=nn.BatchNorm2d)
    predictor = faster_rcnn.FastRCNNPredictor(40, 3)
    return FasterRCNN(pyramid(), box_head=head, box_predictor=predictor, **BOXES)


def mask_rcnn() -> nn.Module:
    head, predictor = MaskRCNNHeads(WIDTH, (24, 24), 1), MaskRCNNPredictor(24, 20, 3)
    return MaskRCNN(pyramid(), mask_head=head, mask_predictor=predictor, **BOXES, **box_head())


def keypoint_rcnn() -> nn.Module:
    head, predictor = KeypointRCNNHeads(WIDTH, (24, 24)), KeypointRCNNPredictor(24, 5)
    heads = {**box_head(), "keypoint_head": head, "keypoint_predictor": predictor}
    return KeypointRCNN(pyramid(), **BOXES, **heads)


# The model, its families, and the layers that keep their outputs. The residual network has 16 families
# (4 streams, 12 inner layers; 11 where it is frozen to layer1), the pyramid 2.
DETECTORS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "ssd_rescaled": (rescaled_ssd, 3, r"head\..*"),
    "retinanet": (
        lambda: RetinaNet(pyramid(), 3, **SIZES),
        26,
        r"head\..*\.(cls_logits|bbox_reg)",
    ),
    # Whole groups of its norms go, of two channels each here.
    "fcos": (lambda: FCOS(pyramid(64), 3, **SIZES), 26, r"head\..*\.(cls_logits|bbox_reg|bbox_ctrness)"),
    "faster_rcnn_frozen": (
        frozen_faster_rcnn,
        16,
        r"backbone\.body\.(conv1|layer1.*)|rpn\.head\.(cls_logits|bbox_pred)|.*box_predictor.*",
    ),
    "faster_rcnn_without_pyramid": (
        faster_rcnn_without_pyramid,
        5,
        r"rpn\.head\.(cls_logits|bbox_pred)|.*box_predictor.*",
    ),
    "faster_rcnn_with_convolutions": (
        faster_rcnn_with_convolutions,
        22,
        r"rpn\.head\.(cls_logits|bbox_pred)|.*box_predictor.*",
    ),
    "mask_rcnn": (
        mask_rcnn,
        24,
        r"rpn\.head\.(cls_logits|bbox_pred)|.*box_predictor.*|.*mask_fcn_logits",
    ),
    "keypoint_rcnn": (
        keypoint_rcnn,
        23,
        r"rpn\.head\.(cls_logits|bbox_pred)|.*box_predictor.*|.*kps_score_lowres",
    ),
}


def images(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.rand(3, SIDE, SIDE, dtype=dtype) for _ in range(count)]


def targets(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    target = {"boxes": torch.tensor([[5.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    if isinstance(model, MaskRCNN):
        target["masks"] = torch.ones(1, SIDE, SIDE, dtype=torch.uint8)
    if isinstance(model, KeypointRCNN):
        target["keypoints"] = torch.cat([20 * torch.rand(1, 5, 2) + 10, torch.ones(1, 5, 1)], -1)
    return [dict(target) for _ in range(count)]


def grouped(model: nn.Module) -> Families:
    scope = Scope(forward=ocsfast.detection.forward)
    return group(model, (torch.zeros(1, 3, SIDE, SIDE),), scope=scope)


def zero(model: nn.Module, families: Families, pruned: Tensor) -> None:
    """Every slice of the pruned groups, in parameters and buffers alike."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    gone = torch.cat([pruned, torch.tensor([False])])
    with torch.no_grad():
        for axis in families.axes:
            state[axis.tensor].index_fill_(axis.axis, torch.nonzero(gone[axis.groups]).flatten(), 0.0)


def counted(run: Callable[[], Any]) -> int:
    with torch.no_grad():
        return count_macs(run)


def train_a_step(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    losses = model.train()(images(2), targets(model, 2))
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)
    optimizer.step()


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_cut_exactly_and_trains_on(name):
    torch.manual_seed(0)
    make, number, dense = DETECTORS[name]
    model = make()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    families = grouped(model)
    assert len(families.families) == number
    # Only what has to stay does: outputs, and frozen layers. No family failed the proof.
    for frozen in families.frozen:
        assert re.fullmatch(dense, frozen.where), frozen
    pruned = portion(families, 0.4)

    # The model's own prediction, boxes picked and all, is what zeroing the slices gives. In float64.
    reference = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        randomize(reference)
    subject = copy.deepcopy(reference)
    zero(reference, families, pruned)
    cut_model(subject, families, pruned)
    inputs = images(1, torch.float64)
    with torch.no_grad():
        (expected,), (found,) = reference(inputs), subject(inputs)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)

    before = predicted_macs(families)
    left = cut_model(model, families, pruned)
    assert predicted_macs(left) < 0.7 * before
    for parameter, tensor in model.named_parameters():
        layer, _, kind = parameter.rpartition(".")
        if not tensor.requires_grad or (kind == "bias" and re.fullmatch(dense, layer)):
            assert tensor.shape == shapes[parameter], parameter
    model.eval()
    batch = torch.rand(1, 3, SIDE, SIDE)
    assert predicted_macs(left) == counted(lambda: ocsfast.detection.forward(model, batch))
    assert predicted_macs(left) == counted(lambda: model(images(1)))
    train_a_step(model)
    (found,) = model.eval()(images(1))
    assert all(value.isfinite().all() for value in found.values())


def test_one_line_prunes_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    model = frozen_faster_rcnn().train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1e-3, momentum=0.9)
    reports = []
    for _ in range(8):
        sum(model(images(2), targets(model, 2)).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(
            ocsfast.step(
                model,
                0.4,
                example_inputs=torch.zeros(1, 3, SIDE, SIDE),
                forward=ocsfast.detection.forward,
                total_steps=8,
                check_every=1,
            )
        )
    (cut,) = (report for report in reports if report.cut)
    assert cut.cost <= 0.6 * cut.cost_dense
    assert reports[-1].stage == "pruned"
    assert counted(lambda: model.eval()(images(1))) == cut.cost
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())

    ocsfast.save(model, tmp_path / "model.safetensors")
    again = frozen_faster_rcnn()
    ocsfast.load(again, tmp_path / "model.safetensors")
    inputs = images(2)
    for a, b in zip(model.eval()(inputs), again.eval()(inputs), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_pyramid_and_pooled_regions_are_one_family():
    """The levels' convolutions, what the heads read, and 49 columns each of the first linear layer."""
    torch.manual_seed(0)
    model = frozen_faster_rcnn()
    families = grouped(model)
    axes = {(a.tensor, a.axis): a.groups for a in families.axes}
    levels = [axes[f"backbone.fpn.layer_blocks.{k}.0.weight", 0] for k in range(4)]
    assert all(torch.equal(level, levels[0]) for level in levels)
    assert torch.equal(axes["rpn.head.conv.0.0.weight", 1], levels[0])
    fc6 = axes["roi_heads.box_head.fc6.weight", 1]
    assert torch.equal(fc6, levels[0].repeat_interleave(49))


def test_fewer_boxes_cost_less():
    model = frozen_faster_rcnn().eval()
    x = torch.rand(1, 3, SIDE, SIDE)
    costs = [
        counted(lambda n=n: ocsfast.detection.forward(model, x, proposals=n)) for n in (1, 3, None, 7)
    ]
    head = (WIDTH * 49 * 40) + 40 * 40 + 40 * (3 + 12)
    assert [cost - costs[0] for cost in costs] == [0, 2 * head, 5 * head, 6 * head]
    scope = Scope(forward=partial(ocsfast.detection.forward, proposals=3))
    assert predicted_macs(group(model, (x,), scope=scope, verify=False)) == costs[1]


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(4, 4), torch.zeros(1, 3, 8, 8), "Linear has neither backbone and head"),
        (rescaled_ssd(), torch.zeros(3, 8, 8), "one batch of images"),
        (rescaled_ssd(), [torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], "one batch of images"),
    ],
)
def test_what_is_no_detector_says_so(model, inputs, message):
    with pytest.raises(OcsfastError, match=message):
        group(model, (inputs,), scope=Scope(forward=ocsfast.detection.forward))


def test_the_page_runs(monkeypatch, capsys):
    """docs/detectors.md from top to bottom, on narrow models."""
    torch.manual_seed(0)
    monkeypatch.setattr("torchvision.models.resnet50", narrow_resnet)
    monkeypatch.setattr(
        "torchvision.models.detection.fasterrcnn_resnet50_fpn", lambda **_: frozen_faster_rcnn()
    )
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 5
    page: dict[str, Any] = {}
    for block in blocks:
        exec(block, page)
    model, report = page["model"], page["cut"]
    assert report.cost <= 0.5 * report.cost_dense
    assert f"{report.cost:,} after it" in capsys.readouterr().out
    images = torch.zeros(1, 3, 300, 300)
    assert counted(lambda: ocsfast.detection.forward(model, images)) == report.cost
    assert model.head.classification_head.module_list[0].out_channels == 2 * 4
    assert page["found"][0].keys() == {"boxes", "scores", "labels"}
    inputs = page["pictures"](1)[0]
    (a,), (b,) = model.eval()(inputs), page["again"].eval()(inputs)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert page["facts"].macs_left <= 0.6 * page["facts"].macs
    assert page["own_facts"].macs == report.cost_dense
