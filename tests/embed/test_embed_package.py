"""How other programs find lfq: the CMake package, pkg-config, the command line; and that the header says all."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lfq
from lfq import _core, cli, embedding

from .conftest import GUIDE, run, tool

HEADER = embedding.include_dir() / "lfq" / "lfq.h"

CONSUMER = """
cmake_minimum_required(VERSION 3.18)
project(consumer LANGUAGES CXX)
find_package(lfq {version} CONFIG REQUIRED {components})
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE {targets})
"""


def consumer(directory, main, targets="lfq::lfq", version="", components=""):
    """A CMake project that uses lfq; the result of its configuration."""
    (directory / "CMakeLists.txt").write_text(CONSUMER.format(targets=targets, version=version, components=components))
    (directory / "main.cpp").write_text(main)
    return subprocess.run(
        [tool("cmake"), "-S", directory, "-B", directory / "build", f"-Dlfq_DIR={embedding.cmake_dir()}"],
        capture_output=True,
        text=True,
    )


def test_the_command_line_prints_the_flags_without_optional_packages():
    hidden = (
        "import sys; sys.modules.update(typer=None, rich=None); from lfq.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    printed = run(sys.executable, "-c", hidden, "--cmakedir", "--includes", "--libs", "--pkgconfigdir").split()
    package = Path(lfq.__file__).resolve().parent
    assert (Path(printed[0]) / "lfqConfig.cmake").is_file()
    assert (Path(printed[1].removeprefix("-I")) / "lfq" / "lfq.h").is_file()
    assert list(Path(printed[2].removeprefix("-L")).glob("liblfq.*"))
    assert (Path(printed[-1]) / "lfq.pc").is_file()
    assert all(str(package) in word for word in (printed[0], printed[1], printed[2], printed[-1]))


def test_a_copy_that_is_not_whole_is_one_clear_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(embedding, "_PACKAGE", tmp_path)
    assert cli.main(["--cmakedir"]) == 2
    assert "lfqConfig.cmake is missing" in capsys.readouterr().err
    assert cli.main(["--cuda-libs"]) == 2
    assert "built without CUDA" in capsys.readouterr().err


def test_the_header_only_target_links_nothing(tmp_path):
    main = """
#include <lfq/phi4.hpp>
int main() { return lfq::phi4_site<double>(0.5, 0.5).force(1.0, 2.0) == -1.0 ? 0 : 1; }
"""
    result = consumer(tmp_path, main, targets="lfq::headers")
    assert result.returncode == 0, result.stderr
    run(tool("cmake"), "--build", tmp_path / "build")
    run(tmp_path / "build" / "consumer")
    needed = run(tool("readelf"), "-d", tmp_path / "build" / "consumer")
    assert "liblfq" not in needed


def test_the_cuda_target_links_and_tells_of_devices(tmp_path):
    if not (Path(lfq.__file__).parent / "liblfq_cuda.so").exists():
        pytest.skip("built without CUDA")
    main = """
#include <cstdio>
#include <lfq/lfq_cuda.h>
int main() {
  const int devices = lfq_cuda_device_count();
  std::printf("%s|%d|%s", lfq_cuda_version(), devices, devices > 0 ? "" : lfq_cuda_last_error());
}
"""
    result = consumer(tmp_path, main, targets="lfq::cuda lfq::lfq", components="COMPONENTS cuda")
    assert result.returncode == 0, result.stderr
    run(tool("cmake"), "--build", tmp_path / "build")
    version, devices, error = run(tmp_path / "build" / "consumer").split("|")
    assert version == lfq.__version__ and (int(devices) > 0 or "CUDA" in error)


@pytest.mark.parametrize(
    "request_for, message",
    [({"version": "99.0"}, "99.0"), ({"components": "COMPONENTS telepathy"}, "telepathy")],
)
def test_what_lfq_cannot_give_is_not_found(tmp_path, request_for, message):
    result = consumer(tmp_path, "int main() {}", **request_for)
    assert result.returncode != 0 and message in result.stderr


def test_pkg_config_finds_the_package_wherever_it_was_moved(tmp_path):
    program = tool("pkg-config")
    moved = tmp_path / "moved"
    for part in ("include", "pkgconfig"):
        shutil.copytree(Path(lfq.__file__).parent / part, moved / part)
    shutil.copy(embedding.library(), moved)
    for directory, home in ((embedding.pkgconfig_dir(), embedding.library().parent), (moved / "pkgconfig", moved)):
        env = {"PKG_CONFIG_PATH": str(directory), "PATH": "/usr/bin:/bin"}
        assert run(program, "--modversion", "lfq", env=env).strip() == lfq.__version__
        flags = run(program, "--cflags", "--libs", "lfq", env=env)
        include, library = re.search(r"-I(\S+) -L(\S+)", flags).groups()
        assert Path(include).resolve() == (home / "include").resolve()
        assert Path(library).resolve() == home.resolve() and "-llfq" in flags


def test_every_function_of_the_header_is_documented():
    """A comment stands over each function, or over the one of the other type just before it."""
    text = HEADER.read_text()
    body = text[text.index("/* ---- library") :]
    pieces = re.split(r"(/\*.*?\*/)", body, flags=re.DOTALL)
    documented, section_only = set(), True
    for piece in pieces:
        if piece.startswith("/*"):
            section_only = piece.startswith("/* ----")
            continue
        names = re.findall(r"LFQ_API\s[^;(]*?\b(lfq_\w+)\s*\(", piece)
        stems = {re.sub(r"_f(32|64)$", "", name) for name in names}
        assert not (names and section_only), f"{names} stand under a heading alone"
        assert len(stems) <= 2 or any("custom" in stem or "cluster" in stem or "fourier" in stem for stem in stems), (
            names
        )
        documented |= set(names)
    assert len(documented) > 60


def test_statuses_have_messages_and_the_versions_agree():
    import ctypes

    library = ctypes.CDLL(str(embedding.library()))
    library.lfq_status_message.restype = ctypes.c_char_p
    codes = dict(re.findall(r"(LFQ_(?:OK|ERR_\w+)) = (-?\d+)", HEADER.read_text()))
    messages = [library.lfq_status_message(int(code)) for code in codes.values()]
    assert len(set(messages)) == len(messages) == 6 and b"unknown status" not in messages
    assert library.lfq_status_message(-99) == b"unknown status"
    assert library.lfq_abi_version() == _core.abi_version()


def test_the_programs_of_the_guide_are_short(programs):
    assert len(programs) >= 4
    for name, program in programs.items():
        assert len(program.splitlines()) <= 30, name
    blocks = re.findall(r"^```(c|cpp|cuda|fortran|python)$", GUIDE.read_text(), flags=re.MULTILINE)
    assert len(blocks) == len(programs), "every block of code in the guide is run"
