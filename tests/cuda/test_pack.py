"""pack and unpack of the CUDA kernels, where they differ from the CPU's in kind."""

from __future__ import annotations

import pytest
import torch

from wise_ext.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_bits(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (rows, -(-columns // 32)), dtype=torch.int32)


# A row, a piece of the scan, one row more, and three pieces.
@pytest.mark.parametrize("rows", [1, 4096, 4097, 2 * 4096 + 3])
def test_offsets_of_any_number_of_rows(emulator, rows):
    bits, delta = random_bits(rows, 3), torch.randn(rows, 3)
    values, row_ptr = torch.ops.wise_ext_emulated.pack(delta, bits)
    expected, pointers = reference.pack(delta, bits)
    assert torch.equal(row_ptr, pointers) and torch.equal(values, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 64, 127, 256, 260, 2049, 4099])
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_of_any_length_and_alignment(emulator, dtype, columns, shift):
    ops, rows = torch.ops.wise_ext_emulated, 3
    bits = random_bits(rows, columns)
    # A view from the second element on: not even the first row is aligned.
    delta = torch.randn(rows * columns + shift).to(dtype)[shift:].view(rows, columns)
    values, row_ptr = ops.pack(delta, bits)
    expected, pointers = reference.pack(delta, bits)
    assert torch.equal(values, expected) and torch.equal(row_ptr, pointers)
    dense = ops.unpack(bits, values, row_ptr, columns)
    assert torch.equal(dense, reference.unpack(bits, values, row_ptr, columns))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_wrong_offsets_become_nan_and_no_others(emulator, dtype):
    rows, columns = 6, 75
    bits = random_bits(rows, columns)
    bits[:, 0] |= 1
    values, row_ptr = reference.pack(torch.randn(rows, columns).to(dtype), bits)
    right = reference.unpack(bits, values, row_ptr, columns)
    for entry, wrong in ((0, -4), (2, 2**40), (3, -(2**63)), (6, 2**62), (6, -1)):
        broken = row_ptr.clone()
        broken[entry] = wrong
        dense = torch.ops.wise_ext_emulated.unpack(bits, values, broken, columns)
        for row in range(rows):
            if row in (entry - 1, entry):
                assert dense[row].isnan().all()
            else:
                assert torch.equal(dense[row], right[row])
    # Offsets that agree with the mask, and lead past the last value.
    dense = torch.ops.wise_ext_emulated.unpack(bits, values[:-1], row_ptr, columns)
    assert dense[-1].isnan().all() and torch.equal(dense[:-1], right[:-1])
