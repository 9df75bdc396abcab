"""The site's configuration for Sphinx. The source folder is the repository: its Markdown pages keep their links."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import warns of picture formats we do not use

from progrpo import __version__

project = "progrpo"
author = "the progrpo authors"
copyright = "the progrpo authors. Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx_external_toc", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "reference"]
external_toc_path = "docs/site/toc.yml"
include_patterns = ["*.md", "docs/**.md", "docs/site/*.rst", "src/progrpo/zoo/weights/**.md"]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "examples", "benchmarks"]

myst_heading_anchors = 4  # levels of headings that are targets of links, by the names that GitHub gives them
default_role = "code"
smartquotes = False  # options begin with two dashes
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"progrpo {__version__}"
html_extra_path = ["root"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
