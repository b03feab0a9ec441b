"""A memory directory in a vLLM server: ``WISE_EXT_MEMORY=my-edits vllm serve MODEL``.

vLLM finds ``register`` as an entry point. A request is routed by its whole prompt when the engine
takes it in (``prompts``); the route then travels on the request itself, through vLLM's own queues
(``requests``), and the worker adds the side memory token by token (``projection``).
"""


def register() -> None:
    """The entry point of ``vllm.general_plugins``; vLLM calls it in each of its processes. Without
    a memory named it changes nothing that vLLM computes."""
    from wise_ext.integrations.vllm.plugin import install

    install()
