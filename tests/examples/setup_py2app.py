"""A py2app recipe for the chat window: `python setup_py2app.py py2app`, in this folder, on a Mac.

Never run on a Mac. What it says about py2app and MLX was read in the sources of py2app 0.28 and
tried with macholib on MLX's macOS wheels; a test checks it against this package's files.

`mlx` cannot be one of py2app's `packages`: it has no `__init__.py`, and py2app then does not find
it. So py2app puts its extension at `lib-dynload/mlx/core.so`. That looks for `libmlx.dylib` in the
folder `lib` beside itself, and MLX for `mlx.metallib` beside that: all of it goes there as data.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup

core = find_spec("mlx.core")
assert core and core.origin, "MLX is not installed"
mlx_lib = Path(core.origin).parent / "lib"
python = f"python{sys.version_info.major}.{sys.version_info.minor}"

OPTIONS = {
    # whole folders, because they read files of theirs: data, vocabulary, kernels; certificates
    "packages": ["mlx_gptoss", "tiktoken", "certifi"],
    "includes": ["mlx.core", "mlx._reprlib_fix", "mlx.__array_api_info"],
    "excludes": ["mlx_lm", "torch", "pytest"],
    "plist": {"CFBundleIdentifier": "org.example.gpt-oss-chat", "LSMinimumSystemVersion": "14.0"},
}

setup(
    name="gpt-oss chat",
    app=["chat_window.py"],
    data_files=[
        (
            f"lib/{python}/lib-dynload/mlx/lib",
            [str(path) for path in sorted(mlx_lib.iterdir()) if path.is_file()],
        )
    ],
    options={"py2app": OPTIONS},
)
