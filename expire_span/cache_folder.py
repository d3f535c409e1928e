"""Where everything lies that is downloaded, generated or compiled once."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_dir() -> Path:
    """The folder of these files: $EXPIRE_SPAN_CACHE, or expire-span in the user's cache folder.

    Raises:
        OSError: the user has no home folder.
    """
    folder = os.environ.get("EXPIRE_SPAN_CACHE")
    try:
        return Path(os.path.expanduser(folder)) if folder else user_cache_path("expire-span")
    except RuntimeError:
        raise OSError("there is no home folder to keep files in; set EXPIRE_SPAN_CACHE to a folder") from None
