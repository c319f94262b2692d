"""HTML of tables, for the `_repr_html_` by which notebooks show an object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]], title: str = "", note: str = "") -> str:
    """Return a table as HTML; all texts are escaped. The first column is aligned to the left, the others to the right.

    Args:
        header: names of the columns.
        rows: cells of each row.
        title: line above the table.
        note: line below the table.

    Example:
        >>> html_table(("name", "mean"), [("<mu>", 1.5)]).count("&lt;mu&gt;")
        1
    """

    def line(tag: str, cells: Iterable[object]) -> str:
        aligned = (
            f'<{tag} style="text-align: {"right" if k else "left"}; white-space: pre-wrap">{escape(str(cell))}</{tag}>'
            for k, cell in enumerate(cells)
        )
        return f"<tr>{''.join(aligned)}</tr>"

    above = f"<p><b>{escape(title)}</b></p>" if title else ""
    below = f"<p>{escape(note)}</p>" if note else ""
    body = "".join(line("td", row) for row in rows)
    return f"<div>{above}<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>{below}</div>"
