"""What was built and what was found: `python -m ocsfast.info`, for a report of a problem."""

from __future__ import annotations

import os
import platform

import torch

import ocsfast
from ocsfast.ops.extension import MISSING, build_info


def facts() -> dict[str, str]:
    """What was built and what was found, as names and values."""
    found = {
        "ocsfast": ocsfast.__version__,
        "folder": os.path.dirname(ocsfast.__file__),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
    }
    if MISSING is not None:
        found["extension"] = f"missing: {MISSING}"
    else:
        built = build_info()
        cuda = f"CUDA {built['cuda_version']} for {built['cuda_archs']}" if built["cuda"] else "no CUDA"
        found["extension"] = f"{built['compiler']}, {cuda}, torch's ABI of {built['torch_target']}"
        found["instruction set"] = built["instruction_set"]
    found["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(k)
            found[f"GPU {k}"] = f"{device.name}, sm_{device.major}{device.minor}"
    else:
        found["GPU"] = "none that torch can use"
    return found


def main() -> None:
    """Print all of it, one fact a line."""
    named = facts()
    width = max(map(len, named))
    for name, value in named.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
