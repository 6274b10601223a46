"""Compiles csrc/ into `ocsfast.ops._C`; everything else is in pyproject.toml.

Environment:
    OCSFAST_CUDA        1: fail without CUDA; 0: never build it; unset: build it where nvcc is found;
                        emulated: CUDA's sources in the CPU kernels' place, for tests (tests/emulated/)
    OCSFAST_CUDA_ARCHS  compute capabilities, "80;90" by default; PTX of the last one is added
    CUDA_HOME           where nvcc is, if it is not on PATH
    CXX, CXXFLAGS       the C++ compiler and more flags for it
    MAX_JOBS            files compiled at a time
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # setuptools runs this file without its folder on the path

from build_backend import TORCH_REQUIREMENT, TORCH_TARGET, find_torch, torch_version  # noqa: E402

CSRC = ROOT / "csrc"
EMULATED = ROOT / "tests" / "emulated"
# Of a launch, so that the tests' plans take several.
EMULATED_TENSORS = 3
# Kernel arguments of up to 32 KB.
OLDEST_CUDA = (12, 1)
# No contraction: a fused multiply-add where the machine has one would make sums differ by machine.
HOST_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]


class BuildError(RuntimeError):
    """The extension cannot be built; the message says why."""


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    version: tuple[int, int]
    archs: tuple[str, ...]
    libraries: Path  # where libcudart_static.a is


def cuda_libraries(nvcc: Path) -> Path:
    """Ask nvcc where its toolkit is: the nvcc on PATH may be a script that calls another."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], check=True, capture_output=True, text=True
    )
    found = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.MULTILINE)
    top = Path(found[1]) if found else nvcc.resolve().parent.parent
    for folder in (top / "lib64", top / "lib", *sorted(top.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").exists():
            return folder.resolve()
    raise BuildError(
        f"{top} has no libcudart_static.a: reinstall the CUDA toolkit, or set OCSFAST_CUDA=0"
    )


def find_cuda() -> Cuda | None:
    switch = os.environ.get("OCSFAST_CUDA", "")
    if switch in ("0", "emulated"):
        return None
    candidates = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if "CUDA_HOME" in os.environ:
        candidates.insert(0, os.environ["CUDA_HOME"] + "/bin/nvcc")
    nvcc = next((Path(c) for c in candidates if c and Path(c).exists()), None)
    if nvcc is None:
        if switch == "1":
            raise BuildError("OCSFAST_CUDA=1, but nvcc was not found: set CUDA_HOME")
        return None
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST_CUDA:
        reason = f"{nvcc} is CUDA {version[0]}.{version[1]}, {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} is needed"
        if switch == "1":
            raise BuildError(reason)
        print(f"ocsfast: building without CUDA: {reason}", file=sys.stderr)
        return None
    archs = re.split(r"[;, ]+", os.environ.get("OCSFAST_CUDA_ARCHS", "80;90").strip())
    return Cuda(nvcc, version, tuple(arch.replace(".", "") for arch in archs), cuda_libraries(nvcc))


class Build(build_ext):
    """Compiles only what has changed, several files at a time, `.cu` with nvcc itself.

    Torch's own CUDAExtension refuses to compile CUDA beside a CPU-only torch.
    """

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise BuildError(f"torch was not found: pip install '{TORCH_REQUIREMENT}' first")
        if torch_version(torch) < TORCH_TARGET:
            raise BuildError(f"{torch} is older than {TORCH_REQUIREMENT}: upgrade torch")
        cuda = find_cuda()
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        commands = self.compile_commands(torch, cuda, cxx)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda item: self.compile(*item), commands.items()))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [*cxx, "-shared", "-o", str(target), *map(str, objects), f"-L{torch / 'lib'}"]
        link += ["-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
        if cuda:
            link += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
        self.spawn(link)

    def compile_commands(self, torch: Path, cuda: Cuda | None, cxx: list[str]) -> dict[Path, list[str]]:
        """What compiles each source, without the source and the object."""
        import pybind11

        emulated = "emulated" if os.environ.get("OCSFAST_CUDA") == "emulated" else ""
        # pybind11's own folder first: the copy beside torch's headers refuses TORCH_TARGET_VERSION up to
        # torch 2.12, and is of whatever version torch was built with.
        includes = [f"-I{CSRC}", "-isystem", pybind11.get_include(), "-isystem", str(torch / "include")]
        target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}{0:012x}ULL"
        more = shlex.split(os.environ.get("CXXFLAGS", ""))
        host = [*cxx, "-c", *HOST_FLAGS, *WARNINGS, *includes, target, *more]
        module = [
            f"-I{sysconfig.get_path('include')}",
            f'-DOCSFAST_VERSION="{self.distribution.get_version()}"',
            f"-DOCSFAST_CUDA={int(cuda is not None)}",
            f'-DOCSFAST_CUDA_VERSION="{".".join(map(str, cuda.version)) if cuda else emulated}"',
            f'-DOCSFAST_CUDA_ARCHS="{";".join(cuda.archs) if cuda else ""}"',
            f'-DOCSFAST_TORCH_TARGET="{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"',
        ]
        kernels = () if emulated else sorted((CSRC / "cpu").glob("*.cpp"))
        commands = dict.fromkeys((*sorted(CSRC.glob("*.cpp")), *kernels), host)
        if emulated:
            device = [*host, f"-I{EMULATED}", f"-DOCSFAST_MOST_TENSORS={EMULATED_TENSORS}", "-x", "c++"]
            sources = (*sorted((CSRC / "cuda").glob("*.cu")), EMULATED / "emulator.cpp")
            commands |= dict.fromkeys(sources, device)
        commands[CSRC / "ocsfast.cpp"] = [*host, *module]
        if cuda:
            device = [str(cuda.nvcc), "-c", "-std=c++17", "-O3", "-ccbin", cxx[0], *includes, target]
            device += ["--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            device += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda.archs]
            device += [f"-gencode=arch=compute_{cuda.archs[-1]},code=compute_{cuda.archs[-1]}"]
            commands |= dict.fromkeys(sorted((CSRC / "cuda").glob("*.cu")), device)
        return commands

    def compile(self, source: Path, command: list[str]) -> Path:
        """The object of a source, made anew if the command, a header or the source has changed."""
        folder = ROOT / "build" / "objects"
        folder.mkdir(parents=True, exist_ok=True)
        state = hashlib.sha256("\0".join(command).encode())
        for path in (
            source,
            *sorted((*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *EMULATED.rglob("*.h"))),
        ):
            state.update(path.read_bytes())
        made = folder / f"{source.parent.name}-{source.name}-{state.hexdigest()[:16]}.o"
        if not made.exists():
            partial = made.with_suffix(f".{os.getpid()}.o")
            self.spawn([*command, str(source), "-o", str(partial)])
            partial.replace(made)
        return made


setup(
    ext_modules=[Extension("ocsfast.ops._C", sources=[])],
    cmdclass={"build_ext": Build},
)
