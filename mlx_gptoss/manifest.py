"""The manifest `mlx_gptoss.json`: where a converted folder came from, and the sha256 of all in it.

It is read once and checked whole, so that whoever uses it finds the fields that it promises.
"""

from pathlib import Path
from typing import Any

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weight_files import read_json

MANIFEST = "mlx_gptoss.json"
MANIFEST_VERSION = 1

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "converter": str,
    "source": dict,
    "options": dict,
    "files": dict,
    "tensors": dict,
    "verified": (list, type(None)),
}
_INNER = {"source": ("folder", "layout"), "options": ("dense",)}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest that our converter wrote; None where there is none.

    Raises:
        CheckpointError: It is damaged, or of a version that this package does not know.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if manifest.get("version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.get('version')!r}, this package reads "
            f"{MANIFEST_VERSION}; run `mlx-gptoss convert` again with this version"
        )
    for field, reason in _faults(manifest):
        raise CheckpointError(
            f"{path}: {field}: {reason}; the file was changed since the conversion: convert again"
        )
    return manifest


def _faults(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with the fields, as (field, reason)."""
    faults = [
        (name, f"expected {_name(kind)}, got {manifest.get(name)!r:.80}")
        for name, kind in _FIELDS.items()
        if name not in manifest or not isinstance(manifest[name], kind)
    ]
    if faults:
        return faults
    for outer, names in _INNER.items():
        faults += [
            (f"{outer}.{name}", f"expected a string, got {manifest[outer].get(name)!r:.80}")
            for name in names
            if not isinstance(manifest[outer].get(name), str)
        ]
    for name, entry in manifest["files"].items():
        if Path(name).name != name:  # an absolute or climbing name would hash a file elsewhere
            faults.append((f"files.{name}", "expected the name of a file in this folder"))
        elif not _is_file_entry(entry):
            faults.append((f"files.{name}", f"expected nbytes and sha256, got {entry!r:.80}"))
    faults += [
        (f"tensors.{name}", f"expected a sha256, got {digest!r:.80}")
        for name, digest in manifest["tensors"].items()
        if not isinstance(digest, str)
    ]
    return faults


def _is_file_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("nbytes"), int)
        and entry["nbytes"] >= 0
    )


def _name(kind: type | tuple[type, ...]) -> str:
    return {str: "a string", dict: "a JSON object"}.get(kind, "a list or null")  # type: ignore[arg-type]
