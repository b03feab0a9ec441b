"""A folder that looks like a clone of EasyEdit from where `bench.peers` stands.

Written for these tests: the names the bench asks for, and under them the plain way of doing what
`bench.same_settings` does cleverly: the whole model and all logits in every iteration.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE_INIT = 'raise RuntimeError("the packages around it must not be run")\n'

HPARAMS_BASE = """
class HyperParams:
    pass
"""

HPARAMS = """
from types import SimpleNamespace

from ...util.hparams import HyperParams


class WISEHyperParams(HyperParams, SimpleNamespace):
    @classmethod
    def from_hparams(cls, path):
        return cls(n_iter=12, edit_lr=1.0, alpha=5.0, beta=20.0, gamma=10.0, mask_ratio=0.2,
                   norm_constraint=1.0, source=path)
"""

UTILS = """
import torch

CONTEXT_TEMPLATES_CACHE = None


def get_context_templates(model, tok, length_params, device):
    global CONTEXT_TEMPLATES_CACHE
    if CONTEXT_TEMPLATES_CACHE is None:
        CONTEXT_TEMPLATES_CACHE = ["{}", "Somebody said so. {}", "And then, in the end: {}"]
    return CONTEXT_TEMPLATES_CACHE


def tokenize(requests, tokenizer, device, context_templates, hparams):
    (request,) = requests
    asked = [t.format(request["prompt"]) for t in context_templates]
    texts = [f"{a} {request['target_new']}" for a in asked] + [request["loc_prompt"]]
    tokens = dict(tokenizer(texts, return_tensors="pt", padding=True))
    answer = len(tokenizer(" " + request["target_new"])["input_ids"])
    labels = tokens["input_ids"].clone()
    labels[:-1, :-answer] = -100
    labels[tokens["attention_mask"] == 0] = -100
    weights = "in the prompt" if request["loc_prompt"] in request["prompt"] else None
    return {**tokens, "labels": labels}, [weights], [weights]
"""

MAIN = """
import numpy
import torch
from torch.nn import functional as F

from .utils import get_context_templates, tokenize


class Adapter(torch.nn.Module):
    def __init__(self, base, mask_ratio):
        super().__init__()
        self.original_layer = base
        self.new_weight = torch.nn.Parameter(base.weight.detach().clone())
        drawn = numpy.random.random(self.new_weight.numel()) < mask_ratio
        self.weight_mask = torch.from_numpy(drawn.astype("int64"))

    def forward(self, a):
        self.old, self.new = self.original_layer(a), F.linear(a, self.new_weight)
        return self.new


def apply_wise_to_model(model, tok, requests, hparams):
    print("chatter")
    path = hparams.inner_params[0].removesuffix(".weight").replace("[", ".").replace("]", "")
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    for p in model.parameters():
        p.requires_grad = False
    if not isinstance(getattr(parent, name), Adapter):
        setattr(parent, name, Adapter(getattr(parent, name), hparams.mask_ratio))
    adapter = getattr(parent, name)
    templates = get_context_templates(model, tok, None, None)
    batch, _, _ = tokenize(requests, tok, None, templates, hparams)
    adapter.new_weight.requires_grad = True
    optimizer = torch.optim.SGD([adapter.new_weight], hparams.edit_lr, weight_decay=1e-5)
    wanted = batch["labels"][:-1, 1:]
    counts = (wanted != -100).sum(1) + 1
    for _ in range(hparams.n_iter):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = F.cross_entropy(logits[:-1, :-1].transpose(1, 2), wanted, reduction="none")
        distance = (F.silu(adapter.new) - F.silu(adapter.old)).norm(dim=-1).mean(1)
        inside, outside = distance[:-1], distance[-1]
        loss = (losses.sum(1) / counts).mean()
        for term in (outside[None] - hparams.alpha, hparams.beta - inside,
                     hparams.gamma + outside - inside):
            if (term > 0).any():
                loss = loss + term[term > 0].mean()
        optimizer.zero_grad()
        loss.backward()
        adapter.new_weight.grad.view(-1).mul_(adapter.weight_mask)
        optimizer.step()
        with torch.no_grad():
            base = adapter.original_layer.weight
            change = (adapter.new_weight - base).clamp(-1.0, 1.0)
            inside = (adapter.new_weight - base).abs() <= 1.0
            adapter.new_weight.copy_(torch.where(inside, adapter.new_weight, base + change))
    return adapter, None
"""


WISE = """
import torch
from torch.nn import functional as F


class EditingMeanAct:
    def __init__(self, min_a=1e9):
        self.min_a = min_a


class WISEAdapter(torch.nn.Module):
    def __init__(self, config, layer, transpose):
        super().__init__()
        assert not layer.weight.requires_grad and transpose and config.retrieve
        self.original_layer, self.hidden_act = layer, config.hidden_act

    def forward(self, a):
        out = base = self.original_layer(a)
        largest = 0.0
        for weight, act in zip(self.memory_weight, self.memory_mean_act, strict=True):
            side = F.linear(a, weight)
            size = float((side - base).norm(dim=-1).mean())
            if size > max(largest, act.min_a):
                out, largest = side, size
        return out
"""


def write(folder: Path) -> Path:
    """Make the folder; returns it."""
    files = {
        "easyeditor/__init__.py": PACKAGE_INIT,
        "easyeditor/models/__init__.py": PACKAGE_INIT,
        "easyeditor/util/__init__.py": PACKAGE_INIT,
        "easyeditor/util/hparams.py": HPARAMS_BASE,
        "easyeditor/models/wise/__init__.py": "",
        "easyeditor/models/wise/WISE.py": WISE,
        "easyeditor/models/wise/utils.py": UTILS,
        "easyeditor/models/wise/wise_hparams.py": HPARAMS,
        "easyeditor/models/wise/wise_main.py": MAIN,
        "hparams/WISE/llama-7b.yaml": "alg_name: WISE\n",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder
