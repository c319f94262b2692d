"""Extension of griffe: shows the section Example of a docstring as code in the reference, as it does Examples."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the sections of docstrings when they are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
