"""A run that ends with its model uncut says so: as the pruner is collected, or the process ends."""

import gc
import logging
import textwrap

import pytest
import torch
from helpers.networks import EPOCH, epochs, net, sgd, train
from helpers.processes import run_script
from helpers.runs import attach, run

import ocsfast
from ocsfast.distributed.ddp import Replicas

NEVER = "the model was never cut"


@pytest.fixture
def ended(caplog):
    """A function: what is said once everything that nothing refers to is gone."""
    gc.collect()  # pruners of other tests
    caplog.clear()

    def said():
        gc.collect()
        return [r.getMessage() for r in caplog.records if NEVER in r.getMessage()]

    return said


LATER = (
    "To cut at once, at any time: Pruner.cut(), of what ocsfast.attach returns. Nothing is lost if the "
    "run is to be resumed"
)
UNKNOWN = (
    "Pass epochs= (step is called once in each) or total_steps= (optimizer steps of the whole run) to "
    "plan the cut. "
)


@pytest.mark.parametrize(
    ("options", "count", "told"),
    [
        (
            {},
            3,
            "after 15 optimizer steps and 3 checks, in stage 'observe'; the deadline was planned at "
            "optimizer step 60",
        ),
        (
            {"total_steps": None, "epochs": 20, "sparsify_from": 2},
            4,
            "after 20 optimizer steps and 4 checks, in stage 'sparsify'; the deadline was planned at "
            "optimizer step 60",
        ),
        (
            {"total_steps": None},
            3,
            "after 15 optimizer steps and 3 checks, in stage 'observe'; nothing told the run's length",
        ),
        (
            {"deadline": 9},
            1,
            "5 optimizer steps and 1 checks, in stage 'observe'; the deadline was planned",
        ),
        (
            {"deadline": None},
            1,
            "the choice was not stable and small yet, and deadline=None sets no limit",
        ),
    ],
)
def test_a_pruner_that_is_collected(options, count, told, ended, caplog):
    model, optimizer, pruner = run(**options)
    epochs(model, optimizer, pruner, count)
    del model, optimizer, pruner
    (said,) = ended()
    assert told in said
    assert LATER in said
    known = [f"{name}={value}" for name, value in {"total_steps": 100, **options}.items() if value]
    length = next((said for said in known if said.startswith(("epochs", "total"))), None)
    assert (f"The run's length was told by {length}. " if length else UNKNOWN) in said
    (record,) = [r for r in caplog.records if NEVER in r.getMessage()]
    assert record.levelno == logging.WARNING


def test_without_any_call_of_step(ended):
    model, optimizer, pruner = run()
    train(model, optimizer, 7)
    del model, optimizer, pruner
    (said,) = ended()
    assert "after 7 optimizer steps and 0 checks, in stage 'observe'; step was not called" in said


def test_calls_in_the_inner_loop_that_were_too_few(ended):
    model, optimizer, pruner = run(total_steps=None, check_every="auto")
    for k in range(7):
        train(model, optimizer, 1, first=k)
        pruner.step()
    del model, optimizer, pruner
    (said,) = ended()
    assert "after 7 optimizer steps and 0 checks, in stage 'observe'; no check was due" in said


def test_a_run_by_step_that_only_listened(ended):
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, EPOCH)
    ocsfast.step(model, 0.5)
    del model, optimizer
    (said,) = ended()
    assert "ocsfast.step was called after 5 optimizer steps to listen" in said
    assert "Nothing is lost if the run is to be resumed" in said


def test_a_run_by_step_that_attached(ended):
    model = net()
    optimizer = sgd(model)
    for _ in range(2):
        train(model, optimizer, EPOCH)
        ocsfast.step(model, 0.5)
    del model, optimizer
    (said,) = ended()
    assert "after 10 optimizer steps and 1 checks" in said


def silent_cut():
    model, optimizer, pruner = run()
    train(model, optimizer, EPOCH)
    pruner.cut()


def silent_detached():
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, 2)
    pruner.detach()


def silent_forgotten():
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, EPOCH)
    ocsfast.step(model, 0.5)
    ocsfast.detach(model)


def silent_untrained():
    run()
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, EPOCH)  # of another run
    attach(model, optimizer)


