"""How many images fit into memory at a time."""

import pytest

from sdcomp.model.batch_size import rows_at_once


@pytest.mark.parametrize(
    ("n", "size", "rows"),
    [(16, 64, 16), (16, 128, 16), (16, 256, 4), (6, 256, 3), (16, 512, 1), (3, 1024, 1), (0, 64, 1)],
)
def test_rows_at_once_divide_the_batch(n, size, rows):
    assert rows_at_once(n, (size, size)) == rows
