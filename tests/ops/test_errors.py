"""Every refusal, worded the same by the reference and the native kernels."""

from __future__ import annotations

import pytest
import torch

from wise_ext import ops

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def side(make_bank):
    bank = make_bank(2, 4, 40)
    return {
        "y": torch.zeros(3, 4),
        "x": torch.randn(3, 40),
        "mask_bits": bank.mask_bits,
        "values": bank.values,
        "row_ptr": bank.row_ptr,
        "route": torch.tensor([0, 1, -1], dtype=torch.int32),
    }


@pytest.fixture
def train(make_bank):
    bank = make_bank(1, 4, 40)
    return {
        "x": torch.randn(3, 40),
        "base": torch.randn(3, 4),
        "delta": bank.dense[0].float(),
        "mask_bits": bank.mask_bits[0],
    }


@pytest.fixture
def update(make_bank):
    bank = make_bank(1, 4, 40)
    return {
        "delta": bank.dense[0].float(),
        "grad": torch.randn(4, 40),
        "mask_bits": bank.mask_bits[0],
        "row_ptr": bank.row_ptr,
        "m": torch.zeros_like(bank.values),
        "v": torch.zeros_like(bank.values),
        "lr": 0.1,
        "step": 1,
    }


def changed(arguments, changes):
    return {k: (changes[k](v) if k in changes else v) for k, v in arguments.items()}


def refused(op, arguments, changes, message):
    with pytest.raises(RuntimeError, match=message):
        op(**changed(arguments, changes))


def refused_or_nan(raises_on_data, op, arguments, changes, message, result=None):
    """What only the values show: an error on the CPU, NaN where nobody waits for the device."""
    if raises_on_data(op.__name__):
        refused(op, arguments, changes, message)
        return
    given = changed(arguments, changes)
    returned = op(**given)
    assert (given[result] if result else returned).isnan().any()


SIDE = [
    ({"x": torch.Tensor.int}, "add_side_: x must be float32, bfloat16 or float16, got torch.int32"),
    ({"y": torch.Tensor.long}, "add_side_: y must be float32, .* got torch.int64"),
    ({"values": torch.Tensor.bool}, "add_side_: values must be float32, .* got torch.bool"),
    ({"mask_bits": torch.Tensor.long}, "add_side_: mask_bits must be int32, got torch.int64"),
    ({"row_ptr": torch.Tensor.int}, "add_side_: row_ptr must be int64, got torch.int32"),
    ({"route": torch.Tensor.long}, "add_side_: route must be int32, got torch.int64"),
    ({"x": lambda t: t[0]}, "add_side_: x must have 2 dimensions, got 1"),
    ({"y": lambda t: t[None]}, "add_side_: y must have 2 dimensions, got 3"),
    ({"mask_bits": lambda t: t[0]}, "add_side_: mask_bits must have 3 dimensions, got 2"),
    ({"values": lambda t: t[None]}, "add_side_: values must have 1 dimension, got 2"),
    ({"row_ptr": lambda t: t[None]}, "add_side_: row_ptr must have 1 dimension, got 2"),
    ({"route": lambda t: t[None]}, "add_side_: route must have 1 dimension, got 2"),
    ({"y": lambda t: t[:2]}, "add_side_: y has 2 rows, x has 3"),
    ({"y": lambda t: torch.zeros(4, 3).T}, "add_side_: y is changed in place, so its rows must be"),
    ({"y": lambda t: torch.zeros(3, 5)}, "mask_bits has 4 rows a shard, expected d_out = 5"),
    ({"x": lambda t: torch.zeros(3, 70)}, "mask_bits has 2 words a row, d_in = 70 needs 3"),
    ({"mask_bits": lambda t: t[:1]}, "row_ptr must have 5 entries .*, got 9"),
    ({"route": lambda t: t[:2]}, r"route must have one entry a row of x \(3\), got 2"),
]


@pytest.mark.parametrize(("changes", "message"), SIDE)
def test_add_side(provider, side, changes, message):
    refused(ops.add_side_, side, changes, message)


