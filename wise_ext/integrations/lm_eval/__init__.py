"""lm-evaluation-harness: edited models as its model ``wise-ext``, and a run of both sides.

Importing this package registers the model, so that ``lm_eval.simple_evaluate(model="wise-ext",
model_args="pretrained=…,memory=…")`` finds it; ``python -m wise_ext.integrations.lm_eval`` is the
harness's own command line with the model registered. The harness has no plugin mechanism of its
own that would do without.
"""

from __future__ import annotations

from ..packages import require

MODEL = "wise-ext"

require("lm_eval", "lm-eval", "lm-evaluation-harness")

from lm_eval.api.registry import model_registry  # noqa: E402

model_registry.register(MODEL, target=f"{__name__}.model:WiseLM")
