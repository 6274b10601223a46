"""torchvision's detectors: the part of their forward pass that grouping can trace.

The forward pass of a detector resizes images, drops boxes and keeps the best ones, so that sizes depend
on the data; and while it trains, it wants targets. None of that involves weights. `forward` runs only
what does: backbone, neck and heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.core.errors import ConfigError


def forward(
    model: nn.Module, images: Tensor, proposals: int | None = None, detections: int | None = None
) -> list[Tensor]:
    """Run backbone, neck and heads of a detector; pass this function as `Config.forward`.

    Two-stage models (Faster, Mask and Keypoint R-CNN) propose boxes, which depend on the data. Here they
    pool fixed boxes instead, as many as at inference, because that number is what their heads cost.

    Args:
        model: SSD, SSDlite, RetinaNet, FCOS, a generalized R-CNN, or a module that is built like one of
            them: with `backbone` and `head`, or with `backbone`, `rpn` and `roi_heads`.
        images: [N, 3, H, W] float, as the backbone gets them. H and W determine the backbone's share of
            the cost.
        proposals: boxes per image for the box head. None: as many as the model keeps. With fewer, the
            proof is faster: pass `functools.partial(forward, proposals=100)`.
        detections: boxes per image for mask and keypoint heads. None: as many as the model returns.

    Returns:
        The outputs of the heads; their shapes do not depend on the data.

    Raises:
        ConfigError: the model is not built like a detector, or `images` is not one batch.

    Examples:
        A detector's parts in small.

        >>> import torch, ocsfast
        >>> from torch import nn
        >>> class Head(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.boxes = nn.Conv2d(8, 4, 1)
        ...     def forward(self, features):
        ...         return {"boxes": torch.cat([self.boxes(x).flatten(2) for x in features], dim=2)}
        >>> class Detector(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone, self.head = nn.Conv2d(3, 8, 3, stride=2), Head()
        >>> images = torch.randn(2, 3, 33, 33)
        >>> [output.shape for output in ocsfast.detection.forward(Detector(), images)]
        [torch.Size([2, 4, 256])]
        >>> ocsfast.group(Detector(), images, forward=ocsfast.detection.forward).num_groups
        8
    """
    detector: Any = model
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise ConfigError("example_inputs= of a detector is one batch of images, a tensor [N, 3, H, W]")
    two_stages = hasattr(model, "rpn") and hasattr(model, "roi_heads")
    if not hasattr(model, "backbone") or not (two_stages or hasattr(model, "head")):
        raise ConfigError(
            f"{type(model).__name__} has neither backbone and head nor backbone, rpn and roi_heads: "
            "pass a function of your own as forward="
        )
    features = detector.backbone(images)
    features = {"0": features} if isinstance(features, Tensor) else dict(features)
    if not two_stages:
        return list(detector.head(list(features.values())).values())

    return _two_stage_outputs(detector, features, images, proposals, detections)


def _two_stage_outputs(
    detector: Any,
    features: dict[str, Tensor],
    images: Tensor,
    proposals: int | None,
    detections: int | None,
) -> list[Tensor]:
    """The outputs of the region proposal network, and of the box, mask and keypoint heads."""
    logits, deltas = detector.rpn.head(list(features.values()))
    heads = detector.roi_heads
    # As many boxes as the box head sees at inference; the other bound, `pre_nms_top_n`, is larger.
    count = proposals or detector.rpn._post_nms_top_n["testing"]
    pooled = _pooled(heads.box_roi_pool, features, images, count)
    outputs = [*logits, *deltas, *heads.box_predictor(heads.box_head(pooled))]
    for kind in ("mask", "keypoint"):
        pool, head = getattr(heads, f"{kind}_roi_pool", None), getattr(heads, f"{kind}_head", None)
        if pool is not None and head is not None:
            pooled = _pooled(pool, features, images, detections or heads.detections_per_img)
            outputs.append(getattr(heads, f"{kind}_predictor")(head(pooled)))
    return outputs


def _pooled(pool: Any, features: dict[str, Tensor], images: Tensor, count: int) -> Tensor:
    """What a `MultiScaleRoIAlign` makes of fixed boxes: [N * count, C, *output_size].

    The module itself chooses each box's level by the size of the box, which cannot be traced. Here the
    boxes are dealt out to the levels in turn. They all begin at the image's corner, and their sides are
    between half and all of the image's.

    Args:
        pool: the module.
        features: name -> [N, C, height, width], one of each level.
        count: boxes per image.
    """
    from torchvision.ops import roi_align

    levels = [features[name] for name in pool.featmap_names if name in features]
    height, width = images.shape[-2:]
    far = torch.linspace(0.5, 1.0, count, dtype=images.dtype, device=images.device)
    zero = torch.zeros_like(far)
    boxes = torch.stack([zero, zero, far * width, far * height], dim=1)  # [count, 4]
    results = []
    for k, level in enumerate(levels[:count]):
        own = [boxes[k :: len(levels)]] * len(images)
        scale = level.shape[-1] / width
        results.append(roi_align(level, own, pool.output_size, scale, pool.sampling_ratio))
    return torch.cat(results)
