"""What the extension says of itself, and what an import without it says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import ocsfast
from ocsfast.ops import functions as ops

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    where = Path(ocsfast.__file__).parents[1]  # the package under test, installed or not
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)


def test_build_info_says_what_was_built() -> None:
    info = ops.build_info()
    assert set(info) == {"version", "cuda", "cuda_version", "cuda_archs", "compiler", "torch_target"}
    assert info["torch_target"] == "2.10"
    assert bool(info["cuda_version"]) == bool(info["cuda_archs"]) == info["cuda"]


def test_every_op_has_a_kernel_wherever_it_was_built() -> None:
    code = (
        "import torch\nfrom ocsfast.ops import functions as ops\n"
        "for op in ('group_saliency', 'partition', 'shrink_', 'lasso_grad_', 'jaccard'):\n"
        "    has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "    assert has('ocsfast::' + op, 'CPU')\n"
        "    assert has('ocsfast::' + op, 'CUDA') == ops.build_info()['cuda']\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_a_missing_extension_says_what_to_do() -> None:
    done = python("import sys\nsys.modules['ocsfast.ops._C'] = None\nimport ocsfast.ops.functions")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: The compiled part of ocsfast is missing or does not fit torch")
    assert "pip install ." in last


def test_an_extension_for_something_else_says_what_to_do(tmp_path: Path) -> None:
    package = Path(ocsfast.__file__).parent
    shutil.copytree(
        package, tmp_path / "ocsfast", ignore=shutil.ignore_patterns("_C.*.so", "__pycache__")
    )
    built = next((package / "ops").glob("_C.*.so"))
    (tmp_path / "ocsfast" / "ops" / built.name).write_bytes(b"not a library")
    done = python(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport ocsfast.ops.functions")
    assert "ImportError: The compiled part of ocsfast is missing or does not fit torch" in done.stderr


def test_the_backend_finds_the_torch_of_this_interpreter() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import build_backend as b\n"
        "assert b.find_torch() is not None and b.torch_version(b.find_torch()) >= b.TORCH_TARGET\n"
        "assert not any('torch' in r for r in b.get_requires_for_build_wheel())\n"
        "b.find_torch = lambda: None\n"
        "assert b.TORCH_REQUIREMENT in b.get_requires_for_build_wheel()\n"
        "assert b.TORCH_REQUIREMENT in b.get_requires_for_build_editable()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
