"""Clusters: operations, seconds and bytes of Llama 70B by hand, and what a forecast makes of them."""

from dataclasses import replace

import pytest

from thresher.errors import ConfigError, ScheduleError
from thresher.pipeline.schedule.ops import Kind, Op, Shape
from thresher.pipeline.simulate.cluster import (
    LLAMA_70B,
    Gpu,
    Run,
    Transformer,
    costs_of,
    footprint_of,
    synchronisation_s,
)
from thresher.pipeline.simulate.forecast import SCENES, Scene, baselines, compare, fitting, forecast, report
from thresher.pipeline.simulate.memory import slimpipe_bytes

SMALL = Transformer(layers=8, width=1024, key_width=256, hidden=4096, vocabulary=32_000)
RUN = Run("slimpipe", 8, 65_536, 4, 2, 1, 4, 2, 8, "partial", exchange=True)


def test_llama_has_seventy_billion_parameters():
    assert LLAMA_70B.parameters == pytest.approx(70.55e9, rel=0.001)


def test_a_step_needs_six_operations_per_parameter_and_token_and_attention():
    tokens = 4096
    dense = 6 * (LLAMA_70B.parameters - 128_256 * 8192) * tokens
    attention = 3 * 80 * 4 * 8192 * tokens * (tokens + 1) / 2
    assert LLAMA_70B.step_flops(tokens, 2) == pytest.approx(2 * (dense + attention))


def test_seconds_of_a_layer():
    gpu = Gpu(latency_s=0, launch_s=0, exposed=0)
    costs = costs_of(SMALL, gpu, RUN)
    shape = Shape(4, 2, 4, 8)
    # Slice 1 of 8192 tokens: 8192 * 8192 + 8192 * 8193 / 2 pairs; half of everything is on this GPU.
    tokens, pairs = 8192, 8192 * 8192 + 8192 * 8193 // 2
    matmul, attention = 2 * SMALL.layer * tokens / 2, 4 * 1024 * pairs / 2
    forward = matmul / (989e12 * 0.7) + attention / (989e12 * 0.6)
    again = 2 * (2 * 1024 * 4096) * tokens / 2 / (989e12 * 0.7)
    backward = 2 * matmul / (989e12 * 0.7) + 2.5 * attention / (989e12 * 0.5) + again
    found = [costs.seconds(shape, 0, Op(kind, 0, 0, 1)) for kind in (Kind.FORWARD, Kind.BACKWARD)]
    assert found == pytest.approx([forward, backward])
    full = costs_of(SMALL, gpu, replace(RUN, recompute="full"))
    assert full.seconds(shape, 0, Op(Kind.BACKWARD, 0, 0, 1)) == pytest.approx(backward - again + forward)


def test_tensor_parallelism_costs_what_is_not_hidden():
    slow = costs_of(SMALL, Gpu(exposed=1.0), RUN).forward.per_token
    hidden = costs_of(SMALL, Gpu(exposed=0.0), RUN).forward.per_token
    assert slow - hidden == pytest.approx(4 * 1024 * 2 / 2 / 360e9)


def test_bytes_of_a_token():
    sizes = {kind: footprint_of(SMALL, replace(RUN, recompute=kind)) for kind in ("none", "partial", "full")}
    assert [sizes[kind].activations for kind in sizes] == [(12 * 1024 + 6 * 4096) / 2, 8 * 1024 / 2, 2 * 1024 / 2]
    assert {size.key_value for size in sizes.values()} == {4 * 256 / 2}
    assert {size.accumulators for size in sizes.values()} == {8 * 256 / 2}
    whole = footprint_of(SMALL, replace(RUN, policy="1f1b", slices=1, chunks=1, recompute="full"))
    assert whole.key_value == whole.accumulators == 0
    assert footprint_of(SMALL, replace(RUN, offload=0.75)).activations == 8 * 1024 / 2 / 4


def test_authors_estimate_of_memory_at_512k():
    """Their own configuration table says 43.2 GiB for this run."""
    run = SCENES["h100-128"].slimpipe
    footprint = footprint_of(LLAMA_70B, run)
    shape = Shape(run.stages, run.chunks, run.microbatches, run.slices)
    total = footprint.states + slimpipe_bytes(footprint.microbatch_bytes(run.tokens, 80), shape, 0)
    assert total / 2**30 == pytest.approx(43.2, rel=0.06)


def test_a_cut_output_layer_is_held_by_all_gpus():
    whole, cut = (replace(RUN, split_head=split) for split in (False, True))
    saved = footprint_of(SMALL, whole).states - footprint_of(SMALL, cut).states
    assert saved == pytest.approx(0.75 * 32_000 * 1024 / 2 * (2 + 4 + 12))
    before, after = (forecast(SMALL, Gpu(), run) for run in (whole, cut))
    # Part of what is saved goes to the parts of logits that every rank then has at a time.
    assert after.peak_bytes < before.peak_bytes - saved / 4
    assert after.bubble < before.bubble


def test_gradients_are_summed_over_context_and_data():
    assert synchronisation_s(SMALL, Gpu(), replace(RUN, gpus=8)) == 0
    twice = synchronisation_s(SMALL, Gpu(), replace(RUN, gpus=16))
    assert twice == pytest.approx(SMALL.parameters / 8 * 6 / 2 / 40e9)


def test_no_run_is_faster_than_its_kernels():
    found = forecast(SMALL, Gpu(), RUN)
    assert 0 < found.mfu < 0.7
    assert found.bubble > 0
    faster = forecast(SMALL, Gpu(peak_flops=2 * 989e12), RUN)
    assert faster.step_s < found.step_s
    assert forecast(SMALL, Gpu(), replace(RUN, exchange=False)).bubble > found.bubble


def test_baselines_use_all_gpus_and_divide_what_must_be_divided():
    runs = list(baselines(LLAMA_70B, SCENES["h100-128"].slimpipe))
    assert len(runs) == len(set(runs)) > 50
    for run in runs:
        assert run.parts * run.stages * run.replicas == 128
        assert run.microbatches * run.replicas == 8
        assert 80 % (run.stages * run.chunks) == 0
        assert run.policy == "1f1b" or run.microbatches % run.stages == 0


def test_what_fits_is_ranked_by_time():
    runs = list(baselines(SMALL, RUN))
    gpu = Gpu()
    found = fitting(SMALL, gpu, runs)
    assert len(found) == len(runs)
    assert [one.step_s for one in found] == sorted(one.step_s for one in found)
    limit = sorted(one.peak_bytes for one in found)[3]
    assert {one.run for one in fitting(SMALL, replace(gpu, usable_bytes=limit), runs)} == {
        one.run for one in found if one.peak_bytes <= limit
    }


def test_the_table_names_rivals_claim_and_assumptions():
    text = compare(Scene(RUN, "a claim"), SMALL, Gpu())
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:7]] == [
        "SlimPipe",
        "SlimPipe, no exchange",
        "best 1F1B",
        "best interleaved",
        "best of both with c <= 1",
    ]
    assert "The paper: a claim." in text
    assert "matmul 0.7, attention_forward 0.6" in text
    none = compare(Scene(RUN, "a claim"), SMALL, Gpu(usable_bytes=1.0))
    assert "| best 1F1B | nothing fits |" in none


def test_unknown_clusters_and_impossible_runs_are_refused():
    with pytest.raises(ConfigError, match="no cluster 'h200'"):
        report("h200")
    with pytest.raises(ScheduleError, match="slices are too few"):
        forecast(SMALL, Gpu(), replace(RUN, slices=2))
