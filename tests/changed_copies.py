"""Copies of directories in which one thing is otherwise."""

import json
import shutil
from pathlib import Path
from typing import Any


def changed_copy(home: Path, tmp_path: Path, file: str, **values: Any) -> Path:
    """Returns a copy of a directory with other entries of a JSON file."""
    copy = shutil.copytree(home, tmp_path / "copy", copy_function=shutil.copyfile)
    content = json.loads((copy / file).read_text()) | values
    (copy / file).write_text(json.dumps(content))
    return copy
