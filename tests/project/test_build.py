"""What the extension says of itself, what an import without it says, and how it is built."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import ocsfast
from ocsfast.ops import extension

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    where = Path(ocsfast.__file__).parents[1]  # the package under test, installed or not
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)


def test_build_info_says_what_was_built() -> None:
    info = extension.build_info()
    cuda = {"cuda", "cuda_version", "cuda_archs"}
    assert set(info) == {"version", *cuda, "compiler", "torch_target", "instruction_set"}
    assert info["torch_target"] == "2.10"
    assert bool(info["cuda_version"]) == bool(info["cuda_archs"]) == info["cuda"]


def test_every_op_has_a_kernel_wherever_it_was_built() -> None:
    code = (
        "import torch\nfrom ocsfast.ops import extension\n"
        "for op in ('group_saliency', 'partition', 'shrink_', 'lasso_grad_', 'compare'):\n"
        "    has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "    assert has('ocsfast::' + op, 'CPU')\n"
        "    assert has('ocsfast::' + op, 'CUDA') == extension.build_info()['cuda']\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_a_missing_extension_says_what_to_do() -> None:
    code = (
        "import sys\nsys.modules['ocsfast.ops._C'] = None\n"
        "import torch, ocsfast\nfrom ocsfast.ops import reference\n"  # these need no kernel
        "model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 2))\n"
        "assert ocsfast.group(model, torch.randn(4, 8)).num_groups == 16\n"
        "ocsfast.inspect(model, torch.randn(4, 8))\n"
    )
    done = python(code)
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
    code = "from ocsfast.ops.extension import build_info\nbuild_info()"
    done = python(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{code}")
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


def setup_file(root: Path = ROOT) -> SimpleNamespace:
    """The functions of setup.py, which reads the environment when it is loaded."""
    sys.path.insert(0, str(ROOT))  # for build_backend
    try:
        return SimpleNamespace(**runpy.run_path(str(root / "setup.py"), run_name="setup_file"))
    finally:
        sys.path.remove(str(ROOT))


def ninja(folder: Path, *arguments: str) -> list[str]:
    """The steps that ninja takes in a folder."""
    command = [sys.executable, "-m", "ninja", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
    return [line.split("] ")[1] for line in said.splitlines() if line.startswith("[")]


def test_ninja_repeats_only_what_a_change_asks_for(tmp_path: Path) -> None:
    (tmp_path / "one.h").write_text("#define ONE 1\n")
    (tmp_path / "with header.cpp").write_text('#include "one.h"\nint one() { return ONE; }\n')
    (tmp_path / "without.cpp").write_text("int two() { return 2; }\n")

    def write(flags: str) -> None:
        sources = [Path("with header.cpp"), Path("without.cpp")]
        rules = {"cpu": (f"{setup.CXX} -fPIC {flags}", sources)}
        with (tmp_path / "build.ninja").open("w") as out:
            setup.write_ninja(out, Path("out"), rules, "", Path("out/module.so"))

    setup = setup_file()
    write("'-DSAID=\"$ 5\"'")
    assert sorted(ninja(tmp_path)) == [
        "compile 'with header.cpp'",
        "compile without.cpp",
        "link out/module.so",
    ]
    assert ninja(tmp_path) == []
    touched = (tmp_path / "out/module.so").stat().st_mtime + 1
    os.utime(tmp_path / "one.h", (touched, touched))
    assert ninja(tmp_path, "-n") == ["compile 'with header.cpp'", "link out/module.so"]
    write("-DSAID=6")
    assert len(ninja(tmp_path, "-n")) == 3


def test_each_configuration_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(cuda: tuple[object, ...] | None = None, version: str = "1", **environment: str) -> Path:
        with monkeypatch.context() as patch:
            for name in ("OCSFAST_CUDA", "CXX", "CXXFLAGS"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            setup = setup_file()
            torch = setup.find_torch()
            given = setup.Cuda(*cuda) if cuda else None
            found = setup.build_folder(torch, given, setup.compile_rules(torch, given, version))
        assert isinstance(found, Path)
        return found

    folders = [
        folder(),
        folder(OCSFAST_CUDA="emulated"),
        folder(CXX="c++ -fsanitize=undefined"),
        folder(CXXFLAGS="-O1"),
        folder(("nvcc", "12.4", ["80", "90"], "")),
        folder(("nvcc", "12.4", ["90"], "")),
        folder(("nvcc", "13.0", ["90"], "")),
    ]
    assert len(set(folders)) == len(folders)
    # What only the module is compiled with does not count: pybind11 lies elsewhere in an isolated build.
    monkeypatch.setattr("pybind11.get_include", lambda: "/elsewhere")
    assert folder(version="2") == folders[0]


def test_a_switch_back_brings_the_earlier_module_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a module of one line beside the package's own build files."""
    monkeypatch.setenv("OCSFAST_CUDA", "0")
    monkeypatch.setenv("MAX_JOBS", "1")
    for name in ("pyproject.toml", "setup.py", "build_backend.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "ocsfast.cpp").write_text('extern "C" const char* ocsfast = OF_THIS_BUILD;\n')
    modules = []
    for name in ("one", "another", "one"):
        monkeypatch.setenv("CXXFLAGS", f"'-DOF_THIS_BUILD=\"{name}\"'")
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built"]
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
        modules.append(next((tmp_path / "built").rglob("*.so")).read_bytes())
    assert modules[0] == modules[2] != modules[1]


@pytest.mark.parametrize("switch", ["", "emulated"])
def test_every_source_is_compiled_once(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSFAST_CUDA", switch)
    setup = setup_file()
    cuda = None if switch else setup.Cuda("nvcc", "12.4", ["90"], "")
    rules = setup.compile_rules(setup.find_torch(), cuda, "1")
    compiled = [source for _, sources in rules.values() for source in sources]
    expected = setup.sources("csrc/**/*.c*")
    if switch:
        expected = [source for source in expected if source.parent.name != "cpu"]
        expected.append(Path("tests/emulated/emulator.cpp"))
    assert sorted(compiled) == sorted(path for path in expected if path.suffix in (".cpp", ".cu"))


def test_cuda_is_left_out_where_nvcc_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 11.8, V11.8.89\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("OCSFAST_CUDA", raising=False)
    assert setup_file().find_cuda() is None
    monkeypatch.setenv("OCSFAST_CUDA", "1")
    with pytest.raises(Exception, match=r"nvcc is older than CUDA 12\.1"):
        setup_file().find_cuda()


def test_cuda_is_compiled_for_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 12.4, V12.4.99\necho '#$ LIBRARIES= \"-L/there\"' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("OCSFAST_CUDA", "1")
    monkeypatch.setenv("OCSFAST_CUDA_ARCHS", "8.6; 90a")
    setup = setup_file()
    cuda = setup.find_cuda()
    assert cuda == (str(nvcc), "12.4", ["86", "90a"], ' "-L/there"')
    command, _ = setup.compile_rules(setup.find_torch(), cuda, "1")["cuda"]
    assert [word for word in command.split() if word.startswith("-gencode")] == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


def call_backend(tree: Path, backend: str, hook: str, into: Path) -> None:
    code = f"import {backend}\n{backend}.{hook}({str(into)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tree, capture_output=True)


def test_the_archives_hold_what_they_should(tmp_path: Path) -> None:
    """An sdist from a copy of the tree, and from that a wheel, but for the extension."""
    tree = tmp_path / "tree"
    for folder in ("csrc", "ocsfast", "tests"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tree / folder, ignore=unwanted)
    files = ("pyproject.toml", "setup.py", "build_backend.py", "MANIFEST.in", "README.md", "LICENSE")
    for name in files:
        shutil.copy(ROOT / name, tree)
    call_backend(tree, "build_backend", "build_sdist", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path)
    unpacked = next(path for path in tmp_path.glob("ocsfast-*") if path.is_dir())
    for pattern in ("csrc/**/*", "tests/emulated/**/*", "ocsfast/**/*"):
        for path in tree.glob(pattern):
            assert (unpacked / path.relative_to(tree)).exists(), path

    (unpacked / "setup.py").unlink()
    call_backend(unpacked, "setuptools.build_meta", "build_wheel", tmp_path)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = (path.relative_to(tree) for path in tree.glob("ocsfast/**/*") if path.is_file())
    assert held == {path.as_posix() for path in expected}
