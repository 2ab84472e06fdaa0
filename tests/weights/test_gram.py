"""Inner products, block by block."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from fusion.weights.gram import BLOCK, gram_matrix


def test_it_equals_the_dense_product_over_several_blocks(make):
    n = 2 * BLOCK + 17
    tensors = [make(seed, n) for seed in range(3)]
    dense = torch.stack(tensors).double()
    assert_close(gram_matrix(tensors), dense @ dense.T, rtol=1e-13, atol=1e-9)


def test_memory_formats_do_not_matter(make):
    a, b = make(0), make(1)
    mixed = gram_matrix([a, b.to(memory_format=torch.channels_last)])
    assert torch.equal(mixed, gram_matrix([a, b]))