SIDE_DATA = [
    ({"route": lambda t: t + 1}, "add_side_: route must be between -1 and 1, got 2"),
    ({"route": lambda t: t - 1}, "add_side_: route must be between -1 and 1, got -2"),
    ({"values": lambda t: t[:-1]}, "add_side_: row_ptr does not match the bits set in mask_bits"),
    ({"row_ptr": lambda t: t - 1}, "add_side_: row_ptr does not match"),
    ({"row_ptr": lambda t: t + (2**62)}, "add_side_: row_ptr does not match"),
    ({"mask_bits": lambda t: t | 1}, "add_side_: row_ptr does not match"),
    ({"mask_bits": lambda t: t & 0}, "add_side_: row_ptr does not match"),
]


@pytest.mark.parametrize(("changes", "message"), SIDE_DATA)
def test_add_side_with_bad_data(provider, raises_on_data, side, changes, message):
    refused_or_nan(raises_on_data, ops.add_side_, side, changes, message, "y")


def test_a_bad_offset_far_from_the_end_is_noticed(provider, raises_on_data, make_bank):
    """Where values cannot be overrun the bits are not counted beforehand, and still it shows."""
    bank = make_bank(3, 4, 40)
    bank.row_ptr[2] += 1
    names = ("y", "x", "mask_bits", "values", "row_ptr", "route")
    tensors = (torch.zeros(1, 4), torch.randn(1, 40), *bank.tensors, torch.zeros(1).int())
    call = dict(zip(names, tensors, strict=True))
    refused_or_nan(raises_on_data, ops.add_side_, call, {}, "row_ptr does not match", "y")


def test_an_empty_bank_has_no_route(provider, raises_on_data, side):
    changes = {
        "mask_bits": lambda t: t[:0],
        "values": lambda t: t[:0],
        "row_ptr": lambda t: t[:1],
    }
    message = "route must be between -1 and -1, got [01]"
    refused_or_nan(raises_on_data, ops.add_side_, side, changes, message, "y")


@pytest.mark.parametrize("name", ["x", "mask_bits", "values", "row_ptr", "route"])
def test_tensors_on_another_device(provider, side, name):
    elsewhere = {name: lambda t: t.to("meta")}
    refused(
        ops.add_side_,
        side,
        elsewhere,
        "add_side_: .* is on (cpu|meta) but .* must be on one device",
    )


LINEAR = [
    ({"weight": torch.Tensor.half}, "dual_linear: weight is torch.float16 but x is torch.float32"),
    ({"weight": lambda t: t[:, 1:]}, "dual_linear: x has d_in = 40, weight has 39"),
    ({"bias": torch.Tensor.half}, "dual_linear: bias is torch.float16 but x is torch.float32"),
    ({"bias": lambda t: t[1:]}, r"dual_linear: bias must have shape \[4\], got \[3\]"),
    ({"x": torch.Tensor.int}, "dual_linear: x must be float32, bfloat16 or float16, got"),
    ({"weight": lambda t: t[0]}, "dual_linear: weight must have 2 dimensions, got 1"),
]


@pytest.fixture
def linear(side):
    del side["y"]
    return {"weight": torch.randn(4, 40), "bias": torch.randn(4), **side}


@pytest.mark.parametrize(("changes", "message"), LINEAR)
def test_dual_linear(provider, linear, changes, message):
    refused(ops.dual_linear, linear, changes, message)


def test_dual_linear_with_a_bad_route(provider, raises_on_data, linear):
    changes = {"route": lambda t: t + 1}
    message = "route must be between -1 and 1, got 2"
    refused_or_nan(raises_on_data, ops.dual_linear, linear, changes, message)


NORM = [
    ({"rows": torch.Tensor.long}, "side_norm: rows must be int32, got torch.int64"),
    ({"shards": torch.Tensor.long}, "side_norm: shards must be int32, got torch.int64"),
    ({"rows": lambda t: t[1:]}, "side_norm: rows has 1 entries, shards has 2"),
    ({"x": lambda t: t[:, :20]}, "side_norm: mask_bits has 2 words a row, d_in = 20 needs 1"),
]


