"""The documentation site: `sphinx-build -W docs site`, with `pip install -e '.[docs]'`."""

import lq

project = "lq"
release = lq.__version__
copyright = "the authors of lq"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = f"lq {release}"
html_copy_source = False
templates_path: list[str] = []
exclude_patterns: list[str] = []

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
nb_render_markdown_format = "myst"  # tables among the outputs
nb_execution_mode = "off"  # the tutorial is run by a test, and committed with its outputs

autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "code"
