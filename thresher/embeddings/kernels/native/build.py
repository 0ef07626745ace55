"""Builds the kernels' library: one shared library without dependencies, with code for three instruction sets.

``setup.py`` runs this file. Where there is no C++ compiler the package is installed without the library, and tables
are looked up by the slow reference.
"""

import os
import platform
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError
from setuptools.modified import newer_group

PACKAGE = "thresher/embeddings/kernels/native"
SOURCES = runpy.run_path(f"{PACKAGE}/sources.py")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
"""No fused multiply-adds: results are the same to the bit on all instruction sets."""
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTIONS: dict[int, list[str]] = {0: [], 1: ["-mavx2", "-mf16c"], 2: AVX512}


def extension() -> Extension:
    """For ``setup(ext_modules=...)``; goes with :class:`BuildKernels`."""
    files = [f"{PACKAGE}/{path.name}" for path in SOURCES["sources"]()]
    return Extension(
        PACKAGE.replace("/", ".") + ".kernels",
        [name for name in files if name.endswith(".cpp")],
        depends=[name for name in files if name.endswith(".h")],
        language="c++",
        optional=True,
    )


class BuildKernels(build_ext):  # type: ignore[misc]
    """Compiles each file with the flags of its instruction set; files that have not changed are kept."""

    def initialize_options(self) -> None:
        """One place for objects, whatever is being built, so that only what changed is compiled."""
        super().initialize_options()
        self.build_temp = "build/kernels"

    def get_ext_filename(self, fullname: str) -> str:
        """A plain library: Python loads it by its path."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Builds, or says in one line that it could not."""
        try:
            self._build(ext)
        except (CompileError, LinkError, PlatformError, OSError):
            print(
                "thresher: no C++17 compiler could build the fast kernels (what it says is above); installing without"
            )

    def _build(self, ext: Extension) -> None:
        levels = INSTRUCTIONS if platform.machine() in ("x86_64", "AMD64") else {0: []}
        jobs: list[tuple[str, int | None, list[str]]] = []
        for source in ext.sources:
            if Path(source).name in SOURCES["PER_INSTRUCTIONS"]:
                jobs += [(source, level, flags) for level, flags in levels.items()]
            else:
                jobs.append((source, None, []))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self._compile(ext, *job), jobs))
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")

    def _compile(self, ext: Extension, source: str, level: int | None, flags: list[str]) -> str:
        folder = Path(self.build_temp, f"level{level}" if level is not None else "once")
        target = str(folder / Path(source).with_suffix(".o"))
        arguments = [*FLAGS, *ARITHMETIC, *flags, *([] if level is None else [f"-DTH_LEVEL={level}"])]
        identifies = Path(source).name == "api.cpp"
        if identifies:
            arguments.append(f'-DTH_SOURCES="{SOURCES["digest"]()}"')
        if identifies or newer_group([source, *ext.depends, f"{PACKAGE}/build.py"], target):
            self.compiler.compile([source], output_dir=str(folder), extra_postargs=arguments)
        return target
