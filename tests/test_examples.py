"""Every public function of the kernels has an example in its docstring, and it runs."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

import fusion

FOLDERS = ("fusion.merging", "fusion.alignment", "fusion.spectrum", "fusion.weights")
FUNCTIONS = [
    ("fusion", name) for name in fusion.__all__ if inspect.isfunction(getattr(fusion, name))
]
FUNCTIONS += [
    (folder, name)
    for folder in FOLDERS
    for name in importlib.import_module(folder).__all__
    if inspect.isfunction(getattr(importlib.import_module(folder), name))
]


@pytest.mark.parametrize(("folder", "name"), FUNCTIONS, ids=lambda value: str(value))
def test_a_public_function_has_an_example_that_runs(folder, name) -> None:
    function = getattr(importlib.import_module(folder), name)
    home = importlib.import_module(function.__module__)
    (found,) = doctest.DocTestFinder(recurse=False).find(
        function, name, module=False, globs=dict(vars(home))
    )
    assert found.examples, f"{folder}.{name} has no example"
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found)
    assert result.failed == 0
