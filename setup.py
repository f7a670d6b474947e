"""Builds the two compiled parts of fairkernels.

``fairkernels/_C``        from ``csrc/module.cpp``: a pybind11 module that tells what was built.
``fairkernels/_kernels``  from ``csrc/*.cpp`` and ``csrc/cuda/*.cu``: the operators, for any Python version.

torch is never imported: its headers and link libraries are enough, and through its stable ABI the result runs
with any torch from ``TORCH_TARGET`` on. What cannot be built is left out, and the package then says why in
``fairkernels/_build_reason.txt``.

Environment variables:
    FAIRKERNELS_NATIVE      auto (default): install without compiled kernels where they cannot be built;
                            1: fail then; 0: do not build them.
    FAIRKERNELS_CUDA        the same for the CUDA kernels. They need nvcc, but no GPU and no torch with CUDA.
    FAIRKERNELS_CUDA_ARCHS  compute capabilities, such as "80;90;100"; newer GPUs translate the PTX of the last.
    FAIRKERNELS_TORCH_DIR   folder of the torch package to build against.
    CXX, CXXFLAGS, CUDA_HOME, CUDA_PATH, MAX_JOBS: as everywhere. ccache is used where there is one.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
REPORT = "_build_reason.txt"
REPORTED_LINES = 20

TORCH_TARGET = (2, 10)
DEFAULT_CUDA_ARCHS = ("80", "90", "100")
TOLD_APART = (80, 90)  # compute capabilities from which on the sources do more: 9.0 has clusters
COMMON_FLAGS = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]
VECTOR_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
CXX_FLAGS = [*COMMON_FLAGS, "-fPIC", "-fvisibility=hidden", *VECTOR_FLAGS, "-Wall", "-Wextra"]
# Products and sums are fused only where the source says so: the same bits as on the CPU.
NVCC_FLAGS = [*COMMON_FLAGS, "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-fopenmp-simd", "--threads=2"]
# Unresolved symbols are an error here, not at import; those of the static CUDA runtime stay private.
LINK_OPTIONS = ["--no-undefined", "--exclude-libs=ALL", "--no-as-needed"]


class CannotBuild(Exception):
    """A part cannot be built; the message tells the user why."""


@dataclass(frozen=True)
class Tools:
    """What every native build needs."""

    cxx: list[str]
    ninja: list[str]
    torch: Path
    pybind11: str


@dataclass(frozen=True)
class Cuda:
    """What a CUDA build needs besides."""

    nvcc: str
    version: str
    archs: list[str]


# ---- Finding things


def find_tools() -> Tools:
    torch = find_torch()
    if torch is None:
        raise CannotBuild("no torch >= {}.{} with its C++ headers was found".format(*TORCH_TARGET))
    return Tools(find_compiler(), find_ninja(), torch, find_pybind11(torch))


def find_torch() -> Path | None:
    return next(filter(is_usable_torch, torch_folders()), None)


def torch_folders() -> Iterator[Path]:
    if "FAIRKERNELS_TORCH_DIR" in os.environ:
        yield Path(os.environ["FAIRKERNELS_TORCH_DIR"])
        return

    visible = importlib.util.find_spec("torch")
    if visible:
        yield from map(Path, visible.submodule_search_locations or ())

    # Under build isolation torch is not visible, but the user's environment is known to sysconfig (pip)
    # or VIRTUAL_ENV (uv).
    for kind in ("platlib", "purelib"):
        yield Path(sysconfig.get_path(kind), "torch")
        yield Path(sysconfig.get_path(kind, sysconfig.get_preferred_scheme("user")), "torch")
    for prefix in filter(None, (os.environ.get("VIRTUAL_ENV"), sys.base_prefix)):
        site = sysconfig.get_path("platlib", "posix_prefix", {"base": prefix, "platbase": prefix})
        yield Path(site, "torch")


def is_usable_torch(folder: Path) -> bool:
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        return False
    version = re.search(r"^__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text(), re.MULTILINE)
    return version is not None and tuple(map(int, version.groups())) >= TORCH_TARGET


def find_compiler() -> list[str]:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise CannotBuild(f"no C++ compiler was found (looked for {', '.join(candidates)})")


def find_ninja() -> list[str]:
    on_path = shutil.which("ninja")
    if on_path:
        return [on_path]
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    raise CannotBuild("ninja was not found")


def find_pybind11(torch: Path) -> str:
    try:
        import pybind11
    except ImportError:
        return str(torch / "include")  # torch carries a copy of the headers, for machines that are offline
    return pybind11.get_include()


def find_cuda() -> Cuda:
    nvcc = find_nvcc()
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    return Cuda(nvcc, version[1] if version else "unknown", cuda_archs(nvcc))


def find_nvcc() -> str:
    for home in filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH"))):
        inside = shutil.which("nvcc", path=str(Path(home, "bin")))
        if inside:
            return inside
    on_path = shutil.which("nvcc")
    if on_path is None:
        raise CannotBuild("nvcc was not found (looked into CUDA_HOME, CUDA_PATH and PATH)")
    return on_path


def cuda_archs(nvcc: str) -> list[str]:
    wanted = re.findall(r"[^;,\s]+", os.environ.get("FAIRKERNELS_CUDA_ARCHS", ""))
    malformed = [arch for arch in wanted if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if malformed:
        raise SetupError(f"FAIRKERNELS_CUDA_ARCHS must look like 80;90;100, got {malformed[0]!r}")
    if wanted:
        return sorted(wanted, key=arch_number)

    # An older toolkit does not know the newest GPUs: take what it has.
    known = output_of(nvcc, "--list-gpu-arch").split()
    archs = [arch for arch in DEFAULT_CUDA_ARCHS if f"compute_{arch}" in known]
    if not archs:
        raise CannotBuild(f"{nvcc} knows none of the compute capabilities {', '.join(DEFAULT_CUDA_ARCHS)}")
    return archs


def arch_number(arch: str) -> int:
    return int(arch.rstrip("af"))


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"{shlex.join(command)} failed: {error}") from error


# ---- Command lines


def compile_command(source: str, tools: Tools, cuda: Cuda | None, version: str) -> list[str]:
    if cuda and source.endswith(".cu"):
        return [*launcher(tools), *nvcc_command(tools, cuda), *NVCC_FLAGS, *arch_flags(cuda)]

    # Two sets of headers that must not meet: the pybind11 inside torch refuses TORCH_TARGET_VERSION.
    flags = module_flags(tools, cuda, version) if source == MODULE else kernel_flags(tools, cuda)
    return [*launcher(tools), *tools.cxx, *CXX_FLAGS, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def module_flags(tools: Tools, cuda: Cuda | None, version: str) -> list[str]:
    flags = [f'-DFK_VERSION="{version}"', '-DFK_TORCH_TARGET="{}.{}"'.format(*TORCH_TARGET)]
    if cuda:
        archs = ",".join(f'"{arch}"' for arch in cuda.archs)
        flags += [f"-DFK_CUDA_ARCHS={archs}", f'-DFK_CUDA_VERSION="{cuda.version}"']
    return [*flags, "-isystem", tools.pybind11, "-isystem", sysconfig.get_path("include")]


def kernel_flags(tools: Tools, cuda: Cuda | None) -> list[str]:
    flags = ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)]
    if cuda:
        flags += ["-DFK_WITH_CUDA", "-DUSE_CUDA"]  # the latter makes torch declare its stream getter
    return [*flags, "-isystem", str(tools.torch / "include")]


def nvcc_command(tools: Tools, cuda: Cuda) -> list[str]:
    host_compiler = next(word for word in tools.cxx if Path(word).name != "ccache")
    return [cuda.nvcc, "-ccbin", host_compiler]


def arch_flags(cuda: Cuda) -> list[str]:
    """The longer half of compiling, up to PTX, is done once for all GPUs that the sources do not tell apart."""
    codes: dict[str, list[str]] = {}
    for arch in cuda.archs:
        codes.setdefault(generation(arch), []).append(f"sm_{arch}")
    newest = generation(cuda.archs[-1])
    codes[newest].append(f"compute_{newest}")
    return [f"-gencode=arch=compute_{shared},code=[{','.join(found)}]" for shared, found in codes.items()]


def generation(arch: str) -> str:
    """The compute capability whose PTX this one is made from; code for one GPU alone has its own."""
    older = [tell for tell in TOLD_APART if arch.isdigit() and tell <= int(arch)]
    return str(max(older)) if older else arch


def launcher(tools: Tools) -> list[str]:
    ccache = shutil.which("ccache")
    return [ccache] if ccache and Path(tools.cxx[0]).name != "ccache" else []


def link_command(extension: Extension, tools: Tools, cuda: Cuda | None) -> list[str]:
    if is_module(extension):
        return [*tools.cxx, "-shared"]
    # nvcc knows where its own static runtime lives.
    driver = [*nvcc_command(tools, cuda), "-cudart=static"] if cuda else tools.cxx
    return [*driver, "-shared"]


def link_libraries(extension: Extension, tools: Tools) -> list[str]:
    if is_module(extension):
        return []
    options = [word for option in LINK_OPTIONS for word in ("-Xlinker", option)]
    return [*options, f"-L{tools.torch / 'lib'}", "-ltorch", "-ltorch_cpu"]


def is_module(extension: Extension) -> bool:
    return extension.sources == [MODULE]


# ---- Ninja

RULES = """\
rule compile
  command = $tool -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in

