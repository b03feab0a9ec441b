"""One vLLM engine in a process of its own: a job in JSON on stdin, its answers as the last line.

``python -m tests.integrations.vllm_engine``. The process knows nothing of wise-ext: vLLM finds it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: One thread, a small cache, and nothing asked of any hub.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def run(job: dict[str, Any], memory: Path | None = None, **environment: str) -> dict[str, Any]:
    """The answers of one engine.

    Args:
        job: ``model``, ``options`` of ``vllm.LLM``, ``batches`` of prompts (token ids), ``tokens``
            to write for each; ``refused`` where the engine is not to start: then there is an
            ``error`` instead of answers; ``piecewise``: see ``_compile_in_pieces``.
        memory: given to the engine in the environment.
        environment: more of it.
    """
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **QUIET, **environment}
    if memory is not None:
        settings["WISE_EXT_MEMORY"] = str(memory)
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.vllm_engine"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | settings,
        timeout=900,
    )
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise AssertionError(f"the engine ended early:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    answers: dict[str, Any] = json.loads(lines[-1])
    if "error" in answers and not job.get("refused"):
        raise AssertionError(answers["error"])
    return answers | {"log": done.stdout + done.stderr}


def _main() -> dict[str, Any]:
    job = json.loads(sys.stdin.read())
    from vllm import LLM, SamplingParams

    if job.get("piecewise"):
        _compile_in_pieces()

    options = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 256,
        "block_size": 32,
        "disable_log_stats": False,
    }
    try:
        engine = LLM(job["model"], **(options | job.get("options", {})))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    count = job["tokens"]
    wanted = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=1
    )
    batches = []
    for prompts in job["batches"]:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(given, wanted, use_tqdm=False)
        batches.append(
            [
                {
                    "ids": list(output.outputs[0].token_ids),
                    "logprobs": [
                        step[token].logprob
                        for step, token in zip(
                            output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                        )
                    ],
                    "cached": output.num_cached_tokens,
                }
                for output in outputs
            ]
        )
    counters = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    return {
        "batches": batches,
        "preemptions": counters["vllm:num_preemptions"],
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens"),
    }


def _compile_in_pieces() -> None:
    """Have vLLM compile on a CPU as it does on a GPU, but for what only a GPU's build has."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def checked(cls: Any, config: Any) -> None:
        check(cls, config)
        compilation = config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "inductor"
        compilation.compile_sizes = []

    CpuPlatform.check_and_update_config = classmethod(checked)
    FixFunctionalizationPass.__call__ = lambda self, graph: None


if __name__ == "__main__":
    print("\n" + json.dumps(_main()), flush=True)
