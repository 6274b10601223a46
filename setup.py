"""Compiles csrc/ into the extension module with ninja; everything else is in pyproject.toml.

Environment:
    OCSFAST_CUDA        1: fail without CUDA; 0: never build it; unset: build it where nvcc is found;
                        emulated: CUDA's sources in the CPU kernels' place, for tests (tests/emulated/)
    OCSFAST_CUDA_ARCHS  compute capabilities, "80;90" by default; PTX of the last one is added
    CUDA_HOME           where nvcc is, if it is not on PATH
    CXX, CXXFLAGS       the C++ compiler and more flags for it
    MAX_JOBS            files compiled at a time; ninja decides if unset

While working on csrc/, `python setup.py build_ext --inplace` compiles what has changed, and no more.
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
import tempfile
from pathlib import Path
from typing import NamedTuple, TextIO

import pybind11
from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

from build_backend import TORCH_REQUIREMENT, TORCH_TARGET, find_torch, torch_version

ROOT = Path(__file__).resolve().parent
EXTENSION = "ocsfast.ops._C"  # the last part is the name that csrc/ocsfast.cpp gives to pybind11
SWITCH = os.environ.get("OCSFAST_CUDA", "")
CXX = os.environ.get("CXX", "c++")
OLDEST_CUDA = (12, 1)  # the first whose kernels take up to 32 KB of arguments
# No contraction: a fused multiply-add where the machine has one would make sums differ by machine.
HOST_FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp-simd -ffp-contract=off -fno-math-errno -fvisibility=hidden"
    " -Wall -Wextra -Wno-psabi"
)
CUDA_FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden"
# Three tensors a launch, so that the small plans of the tests take several launches.
EMULATED_FLAGS = "-Itests/emulated -DOCSFAST_MOST_TENSORS=3 -x c++"

# By name: a command, and the sources that it compiles. Paths are relative to ROOT, where ninja runs.
Rules = dict[str, tuple[str, list[Path]]]


class Cuda(NamedTuple):
    nvcc: str
    version: str
    archs: list[str]
    libraries: str  # the -L flags that lead to libcudart_static.a


def output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def find_cuda() -> Cuda | None:
    """What compiles CUDA's kernels, or None if they are not to be compiled."""
    if SWITCH in ("0", "emulated"):
        return None
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if "CUDA_HOME" in os.environ:
        places.insert(0, os.environ["CUDA_HOME"] + "/bin")
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    problem = "nvcc was not found: set CUDA_HOME"
    if nvcc:
        found = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
        if found and (int(found[1]), int(found[2])) >= OLDEST_CUDA:
            # nvcc knows where its libraries are; what lies on PATH may be a script that calls another.
            dry = output(nvcc, "--dryrun", "-x", "cu", "/dev/null")
            libraries = " ".join(re.findall(r"^#\$ LIBRARIES=(.*)$", dry, re.MULTILINE))
            archs = os.environ.get("OCSFAST_CUDA_ARCHS", "80;90").replace(".", "")
            return Cuda(nvcc, f"{found[1]}.{found[2]}", re.findall(r"\w+", archs), libraries)
        problem = f"{nvcc} is older than CUDA {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}"
    if SWITCH == "1":
        raise PlatformError(f"OCSFAST_CUDA=1, but {problem}")
    print(f"ocsfast: building without CUDA: {problem}", file=sys.stderr)
    return None


def sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


def compile_rules(torch: Path, cuda: Cuda | None, version: str) -> Rules:
    """How each source is compiled; `version` is the package's."""
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}{0:012x}ULL"
    headers = f"-Icsrc -isystem {shlex.quote(str(torch / 'include'))} {target}"
    flags = f"{headers} {os.environ.get('CXXFLAGS', '')}"
    host = f"{CXX} {HOST_FLAGS} {flags}"
    module = Path("csrc", "ocsfast.cpp")
    common = [source for source in sources("csrc/*.cpp") if source != module]
    # pybind11's own headers come first: torch's copy refuses TORCH_TARGET_VERSION up to torch 2.12.
    rules = {"module": (f"{CXX} {HOST_FLAGS} {module_flags(cuda, version)} {flags}", [module])}
    if SWITCH == "emulated":
        kernels = [*sources("csrc/cuda/*.cu"), *sources("tests/emulated/*.cpp")]
        return {**rules, "cpu": (host, common), "emulated": (f"{host} {EMULATED_FLAGS}", kernels)}
    rules["cpu"] = (host, [*common, *sources("csrc/cpu/*.cpp")])
    if cuda:
        nvcc = f"{shlex.quote(cuda.nvcc)} -ccbin {shlex.split(CXX)[0]} {CUDA_FLAGS} {headers}"
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda.archs]
        ptx = f"-gencode=arch=compute_{cuda.archs[-1]},code=compute_{cuda.archs[-1]}"
        rules["cuda"] = (f"{nvcc} {' '.join(codes)} {ptx}", sources("csrc/cuda/*.cu"))
    return rules


