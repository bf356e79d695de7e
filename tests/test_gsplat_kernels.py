"""gsplat's first use on a machine, with a stand-in for the package: what is missing is one line, and processes that
start together compile one after the other."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ouroboros3d.rendering.gsplat_backend import LIBRARY, VERSION, RendererError, load_kernels

# As gsplat 1.5.3: whoever finds no finished library deletes the folder and compiles.
BUILDING = """
import os, shutil, time
from torch.utils.cpp_extension import _get_build_directory
folder = _get_build_directory("gsplat_cuda", False)
library = os.path.join(folder, "gsplat_cuda.so")
if not os.path.exists(library):
    shutil.rmtree(folder)
    os.makedirs(folder)
    part = os.path.join(folder, "part.o")
    with open(part, "w") as file:
        time.sleep(1.0)
    os.replace(part, library)  # fails if another process has deleted the folder meanwhile
_C = library
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(backend="_C = None", nvcc="12.4"): a gsplat with this _backend.py, a toolkit, and a build folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "_find_cuda_home", lambda: None)

    def make(backend: str = "_C = None", nvcc: str | None = "13.0", version: str = "1.5.3") -> Path:
        package = tmp_path / "gsplat" / "cuda"
        package.mkdir(parents=True)
        (tmp_path / "gsplat" / "__init__.py").write_text(f"__version__ = '{version}'")
        (package / "__init__.py").write_text("")
        (package / "_backend.py").write_text(backend)
        if nvcc is not None:
            monkeypatch.setattr(cpp_extension, "_find_cuda_home", lambda: str(tmp_path / "cuda"))
            program = tmp_path / "cuda" / "bin" / "nvcc"
            program.parent.mkdir(parents=True)
            program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'")
            program.chmod(0o755)
        return Path(cpp_extension._get_build_directory(LIBRARY, False))

    yield make
    for name in [n for n in sys.modules if n.split(".")[0] == "gsplat"]:
        del sys.modules[name]


def refusal() -> str:
    with pytest.raises(RendererError) as caught:
        load_kernels()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_command_installs_what_a_gpu_needs():
    """gsplat of the version whose rules are ours; LPIPS's networks; a background remover; FSDP2's versions."""
    lines = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()
    wanted = {line.split(";")[0].split("#")[0].strip() for line in lines}
    assert any(name.startswith(f"gsplat=={VERSION}.") for name in wanted)
    assert {"torchvision", "onnxruntime>=1.17", "torch>=2.6", "accelerate>=1.6"} <= wanted
    assert "transformers>=4.46,!=4.46.0" in wanted  # withdrawn


def test_kernels_that_are_there_need_no_compiler(machine):
    folder = machine("_C = object()", nvcc=None)
    (folder / f"{LIBRARY}.so").touch()
    load_kernels()


def test_without_gsplat(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "pip install gsplat==1.5.3" in refusal()


def test_of_other_rules(machine):
    machine(version="1.6.0")
    assert "gsplat 1.6.0" in refusal()


def test_without_a_compiler(machine):
    """Said before gsplat is imported, and where gsplat itself finds none."""
    folder = machine(nvcc=None)
    assert "install the CUDA 13.0 toolkit and set CUDA_HOME" in refusal()
    (folder / f"{LIBRARY}.so").touch()
    assert "install the CUDA 13.0 toolkit and set CUDA_HOME" in refusal()


def test_with_a_compiler_of_another_cuda(machine):
    machine(nvcc="12.4")
    text = refusal()
    assert "is of CUDA 12.4" in text and "of CUDA 13.0" in text and "set CUDA_HOME to a CUDA 13.0 toolkit" in text


def test_half_built(machine):
    folder = machine("raise ImportError('gsplat_cuda.so: cannot open shared object file')")
    assert f"delete {folder} and try again" in refusal() and folder.is_dir()


def test_two_processes_do_not_delete_each_other_s_build(machine):
    folder = machine(BUILDING)

    def start() -> multiprocessing.Process:
        process = multiprocessing.get_context("fork").Process(target=load_kernels)
        process.start()
        return process

    first = start()
    time.sleep(0.3)
    second = start()
    for process in (first, second):
        process.join(60)
    assert [first.exitcode, second.exitcode] == [0, 0] and (folder / f"{LIBRARY}.so").exists()
