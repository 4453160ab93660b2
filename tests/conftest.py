import gc
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from cuda_grid import in_place_of_the_cpu
from hypothesis import settings

import fastcl
from fastcl import testing

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if testing.DEVICE.type != "cpu":  # a default device takes part in every call of torch's, the CPU as well
    torch.set_default_device(testing.DEVICE)

settings.register_profile("same cases every run", derandomize=True)
settings.load_profile("same cases every run")


@pytest.fixture
def threads():
    """Sets how many threads torch uses, until the end of the test, in which torch may add up in any order."""
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield torch.set_num_threads
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(deterministic)


def pytest_configure(config):
    # NaN and infinity are warned of by the NumPy that interprets Triton's kernels
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
    gc.disable()  # until all tests are collected: millions of objects, none of which is garbage


def pytest_collection_finish():
    gc.enable()


def pytest_collection_modifyitems(items):
    """The longest tests are the trainers': first, so that no worker waits for another's at the end."""
    items.sort(key=lambda item: item.path.parent.name != "train")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


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


@pytest.fixture
def grid(monkeypatch):
    """What the CUDA kernels are given, which then serve the public API on the host."""
    with in_place_of_the_cpu(monkeypatch) as given:
        yield given


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """A tree of JPEG files: 200 training and 20 test images of each of CIFAR-10's classes."""
    archive = Path(__file__).parents[2] / "shared" / "data" / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip(f"CIFAR-10 as JPEG files is not at {archive}")
    folder, kept = tmp_path_factory.mktemp("cifar"), Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            place = Path(member.name).parent
            kept[place] += member.isfile()
            if member.isfile() and kept[place] <= (200 if "train" in place.parts else 20):
                tar.extract(member, folder, filter="data")
    return folder
