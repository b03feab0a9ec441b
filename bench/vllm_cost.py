"""`python -m bench.vllm_cost MODEL MEMORY`: what a memory costs a vLLM engine on a CPU.

Two engines of one process, one of them with the memory, take turns over the same requests; what is
reported is the median of the paired ratios of CPU seconds. Runs where vLLM is installed
(docs/vllm.md).

prefill  unrelated texts of that many tokens, one token written for each
decode   what is written behind unrelated prompts, or behind prompts of edits (their answers,
         and on), the route being decided once
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from wise_ext.cli import console
from wise_ext.editing.prompts import neutral_prompts
from wise_ext.integrations.vllm.admission import ADMISSION
from wise_ext.storage import load_memory_dir

_COLUMNS = ("what", "requests", "over bare", "p20-p80", "bare CPU s")


def main(
    model: Annotated[str, typer.Argument(help="What vLLM serves.")],
    memory: Annotated[Path, typer.Argument(help="A memory made for it.")],
    rounds: Annotated[int, typer.Option(help="Pairs of measurements.")] = 9,
    batch: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
) -> None:
    """Measure and print."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    bare, edited = engine(model, {}), engine(model, {"wise_ext": {"memory": str(memory)}})
    tokenizer = bare.get_tokenizer()
    text = tokenizer.encode(" ".join(neutral_prompts()))
    edits = [entry["prompt"] for entry in load_memory_dir(memory).ledger][:batch]
    asked = [tokenizer.encode(prompt) for prompt in edits]
    lengths = {128: 1, 512: 1}
    cases = {
        f"prefill of {length}, unrelated": (pieces(text, length, batch), tokens)
        for length, tokens in lengths.items()
    }
    cases["decode of 32, unrelated"] = (pieces(text, 16, batch), 32)
    cases["decode of 32, prompts of edits"] = (asked, 32)
    lines: list[tuple[str, ...]] = []
    for name, (prompts, tokens) in cases.items():
        pairs = [pair(bare, edited, prompts, tokens, round_ % 2 == 1) for round_ in range(rounds)]
        ratios = sorted(after / before for before, after in pairs)
        low, high = (ratios[int(share * (rounds - 1) + 0.5)] for share in (0.2, 0.8))
        seconds = statistics.median(before for before, _ in pairs)
        middle = statistics.median(ratios)
        spread = f"{low:.3f}-{high:.3f}"
        lines.append((name, str(len(prompts)), f"{middle:.3f}", spread, f"{seconds:.2f}"))
    console.table(f"{model}, {memory}", _COLUMNS, lines)


def engine(model: str, additional: dict[str, Any]) -> Any:
    """A vLLM engine in this process, in fp32 and eager mode, without a prefix cache."""
    from vllm import LLM

    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=16,
        additional_config=additional,
    )


def pieces(text: list[int], length: int, count: int) -> list[list[int]]:
    """Consecutive pieces of a text."""
    wrapped = text * (1 + length * count // len(text))
    return [wrapped[place * length : (place + 1) * length] for place in range(count)]


def pair(
    bare: Any, edited: Any, prompts: list[list[int]], tokens: int, swapped: bool
) -> tuple[float, float]:
    """CPU seconds of both engines, the edited one first where the pair is swapped."""
    engines = (edited, bare) if swapped else (bare, edited)
    first, second = (seconds(engine_, prompts, tokens) for engine_ in engines)
    return (second, first) if swapped else (first, second)


def seconds(engine_: Any, prompts: list[list[int]], tokens: int) -> float:
    """CPU seconds of one batch of requests, their routing included."""
    from vllm import SamplingParams

    executor = engine_.llm_engine.engine_core.engine_core.model_executor
    admission = getattr(executor, ADMISSION, None)
    if admission is not None:
        admission.forget()  # prompts of an earlier round
    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.process_time()
    engine_.generate(given, wanted, use_tqdm=False)
    return time.process_time() - begin


if __name__ == "__main__":
    typer.run(main)
