from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusion.training.scoring import Scorer

# Two processes of one group, of which only the first computes.
ALONE = """
import sys, torch, torch.distributed as dist
from fusion.training.scoring import Scorer
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
if rank == 0:
    scorer = Scorer(processes=1)
    scorer.update(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 1]))
    print(scorer.compute(3).accuracy)
else:
    sys.stdin.read()  # until the first is done
"""


def test_scores_are_those_of_all_batches_together() -> None:
    scorer = Scorer()
    scorer.update(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 1]))
    scorer.update(torch.tensor(3.0), torch.eye(3)[:1], torch.tensor([0]))
    scores = scorer.compute(3)
    assert scores.loss == pytest.approx((3 * 1.0 + 3.0) / 4)
    assert scores.accuracy == pytest.approx(3 / 4)


@pytest.mark.slow
def test_one_process_of_several_does_not_wait_for_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE]
    store = str(tmp_path / "store")
    with subprocess.Popen([*command, "1", store], stdin=subprocess.PIPE) as waiting:
        try:
            told = subprocess.run(
                [*command, "0", store], capture_output=True, text=True, check=True, timeout=100
            )
        finally:
            waiting.communicate()
    assert float(told.stdout) == pytest.approx(2 / 3)
