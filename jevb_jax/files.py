"""Files that are either whole or absent."""

import json
import os
from pathlib import Path
from typing import Any


def write_text_atomically(path: Path, text: str) -> None:
    """Writes beside the target, flushes to disk, and moves into place.

    Args:
      path: the file; its directory exists.
      text: its content.
    """
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes indented JSON, as `write_text_atomically`.

    Args:
      path: the file.
      value: JSON values; infinities are written as `Infinity`, which Python reads back.
    """
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")
