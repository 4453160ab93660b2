import os

import pytest
import torch

import fastcl
from fastcl import testing

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory():
    """torch.empty holds NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()


@pytest.fixture(params=testing.backends())
def backend(request):
    """Every backend that serves CPU tensors here, one test each."""
    with fastcl.use_backend(request.param):
        yield request.param