rule link
  command = $tool $in $libraries -o $out
  description = $out
"""


def as_path(path: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def as_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def compile_step(source: str, command: list[str]) -> str:
    return f"build {source}.o: compile {as_path(ROOT / source)}\n  tool = {as_command(command)}\n"


def link_step(library: str, sources: list[str], command: list[str], libraries: list[str]) -> str:
    objects = " ".join(f"{source}.o" for source in sources)
    variables = f"  tool = {as_command(command)}\n  libraries = {as_command(libraries)}\n"
    return f"build {library}: link {objects}\n{variables}"


def run_ninja(ninja: list[str], folder: Path) -> None:
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    process = subprocess.Popen(
        [*ninja, "-C", str(folder), *jobs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    with process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode != 0:
        raise CannotBuild("the compiler failed:\n" + "".join(first_error(lines)[-REPORTED_LINES:]).rstrip())


def first_error(lines: list[str]) -> list[str]:
    """The compiler's own words: what follows ninja's ``FAILED:`` and the command, up to its next message."""
    failed = next((at for at, line in enumerate(lines) if line.startswith("FAILED:")), None)
    if failed is None:
        return lines
    return list(takewhile(lambda line: not re.match(r"\[\d+/|FAILED:|ninja:", line), lines[failed + 2 :]))


# ---- Building


def switch(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SetupError(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def attempt(part: str, name: str, build: Callable[[], None]) -> str | None:
    """Builds a part as far as its switch allows; returns None, or why there is no such part."""
    wanted = switch(name)
    if wanted == "0":
        return f"{part}: switched off by {name}=0"
    try:
        build()
    except CannotBuild as reason:
        if wanted == "1":
            raise SetupError(f"{name}=1, but {reason}") from reason
        return f"{part}: {reason}"
    return None


class BuildNative(build_ext):
    """Builds both libraries with ninja and puts them, or the reason why not, into the package."""

    def run(self) -> None:
        self.package_folder().mkdir(parents=True, exist_ok=True)
        missing = self.build_what_can_be_built()
        report = self.package_folder() / REPORT
        if missing:
            print(f"fairkernels: not built: {missing}", file=sys.stderr)
            report.write_text(missing + "\n", encoding="utf-8")
        else:
            report.unlink(missing_ok=True)

    def build_what_can_be_built(self) -> str | None:
        without_cuda = self.attempt_cuda()
        if without_cuda is None:
            return None
        without_kernels = attempt("compiled kernels", "FAIRKERNELS_NATIVE", self.compile_for_cpu)
        if without_kernels:
            self.leave_out_libraries()
        return without_kernels or without_cuda or None

    def attempt_cuda(self) -> str | None:
        """As ``attempt``; the empty string where there is nothing to build and nothing to report."""
        wanted = switch("FAIRKERNELS_CUDA")
        if wanted == "1" and switch("FAIRKERNELS_NATIVE") == "0":
            raise SetupError("FAIRKERNELS_CUDA=1 contradicts FAIRKERNELS_NATIVE=0")
        if wanted == "auto" and (switch("FAIRKERNELS_NATIVE") == "0" or not CUDA_SOURCES):
            return ""
        return attempt("CUDA kernels", "FAIRKERNELS_CUDA", self.compile_with_cuda)

    def compile_for_cpu(self) -> None:
        self.compile(find_tools(), None)

    def compile_with_cuda(self) -> None:
        cuda = find_cuda()
        if not CUDA_SOURCES:
            raise CannotBuild("csrc/cuda has no .cu file")
        self.compile(find_tools(), cuda)

    def compile(self, tools: Tools, cuda: Cuda | None) -> None:
        folder = self.objects_folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(tools, cuda), encoding="utf-8")
        run_ninja(tools.ninja, folder)
        for extension in self.extensions:
            install(folder / self.file_name(extension), self.package_folder() / self.file_name(extension))

    def ninja_file(self, tools: Tools, cuda: Cuda | None) -> str:
        version = self.distribution.get_version()
        steps = [RULES]
        for extension in self.extensions:
            sources = [source for source in extension.sources if cuda or not source.endswith(".cu")]
            for source in sources:
                steps.append(compile_step(source, compile_command(source, tools, cuda, version)))
            library, libraries = self.file_name(extension), link_libraries(extension, tools)
            steps.append(link_step(library, sources, link_command(extension, tools, cuda), libraries))
        return "\n".join(steps)

    def leave_out_libraries(self) -> None:
        for extension in self.extensions:
            (self.package_folder() / self.file_name(extension)).unlink(missing_ok=True)  # of an earlier build
        self.extensions = []  # setuptools must not expect them

    def package_folder(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "fairkernels"

    def objects_folder(self) -> Path:
        # In place, build_temp may be temporary; objects that stay make the next build take seconds.
        if self.inplace:
            return ROOT / "build" / sys.implementation.cache_tag
        return Path(self.build_temp).resolve()

    def file_name(self, extension: Extension) -> str:
        return Path(self.get_ext_filename(extension.name)).name

    def get_ext_filename(self, fullname: str) -> str:
        # Only _C belongs to one version of Python.
        if fullname.split(".")[-1] == "_kernels":
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)


def install(library: Path, target: Path) -> None:
    """Replaces in one step, so that a process that has the earlier library open keeps it."""
    fresh = target.with_suffix(".new")
    shutil.copyfile(library, fresh)
    shutil.copymode(library, fresh)
    fresh.replace(target)


def files(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern) if path.is_file())


MODULE = "csrc/module.cpp"
CUDA_SOURCES = files("csrc/cuda/*.cu")
KERNEL_SOURCES = [source for source in files("csrc/*.cpp") if source != MODULE] + CUDA_SOURCES
SHIPPED = [*files("csrc/**/*"), "constraints.txt"]  # what the sdist must hold besides the package


def needs_torch() -> bool:
    """Whether a torch must be fetched for its headers alone."""
    return switch("FAIRKERNELS_NATIVE") != "0" and find_torch() is None


setup(
    ext_modules=[
        Extension("fairkernels._C", [MODULE], depends=SHIPPED),
        Extension("fairkernels._kernels", KERNEL_SOURCES),
    ],
    cmdclass={"build_ext": BuildNative},
    setup_requires=["torch>={}.{}".format(*TORCH_TARGET)] if needs_torch() else [],
)
