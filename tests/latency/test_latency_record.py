"""The file of a latency table: what is written is read, and what no measurement gives is refused."""

import copy
import json

import pytest
import torch

import ocsfast
from ocsfast import ConfigError, LatencyTable

ROWS = {"tensor": 1, "dim": 0, "kept": [4, 8]}
TABLE = {
    "format": "ocsfast latency",
    "version": 1,
    "device": "a phone",
    "dtype": "float16",
    "memory_format": "contiguous",
    "threads": 4,
    "torch": "",
    "example": [[1, 3, 8, 8]],
    "dense": 3000,
    "spread": 0.01,
    "rest": 1000,
    "entries": [
        {
            "operator": "aten.linear.default",
            "nodes": ["linear"],
            "shapes": [[1, 6], [8, 6]],
            "rows": ROWS,
            "cols": None,
            "nanoseconds": [[1200], [2000]],
        }
    ],
}


def test_it_is_written_and_read(tmp_path):
    table = LatencyTable.from_plain(TABLE)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert json.loads((tmp_path / "table.json").read_text()) == TABLE
    assert table.says() == "a phone, 4 threads, float16, contiguous, inputs 1x3x8x8"


def changed(**changes):
    value = copy.deepcopy(TABLE)
    for name, new in changes.items():
        place = value if name in value else value["entries"][0]
        place[name] = new
    return value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nanoseconds": [[1200]]}, "2 x 1 times are expected"),
        ({"nanoseconds": [[1200], [None]]}, "None is not whole nanoseconds"),
        ({"nanoseconds": [[-1], [2000]]}, "-1 is not whole nanoseconds"),
        ({"nanoseconds": [[1.5], [2000]]}, "1.5 is not whole nanoseconds"),
        ({"nanoseconds": [[2001], [2000]]}, "with more kept it takes less time"),
        ({"rows": {**ROWS, "kept": [8, 4]}}, "are not whole numbers that rise"),
        ({"rows": {**ROWS, "kept": []}}, "are not whole numbers that rise"),
        ({"rows": {"kept": [4, 8]}}, "entries lack something|not as they should be"),
        ({"nodes": []}, "names no call"),
        ({"entries": []}, "nothing was measured"),
        ({"entries": 2 * TABLE["entries"]}, "has linear in two entries"),
        ({"dense": 0}, "dense: 0 is not whole nanoseconds"),
        ({"spread": float("nan")}, "spread: nan is not a share"),
        ({"threads": "four"}, "threads: 'four'"),
        ({"device": None}, "device: None is not a text"),
        ({"example": [3]}, "example: .3. is not shapes"),
        ({"format": "another"}, "its format is not 'ocsfast latency'"),
        ({"version": 2}, "has version 2, here it is 1"),
    ],
)
def test_what_no_measurement_gives_is_refused(changes, said, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(changed(**changes)))
    with pytest.raises(ConfigError, match=said) as error:
        LatencyTable.load(tmp_path / "table.json")
    assert "table.json" in str(error.value)


def test_fields_are_neither_missing_nor_unknown():
    with pytest.raises(ConfigError, match="lacks 'rest'"):
        LatencyTable.from_plain({name: value for name, value in TABLE.items() if name != "rest"})
    with pytest.raises(ConfigError, match="has an unknown field 'more'"):
        LatencyTable.from_plain({**TABLE, "more": 1})


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a latency table"):
        LatencyTable.load(tmp_path / "missing.json")
    (tmp_path / "torn.json").write_text('{"format": ')
    with pytest.raises(ConfigError, match="cannot be read as a latency table"):
        LatencyTable.load(tmp_path / "torn.json")


def test_a_table_by_hand_prunes_a_model():
    """Of eight neurons two may go, as 1200 ns + 400 a pair is left of 2000."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    more = {"operator": "aten.linear.default", "nodes": ["linear_1"], "shapes": [[1, 8], [2, 8]]}
    more |= {"rows": None, "cols": {"tensor": 0, "dim": 1, "kept": [8]}, "nanoseconds": [[0]]}
    table = LatencyTable.from_plain(changed(entries=[*TABLE["entries"], more]))
    found = ocsfast.inspect(model, torch.randn(2, 6), 0.13, target=table)
    assert (found.latency, found.latency_left, found.families[0].kept) == (3000, 2600, 6)
    assert found.families[0].latency == 800  # as if four were left: less was not measured
    assert "at ratio 0.13: 0.0026 ms" in str(found)
