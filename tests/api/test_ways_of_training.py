"""Mixed precision, accumulation, schedulers, compilation, checkpointing: what people train with."""

import copy

import pytest
import torch
from helpers.networks import EPOCH, Net, batch, epochs, net, sgd, train
from helpers.runs import attach
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ocsfast
from ocsfast import StateError

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "ocsfast SGD": lambda p: ocsfast.optim.SGD(p, lr=0.01, momentum=0.9),
    "ocsfast AdamW": lambda p: ocsfast.optim.AdamW(p, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overflows_skip_the_penalty(name):
    """500 steps of a gradient scaler, every tenth with an overflow: then nothing moves at all."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = attach(model, optimizer, total_steps=2000, sparsify_from=1, deadline=1.0)
    train(model, optimizer, 2)
    pruner.step()
    assert pruner.stage == "sparsify"
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=50)
    skipped = 0
    for k in range(500):
        x, y = batch(k % 40)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if k % 10 == 9:
            model.fc1.weight.grad[0, 0] = float("inf")
            before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if k % 10 == 9:
            same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            skipped += all(same)
    assert skipped == 50
    assert all(torch.isfinite(p).all() for p in model.parameters())
    pruner.step()
    assert pruner.stage == "sparsify"
    assert pruner.cut().cost * 2 <= pruner.history[-1].cost_dense
    train(model, optimizer, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_goes_on_after_the_cut(dtype):
    """Inside one autocast region: it must not hand out copies of the weights as they were."""
    model = net()
    optimizer = sgd(model, lr=0.01)
    pruner = attach(model, optimizer)
    x, y = batch(0)
    with torch.autocast("cpu", dtype=dtype):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.cut()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
    assert model.conv1.weight.grad.shape == model.conv1.weight.shape
    optimizer.step()


def test_accumulation_and_clipping_equal_one_large_batch():
    def trained(parts):
        torch.manual_seed(0)
        model = Net()
        model.bn1 = model.bn2 = nn.Identity()
        optimizer = sgd(model)
        pruner = attach(model, optimizer, total_steps=60)
        for k in range(60):
            x, y = batch(k)
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(a), b) / parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if k % EPOCH == EPOCH - 1:
                pruner.step()
        assert pruner.stage == "pruned"
        assert pruner.steps == (pruner.t_cut or 0) * EPOCH
        return model.state_dict()

    one, four = trained(1), trained(4)
    for key, value in one.items():
        torch.testing.assert_close(four[key], value, rtol=1e-3, atol=1e-4)


def warm_up(optimizer, total):
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=total // 10)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - total // 10)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [total // 10])


SCHEDULERS = {
    "OneCycle": lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=n + 1),
    "Cosine": lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n),
    "Polynomial": lambda o, n: torch.optim.lr_scheduler.PolynomialLR(o, n),
    "warm-up": warm_up,
    "Step": lambda o, n: torch.optim.lr_scheduler.StepLR(o, n // 3),
    "Exponential": lambda o, n: torch.optim.lr_scheduler.ExponentialLR(o, 0.99),
    "Plateau": lambda o, n: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    "Lambda": lambda o, n: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 - k / (n + 1)),
    "Restarts": lambda o, n: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, max(1, n // 4)),
}


@pytest.mark.parametrize("each", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, each):
    epochs = 20
    model = net()
    optimizer = sgd(model)
    scheduler = SCHEDULERS[name](optimizer, epochs * EPOCH if each == "step" else epochs)
    arguments = [1.0] if name == "Plateau" else []
    pruner = attach(model, optimizer)
    for e in range(epochs):
        for k in range(EPOCH):
            train(model, optimizer, 1, first=e * EPOCH + k)
            if each == "step":
                scheduler.step(*arguments)
        if each == "epoch":
            scheduler.step(*arguments)
        pruner.step()
    if pruner.stage != "pruned":  # these tell nothing of the run's length: it takes longer, or a word
        assert name in ("Step", "Exponential", "Plateau", "Lambda", "Restarts")
        pruner.cut()
    assert 1 < pruner.t_cut <= epochs + 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_compilations():
    """One for the dense network, one more after the cut, and none because of the penalty."""
    compiled = []

    def backend(graph, inputs):
        compiled.append([x.shape for x in inputs if isinstance(x, nn.Parameter)])
        return graph.forward

    torch._dynamo.reset()
    model = net()
    optimizer = sgd(model)
    fast = torch.compile(model, backend=backend)
    pruner = attach(fast, optimizer, total_steps=60)
    at_cut = None
    for e in range(12):
        train(fast, optimizer, EPOCH, first=e * EPOCH)
        if pruner.step().cut:
            at_cut = len(compiled)
    assert pruner.stage == "pruned"
    assert (at_cut, len(compiled)) == (1, 2)
    assert compiled[1] == [p.shape for p in model.parameters()] != compiled[0]
    torch._dynamo.reset()


def test_weights_loaded_into_a_compiled_network(tmp_path):
    """They bring other sizes than it was compiled for."""
    torch._dynamo.reset()
    pruned, model, x = net(), net(1), batch(0)[0]
    ocsfast.attach(pruned, 0.5, optimizer=sgd(pruned), example_inputs=x).cut()
    ocsfast.save(pruned, tmp_path / "model.safetensors")
    fast = torch.compile(model.eval(), backend="aot_eager")
    fast(x)
    ocsfast.load(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(fast(x), pruned.eval()(x))
    torch._dynamo.reset()


def test_a_compiled_network_shows_its_input():
    """The hook that waits for an input comes after the compilation, which knows nothing of it."""
    torch._dynamo.reset()
    model = net()
    optimizer = sgd(model)
    fast = torch.compile(model, backend="eager")
    for e in range(3):
        train(fast, optimizer, EPOCH, first=e * EPOCH)
        report = ocsfast.step(fast, 0.5)
    assert report.check == 2
    assert not fast._forward_pre_hooks
    assert not model._forward_pre_hooks
    torch._dynamo.reset()


def test_channels_last_through_a_whole_run():
    model = net().to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    pruner = attach(model, optimizer, total_steps=60)
    epochs(model, optimizer, pruner, 12)
    assert pruner.stage == "pruned"
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_activation_checkpointing_changes_nothing():
    class Recomputed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    def trained(kind):
        torch.manual_seed(0)
        model = kind()
        model.bn1 = model.bn2 = nn.Identity()  # statistics are updated twice where it is recomputed
        optimizer = sgd(model)
        pruner = attach(model, optimizer, total_steps=60)
        epochs(model, optimizer, pruner, 12)
        assert pruner.stage == "pruned"
        return model.state_dict()

    plain, recomputed = trained(Net), trained(Recomputed)
    assert all(torch.equal(value, recomputed[key]) for key, value in plain.items())


def test_no_cut_inside_a_step():
    model = net()
    optimizer = sgd(model)
    pruner = attach(model, optimizer)
    train(model, optimizer, 2)
    model.eval()  # so that a forward pass leaves nothing behind
    before = copy.deepcopy(model.state_dict())
    refused = []

    def try_to_cut(*_):
        with pytest.raises(StateError) as error:
            pruner.cut()
        refused.append(str(error.value).split(" is under way")[0])

    inside = model.bn1.register_forward_hook(try_to_cut)
    loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
    inside.remove()
    model.conv1.weight.register_hook(try_to_cut)
    loss.backward()
    assert refused == ["the model's forward pass", "a backward pass"]
    assert (pruner.stage, len(pruner.history)) == ("observe", 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pruner.cut()


def test_an_optimizer_of_stale_parameters():
    model = net()
    optimizer = sgd(model)
    model.fc1 = nn.Linear(model.fc1.in_features, model.fc1.out_features)
    said = r"fc1\.weight and 1 more are to be pruned, but .* does not own them.*Add what is missing"
    with pytest.raises(StateError, match=said):
        attach(model, optimizer)


def test_groups_with_rates_of_their_own_agree_on_what_shrinks():
    model = net()
    groups = [{"params": model.conv1.parameters(), "lr": 0.01}]
    rest = [p for n, p in model.named_parameters() if not n.startswith("conv1")]
    optimizer = torch.optim.SGD([*groups, {"params": rest}], lr=0.05, momentum=0.9)
    pruner = attach(model, optimizer, total_steps=60)
    epochs(model, optimizer, pruner, 12)
    assert pruner.stage == "pruned"
