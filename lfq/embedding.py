"""Where other programs find lfq's library and headers: `python -m lfq --cmakedir`, `--includes`, `--libs`."""

from __future__ import annotations

from pathlib import Path

__all__ = ["OPTIONS", "cmake_dir", "cuda_library", "include_dir", "library", "pkgconfig_dir"]

_PACKAGE = Path(__file__).resolve().parent


def _installed(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: this copy of lfq was not installed whole")
    return path


def library() -> Path:
    """liblfq itself."""
    return _installed(next(_PACKAGE.glob("liblfq.*"), _PACKAGE / "liblfq.so"))


def cuda_library() -> Path:
    """liblfq_cuda, of lfq_cuda.h."""
    path = _PACKAGE / "liblfq_cuda.so"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: this copy of lfq was built without CUDA")
    return path


def include_dir() -> Path:
    """The directory for ``#include <lfq/lfq.h>``."""
    return _installed(_PACKAGE / "include" / "lfq" / "lfq.h").parents[1]


def cmake_dir() -> Path:
    """Where ``find_package(lfq CONFIG)`` finds lfq: its ``lfq_DIR``."""
    return _installed(_PACKAGE / "cmake" / "lfqConfig.cmake").parent


def pkgconfig_dir() -> Path:
    """For ``PKG_CONFIG_PATH``."""
    return _installed(_PACKAGE / "pkgconfig" / "lfq.pc").parent


OPTIONS = {
    "--cmakedir": lambda: str(cmake_dir()),
    "--includes": lambda: f"-I{include_dir()}",
    "--libs": lambda: f"-L{library().parent} -llfq -Wl,-rpath,{library().parent}",
    "--cuda-libs": lambda: f"-L{cuda_library().parent} -llfq_cuda -llfq -Xlinker=-rpath,{library().parent}",
    "--pkgconfigdir": lambda: str(pkgconfig_dir()),
}
"""What each option of the command line prints."""
