"""The reference on CUDA: the same numbers as on CPU."""

import pytest
import torch
from hypothesis import given, settings

from tests.embeddings.backends import Case, assert_same, cases
from thresher.embeddings.kernels.reference import Reference


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@settings(max_examples=100)
@given(cases(device="cuda"))
def test_the_reference_does_on_cuda_what_it_does_on_cpu(case: Case) -> None:
    assert_same(case, Reference())
