"""The launches of training, where they promise more than the ops do: offsets nobody may follow,
rows that must not feel each other, strides; and that what bench/tune.py launches computes the op.

They run where the ops' own tests run on Triton: with TRITON_INTERPRET=1, or with
WISE_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no Triton kernels")

from bench import tune
from bench.cases import Case
from bench.inputs import Inputs
from bench.timing import Samples
from bench.tune_jobs import JOBS, verify
from tests.triton import interpreter
from wise_ext.memory.masks import random_mask_bits
from wise_ext.triton_kernels import configs, dual_linear_train, masked_update

DEVICE = torch.device(os.environ.get("WISE_TEST_DEVICE", "cpu"))
REFERENCE = torch.ops.wise_ext_reference
D_OUT, D_IN = 9, 70
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

if configs.INTERPRETED:
    interpreter.install()
elif DEVICE.type == "cpu":
    pytest.skip("runs with TRITON_INTERPRET=1 or on a GPU", allow_module_level=True)


@pytest.fixture
def mask_bits():
    return random_mask_bits(D_OUT, D_IN, 0.3, seed=1).to(DEVICE)


def bools(mask_bits):
    ones = torch.ones(D_OUT, D_IN, device=DEVICE)
    return REFERENCE.unpack(mask_bits, *REFERENCE.pack(ones, mask_bits), D_IN).bool()


def draw(*shape):
    return torch.randn(*shape).to(DEVICE)


# What is added to which offset, and the rows that must show it.
@pytest.mark.parametrize(
    ("index", "change", "rows"),
    [
        (4, 1, [3, 4]),
        (4, -2, [3, 4]),
        (0, -3, [0]),
        (D_OUT, 5, [D_OUT - 1]),
        (5, 2**62, [4, 5]),
        (5, -(2**62), [4, 5]),
        (slice(None), 1, [D_OUT - 1]),
        (slice(None), 2**40, list(range(D_OUT))),
        (slice(None), -(2**40), list(range(D_OUT))),
    ],
)
def test_rows_with_wrong_offsets_turn_nan_and_move_no_state(mask_bits, index, change, rows):
    chosen, delta, grad = bools(mask_bits), draw(D_OUT, D_IN), draw(D_OUT, D_IN)
    _, row_ptr = REFERENCE.pack(delta, mask_bits)
    m, v = draw(int(row_ptr[-1])), draw(int(row_ptr[-1])).square()
    wrong = row_ptr.clone()
    wrong[index] += change
    settings = (0.03, 0.9, 0.95, 1e-8, 3, float("inf"))
    got, got_m, got_v = delta.clone(), m.clone(), v.clone()
    masked_update.masked_update(got, grad, mask_bits, wrong, got_m, got_v, *settings)
    bad = torch.zeros(D_OUT, 1, dtype=torch.bool, device=DEVICE)
    bad[rows] = True
    assert got[bad & chosen].isnan().all() and not got[~bad & chosen].isnan().any()
    assert torch.equal(got[~chosen], delta[~chosen])
    if index != slice(None):
        REFERENCE.masked_update_(delta, grad, mask_bits, row_ptr, m, v, *settings)
        right = chosen & ~bad
        torch.testing.assert_close(got[right], delta[right])
    if len(rows) == D_OUT:
        assert torch.equal(got_m, m) and torch.equal(got_v, v)


@pytest.mark.parametrize("clamp", [0.5, float("inf")])
@pytest.mark.parametrize("adam", [True, False])
def test_nan_is_not_clamped_away_and_bits_past_the_end_are_ignored(mask_bits, clamp, adam):
    chosen, delta, grad = bools(mask_bits), 2 * draw(D_OUT, D_IN), draw(D_IN, D_OUT).T
    _, row_ptr = REFERENCE.pack(delta, mask_bits)
    states = [draw(int(row_ptr[-1])).square() for _ in "mv"] if adam else [None, None]
    delta[~chosen] = float("nan")
    grad[chosen & (delta > 0)] = float("nan")
    wanted, wanted_states = delta.clone(), [None if s is None else s.clone() for s in states]
    settings = (0.03, 0.9, 0.95, 1e-8, 3, clamp)
    REFERENCE.masked_update_(wanted, grad, mask_bits, row_ptr, *wanted_states, *settings)
    mask_bits[:, -1] |= -1 << (D_IN % 32)
    masked_update.masked_update(delta, grad, mask_bits, row_ptr, *states, *settings)
    torch.testing.assert_close(delta, wanted, equal_nan=True, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_a_base_of_another_dtype(mask_bits, dtype):
    rows = 19
    x = draw(D_IN, 2 * rows).to(dtype).T[::2]
    base, grad_y = draw(D_OUT, rows).T, draw(1, 1).expand(rows, D_OUT)
    grad_indicator = draw(1).expand(rows)
    delta = torch.where(bools(mask_bits), draw(D_OUT, D_IN), 0.0).T.contiguous().T
    # Rows of what is written may lie apart.
    y, side = (torch.full((rows, 2 * D_OUT), torch.nan, device=DEVICE)[:, :D_OUT] for _ in "ys")
    indicator = torch.full((rows,), torch.nan, device=DEVICE)
    dual_linear_train.forward(x, base, delta, y, side, indicator)
    wanted = REFERENCE.dual_linear_train(x.double(), base.double(), delta.double(), mask_bits)
    for got, want in zip((y, side, indicator), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-6)
    grad_x, grad_delta = (
        torch.empty(rows, D_IN, dtype=dtype, device=DEVICE),
        torch.empty_like(delta, memory_format=torch.contiguous_format),
    )
    dual_linear_train.backward(
        grad_y, grad_indicator, x, delta, mask_bits, side, indicator, grad_x, grad_delta
    )
    wide = (tensor.double() for tensor in (grad_y, grad_indicator, x, delta))
    wanted = REFERENCE.dual_linear_train_backward(*wide, mask_bits, *wanted[1:], True, True)
    torch.testing.assert_close(grad_x, wanted[0].to(dtype), atol=2e-5, rtol=1.6e-2)
    torch.testing.assert_close(grad_delta.double(), wanted[1], atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_feel_what_the_others_hold(mask_bits, dtype):
    rows, row = 33, 17
    x, base, delta = draw(rows, D_IN).to(dtype), draw(rows, D_OUT).to(dtype), draw(D_OUT, D_IN)

    def run():
        y, side = torch.empty_like(base), torch.empty(rows, D_OUT, device=DEVICE)
        indicator = torch.empty(rows, device=DEVICE)
        dual_linear_train.forward(x, base, delta, y, side, indicator)
        grad_x = torch.empty_like(x)
        dual_linear_train.backward(
            base, indicator, x, delta, mask_bits, side, indicator, grad_x, None
        )
        return [tensor[row].clone() for tensor in (y, side, indicator, grad_x)]

    before = run()
    others = torch.arange(rows, device=DEVICE) != row
    x[others], base[others] = float("nan"), float("inf")
    for got, want in zip(run(), before, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", JOBS)
def test_what_is_tuned_agrees_with_the_reference(op, dtype):
    job = JOBS[op]
    if dtype != "fp32" and not job.by_rows:
        pytest.skip("its states are float32")
    inputs = Inputs(Case(op, "tiny", 5, 1, dtype, variant="all"), DEVICE)
    wanted = job.expected(inputs.with_copies(job.changed))
    verify(op, dtype, job.launch(inputs.with_copies(job.changed))(), wanted)


@pytest.mark.skipif(not configs.INTERPRETED, reason="on a GPU, bench/tune.py itself is the test")
@pytest.mark.parametrize("op", ["add_side", "dual_linear_train_forward"])
def test_a_search_runs_checks_and_writes(monkeypatch, tmp_path, op):
    """All of bench/tune.py but the compiler and the clock."""
    path = tmp_path / "sm90.json"
    path.write_text((configs.TABLES / "sm90.json").read_text(encoding="utf-8"))

    def measure(candidates, device, seconds):
        for candidate in candidates:
            with candidate.in_force() as call:
                call()
        # The later, the faster: a search that goes on.
        return {
            each.provider: Samples("graph", 1, [1e-3 / (place + 1)])
            for place, each in enumerate(candidates)
        }

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "_table_here", lambda: "sm90")
    monkeypatch.setattr(tune, "Inputs", lambda case, device: Inputs(case, DEVICE))
    monkeypatch.setattr(tune.resources, "variants", lambda arch: [])
    monkeypatch.setattr(tune, "provenance", lambda *_: defaultdict(str))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    asked = Namespace(rows=[5], shape="tiny", rounds=1, seconds=0.0, table=path)
    tune.tune(op, "fp32", asked)
    before, after = (configs.read_table(at) for at in (configs.TABLES / "sm90.json", path))
    assert after[op]["fp32"] != before[op]["fp32"]
    assert json.loads(path.read_text())["provenance"]["measured"].keys() == {f"{op} fp32"}
