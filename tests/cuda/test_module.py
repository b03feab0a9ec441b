"""The CUDA half of the native module where there is no card: it loads, registers, and says why not.

The CUDA kernels are called with CPU tensors by naming the dispatch key. They get as far as asking
for torch's stream, and no further.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest
import torch

from wise_ext import ops

OPS = {"add_side_", "dual_linear", "side_norm", "pack", "unpack", "ties_merge"}

CALL = """
import ctypes, sys, torch
from wise_ext import ops
fake = ctypes.CDLL(sys.argv[1]) if sys.argv[1:] else None
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.wise_ext.unpack.default.redispatch(
        cuda, torch.ones(2, 1, dtype=torch.int32), torch.ones(2), torch.arange(3), 5
    )
except RuntimeError as error:
    print(str(error).splitlines()[0])
if fake is not None:
    print("asked", ctypes.c_int.in_dll(fake, "asked").value)
"""

FAKE = """
#include <cstdint>
extern "C" {
int asked = 0;
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  ++asked;
  *stream = nullptr;
  return 0;
}
}
"""


@pytest.fixture(autouse=True)
def _built() -> None:
    if util.find_spec("wise_ext._C") is None:
        pytest.skip("no native module was built here")
    if not import_module("wise_ext._C").build_info()["cuda"]:
        pytest.skip("the native module was built without CUDA")


def call(*arguments: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, check=True
    )
    return answer.stdout


def test_both_dispatch_keys_are_registered() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cuda = {op for op in ops.OPS if registered(f"wise_ext::{op}", "CUDA")}
    assert on_cuda == OPS
    assert all(registered(f"wise_ext::{op}", "CPU") for op in OPS)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA streams")
def test_a_torch_without_cuda_streams_is_named_in_one_line() -> None:
    assert call() == (
        "unpack: this torch has no CUDA streams (libtorch_cuda.so offers no "
        "aoti_torch_get_current_cuda_stream); install a CUDA build of torch 2.11 or newer\n"
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA streams")
def test_the_stream_is_found_in_a_library_torch_loaded_for_itself(tmp_path: Path) -> None:
    """As Python loads libtorch_cuda.so: out of sight of other modules, unless asked for by name."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("this machine has no C++ compiler")
    source, library = tmp_path / "fake.cpp", tmp_path / "libtorch_cuda.so"
    source.write_text(FAKE, encoding="utf-8")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", source, "-o", library]
    subprocess.run([str(part) for part in command], check=True)
    *failure, asked = call(str(library)).splitlines()
    assert asked == "asked 1"
    # There is no device to make the current one, and no other complaint comes before that.
    assert not any("streams" in line for line in failure)