@pytest.fixture
def norm(side):
    del side["y"], side["route"]
    pair = torch.tensor([0, 1], dtype=torch.int32)
    return {**side, "rows": pair, "shards": pair}


@pytest.mark.parametrize(("changes", "message"), NORM)
def test_side_norm(provider, norm, changes, message):
    refused(ops.side_norm, norm, changes, message)


NORM_DATA = [
    ({"rows": lambda t: t + 2}, "side_norm: rows must be between 0 and 2, got 3"),
    ({"rows": lambda t: t - 1}, "side_norm: rows must be between 0 and 2, got -1"),
    ({"shards": lambda t: t + 1}, "side_norm: shards must be between 0 and 1, got 2"),
    ({"shards": lambda t: t - 1}, "side_norm: shards must be between 0 and 1, got -1"),
    ({"mask_bits": lambda t: t | 1}, "side_norm: row_ptr does not match"),
]


@pytest.mark.parametrize(("changes", "message"), NORM_DATA)
def test_side_norm_with_bad_data(provider, raises_on_data, norm, changes, message):
    refused_or_nan(raises_on_data, ops.side_norm, norm, changes, message)


SKETCH = [
    ({"x": torch.Tensor.int}, "sketch_norm: x must be float32, bfloat16 or float16, got torch.int"),
    ({"sketch": torch.Tensor.int}, "sketch_norm: sketch must be float32, bfloat16 or float16, got"),
    ({"x": lambda t: t[0]}, "sketch_norm: x must have 2 dimensions, got 1"),
    ({"sketch": lambda t: t[0]}, "sketch_norm: sketch must have 3 dimensions, got 2"),
    ({"x": lambda t: t[:, 1:]}, "sketch_norm: x has d_in = 39, sketch has 40"),
]


@pytest.mark.parametrize(("changes", "message"), SKETCH)
def test_sketch_norm(provider, changes, message):
    arguments = {"x": torch.randn(3, 40), "sketch": torch.randn(2, 4, 40)}
    refused(ops.sketch_norm, arguments, changes, message)


MAX_SIM = [
    ({"query": torch.Tensor.half}, "max_sim: query must be float32, got torch.float16"),
    ({"keys": torch.Tensor.float}, "max_sim: keys must be int8, got torch.float32"),
    ({"scales": torch.Tensor.half}, "max_sim: scales must be float32, got torch.float16"),
    ({"places": torch.Tensor.long}, "max_sim: places must be int32, got torch.int64"),
    ({"weights": torch.Tensor.half}, "max_sim: weights must be float32, got torch.float16"),
    ({"query": lambda t: t[0]}, "max_sim: query must have 3 dimensions, got 2"),
    ({"keys": lambda t: t[0]}, "max_sim: keys must have 2 dimensions, got 1"),
    ({"scales": lambda t: t[None]}, "max_sim: scales must have 1 dimension, got 2"),
    ({"places": lambda t: t[0]}, "max_sim: places must have 2 dimensions, got 1"),
    ({"query": lambda t: t[..., 1:]}, "max_sim: query has width 39, keys have 40"),
    ({"scales": lambda t: t[1:]}, "max_sim: there are 6 keys, but 5 scales"),
    ({"weights": lambda t: t[1:]}, r"max_sim: weights must have shape \[3, 2\], got \[2, 2\]"),
    ({"places": lambda t: t + 1}, "max_sim: places must be between -1 and 5, got 6"),
    ({"places": lambda t: t - 7}, "max_sim: places must be between -1 and 5, got -"),
]


@pytest.mark.parametrize(("changes", "message"), MAX_SIM)
def test_max_sim(provider, changes, message):
    arguments = {
        "query": torch.zeros(2, 3, 40),
        "keys": torch.zeros(6, 40, dtype=torch.int8),
        "scales": torch.ones(6),
        "places": torch.arange(6, dtype=torch.int32).view(3, 2),
        "weights": torch.ones(3, 2),
        "floor": 0.5,
    }
    refused(ops.max_sim, arguments, changes, message)


