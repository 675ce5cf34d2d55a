"""Build of the native extension by CMake; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure and build CMakeLists.txt, leaving the extension where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGGRO_CUDA={os.environ.get('GGRO_CUDA', 'AUTO')}",
        ]
        # A cache of an earlier build points into the temporary environment that pip made for it.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


native = os.environ.get("GGRO_BUILD_NATIVE", "1") != "0"
setup(
    ext_modules=[Extension("ggro_kernels._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
