"""Plain text on a page."""

import html
from typing import Any

import panel as pn


class Text(pn.pane.Str):
    """Text that is shown and never read as markup; ``object`` stays the text itself.

    Panel's own ``Str`` escapes its text once for the way to the browser, which undoes that again: tags in it
    act. Here they are escaped once more.
    """

    priority = -1  # below Str: nothing is shown by this pane unless it is asked for by name

    def _transform_object(self, obj: Any) -> dict[str, Any]:
        return super()._transform_object(html.escape("" if obj is None else str(obj)))
