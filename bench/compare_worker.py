"""One side of `bench.compare`: measures with the wise_ext of one source tree, as it is told.

`python -m bench.compare_worker TREE DEVICE THREADS`; a JSON object a line in, one out.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class Tree:
    """Finds wise_ext in one source tree, before the tree of the bench code and an installed one."""

    def __init__(self, root: Path) -> None:
        self._folders = {
            "wise_ext": root / "wise_ext",
            "wise_ext.triton_kernels": root / "kernels" / "triton",
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The import system's question."""
        folder = self._folders.get(name)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


class Side:
    """Prepares a case, then gives samples of it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._candidates: list[Any] = []
        self._dispatch = False

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What one line of input asks for."""
        from bench import registry, timing
        from bench.cases import DISPATCH_SHAPE, Case
        from bench.inputs import Inputs

        if "sample" in question:
            samples = timing.measure(self._candidates, self._device, 0.0, self._dispatch)
            return {"seconds": next(iter(samples.values())).percentile(0.5)}
        case, provider = Case.from_json(question["prepare"]), question["provider"]
        reason = registry.unavailable(case, provider, self._device)
        if reason:
            return {"failure": reason}
        inputs = Inputs(case, self._device)
        registry.check(case, [provider], inputs)
        self._candidates = [registry.build(case, provider, inputs)]
        self._dispatch = case.shape == DISPATCH_SHAPE
        return {}


def main(tree: str, device: str, threads: str) -> None:
    """Answer until the input ends."""
    sys.meta_path.insert(0, Tree(Path(tree)))
    import torch

    torch.set_num_threads(int(threads))
    side = Side(device)
    for line in sys.stdin:
        try:
            answer = side.answer(json.loads(line))
        except Exception as error:  # an older revision may lack anything: say so and go on
            answer = {"failure": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
