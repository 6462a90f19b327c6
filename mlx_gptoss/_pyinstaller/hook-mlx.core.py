"""Carries the Metal library of MLX, and the modules that its extension imports from C++.

MLX looks for `mlx.metallib` beside `libmlx.dylib`, by the path that dyld gives for it: that of the
file itself, wherever a link to it lies. PyInstaller keeps the dylib in `mlx/lib` and links to it,
so the Metal library belongs there too, and no copy of the dylib anywhere else.
"""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("mlx", includes=["lib/*.metallib"])
hiddenimports = ["mlx.__array_api_info", "mlx._reprlib_fix"]
