from __future__ import annotations

import subprocess
import sys

import pytest

import fusion

HEAVY = ("torch", "torchvision", "lightning", "hydra", "matplotlib", "pandas", "sklearn", "numpy")


@pytest.mark.parametrize("module", ["fusion", "fusion.cli", "fusion.target", "fusion.errors"])
def test_importing_it_costs_nothing_heavy(module) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == []


def test_the_public_names_are_there() -> None:
    for name in fusion.__all__:
        assert getattr(fusion, name)
        assert name in dir(fusion)
    with pytest.raises(AttributeError, match="no attribute 'Fusion'"):
        fusion.Fusion  # noqa: B018
