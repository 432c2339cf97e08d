"""Small packages named `vllm`, written for tests; importing one would fail."""

import zipfile
from pathlib import Path

Files = dict[str, str]

OLD: Files = {
    "__init__.py": "raise RuntimeError('nobody imports this')",
    "_version.py": "__version__ = version = '0.32.0'",
    "v1/__init__.py": "",
    "v1/kv_cache_interface.py": """
        class KVCacheSpec:
            block_size: int
        class AttentionSpec(KVCacheSpec):
            head_size: int
        class SlidingWindowSpec(AttentionSpec):
            sliding_window: int
            def max_admission_blocks_per_request(self, max_in_flight_tokens, max_model_len):
                return self.sliding_window
    """,
    "v1/attention/backend.py": """
        class AttentionBackend:
            is_ssm = False
            @classmethod
            def customize_spec(cls, spec): return spec
        class AttentionImpl:
            def forward(self, layer, query, key, value, kv_cache, attn_metadata, output,
                        output_scale=None, output_block_scale=None): ...
    """,
    "v1/core/kv_cache_utils.py": """
        def get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory): ...
    """,
    "v1/core/sched/scheduler.py": """
        class Scheduler:
            def __init__(self, vllm_config, kv_cache_config): ...
            def schedule(self): return self.waiting.peek_request()
    """,
    "v1/core/sched/async_scheduler.py": """
        from .scheduler import Scheduler
        class AsyncScheduler(Scheduler):
            def _update_request_with_output(self, request): ...
    """,
}
"""As 0.32 has some of what is relied on."""

NEW: Files = {
    **OLD,
    "_version.py": "__version__ = version = '0.33.0'",
    "v1/kv_cache_interface.py": """
        class KVCacheSpec:
            block_size: int
            is_draft: bool = False
        class AttentionSpec(KVCacheSpec):
            head_size: int
        class SlidingWindowSpec(AttentionSpec):
            sliding_window: int
            @property
            def num_retained_tokens(self): return self.sliding_window - 1
            def max_admission_blocks_per_request(self, max_in_flight_tokens, max_model_len):
                '''A docstring and a comment change nothing.'''
                return self.sliding_window  # nor do types
    """,
    "v1/attention/backend.py": """
        class AttentionBackend:
            is_ssm = False
            supports_kv_cache_update_bypass = False
            @classmethod
            def customize_spec(cls, spec: object) -> object: return spec
        class AttentionImpl:
            def forward(self, layer, query, key, value, kv_cache, attn_metadata, output,
                        output_scale=None, output_block_scale=None): ...
            def set_interleaved_v_cache(self): ...
    """,
    "v1/core/kv_cache_utils.py": "",
    "v1/core/kv_cache_planning.py": """
        def get_global_kv_cache_groups(vllm_config, kv_cache_specs): ...
        def get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory, groups): ...
    """,
    "v1/core/sched/scheduler.py": """
        class Scheduler:
            def __init__(self, vllm_config, kv_cache_config, *, log_stats=False): ...
            def schedule(self): return self.queue.first()
    """,
    "v1/core/sched/async_scheduler.py": """
        from vllm.v1.core.sched.scheduler import Scheduler
        class AsyncScheduler(Scheduler): ...
    """,
}
"""As 0.33 has it, but for `schedule`, which has lost a call."""


def write(folder: Path, files: Files) -> Path:
    """A folder that holds the package."""
    for name, text in files.items():
        file = folder / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        file.write_text("\n".join(line[margin:] for line in lines))
    return folder


def pack(folder: Path, wheel: Path) -> Path:
    """The folder as a wheel."""
    with zipfile.ZipFile(wheel, "w") as packed:
        for file in sorted(folder.rglob("*.py")):
            packed.write(file, file.relative_to(folder))
    return wheel
