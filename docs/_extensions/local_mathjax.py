"""Puts MathJax into the result, as one file that has its fonts as outlines."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = "sphinx-mathjax-offline"  # of its 24 MiB one file is needed
FILE = "static/mathjax/tex-svg-full.js"


def copy_mathjax(app: Any, error: Exception | None) -> None:
    """Copy the file beside the other static files of the result."""
    if error is not None or app.builder.format != "html":
        return
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None
    assert found.origin is not None
    shutil.copyfile(
        Path(found.origin).parent / FILE,
        Path(app.outdir) / "_static" / app.config.mathjax_path,
    )


def setup(app: Any) -> Mapping[str, Any]:
    """Copy the file when all pages are written."""
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True}
