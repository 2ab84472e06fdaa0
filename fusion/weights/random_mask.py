"""Random masks whose every entry depends on a seed and its position only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WORDS = 8  # 32-bit words of one step of Philox4x64


def random_mask(count: int, density: float, *, seed: int, start: int = 0) -> Tensor:
    """Draw which of the entries ``start`` … ``start + count - 1`` of a sequence are kept.

    Each entry is kept with probability ``density``, independently of all others. The words come
    from the counter-based generator Philox (Salmon et al., 2011), which yields any part of its
    sequence at once: the mask of a part is that part of the mask, however a sequence is divided.

    Args:
        count: number of entries.
        density: probability, in [0, 1], with a resolution of 2⁻³².
        seed: of the sequence.
        start: position of the first entry.

    Returns:
        (count,) bool, on the CPU.

    Example::

        >>> whole = random_mask(100, 0.3, seed=1)
        >>> bool((random_mask(40, 0.3, seed=1, start=37) == whole[37:77]).all())
        True
    """
    first, skipped = divmod(start, WORDS)
    steps = -(-(skipped + count) // WORDS)
    raw = np.random.Philox(key=seed, counter=first).random_raw(steps * WORDS // 2)
    words = raw.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]
    return torch.from_numpy(words < np.uint64(round(density * 2**32)))
