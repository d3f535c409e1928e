"""Read what an offline W&B run has written."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7  # bytes; LevelDB's log format, behind a header of W&B's own of the same length


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, content = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # too little for a record: the block's rest is empty
            position += BLOCK - position % BLOCK
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])  # checksum, length, kind
        content += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(content)
            content = b""


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """The rows in a .wandb file, without what W&B adds (`_step`, ...); an image or table is a dictionary."""
    rows = []
    for history in (record.history for record in wandb_records(path) if record.HasField("history")):
        row: dict[str, Any] = {}
        for item in history.item:
            name, *inner = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            row[name] = {**row.get(name, {}), inner[0]: value} if inner else value
        rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return rows
