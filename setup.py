"""Requirements from ``thresher/pins.py``, the kernels' library; everything else stands in ``pyproject.toml``."""

import runpy

from setuptools import setup

VERSIONS = runpy.run_path("thresher/pins.py")
NATIVE = runpy.run_path("thresher/embeddings/kernels/native/build.py")

LIBRARIES = [
    "fsspec",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "plotly>=6",
    "polars>=1.30,<2",  # the peers measured in benchmarks/ run beside us, and need polars 1
    "pyarrow>=20",
    "pydantic>=2.10",
    "pyyaml>=6",
    "rich>=13.9",
    "scipy>=1.14",
    "tensorboard>=2.18",
    "typer>=0.15",
    "xxhash>=3.5",
]
CHECKS = [
    "beartype",
    "codespell~=2.4",
    "hypothesis",
    "import-linter",
    "jaxtyping",
    "mypy~=2.4.1",  # checkers are pinned: a newer one may find new faults in old code
    "pytest",
    "pytest-timeout",
    "ruff~=0.17.6",
    "scikit-learn",
    "setuptools>=77",
    f"triton=={VERSIONS['TRITON']}; platform_system == 'Linux'",
    "types-PyYAML",
]

setup(
    install_requires=[f"{name}=={version}" for name, version in VERSIONS["PINS"].items()] + LIBRARIES,
    extras_require={"dev": CHECKS},
    ext_modules=[NATIVE["extension"]()],
    cmdclass={"build_ext": NATIVE["BuildKernels"]},
)