TRAIN = [
    ({"x": torch.Tensor.int}, "dual_linear_train: x must be float32, bfloat16 or float16"),
    ({"base": torch.Tensor.int}, "dual_linear_train: base must be float32, bfloat16 or float16"),
    (
        {"delta": torch.Tensor.bfloat16},
        "dual_linear_train: delta must be float32, got torch.bfloat",
    ),
    ({"delta": lambda t: t[0]}, "dual_linear_train: delta must have 2 dimensions, got 1"),
    ({"x": lambda t: t[:, 1:]}, "dual_linear_train: x has d_in = 39, delta has 40"),
    ({"base": lambda t: t[:2]}, r"base must have shape \[3, 4\], got \[2, 4\]"),
    ({"mask_bits": torch.Tensor.long}, "dual_linear_train: mask_bits must be int32"),
    ({"mask_bits": lambda t: t[1:]}, "mask_bits has 3 rows, expected d_out = 4"),
    ({"mask_bits": lambda t: t[:, 1:]}, "mask_bits has 1 words a row, d_in = 40 needs 2"),
]


@pytest.mark.parametrize(("changes", "message"), TRAIN)
def test_dual_linear_train(provider, train, changes, message):
    refused(ops.dual_linear_train, train, changes, message)


BACKWARD = [
    ({"grad_y": lambda t: t[1:]}, r"grad_y must have shape \[3, 4\], got \[2, 4\]"),
    ({"side": lambda t: t[1:]}, r"side must have shape \[3, 4\], got \[2, 4\]"),
    ({"indicator": lambda t: t[1:]}, r"indicator must have shape \[3\], got \[2\]"),
    ({"grad_indicator": lambda t: t[1:]}, r"grad_indicator must have shape \[3\], got \[2\]"),
    ({"side": torch.Tensor.bfloat16}, "side must be float32, got torch.bfloat16"),
]


@pytest.mark.parametrize("namespace", ["wise_ext", "wise_ext_reference"])
@pytest.mark.parametrize(("changes", "message"), BACKWARD)
def test_dual_linear_train_backward(namespace, train, changes, message):
    del train["base"]
    extra = {
        "grad_y": torch.randn(3, 4),
        "grad_indicator": torch.randn(3),
        "side": torch.randn(3, 4),
        "indicator": torch.rand(3),
        "need_x": True,
        "need_delta": True,
    }
    op = getattr(torch.ops, namespace).dual_linear_train_backward
    refused(op, {**train, **extra}, changes, f"dual_linear_train_backward: {message}")


UPDATE = [
    ({"delta": torch.Tensor.half}, "masked_update_: delta must be float32, got torch.float16"),
    ({"grad": torch.Tensor.half}, "masked_update_: grad must be float32, got torch.float16"),
    ({"delta": lambda t: t[0]}, "masked_update_: delta must have 2 dimensions, got 1"),
    ({"delta": lambda t: t.T.contiguous().T}, "masked_update_: delta is changed in place, so it"),
    ({"grad": lambda t: t[1:]}, r"grad has shape \[3, 40\], delta has \[4, 40\]"),
    ({"mask_bits": lambda t: t[:, 1:]}, "mask_bits has 1 words a row, d_in = 40 needs 2"),
    ({"row_ptr": lambda t: t[1:]}, "row_ptr must have 5 entries .*, got 4"),
    ({"m": lambda t: None}, r"give both m and v \(Adam\) or neither \(SGD\)"),
    ({"m": torch.Tensor.half}, "masked_update_: m must be float32, got torch.float16"),
    ({"v": torch.Tensor.half}, "masked_update_: v must be float32, got torch.float16"),
    ({"m": lambda t: t[None]}, "masked_update_: m must have 1 dimension, got 2"),
    ({"m": lambda t: t[1:]}, "masked_update_: m has .* entries, v has "),
    ({"m": lambda t: torch.cat([t, t])[::2]}, "masked_update_: m and v must be contiguous"),
    ({"step": lambda t: 0}, "masked_update_: step counts from 1, got 0"),
]


@pytest.mark.parametrize(("changes", "message"), UPDATE)
def test_masked_update(provider, update, changes, message):
    refused(ops.masked_update_, update, changes, message)


