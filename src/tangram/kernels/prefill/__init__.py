"""Attention of many queries at once, over sealed pages and raw tokens, on a GPU.

`make_head_table` is built once a layer, `make_tiles` once a step; `prefill_attention` runs a layer.
"""

from tangram.kernels.prefill.kernel import prefill_attention
from tangram.kernels.prefill.tables import Blocks, choose_blocks, make_head_table, make_tiles

__all__ = ["Blocks", "choose_blocks", "make_head_table", "make_tiles", "prefill_attention"]
