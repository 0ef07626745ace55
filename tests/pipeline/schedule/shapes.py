"""Shapes of schedules for property tests, and the lists of a rank spelled briefly."""

from collections.abc import Iterable

from hypothesis import strategies as st

from thresher.pipeline.schedule.ops import Op
from thresher.pipeline.schedule.work import Work


@st.composite
def arguments(draw: st.DrawFn, stages: int = 8) -> tuple[int, int, int, int, int, str]:
    """Arguments of ``build_schedule`` that make a schedule."""
    policy = draw(
        st.sampled_from(["slimpipe", "slimpipe", "slimpipe", "gpipe", "1f1b", "interleaved", "terapipe", "seq1f1b"])
    )
    p = draw(st.integers(1, stages))
    v = 1 if policy in ("1f1b", "terapipe", "seq1f1b") else draw(st.integers(1, 5))
    n = draw(st.integers(p if policy == "slimpipe" else 1, 32)) if policy in ("slimpipe", "terapipe", "seq1f1b") else 1
    m = draw(st.integers(1, 4)) if n > 1 else draw(st.integers(1, 12))
    if policy == "interleaved":
        m = m * p if m > p else m
    return p, v, m, n, draw(st.sampled_from([1, 2])), policy


SPLITS = st.fixed_dictionaries(
    {name: st.booleans() for name in ("split_embedding", "split_head", "split_backward")},
)


WORKS = st.builds(Work, attention=st.sampled_from([0.0, 0.3, 3.0, 10.0]), head=st.sampled_from([0.0, 0.25, 2.0]))


def brief(ops: Iterable[Op]) -> str:
    """Kind and (microbatch, chunk, slice) of each: ``F000 B013``."""
    return " ".join(f"{op.kind}{op.microbatch}{op.chunk}{op.slice}" for op in ops)
