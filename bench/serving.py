"""`python -m bench.serving --memory DIR`: an edited model behind its endpoint, many clients.

Two servers run beside each other, one with the memory and one without any. First one client asks
everything once; then all clients ask together, questions of the memory's edits and unrelated ones
mixed, and every answer has to be the one that a client got alone. Servers take turns; a row a
server holds the percentiles of what a request took, of all and of those that both answer alike (the
others are longer at one of them), and how many tokens a second all clients got.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from bench import rows
from wise_ext.cli import console
from wise_ext.errors import WiseError
from wise_ext.evaluation.long_answers import unrelated_prompts
from wise_ext.storage import load_memory_dir

RESULTS = Path(__file__).with_name("results") / "serving.jsonl"
_STARTS_WITHIN = 180


class Answer(NamedTuple):
    """A text, how many tokens it has, and the seconds that it took."""

    text: str
    tokens: int
    seconds: float


@dataclass
class Endpoint:
    """A running server, what it is called here, and a client of it."""

    name: str
    client: Any
    model: str
    new_tokens: int

    def ask(self, prompt: str) -> Answer:
        """Ask once, and look at the clock."""
        start = time.perf_counter()
        answer = self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=self.new_tokens, temperature=0.0
        )
        seconds = time.perf_counter() - start
        return Answer(str(answer.choices[0].text), answer.usage.completion_tokens, seconds)


@contextmanager
def served(name: str, model: str, options: Sequence[str], new_tokens: int) -> Iterator[Endpoint]:
    """A server in a process of its own, until the block ends."""
    from openai import OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "wise_ext", "serve", model, "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=600)
        deadline = time.monotonic() + _STARTS_WITHIN
        while True:
            try:
                called = client.models.list().data[0].id
                break
            except Exception:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise WiseError(f"the server of {name} did not start: {command}") from None
                time.sleep(0.5)
        yield Endpoint(name, client, called, new_tokens)
    finally:
        process.terminate()
        process.wait(30)


def measure(
    endpoints: Sequence[Endpoint], prompts: Sequence[str], clients: int, rounds: int, seed: int
) -> list[rows.Row]:
    """What requests take at each endpoint, after their answers were checked.

    Raises:
        WiseError: an answer is another one than a client got alone.
    """
    alone = {one.name: {prompt: one.ask(prompt).text for prompt in prompts} for one in endpoints}
    first = alone[endpoints[0].name]
    alike = {p for p in prompts if all(texts[p] == first[p] for texts in alone.values())}
    taken: dict[str, list[tuple[str, Answer]]] = {one.name: [] for one in endpoints}
    seconds = dict.fromkeys(taken, 0.0)
    draw = random.Random(seed)
    for number in range(rounds):
        turn = endpoints if number % 2 == 0 else endpoints[::-1]
        order = draw.sample(prompts, len(prompts))
        for one in turn:
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                answers = list(pool.map(one.ask, order))
            seconds[one.name] += time.perf_counter() - start
            for prompt, answer in zip(order, answers, strict=True):
                if answer.text != alone[one.name][prompt]:
                    raise WiseError(
                        f"{one.name} answers {prompt!r} differently in company: {answer.text}"
                    )
            taken[one.name] += zip(order, answers, strict=True)
    return [
        {
            "server": name,
            "clients": clients,
            "requests": len(answered),
            "alike": len(alike) / len(prompts),
            "latency_seconds": _percentiles([a.seconds for _, a in answered]),
            "latency_seconds_alike": _percentiles([a.seconds for p, a in answered if p in alike]),
            "tokens_a_second": sum(answer.tokens for _, answer in answered) / seconds[name],
        }
        for name, answered in taken.items()
    ]


def _percentiles(values: Sequence[float]) -> dict[int, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {p: ordered[min(last, len(ordered) * p // 100)] for p in (50, 90, 99) if ordered}


def main(
    memory: Annotated[Path, typer.Option("--memory", metavar="DIR", help="A saved memory.")],
    model: Annotated[str, typer.Option("--model", help="Its base model.")] = "smollm2",
    clients: Annotated[int, typer.Option("--clients", min=1, help="At once.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of all questions.")] = 4,
    edits: Annotated[int, typer.Option("--edits", min=1, help="Questions of edits.")] = 16,
    unrelated: Annotated[int, typer.Option("--unrelated", min=0, help="Other questions.")] = 16,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="At most.")] = 16,
    batching: Annotated[
        bool, typer.Option("--continuous-batching/--one-by-one", help="How the servers do it.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of questions.")] = 0,
    out: Annotated[Path, typer.Option("--rows", help="JSONL that grows.")] = RESULTS,
) -> None:
    """Serve a model with a memory and without, and compare."""
    try:
        ledger = load_memory_dir(memory).ledger
        asked = [str(entry["prompt"]) for entry in ledger][:edits]
        prompts = [*asked, *list(unrelated_prompts())[:unrelated]]
        way = "--continuous-batching" if batching else "--one-by-one"
        with ExitStack() as stack:
            endpoints = [
                stack.enter_context(served(name, model, [way, *more], new_tokens))
                for name, more in {"unedited": [], "edited": ["--memory", str(memory)]}.items()
            ]
            found = measure(endpoints, prompts, clients, rounds, seed)
        origin = rows.provenance("cpu", rows.command_line("bench.serving", sys.argv[1:]))
        about = {"model": model, "edits": len(ledger), "continuous_batching": batching}
        about |= {"new_tokens": new_tokens, "machine": origin}
        rows.append(out, [row | about for row in found])
    except (WiseError, OSError) as error:
        console.complain(str(error))
        raise typer.Exit(1) from None
    for row in found:
        console.say(
            f"{row['server']}: {row['tokens_a_second']:.1f} tokens/s, seconds at 50/90/99 % "
            + " / ".join(f"{value:.2f}" for value in row["latency_seconds"].values())
            + ", where both answer alike "
            + " / ".join(f"{value:.2f}" for value in row["latency_seconds_alike"].values())
        )


if __name__ == "__main__":
    typer.run(main)
