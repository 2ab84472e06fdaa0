"""Upper triangles of symmetric matrices."""

from __future__ import annotations

import pytest
import torch

from fusion.weights.triangles import from_triangle, to_triangle, triangle_size


@pytest.mark.parametrize("size", [1, 2, 5, 600])
def test_triangles_of_symmetric_matrices(size) -> None:
    matrices = torch.randn(2, size, size, dtype=torch.float64)
    matrices = matrices + matrices.mT
    assert to_triangle(matrices).shape == (2, size * (size + 1) // 2)
    assert triangle_size(size * (size + 1) // 2) == size
    assert torch.equal(from_triangle(to_triangle(matrices), size), matrices)


def test_a_number_that_is_no_triangle() -> None:
    with pytest.raises(ValueError, match="4 entries"):
        triangle_size(4)
