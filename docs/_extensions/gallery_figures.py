"""Shows the figures of the gallery's scripts, which are made without pyplot's registry."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

DPI = 200  # the figures are of a paper's size


def scrape(block: Any, variables: dict[str, Any], settings: dict[str, Any]) -> str:
    """Save the figures that a block of a script made, and return the text that shows them.

    A figure is shown where the script first has it under a name.
    """
    del block
    names = variables["example_globals"]
    shown = names.setdefault("__shown_figures__", set())
    paths = variables["image_path_iterator"]
    saved = []
    for value in list(names.values()):
        if isinstance(value, Figure) and id(value) not in shown:
            shown.add(id(value))
            path = str(next(paths))
            value.savefig(path, dpi=DPI)
            saved.append(path)
    return figure_rst(saved, settings["src_dir"]) if saved else ""
