"""Builds liblfq and lfq._core with CMake; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self):
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={prefix}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # Given every time: a kept cache points into the deleted environment of an earlier isolated build.
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += os.environ.get("LFQ_CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        # Modules of an earlier build must not be packed along.
        for stale in list(prefix.glob("lfq/_core*.so")) + list(prefix.glob("lfq/liblfq*")):
            stale.unlink()
        subprocess.run(["cmake", "--install", str(build)], check=True)


setup(ext_modules=[Extension("lfq._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
