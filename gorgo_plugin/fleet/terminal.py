"""Where commands print their tables."""

from rich.console import Console

# The widest table's. Rich cuts figures where the terminal is narrower, and takes a file for one of 80 columns.
TABLE_COLUMNS = 150


def wide_console() -> Console:
    """A console that shows every table whole."""
    console = Console()
    console.width = max(console.width, TABLE_COLUMNS)
    return console
