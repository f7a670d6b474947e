"""The files of results: JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


def write_json(content: dict[str, Any], path: Path) -> None:
    """The whole file or none of it; lists of numbers stay on one line."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    text = re.sub(r"\[[-+.,\de\s]+\]", lambda found: " ".join(found[0].split()), text)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
