"""Compression as an ordinary plugin of stock vLLM.

`register` is the `vllm.general_plugins` entry point. It adds the flags and three small overrides,
all of which step aside unless a configuration asks for compression.
"""


def register() -> None:
    """Install the plugin in this process; running it again changes nothing."""
    from tangram.vllm_plugin.frontend import overrides

    overrides.install()