def module_flags(cuda: Cuda | None, version: str) -> str:
    """For the one source that includes Python, and that tells what was built."""
    no_cuda = "emulated" if SWITCH == "emulated" else ""
    flags = [
        *("-isystem", pybind11.get_include(), f"-I{sysconfig.get_path('include')}"),
        f'-DOCSFAST_VERSION="{version}"',
        f"-DOCSFAST_CUDA={int(cuda is not None)}",
        f'-DOCSFAST_CUDA_VERSION="{cuda.version if cuda else no_cuda}"',
        f'-DOCSFAST_CUDA_ARCHS="{";".join(cuda.archs) if cuda else ""}"',
        f'-DOCSFAST_TORCH_TARGET="{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"',
    ]
    return shlex.join(flags)


def link_libraries(torch: Path, cuda: Cuda | None) -> str:
    """Torch's libraries are linked even if the linker sees no symbol of theirs in use."""
    torch_lib = shlex.quote(str(torch / "lib"))
    libraries = f"-L{torch_lib} -Wl,--no-as-needed -ltorch_cpu -lc10 -Wl,--as-needed"
    return f"{libraries} {cuda.libraries} -lcudart_static -ldl -lpthread -lrt" if cuda else libraries


def build_folder(torch: Path, cuda: Cuda | None, rules: Rules) -> Path:
    """A folder for each configuration, so that switching back to one finds its objects.

    The module's command does not count: with build isolation, pybind11 lies elsewhere each time.
    """
    commands = {name: command for name, (command, _) in rules.items() if name != "module"}
    state = repr((commands, cuda, torch_version(torch), sysconfig.get_config_var("SOABI")))
    return Path("build", "ninja", f"{[*rules][-1]}-{hashlib.sha256(state.encode()).hexdigest()[:8]}")


def write_ninja(out: TextIO, folder: Path, rules: Rules, libraries: str, module: Path) -> None:
    """A build.ninja that compiles into a folder and links a module.

    ninja repeats a step when its command has changed, or a file that it reads. The compiler itself says
    which headers it read: -MD names torch's as well, which an upgrade may change in their place.
    """
    writer = ninja_syntax.Writer(out)
    writer.variable("builddir", str(folder))  # for ninja's own logs
    objects: list[str] = []
    for name, (compiler, files) in rules.items():
        command = f"{ninja_syntax.escape(compiler)} -MD -MF $out.d -c $in -o $out"
        writer.rule(name, command, description="compile $in", depfile="$out.d", deps="gcc")
        for source in files:
            objects += writer.build(f"{folder / source}.o", name, str(source))
    link = f"{ninja_syntax.escape(CXX)} -shared -o $out $in {ninja_syntax.escape(libraries)}"
    writer.rule("link", link, description="link $out")
    writer.build(str(module), "link", objects)


class Build(build_ext):
    """Compiles `.cu` with nvcc itself: torch's CUDAExtension refuses to beside a CPU-only torch."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None or torch_version(torch) < TORCH_TARGET:
            raise PlatformError(f"pip install '{TORCH_REQUIREMENT}' first: {torch or 'none'} was found")
        cuda = find_cuda()
        rules = compile_rules(torch, cuda, self.distribution.get_version())
        folder = build_folder(torch, cuda, rules)
        # Linked where the objects are, then copied: setuptools' own folders are new each time.
        module = folder / Path(self.get_ext_filename(ext.name)).name
        file = folder / "build.ninja"
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        with (ROOT / file).open("w", encoding="utf-8") as out:
            write_ninja(out, folder, rules, link_libraries(torch, cuda), module)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        self.spawn([sys.executable, "-m", "ninja", "-C", str(ROOT), "-f", str(file), *jobs])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.force = True  # copy the module even if it is older: that of a configuration built before
        self.copy_file(str(ROOT / module), str(target))


if __name__ == "__main__":  # the tests load this file for its functions
    # Wheels are put together in a new folder: in build/lib, modules that have moved since lie on.
    with tempfile.TemporaryDirectory() as build_lib:
        setup(
            ext_modules=[Extension(EXTENSION, sources=[])],
            cmdclass={"build_ext": Build},
            options={"build": {"build_lib": build_lib}},
        )
