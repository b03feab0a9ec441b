"""A worker that adds the side memory to what its model computes."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from wise_ext import ops
from wise_ext.errors import ModelError
from wise_ext.integrations.vllm.projection import SideProjection
from wise_ext.integrations.vllm.requests import HeldRoutes
from wise_ext.memory import Cues, MixedBank, SideMemory


def attach(worker: Any, memory: SideMemory) -> None:
    """Have a worker install a memory once it has loaded its model.

    Args:
        worker: one whose model runner is there, its model not yet.
        memory: what to install; one without shards changes nothing.

    Raises:
        ModelError: later, as the model is loaded: see ``side_projection``; or the model runner is
            not one of vLLM 0.32's or 0.33's.
    """
    if not memory.shards:
        return
    load = worker.load_model

    @functools.wraps(load)
    def load_model(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        _follow(worker.model_runner, side_projection(worker.model_runner, memory))

    worker.load_model = load_model


def side_projection(runner: Any, memory: SideMemory) -> SideProjection:
    """Put a memory beside the projection of a loaded model.

    Args:
        runner: vLLM's model runner.
        memory: with at least one shard.

    Raises:
        ModelError: the model has no such layer, or one of another shape.
        NativeError: a backend was chosen by name that has no kernel for the model's device.
    """
    from wise_ext.integrations.vllm.method import SideMethod

    projection = find_projection(runner.get_model(), memory.layer, memory.shape)
    dtype, device = runner.model_config.dtype, runner.device
    bank = memory.bank(dtype, device)
    for op in ("add_side_", *(["add_low_rank_"] if isinstance(bank, MixedBank) else [])):
        ops.backend(op, device)
    cues = Cues(memory.cue, memory.shape[1]) if memory.cue else None
    sizes = runner.max_num_tokens, runner.max_num_reqs
    side = SideProjection(bank, cues, *sizes, dtype, device)
    projection.quant_method = SideMethod(projection.quant_method, side)
    return side


def find_projection(model: nn.Module, layer: str, shape: tuple[int, int]) -> Any:
    """The module of a vLLM model that transformers has at ``layer``.

    Args:
        model: vLLM's, which may name its weights otherwise and says how (``hf_to_vllm_mapper``).
        layer: the path in transformers' model.
        shape: of the projection, ``(d_out, d_in)``.

    Raises:
        ModelError: there is none, or it has another shape.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    name = f"{layer}.weight"
    mapped = name if mapper is None else mapper.apply_list([name])[0]
    path = mapped.removesuffix(".weight")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"the memory edits '{layer}', and vLLM's {type(model).__name__} has no layer '{path}': "
            "this architecture cannot be served with a memory"
        ) from None
    found = tuple(getattr(module, side, None) for side in ("output_size", "input_size"))
    if found != tuple(shape):
        raise ModelError(
            f"the memory edits a projection of shape {tuple(shape)}, and '{path}' of vLLM's "
            f"{type(model).__name__} is {found}: it was made for another model"
        )
    return module


def _follow(runner: Any, side: SideProjection) -> None:
    """Have a model runner say who is in each batch, before it computes it."""
    held = HeldRoutes()
    execute = runner.execute_model

    @functools.wraps(execute)
    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        fresh = scheduled.scheduled_new_reqs
        parameters = ((new.req_id, new.sampling_params) for new in fresh)
        held.update(
            scheduled.finished_req_ids,
            ((name, None if given is None else given.extra_args) for name, given in parameters),
        )
        return execute(scheduled, *args, **kwargs)

    runner.execute_model = execute_model
    if hasattr(runner, "_prepare_inputs"):
        prepare = runner._prepare_inputs

        @functools.wraps(prepare)
        def prepare_inputs_v1(scheduled: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
            prepared = prepare(scheduled, counts, *args, **kwargs)
            side.begin(held.of(runner.input_batch.req_ids), counts)
            return prepared

        runner._prepare_inputs = prepare_inputs_v1
    elif hasattr(runner, "prepare_inputs"):
        prepare = runner.prepare_inputs

        @functools.wraps(prepare)
        def prepare_inputs_v2(*args: Any, **kwargs: Any) -> Any:
            batch = prepare(*args, **kwargs)
            side.begin(held.of(batch.req_ids), batch.num_scheduled_tokens)
            return batch

        runner.prepare_inputs = prepare_inputs_v2
    else:
        raise ModelError(
            f"vLLM's {type(runner).__name__} prepares its batches in a way that wise-ext does not "
            "know: use vLLM 0.32 or 0.33"
        )
