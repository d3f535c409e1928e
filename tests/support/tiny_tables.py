"""Tables of the paper, whose rows are tiny runs."""

from tiny_config import COPY

from expire_span.paper_rows import Row, paper_numbers
from expire_span.paper_tables import SIZES, Table, read_table, table_names

SHORT, LONG = "table1_trans_xl_2k", "table1_expire_span_128k"
TINY = (*COPY, "train.updates=2")


def preset_row(preset, title="", seeds=(1, 2, 3), settings=TINY):
    """A row of a preset, with the settings of a tiny run."""
    return Row(preset, title, (f"experiment=mini/{preset}", *settings), paper_numbers(preset), tuple(seeds))


def table_of(*rows, metrics=("test/accuracy",)):
    return Table("table1", "Accuracy on copy", list(metrics), list(rows), command="expire-span-paper table1 size=mini")


def two_rows(*seeds):
    return table_of(preset_row(SHORT, "Transformer-XL", seeds), preset_row(LONG, "Expire-Span", seeds))


def all_rows():
    """The rows of all tables, by size and preset; those of the user's own data with a path, which need not exist."""
    return {
        (size, row.preset): row._replace(overrides=(*row.overrides, *(f"{key}=text.txt" for key in table.given)))
        for size in SIZES
        for table in (read_table(name, size) for name in table_names())
        for row in table.rows
    }
