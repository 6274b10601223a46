"""What the times depend on, and the roof of all: python bench/machine.py --device cuda"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import records
import torch
from timing import in_turn

from ocsfast.ops import extension


def processor() -> str:
    """The CPU as Linux describes it: name, family and model, and its caches."""
    said = Path("/proc/cpuinfo").read_text()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", said, re.MULTILINE))
    caches = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / part).read_text().strip() for part in ("level", "type", "size"))
        if kind != "Instruction":
            caches.append(f"L{level} {size}")
    name = found.get("model name", platform.machine())
    return f"{name}, family {found.get('cpu family')}, model {found.get('model')}, {', '.join(caches)}"


def main() -> None:
    args = records.program(__doc__).parse_args()
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "device": records.device_name(args.device),
        "build": extension.build_info(),
    }
    if args.device == "cuda":
        card = torch.cuda.get_device_properties()
        facts |= {
            "processors": card.multi_processor_count,
            "memory": card.total_memory,
            "l2": card.L2_cache_size,
            "capability": f"{card.major}.{card.minor}",
        }
    records.append(args.rows, "machine", **facts)
    # A gigabyte each way: far more than the cache holds.
    source = torch.randn(2**22 if args.quick else 2**28, device=args.device)
    target = torch.empty_like(source)
    calls = {
        "copy": (2, lambda: target.copy_(source)),
        "read": (1, lambda: torch.sum(source)),
        "read and write": (2, lambda: target.mul_(1.0)),
    }
    times = in_turn({n: c for n, (_, c) in calls.items()}, args.device, 3 if args.quick else 21)
    for name, (passes, _) in calls.items():
        moved = passes * source.numel() * source.element_size()
        device = records.device_name(args.device)
        records.append(args.rows, "roof", what=name, device=device, bytes=moved, **times[name].stats())


if __name__ == "__main__":
    main()
