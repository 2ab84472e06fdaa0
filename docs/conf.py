"""How the manual is built."""

import logging
import os
import sys
from pathlib import Path

import fusion

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_extensions"))  # also imported by name, for the gallery's figures

logging.getLogger("fusion").setLevel(logging.WARNING)  # the gallery shows what scripts print

project = "fusion"
version = release = fusion.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "docstrings",
    "local_mathjax",
    "method_pages",
]
# Building fetches nothing, unless somebody asks for links into the manuals of others.
if os.environ.get("DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "torchvision": ("https://docs.pytorch.org/vision/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "pandas": ("https://pandas.pydata.org/docs", None),
        "lightning": ("https://lightning.ai/docs/fabric/stable", None),
    }
exclude_patterns = ["_build", "_extensions", "gallery"]
default_role = "py:obj"

# -- pages
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# -- docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the descriptions say what an argument may be
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of a dataclass are listed once
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# -- the gallery
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("gallery_figures.scrape",),
    "reset_modules": (),
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "thumbnail_size": (420, 280),
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "copyfile_regex": "",
    "write_computation_times": False,  # that page would fetch its table's script from a server
}

# -- the result: nothing in it asks a server
html_theme = "furo"
html_title = "fusion"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
mathjax_path = "mathjax.js"  # beside the other static files; see _extensions/local_mathjax.py
