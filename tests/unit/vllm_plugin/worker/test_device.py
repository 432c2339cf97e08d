"""What of the GPU's step can be told without a GPU."""

import pytest

from tangram.vllm_plugin.worker.runners.device import table_size


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (17, 32), (600, 1024)],
)
def test_tables_are_those_of_the_next_size_that_has_some(count, size):
    assert table_size(count, [1, 2, 4, 8]) == size


def test_without_captured_sizes_they_are_those_of_powers_of_two():
    assert {table_size(count, [1]) for count in range(1, 257)} == {2**i for i in range(9)}
