"""Damaged and forged files: each loads as a sound model, or is refused with the model as it was."""

import contextlib
import json
import random
import struct

import pytest
import safetensors.torch
import torch
from helpers.networks import Net, batch, net
from safetensors import SafetensorError
from safetensors.torch import load_file

from ocsfast import CheckpointError, cut_model, load, save
from ocsfast.api.checkpoint_format import checksum
from ocsfast.grouping.engines import group


def read(data):
    """A safetensors file's header and the rest."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def written(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def damaged(data, dice):
    """Bytes turned, cut off, doubled or swapped, anywhere; most often in the header."""
    data = bytearray(data)
    (header,) = struct.unpack("<Q", data[:8])
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(header + 8) if dice.random() < 0.7 else dice.randrange(len(data))
        what = dice.randrange(5)
        if what == 0:
            data[at] ^= 1 << dice.randrange(8)
        elif what == 1:
            data[at] = dice.randrange(256)
        elif what == 2:
            del data[at : at + dice.randint(1, 64)]
        elif what == 3:
            data[at:at] = data[at : at + dice.randint(1, 64)]
        elif len(data) > 16:
            other = dice.randrange(len(data))
            data[at], data[other] = data[other], data[at]
        if at >= len(data) - 1:
            break
    return bytes(data)


ODD = (-1, 0, 1, 2**31, 2**63, 10**30, 1.5, True, None, "", "8", [], {}, [1], {"a": 1})


def forged(data, dice):
    """A well-formed file that says something else: shapes, sizes, names, whole parts."""
    header, rest = read(data)
    structure = json.loads(header["__metadata__"]["ocsfast"])
    for _ in range(dice.randint(1, 3)):
        names = [name for name in header if name != "__metadata__"]
        what = dice.randrange(8)
        if what == 0 and names:
            entry = header[dice.choice(names)]
            if entry["shape"]:
                entry["shape"][dice.randrange(len(entry["shape"]))] = dice.choice((0, 1, 3, 7, 2**40))
        elif what == 1 and names:
            header[dice.choice(names)]["data_offsets"] = [dice.randrange(99), dice.randrange(9999)]
        elif what == 2 and names:
            header[dice.choice(names)]["dtype"] = dice.choice(("F64", "I32", "BOOL", "F4", "nothing"))
        elif what == 3 and names:
            header[dice.choice(names) + dice.choice(("", "x"))] = header.pop(dice.choice(names))
        elif what == 4:
            module = dice.choice(list(structure["attributes"]) or [""])
            sizes = structure["attributes"].setdefault(module, {})
            if isinstance(sizes, dict):
                sizes[dice.choice([*sizes, "__class__", "training"])] = dice.choice(ODD)
        elif what == 5:
            structure[dice.choice([*structure, "more"])] = dice.choice(ODD)
            break
        elif what == 6:
            structure["aliases"] = {dice.choice(names or ["x"]): dice.choice(names or ["x"])}
        else:
            header["__metadata__"] = dice.choice(({}, {"ocsfast": dice.choice(("", "[]", "{" * 9000))}))
            return written(header, rest)
    header["__metadata__"] = {"ocsfast": json.dumps(structure)}
    with contextlib.suppress(SafetensorError):  # one that holds together gets a checksum that fits
        structure["checksum"] = checksum(structure, safetensors.torch.load(written(header, rest)))
        header["__metadata__"] = {"ocsfast": json.dumps(structure)}
    return written(header, rest)


@pytest.mark.parametrize("files", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_file_loads_or_is_refused(files, tmp_path):
    model = net()
    families = group(model, (batch(0)[0],), {})
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for family in families.families:
        pruned[family.first : family.first + family.size // 3] = True
    cut_model(model, families, pruned)
    save(model, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    x = batch(1)[0]
    dice = random.Random(files)
    fresh = net(1)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    sizes = repr(fresh)
    refused = works = 0
    for k in range(files):
        data = (damaged, forged)[k % 2](good, dice)
        (tmp_path / "bad").write_bytes(data)
        try:
            load(fresh, tmp_path / "bad")
        except CheckpointError:
            refused += 1
            after = fresh.state_dict()
            assert all(torch.equal(value, after[name]) for name, value in before.items()), k
            assert repr(fresh) == sizes, k
            continue
        kept = load_file(tmp_path / "bad")
        assert all(torch.equal(value, kept[name]) for name, value in fresh.state_dict().items()), k
        with contextlib.suppress(RuntimeError):  # a forged size of a pooling layer, say
            assert fresh.eval()(x).shape == (len(x), 5), k
            works += 1
        fresh = Net()
        fresh.load_state_dict(before)
    assert refused > files // 2
    assert works > 0
