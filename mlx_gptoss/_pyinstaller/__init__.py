"""What PyInstaller needs to know to bundle an app with this package.

Found through the entry point `pyinstaller40`, so an app has nothing to configure. Only PyInstaller
imports this package, and only while it builds.
"""

from pathlib import Path


def hook_folders() -> list[str]:
    """The folder of the hooks."""
    return [str(Path(__file__).parent)]
