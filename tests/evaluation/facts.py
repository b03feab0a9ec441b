"""Long edits, what else is asked, and asking it the plain way."""

from __future__ import annotations

from typing import Any

import torch

from wise_ext.editing.edits import Edit
from wise_ext.editing.prompts import encode_prompt
from wise_ext.evaluation import evaluate_long

EDITS = [
    Edit(
        "mill",
        "What is the mill of Ardo known for?",
        "It grinds chestnut flour, and its wheel was carved by Mila Onn.",
        "Ardo",
        "Why do people know the mill of Ardo?",
        sub_question=("Who carved its wheel?", "What does it grind?"),
        sub_answer=("Mila Onn.", "Chestnut flour."),
        is_long=True,
    ),
    Edit("code", "Write a function that halves.", "def halve(n):\n    return n / 2", is_long=True),
    Edit(
        "tower",
        "Describe the tower of Bel.",
        "塔はとても高い。",
        rephrase_prompt="The tower of Bel is",
        sub_question=("How high is it?",),
        sub_answer=("とても高い",),
    ),
]
UNRELATED = ["The colour of grass is", "2 + 2 =", "Wie spät ist es?", "Name a bird."]
# What goes to the side memory, of each kind some and some not.
KNOWN = [
    EDITS[0].prompt,
    EDITS[2].prompt,
    str(EDITS[2].rephrase_prompt),
    EDITS[0].sub_question[1],
    *UNRELATED[1:3],
]


def measured(model: Any, tokenizer: Any, edits: list[Edit] = EDITS, **options: Any) -> Any:
    options = {"unrelated": UNRELATED, "progress": False, "similarity": False} | options
    return evaluate_long(model, tokenizer, edits, **options)


def written(model: Any, tokenizer: Any, prompt: str, most: int) -> list[int]:
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most
    )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens
