"""What mkdocs.yml cannot say: the page of all models, and names in docstrings."""

import re
import tempfile
from pathlib import Path

from detbackbones.cli.main import main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add all-models.html, as `detbackbones list --html` writes it, with a way back."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        main(["list", "--html", str(page)])
        back = f'<body>\n<a href="index.html">{config.site_name}</a>'
        html = page.read_text().replace("<body>", back)
        files.append(File.generated(config, "all-models.html", content=html))
    return files


def on_page_content(html: str, **_) -> str:
    """Show :class:`Name` of a docstring as a name."""
    return re.sub(r":(?:attr|class|func|meth|mod):(?=<code)", "", html).replace("::</p>", ":</p>")
