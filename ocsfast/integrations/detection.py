"""torchvision's detectors: the part of their forward pass that grouping traces.

A detector's own forward pass resizes images, drops boxes and picks the best ones, so that sizes depend
on the data, and it wants targets while it trains. None of that has weights. What has is traced instead:
`ocsfast.step(model, 0.5, example_inputs=images, forward=ocsfast.detection.forward)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.core.errors import ConfigError


def forward(
    model: nn.Module, images: Tensor, proposals: int | None = None, detections: int | None = None
) -> list[Tensor]:
    """Backbone, neck and heads of a detector: what `Config.forward` can be for one.

    Two-stage models (Faster, Mask and Keypoint R-CNN) pool fixed boxes in the place of those that they
    would propose, as many as at inference, since that is what their heads cost.

    Args:
        model: SSD, SSDlite, RetinaNet, FCOS, a generalized R-CNN, or a module built like them: with
            `backbone` and `head`, or with `backbone`, `rpn` and `roi_heads`.
        images: [N, 3, H, W], as the backbone gets them; H and W decide what share the backbone has in
            the cost.
        proposals: boxes an image for the box head; None: as many as the model keeps. Fewer make the
            proof faster: pass `functools.partial(forward, proposals=100)`.
        detections: boxes an image for mask and keypoint heads; None: as many as the model returns.

    Returns:
        The heads' outputs, which keep their shapes.

    Raises:
        ConfigError: the model is not built like a detector, or the images are not one batch.
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

    logits, deltas = detector.rpn.head(list(features.values()))
    heads = detector.roi_heads
    # What the box head sees at inference; `pre_nms_top_n` is the other bound, and the larger one.
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
    """What `MultiScaleRoIAlign` makes of `count` boxes an image, dealt out to its levels in turn.

    [N * count, C, *output_size]. It would look at the boxes to find each one's level, which cannot be
    traced. They all begin at the image's corner and are between half of it and all of it.
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
