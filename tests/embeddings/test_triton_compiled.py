"""What Triton's compiler makes of the kernels for a GPU; needs none: compiling ends before loading."""

import re
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from thresher.embeddings.kernels.gpu import gradients, lookup, maintain, slots, update
from thresher.embeddings.kernels.gpu.kernel import OPTIONS, TILE
from thresher.embeddings.kernels.gpu.rules import OPTIMIZERS
from thresher.embeddings.kernels.rules import VECTORS

HOPPER, AMPERE = 90, 80
ALL_LEVELS, FLAT = 0b111111, 0b100000
KINDS = {
    "*i64": "numbers counts ids starts ends outputs bags source first_piece row_numbers bad taken",
    "*i32": "tables old wanted otherwise places freed targets ranks",
    "*fp32": "rules weights output grad result factor pieces sums values increases priorities",
    "*i1": "moved",
    "i32": "count number width piece",
}
TYPES = {name: kind for kind, names in KINDS.items() for name in names.split()}
CONSTANTS: dict[str, Any] = {"mean": True, "summed": True, "levels": ALL_LEVELS, "align": 16, "rows": 16, "block": 64}
SCALARS = {"rows": TILE}
WHOLE = {"first_piece": None, "pieces": None, "factor": None, "sums": None}
FAST = {
    "pool": (lookup._pool, {}),
    "adagrad": (update._apply, {"name": 1, "vectors": 0, **WHOLE}),
}
SLOW = {
    "pool flat": (lookup._pool, {"levels": FLAT, "weights": None}),
    "weigh": (lookup._weigh, {}),
    "pieces": (gradients._add_pieces, {}),
    "square": (gradients._square, {}),
    "add": (gradients._add_up, SCALARS),
    "plan": (update._plan, SCALARS),
    "choose": (slots._choose, SCALARS),
    "push": (slots._push, SCALARS),
    "relocate": (maintain._relocate, {"vectors": 2}),
    "flat": (update._apply, {"name": 1, "vectors": 0, "levels": FLAT, **WHOLE}),
    "wide": (update._apply, {"name": 3, "vectors": 2, "rows": 1, "block": 1024}),
    **{name: (update._apply, {"name": OPTIMIZERS.index(name), "vectors": VECTORS[name]}) for name in OPTIMIZERS},
}


def compiled(kernel: Any, given: dict[str, Any], architecture: int) -> str:
    """The PTX of a kernel, once the assembler has accepted it."""
    constants = {name: given.get(name, CONSTANTS.get(name)) for name in kernel.arg_names if name in CONSTANTS | given}
    types = {name: "constexpr" if name in constants else TYPES[name] for name in kernel.arg_names}
    whole = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if types[name][0] == "*"
    }
    built = triton.compile(
        ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=whole),
        target=GPUTarget("cuda", architecture, 32),
        options=OPTIONS,
    )
    assert len(built.asm["cubin"]) > 0
    return str(built.asm["ptx"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def assert_exact(ptx: str) -> None:
    """Every operation is rounded once: none is fused, approximated or flushes small numbers to zero."""
    assert not re.findall(r"\bfma\.\S*", ptx)
    assert not re.findall(r"\b(?:div|sqrt|rcp)\.(?:full|approx)\S*", ptx)
    assert not re.findall(r"\.ftz\b", ptx)


@pytest.mark.parametrize("name", FAST)
def test_kernels_compile_for_a_gpu_and_round_every_operation_once(name: str) -> None:
    ptx = compiled(*FAST[name], HOPPER)
    assert_exact(ptx)
    assert "ld.global.v4.b32" in ptx, "rows are read 16 bytes at a time"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [HOPPER, AMPERE])
@pytest.mark.parametrize("name", FAST | SLOW)
def test_all_kernels_compile_for_gpus_and_round_every_operation_once(name: str, architecture: int) -> None:
    assert_exact(compiled(*(FAST | SLOW)[name], architecture))