UPDATE_DATA = [
    ({"row_ptr": lambda t: t + 1}, "row_ptr must start at 0, one shard at a time"),
    ({"row_ptr": lambda t: t.clamp(max=3)}, "masked_update_: row_ptr does not match"),
    ({"mask_bits": lambda t: t | 1}, "masked_update_: row_ptr does not match"),
    ({"m": lambda t: t[1:], "v": lambda t: t[1:]}, "masked_update_: row_ptr does not match"),
]


@pytest.mark.parametrize(("changes", "message"), UPDATE_DATA)
def test_masked_update_with_bad_data(provider, raises_on_data, update, changes, message):
    refused_or_nan(raises_on_data, ops.masked_update_, update, changes, message, "delta")


def test_pack_and_unpack(provider, make_bank):
    bank = make_bank(1, 4, 40)
    delta, mask_bits = bank.dense[0].float(), bank.mask_bits[0]
    packed = {"mask_bits": mask_bits, "values": bank.values, "row_ptr": bank.row_ptr, "d_in": 40}
    pair = {"delta": delta, "mask_bits": mask_bits}
    refused(ops.pack, pair, {"delta": torch.Tensor.int}, "pack: delta must be float32, bfloat16")
    refused(ops.pack, pair, {"delta": lambda t: t[0]}, "pack: delta must have 2 dimensions, got 1")
    refused(ops.pack, pair, {"mask_bits": lambda t: t[:, 1:]}, "pack: mask_bits has 1 words a row")
    refused(ops.pack, pair, {"mask_bits": lambda t: t.long()}, "pack: mask_bits must be int32")
    refused(ops.unpack, packed, {"values": torch.Tensor.int}, "unpack: values must be float32")
    refused(ops.unpack, packed, {"d_in": lambda n: 70}, "unpack: mask_bits has 2 words a row")
    refused(ops.unpack, packed, {"row_ptr": lambda t: t[1:]}, "unpack: row_ptr must have 5 entries")
    refused(ops.unpack, packed, {"mask_bits": lambda t: t[0]}, "mask_bits must have 2 dimensions")


UNPACK_DATA = [
    {"values": lambda t: t[1:]},
    {"row_ptr": lambda t: t - 1},
    {"mask_bits": lambda t: t | 1},
]


@pytest.mark.parametrize("changes", UNPACK_DATA)
def test_unpack_with_bad_data(provider, raises_on_data, make_bank, changes):
    bank = make_bank(1, 4, 40)
    packed = {
        "mask_bits": bank.mask_bits[0],
        "values": bank.values,
        "row_ptr": bank.row_ptr,
        "d_in": 40,
    }
    message = "unpack: row_ptr does not match"
    refused_or_nan(raises_on_data, ops.unpack, packed, changes, message)


@pytest.mark.parametrize(
    ("deltas", "weights", "density", "message"),
    [
        ([], [], 0.5, "needs at least one delta"),
        ([torch.ones(2, 2)], [1.0, 1.0], 0.5, "got 2 weights for 1 deltas"),
        ([torch.ones(2, 2)], [-1.0], 0.5, "weights must be finite and not negative"),
        ([torch.ones(2, 2)], [NAN], 0.5, "weights must be finite and not negative"),
        ([torch.ones(2, 2)], [INF], 0.5, "weights must be finite and not negative"),
        ([torch.ones(2, 2)], [1.0], 0.0, r"density must be in \(0, 1\], got 0"),
        ([torch.ones(2, 2)], [1.0], 1.5, r"density must be in \(0, 1\], got 1.5"),
        ([torch.ones(2, 2).half()], [1.0], 0.5, r"deltas\[0\] must be float32, got torch.float16"),
        ([torch.ones(2, 2), torch.ones(2, 3)], [1.0, 1.0], 0.5, r"deltas\[1\] has shape \[2, 3\]"),
    ],
)
def test_ties_merge(provider, deltas, weights, density, message):
    with pytest.raises(RuntimeError, match=f"ties_merge: {message}"):
        ops.ties_merge(deltas, weights, density)
