"""What a refused conversion must do: say why in one line, and change nothing."""

from pathlib import Path
from typing import Any

import pytest

from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import CheckpointError, GptOssError


def everything(folder: Path) -> dict[str, Any]:
    """What lies in a folder: names, and contents of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(
    source: Path, message: str, kind: type[GptOssError] = CheckpointError, target: str = "mlx"
) -> None:
    """Converting fails with this message, in one line, and changes nothing on the disk."""
    place = source.parent
    before = everything(place)
    with pytest.raises(kind) as caught:
        convert_checkpoint(source, place / target, dense="q8")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert everything(place) == before
