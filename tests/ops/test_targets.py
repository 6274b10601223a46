"""What a ratio may be of: FLOPs, parameters, bytes, a mixture, or a user's own products."""

import pytest
from helpers.networks import batch, net, train
from helpers.runs import run

from ocsfast.choice.targets import target_products
from ocsfast.grouping.engines import group
from ocsfast.ops.cost import build_cost_model


def test_the_ratio_may_be_of_parameters():
    model, optimizer, pruner = run(target="params", ratio=0.6)
    dense = sum(p.numel() for p in model.parameters())
    train(model, optimizer, 3)
    report = pruner.cut()
    assert (report.cost_dense, report.cost) == (dense, sum(p.numel() for p in model.parameters()))
    assert report.cost <= 0.4 * dense


def test_target_bytes_counts_each_tensor_in_its_dtype():
    model = net()
    model.fc2.double()
    families = group(net(), (batch(0)[0],))
    products, unit = target_products("bytes", families, dict(model.named_parameters()))
    sizes = [f.size for f in families.families]
    assert unit == "bytes"
    assert build_cost_model(families, products, unit)(sizes) == sum(
        p.numel() * p.element_size() for p in model.parameters()
    )


def test_a_weighted_target_lies_between_its_parts():
    def shares(target):
        model, optimizer, pruner = run(target=target)
        before = [sum(p.numel() for p in model.parameters()), pruner.families]
        dense_macs = build_cost_model(before[1], before[1].macs, "MACs")
        train(model, optimizer, 3)
        report = pruner.cut()
        left = dense_macs([kept for _, kept, _ in report.kept])
        params = sum(p.numel() for p in model.parameters())
        return 1 - left / report_dense(dense_macs, before[1]), 1 - params / before[0], report

    def report_dense(model, families):
        return model([f.size for f in families.families])

    flops, params, report = shares({"flops": 3, "params": 1})
    assert 0.75 * flops + 0.25 * params == pytest.approx(1 - report.cost / report.cost_dense, abs=1e-6)
    assert report.cost <= report.cost_dense // 2
    assert shares({"flops": 1})[2].kept == shares("flops")[2].kept


def test_the_ratio_may_be_of_products_of_ones_own():
    model, optimizer, pruner = run(target=lambda families: families.macs[:1])
    train(model, optimizer, 3)
    assert pruner.cut().cost_dense == 8 * 3 * 9 * 64
