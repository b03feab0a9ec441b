"""A down projection with side memories."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from wise_ext.errors import ModelError
from wise_ext.memory import Bank
from wise_ext.nn.route_state import RouteState

_BASE = "base."


class DualLinear(nn.Module):
    """`y = W a (+ b)`, plus `D_route (a + cue)` for the rows routed to a shard.

    Needs only the base module's output, so the base may be nn.Linear, GPT-2's Conv1D (transposed
    weight, with bias) or a quantised linear. It is the very module that stood here before, neither
    copied nor written; parameters are saved and loaded under the names it had. Without shards, or
    without a row routed to one, the output is exactly the base module's.

    Args:
        base: the original projection, from `[..., d_in]` to `[..., d_out]`.
        bank: shards of shape `(d_out, d_in)` in fp32, bf16 or fp16, or this process's columns of
            them.
        state: the routes of the running forward pass, int32 `[B]`. Rows of the input that belong
            to one row of the batch lie next to each other: `[B, T, d_in]` or `[B * T, d_in]`.

    Raises:
        ModelError: when called before the route is known (the router's layer lies above this one).
    """

    def __init__(self, base: nn.Module, bank: Bank, state: RouteState) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        self.state = state
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map fp32, bf16 or fp16 `[..., d_in]` to `[..., d_out]`; differentiable in x."""
        y: Tensor = self.base(x)
        course = self.state.course
        if course is None:
            if self.state.decide:
                raise ModelError(
                    "the layer whose input decides the route did not run before the edited layer: "
                    "choose a key layer below it"
                )
            return y
        if self.bank.num_shards == 0:
            return y
        glance = self.state.glance
        # Processes that share the projection have to agree; on a GPU one may look too soon.
        looks = self.bank.columns is None or y.device.type == "cpu"
        compiling = torch.compiler.is_compiling()
        if not compiling and looks and glance is not None and not glance.routed():
            return y
        route, cue = course.decision.route, course.cue
        if self.bank.columns is not None:
            x, cue = self.bank.columns.take(x), None if cue is None else self.bank.columns.take(cue)
        d_out, d_in = self.bank.shape[0], x.shape[-1]
        inputs, outputs = x.reshape(-1, d_in), y.reshape(-1, d_out)
        batch = route.shape[0]
        tokens = inputs.shape[0] // batch
        # Models spread over devices hand over activations from elsewhere; the base's output counts.
        inputs, route = inputs.to(outputs.device), route.to(outputs.device)
        if cue is not None:
            cue = cue.to(inputs).unsqueeze(1)
            inputs = (inputs.view(batch, tokens, d_in) + cue).view(-1, d_in)
        per_token = route.unsqueeze(1).expand(batch, tokens).reshape(-1)
        self.bank.add_side_(outputs, inputs, per_token)
        return outputs.view(y.shape)

    @property
    def weight(self) -> Any:
        """The base module's weight (a method, for torch's own quantised linears)."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base module's bias."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """d_in."""
        return self.bank.shape[1]

    @property
    def out_features(self) -> int:
        """d_out."""
        return self.bank.shape[0]

    def extra_repr(self) -> str:
        """Shapes, when the model is printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's state, under the names it has without the side memory."""
        return self.base.state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: OrderedDict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The names are the base module's own; torch looks for those of a submodule.
        own = [key for key in state_dict if key.startswith(prefix)]
        for key in own:
            name = key.removeprefix(prefix)
            if not name.startswith(_BASE):
                state_dict[prefix + _BASE + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
