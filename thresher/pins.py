"""The exact versions Thresher is built and tested with: the only place they are written.

``setup.py`` turns them into install requirements, ``thresher/__init__.py`` compares them with what is installed.
This module imports nothing, so that it can be read before any dependency exists.
"""

PINS: dict[str, str] = {
    "torch": "2.13.0",
    "torchrec": "1.8.0",
    "fbgemm-gpu": "1.8.0",
    "ray": "2.58.0",
    "deepspeed": "0.19.8",
    "numpy": "2.4.6",
}
"""Distribution name to exact version. On CPU ``fbgemm-gpu`` is the shim of ``packaging/fbgemm-gpu-cpu``."""
TRITON = "3.7.1"
"""The version that torch brings along for CUDA; a CPU build of torch has none, and only tests need it there."""
