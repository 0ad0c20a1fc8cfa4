"""One self-contained HTML page per run: what it was, how it went, how it ended."""

from meshwright.launch.page.document import document
from meshwright.launch.page.read import RunView, read_view
from meshwright.launch.page.write import write_page

__all__ = ["RunView", "document", "read_view", "write_page"]
