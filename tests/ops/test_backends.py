"""Which implementation answers, and how its absence explains itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from wise_ext import ops
from wise_ext.errors import ConfigError, NativeError
from wise_ext.ops import backends

needs_native = pytest.mark.skipif(not ops.native_loaded(), reason="needs the native module")
HIDE = "import sys; sys.modules['wise_ext._C'] = None\n"


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, "WISE_BACKEND": "auto", "WISE_CPU_ISA": "auto", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def choice():
    yield ops.set_backend
    ops.set_backend("auto")


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(backends, "_selected", backends._selected.__wrapped__)  # nothing remembered
    monkeypatch.setattr(backends._state, "loaded", False)
    monkeypatch.setattr(backends._state, "kernels", frozenset())
    monkeypatch.setattr(backends._state, "failure", "ImportError: libmissing.so: no such file")


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="unknown backend 'fast': choose one of auto, native"):
        ops.set_backend("fast")
    with pytest.raises(ConfigError, match="unknown op 'sub_side_': the ops are add_side_"):
        ops.backend("sub_side_", "cpu")
    with pytest.raises(ConfigError, match="unknown CPU instruction set 'mmx': choose auto"):
        ops.set_cpu_isa("mmx")


def test_the_reference_can_be_chosen(choice):
    choice("reference")
    assert ops.get_backend() == "reference"
    assert {ops.backend(op, "cpu") for op in ops.OPS} == {"reference"}


@needs_native
def test_auto_takes_the_native_kernels_of_the_cpu(choice):
    for name in ("auto", "native"):
        choice(name)
        assert {ops.backend(op, "cpu", rows) for op in ops.OPS for rows in (1, 999)} == {"native"}
    assert ops.native_failure() == ""


@needs_native
def test_native_has_to_exist_for_the_device(choice):
    choice("auto")
    assert ops.backend("pack", "meta") == "reference"
    choice("native")
    with pytest.raises(NativeError, match=r"no native pack for device type 'meta'.*auto"):
        ops.backend("pack", "meta")


@needs_native
def test_native_refuses_what_it_cannot_do_and_auto_takes_the_reference(choice, make_bank):
    bank = make_bank(1, 4, 40, torch.float64)
    y, x, route = torch.zeros(2, 4).double(), torch.randn(2, 40).double(), torch.zeros(2).int()
    ops.add_side_(y, x, *bank.tensors, route)
    torch.testing.assert_close(y, x @ bank.dense[0].T)
    choice("native")
    with pytest.raises(RuntimeError, match=r"add_side_: y must be float32.*got torch.float64"):
        ops.add_side_(y, x, *bank.tensors, route)


def test_absent_native_explains_itself(absent):
    with pytest.raises(NativeError, match=r"libmissing\.so.*: build it .*WISE_BACKEND=auto"):
        ops.set_backend("native")
    assert ops.get_backend() == "auto"
    with pytest.raises(NativeError, match="cannot be used"):
        ops.set_cpu_isa("portable")
    assert ops.cpu_isa() is None
    assert ops.backend("pack", "cpu") == "reference"


def test_absent_native_chosen_by_the_environment_explains_itself_at_the_first_call(
    absent, monkeypatch
):
    monkeypatch.setattr(backends._state, "choice", "native")
    with pytest.raises(NativeError, match="cannot be used"):
        ops.pack(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int32))


def test_everything_works_without_the_module():
    done = python(
        HIDE + "import torch\nfrom wise_ext import ops\n"
        "assert not ops.native_loaded() and 'wise_ext._C' in ops.native_failure()\n"
        "mask = torch.tensor([[5]], dtype=torch.int32)\n"
        "values, row_ptr = ops.pack(torch.ones(1, 3), mask)\n"
        "y = torch.zeros(1, 1)\n"
        "ops.add_side_(y, torch.ones(1, 3), mask[None], values, row_ptr, torch.zeros(1).int())\n"
        "assert y.item() == 2\n"
    )
    assert done.returncode == 0, done.stderr


def test_the_environment_chooses():
    done = python("from wise_ext import ops; print(ops.get_backend())", WISE_BACKEND="reference")
    assert done.stdout == "reference\n", done.stderr


def test_a_bad_environment_warns_and_does_not_break_the_import():
    done = python("from wise_ext import ops; print(ops.get_backend())", WISE_BACKEND="warp")
    assert done.stdout == "auto\n", done.stderr
    assert "WISE_BACKEND=warp is not one of auto, native, triton, reference" in done.stderr


@needs_native
def test_the_environment_forces_an_instruction_set():
    code = "from wise_ext import ops; print(ops.cpu_isa())"
    done = python(code, WISE_CPU_ISA="portable")
    assert done.stdout == "portable\n", done.stderr
    done = python(code, WISE_CPU_ISA="sse9")
    assert done.stdout == f"{ops.cpu_isa()}\n", done.stderr
    assert "WISE_CPU_ISA=sse9 is ignored" in done.stderr


@needs_native
def test_an_instruction_set_the_cpu_lacks_is_refused(monkeypatch):
    before = ops.cpu_isa()
    monkeypatch.setattr(backends, "ISAS", (*ops.ISAS, "avx1024"))
    with pytest.raises(NativeError, match="no avx1024 kernels: choose auto or "):
        ops.set_cpu_isa("avx1024")
    assert ops.cpu_isa() == before


def test_a_backward_is_native_where_the_forward_is(provider, make_bank):
    bank = make_bank(1, 4, 40)
    x = torch.randn(2, 40, requires_grad=True)
    y = torch.zeros(2, 4)
    ops.add_side_(y, x, *bank.tensors, torch.zeros(2).int())
    y.sum().backward()
    torch.testing.assert_close(x.grad, bank.dense[0].sum(0).float().expand(2, 40))
