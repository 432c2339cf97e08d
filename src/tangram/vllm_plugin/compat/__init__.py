"""The places of vLLM that are relied on, and how they are overridden; knows its version.

Knows vLLM and nothing of the plugin. Checks that run the plugin's own classes stand beside these.
"""
