"""What every objective has in common: its signature, dtypes, autocast, meta tensors, scalars as tensors."""

import contextlib
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from objective_checks import OBJECTIVES, rows

import fastcl
from fastcl import testing

for _path in sorted(Path(__file__).parent.glob("test_*.py")):
    if _path.stem != Path(__file__).stem:
        with contextlib.suppress(pytest.skip.Exception):
            importlib.import_module(_path.stem)  # each registers its own

SIGNATURES = {name: made.signature for name, made in OBJECTIVES.items() if made.signature} | {
    "DecoupledLoss": "temperature=0.1, *, within_views=True, sigma=None",
    "HardNegativeLoss": "temperature=0.5, *, beta=1.0, tau_plus=0.1",
    "concentration": "features, assigned, prototypes, *, temperature=0.2, smoothing=10.0",
    "k_means": "features, k, *, steps=20, generator=None, group=None",
    "MemoryBank": "size, dim, *, momentum=0.5",
}
SCALED = [name for name, made in OBJECTIVES.items() if made.scaled]
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def of(name):
    return OBJECTIVES[name].function, OBJECTIVES[name].shapes


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    def described(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    expected, found = (
        described(f) for f in (eval(f"lambda {SIGNATURES[name]}: None"), getattr(fastcl, name))
    )
    assert found[: len(expected)] == expected
    for _, kind, default in found[len(expected) :]:
        assert kind is inspect.Parameter.KEYWORD_ONLY
        assert default is not inspect.Parameter.empty
    assert name in fastcl.__all__


@every_objective
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_returns_the_compute_dtype_and_gradients_of_the_inputs(name, dtype):
    function, shapes = of(name)
    inputs = [x.to(dtype) for x in rows(*shapes)]
    (value,), grads = testing.value_and_grads(function, inputs)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [(g.dtype, g.shape) for g in grads] == [(x.dtype, x.shape) for x in inputs]


@every_objective
def test_autocast_changes_nothing(name):
    function, shapes = of(name)
    inputs = [x.float() for x in rows(*shapes)]
    wanted = testing.value_and_grads(function, inputs)

    def under_autocast(*tensors):
        with torch.autocast(testing.DEVICE.type, dtype=torch.bfloat16):
            return function(*tensors)

    got = testing.value_and_grads(under_autocast, inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@every_objective
def test_meta_tensors(name):
    function, shapes = of(name)
    value = function(*(x.float().to("meta") for x in rows(*shapes)))
    assert value.shape == ()
    assert value.device.type == "meta"


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_may_be_tensors_of_one_element(name, shape):
    function, shapes = of(name)
    inputs = [x.float() for x in rows(*shapes)]
    factor = torch.full(shape, 0.5, requires_grad=True)
    value = function(*inputs, factor)
    torch.testing.assert_close(value, function(*inputs, 0.5))
    value.backward()
    assert factor.grad.shape == shape
    assert factor.grad.isfinite().all()
    assert factor.grad.ne(0).all()


@pytest.mark.parametrize("name", SCALED)
def test_a_tensor_out_of_range_gives_nan(name):
    function, shapes = of(name)
    bad = torch.tensor(OBJECTIVES[name].out_of_range)
    assert function(*(x.float() for x in rows(*shapes)), bad).isnan()


@every_objective
def test_frozen_sides_cost_no_gradient(name):
    function, shapes = of(name)
    inputs = [x.requires_grad_(i == 0) for i, x in enumerate(rows(*shapes))]
    function(*inputs).backward()
    (_, grads) = testing.value_and_grads(function, [x.detach() for x in inputs])
    torch.testing.assert_close(inputs[0].grad, grads[0])
    with torch.no_grad():
        assert not function(*inputs).requires_grad


@pytest.mark.parametrize("name", [name for name, made in OBJECTIVES.items() if made.any_count])
def test_the_same_bits_for_any_number_of_threads(name, threads):
    function, shapes = of(name)
    inputs = [x.float() for x in rows(*((320, 130) for _ in shapes))]
    threads(1)
    one = testing.value_and_grads(function, inputs)
    for count in (2, 2, 5):  # what two threads add in any order may come out right once
        threads(count)
        torch.testing.assert_close(testing.value_and_grads(function, inputs), one, rtol=0, atol=0)


@every_objective
def test_one_graph_serves_all_batch_sizes(name):
    function, shapes = of(name)
    torch._dynamo.reset()
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counted)
    for count in (6, 9, 12):
        batch = [(count, width) for _, width in shapes] if OBJECTIVES[name].any_count else shapes
        inputs = rows(*batch)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert len(graphs) == 1
