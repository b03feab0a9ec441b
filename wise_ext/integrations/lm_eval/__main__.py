"""The harness's own command line, with the model ``wise-ext`` registered by the package."""

from lm_eval.__main__ import cli_evaluate

cli_evaluate()