def silent_only_loaded():
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, 2)
    state = pruner.state_dict()
    pruner.detach()
    run()[2].load_state_dict(state)


def silent_elsewhere():
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, 2)
    pruner._watch.process = -1  # a fork, whose parent will speak


@pytest.mark.parametrize(
    "case",
    [
        silent_cut,
        silent_detached,
        silent_forgotten,
        silent_untrained,
        silent_only_loaded,
        silent_elsewhere,
    ],
)
def test_nothing_to_say(case, ended):
    case()
    assert ended() == []


def test_only_the_first_rank_speaks(ended, monkeypatch, caplog):
    monkeypatch.setattr(Replicas, "is_first", property(lambda self: False))
    with caplog.at_level(logging.DEBUG, "ocsfast"):
        model, optimizer, pruner = run(total_steps=None, deadline=2)
        epochs(model, optimizer, pruner, 3)  # to the cut
        model, optimizer, pruner = run(total_steps=None)
        epochs(model, optimizer, pruner, 2)
        model = net()
        optimizer = sgd(model)
        train(model, optimizer, EPOCH)
        ocsfast.step(model, 0.5)
        del model, optimizer, pruner
        assert ended() == []
    assert [r for r in caplog.records if r.name == "ocsfast"] == []


def test_a_resumed_run_that_made_no_check(ended):
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, 2)
    state = pruner.state_dict()
    pruner.detach()
    model, optimizer, pruner = run()
    pruner.load_state_dict(state)
    train(model, optimizer, 1)
    del model, optimizer, pruner
    (said,) = ended()
    assert (
        "after 11 optimizer steps and 2 checks, in stage 'observe'; it was resumed and made no" in said
    )


def test_a_check_that_failed_leaves_the_count_right(ended):
    model, optimizer, pruner = run()
    epochs(model, optimizer, pruner, 1)
    train(model, optimizer, EPOCH)
    weight = model.conv2.weight.detach().clone()
    with torch.no_grad():
        model.conv2.weight.fill_(float("nan"))
    with pytest.raises(ocsfast.StateError):
        pruner.step()
    with torch.no_grad():
        model.conv2.weight.copy_(weight)
    train(model, optimizer, 2)
    del model, optimizer, pruner
    (said,) = ended()
    assert "after 12 optimizer steps and 1 checks" in said


SCRIPT = """
    import multiprocessing, sys
    import ocsfast
    from helpers.networks import EPOCH, batch, net, sgd, train

    def go(kind):
        model = net()
        optimizer = sgd(model)
        if kind == "attached":
            options = dict(optimizer=optimizer, example_inputs=batch(0)[0], check_every="call")
            pruner = ocsfast.attach(model, 0.5, total_steps=100, **options)
        for _ in range(1 if kind == "listening" else 2):
            train(model, optimizer, EPOCH)
            ocsfast.step(model, 0.5)
        if kind == "cut":
            ocsfast.detach(model)
        if kind == "raised":
            raise KeyError("a mistake of the loop")
        globals().update(model=model, optimizer=optimizer)  # what is alive at the end

    if __name__ == "__main__":
        if sys.argv[1] == "child":
            process = multiprocessing.get_context("fork").Process(target=go, args=("attached",))
            process.start()
            process.join()
        else:
            go(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "attached",
            "after 10 optimizer steps and 2 checks, in stage 'observe'; the deadline was planned",
        ),
        ("stepped", "after 10 optimizer steps and 1 checks, in stage 'observe'; nothing told the run's"),
        ("raised", "after 10 optimizer steps and 1 checks, in stage 'observe'; nothing told the run's"),
        ("listening", "ocsfast.step was called after 5 optimizer steps to listen for the model's input"),
        ("child", "after 10 optimizer steps and 2 checks, in stage 'observe'; the deadline was planned"),
        ("cut", None),
    ],
)
def test_a_process_that_ends(kind, told, tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    done = run_script(tmp_path, kind)
    assert done.returncode == (1 if kind == "raised" else 0), done.stderr
    assert done.stderr.count(NEVER) == (0 if told is None else 1)
    assert told is None or told in done.stderr
