"""run.log: what the run printed, with time and level."""

import logging
from contextlib import suppress
from typing import Any

from ..run_folder.files import open_without_links


class RunLog(logging.FileHandler):
    """Opens its file at the first message, follows no link, and lets a run go on where it cannot be written."""

    def __init__(self, filename: str):
        super().__init__(filename, encoding="utf-8", delay=True)

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=open_without_links)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: the message has been printed as well."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()
