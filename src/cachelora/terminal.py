"""Tables on the terminal: with colour for a person, plain for a pipe."""

import io
import re
import sys
from collections.abc import Sequence

from cachelora.text import normalise

# A number, with its interval and star where it has them; or the mark of one that there is not.
_NUMBER = re.compile(r"[-+−]?[\d.,]+(?: ?%)?(?: \[.*\])?\*?|–|")  # noqa: RUF001
_WIDEST = 1_000_000


def plain(text: object) -> str:
    """Return a text on one line, without what a terminal would take for a command or what turns the text around it.

    Parameters
    ----------
    text : object
        Anything; its ``str`` is shown.

    Returns
    -------
    str
        Its printable characters, white space as single blanks.
    """
    return normalise("".join(character for character in normalise(str(text)) if character.isprintable()))


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table to the standard output.

    On a terminal it has colour, and long cells are folded to its width; elsewhere a row is a line.

    Parameters
    ----------
    title : str
        What stands above it.
    head : sequence of str, length n
        The names of the columns.
    rows : sequence of sequence of object, each of length n
        The cells: data, shown as they are by :func:`plain`, and never as markup. Numbers stand at the right. Without
        rows, the title stands alone.
    """
    # Imported here: the command's start need not pay for it.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[plain(cell) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(head):
        right = all(_NUMBER.fullmatch(row[number]) for row in cells)
        table.add_column(Text(plain(name)), justify="right" if right else "left", header_style="bold cyan")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the encoding lacks is shown as another, and ends nothing.
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    if not console.is_terminal:
        wide = console.options.update(max_width=_WIDEST)
        console.width = max(len(plain(title)), console.measure(table, options=wide).maximum)
    with console.capture() as captured:
        console.print(Text(plain(title), style="bold"))
        if rows:
            console.print(table)
    # Cells are padded to the width of the column, the last one too.
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), end="\n\n")
