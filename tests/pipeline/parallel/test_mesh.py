import math
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.multi.harness import run_ranks
from thresher.errors import ConfigError, PipelineStalled
from thresher.pipeline.parallel.clip import clip_gradients
from thresher.pipeline.parallel.dense import BucketedSum, Gradients
from thresher.pipeline.parallel.mesh import make_mesh

LIMIT = timedelta(seconds=30)


def places(rank, world):
    """Where each process stands, and what a sum over each axis gives it; what is refused."""
    mesh = make_mesh(2, "cpu", LIMIT)
    sums = []
    for group in (mesh.data, mesh.pipeline):
        value = torch.tensor(10**rank)
        dist.all_reduce(value, group=group)
        sums.append(value.item())
    with pytest.raises(ConfigError, match=r"4 processes cannot form pipelines of 3 stages.*that divide 4: 1, 2, 4"):
        make_mesh(3, "cpu", LIMIT)
    return mesh.replica, mesh.rank, mesh.stages, mesh.replicas, sums, mesh.pipelines, _norms(mesh), _buckets(mesh)


def _norms(mesh):
    """Norms before and after clipping, and of a gradient that is not finite."""
    whole, sharded = torch.full((2,), 3.0 + mesh.rank), torch.full((3,), 1.0 + mesh.replica)
    gradients = Gradients([whole], [sharded])
    before = clip_gradients(gradients, mesh, 2.0)
    after = clip_gradients(gradients, mesh, math.inf)
    whole[0] = math.inf
    broken = clip_gradients(gradients, mesh, 2.0)
    return before, after, broken, sharded.tolist(), clip_gradients(Gradients(), mesh)


def _buckets(mesh):
    """Sums of gradients of several sizes and dtypes, and buckets they went in."""
    shapes = [((3, 4), torch.float32), ((2,), torch.float64), ((5,), torch.float32), ((40,), torch.float32)]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
    for number, parameter in enumerate(parameters[:3]):
        parameter.grad = torch.full_like(parameter, 10**mesh.replica * (number + 1))
    sums = BucketedSum(mesh.data, 70)
    sums.start(parameters)
    buckets = [joined.numel() for _, joined, _ in sums._pending]
    sums.wait()
    return [parameter.grad.unique().tolist() for parameter in parameters], buckets


def test_processes_stand_in_pipelines_of_neighbours():
    found = run_ranks(4, places, timeout_s=120)
    assert [place[:2] for place in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {place[2:4] for place in found} == {(2, 2)}
    assert [place[4] for place in found] == [[101, 11], [1010, 11], [101, 1100], [1010, 1100]]
    assert found[0][5] == [[0, 1], [2, 3]]
    norm = math.sqrt(2 * 9 + 2 * 16 + 2 * 3 * (1 + 4))
    for *_, (before, after, broken, sharded, nothing), (sums, buckets) in found:
        assert before == pytest.approx(norm, rel=1e-7)
        assert after == pytest.approx(2, rel=1e-5)
        assert (broken, nothing) == (math.inf, 0)
        assert sharded[0] < 0.5
        assert sums == [[11], [22], [33], [0]]
        assert buckets == [17, 40, 2]


def alone(rank, world):
    """What a replica is told whose peer never comes."""
    mesh = make_mesh(1, "cpu", timedelta(seconds=1))
    if rank:
        time.sleep(3)
        return ""
    sums = BucketedSum(mesh.data, 100)
    sums.start([nn.Parameter(torch.zeros(3))])
    try:
        sums.wait()
    except PipelineStalled as error:
        return str(error)
    return ""


def test_a_replica_that_never_comes_is_an_error_within_the_limit():
    told = run_ranks(2, alone, timeout_s=60)[0]
    assert "rank 0, among ranks [0, 1]: replicas did not sum 12 bytes of gradients" in told
