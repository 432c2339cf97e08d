"""Where vLLM's sources have the options of `vllm serve`."""

OPTION_FILES = (
    "engine/arg_utils.py",
    "entrypoints/cli/serve.py",
    "entrypoints/common/cli_args.py",
    "entrypoints/launchers/cli_args.py",  # where 0.32 has what newer releases have in common/
)
"""Files whose dataclasses, and whose texts that begin with `--`, are options; one may be absent."""
