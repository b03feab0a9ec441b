"""torch.export of patched models: one graph decides, routes and adds the side memory."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.export import Dim

from wise_ext.models import disabled, last_route, patch

OPS = {"wise_ext.max_sim.default", "wise_ext.add_side_.default"}


def exported(model: torch.nn.Module, batch: dict[str, Tensor], dynamic: bool) -> torch.nn.Module:
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in batch} | {"use_cache": None}
    program = torch.export.export(
        model, (), {**batch, "use_cache": False}, dynamic_shapes=shapes if dynamic else None
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert targets >= OPS
    return program.module()


@torch.no_grad()
def test_the_graph_says_what_the_model_says(architecture: str, lab: SimpleNamespace) -> None:
    model, known = lab.make_model(architecture), lab.prompts(5, 9)
    patch(model, lab.key_memory(model, known))
    other = lab.prompts(9, seed=3)[0]
    module = exported(model, lab.padded([known[0], known[1], other], left=False), dynamic=False)
    for rows, routes in (([1, 0, 2], [1, 0, -1]), ([2, 2, 0], [-1, -1, 0])):
        batch = lab.padded([[*known, other][row] for row in rows], left=False)
        wanted = model(**batch, use_cache=False).logits
        assert last_route(model).tolist() == routes
        got = module(**batch, use_cache=False).logits
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        with disabled(model):
            bare = model(**batch, use_cache=False).logits
        assert [bool((got[i] - bare[i]).abs().max() > 1e-3) for i in range(3)] == [
            route >= 0 for route in routes
        ]


@torch.no_grad()
def test_batch_and_length_may_vary(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 9)
    patch(model, lab.key_memory(model, known))
    module = exported(model, lab.padded([known[0], known[1]], left=False), dynamic=True)
    others = lab.prompts(12, 7, seed=4)
    for rows in ([known[1], others[0], known[0]], [others[1], known[0]]):
        batch = lab.padded(rows, left=False)
        wanted = model(**batch, use_cache=False).logits
        got = module(**batch, use_cache=False).logits
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_patched_later_does_not_reach_an_exported_graph(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 9)
    patch(model, lab.key_memory(model, known))
    batch = lab.padded(known, left=False)
    wanted = model(**batch, use_cache=False).logits
    module = exported(model, batch, dynamic=False)
    patch(model, lab.key_memory(model, lab.prompts(4, 4, seed=7)))
    torch.testing.assert_close(module(**batch, use_cache=False).logits, wanted)
