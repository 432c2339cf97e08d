"""Compression as an ordinary plugin of stock vLLM.

`register` is the `vllm.general_plugins` entry point. It adds the flags and a few small overrides,
all of which step aside unless a configuration asks for compression.
"""

import logging

logger = logging.getLogger("vllm.tangram")


def register() -> None:
    """Install the plugin in this process; running it again changes nothing.

    On a vLLM that it does not fit this ends with a warning: vLLM loads the plugin whether or not
    anyone asks for compression. Whoever does is refused, by `require_hooks` in what comes first
    here, or by a parser that does not know the flags.
    """
    try:
        from tangram.vllm_plugin.frontend import overrides
        from tangram.vllm_plugin.worker import selection

        selection.install()
        overrides.install()
    except Exception as error:
        logger.warning("KV cache compression is not available: %s", error)
