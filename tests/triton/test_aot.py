"""Every Triton kernel, config and dtype compiled for real architectures; no card is needed.

What is looked for in the machine code is what made kernels slow unnoticed: registers that spill,
and products that miss the tensor cores.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there are no Triton kernels")

from bench import triton_resources as resources
from wise_ext.triton_kernels import configs

if configs.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: the interpreter compiles nothing", allow_module_level=True)
if not resources.CUOBJDUMP.exists():
    pytest.skip("this Triton has no NVIDIA tools", allow_module_level=True)

CASES = {
    f"{resources.label(variant)}-sm{arch}": (variant, arch)
    for arch in resources.ARCHITECTURES
    for variant in resources.variants(arch)
}


@pytest.mark.parametrize("case", CASES)
def test_compiles_well(case):
    assert resources.complaint(*CASES[case]) == ""


@pytest.mark.parametrize("arch", resources.ARCHITECTURES)
def test_every_config_of_the_tables_is_compiled(arch):
    compiled = [(variant.name, variant.config) for variant in resources.variants(arch)]
    table = configs.read_table(configs.TABLES / f"sm{arch}.json")
    for op, dtypes in table.items():
        for entries in dtypes.values():
            for _, config in entries:
                assert any(name.startswith(op) and config == each for name, each in compiled)
