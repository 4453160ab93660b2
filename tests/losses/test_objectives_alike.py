"""What every objective has in common: its signature, dtypes, autocast, meta tensors, scalars as tensors."""

import inspect

import pytest
import torch
from objective_checks import rows

import fastcl
from fastcl import testing

# what users rely on; further options may follow, by keyword
SIGNATURES = {
    "decoupled_loss": "z1, z2, temperature=0.1, *, within_views=True, sigma=None",
    "DecoupledLoss": "temperature=0.1, *, within_views=True, sigma=None",
    "hard_negative_loss": "z1, z2, temperature=0.5, *, beta=1.0, tau_plus=0.1",
    "HardNegativeLoss": "temperature=0.5, *, beta=1.0, tau_plus=0.1",
    "prototype_nce": "query, prototypes, assigned, temperature=0.1, *, bias=None, normalize=True",
    "concentration": "features, assigned, prototypes, *, temperature=0.2, smoothing=10.0",
    "k_means": "features, k, *, steps=20, generator=None, group=None",
    "MemoryBank": "size, dim, *, momentum=0.5",
    "alignment": "x, y",
    "uniformity": "x, t=2.0",
    "info_nce_bound": "f, g",
    "nwj_bound": "f, g",
    "donsker_varadhan_bound": "f, g",
}
NAMED = torch.tensor([[0, 2], [1, 1], [3, -1], [-1, -1], [4, 5]])  # targets, of six keys


def by_row(x, values):
    """One of the values for each row of x, again and again, on its device."""
    count = x.shape[0]
    return values.to(x.device).repeat(1 + count // len(values), *[1] * (values.dim() - 1))[:count]


def weighted(q, k, *t):
    return fastcl.weighted_info_nce(q, k, by_row(q, NAMED), by_row(q, torch.tensor([[0.75, 0.5]])), *t)


ASSIGNED = torch.tensor([0, 2, 2, 1, 0, 2])
PAIR = ((6, 4), (6, 4))
OBJECTIVES = {
    "decoupled_loss": (fastcl.decoupled_loss, PAIR),
    "hard_negative_loss": (fastcl.hard_negative_loss, PAIR),
    "prototype_nce": (lambda q, c, *t: fastcl.prototype_nce(q, c, ASSIGNED, *t), ((6, 4), (3, 4))),
    "alignment": (fastcl.alignment, PAIR),
    "uniformity": (fastcl.uniformity, ((6, 4),)),
    "info_nce_bound": (fastcl.info_nce_bound, PAIR),
    "nwj_bound": (fastcl.nwj_bound, PAIR),
    "donsker_varadhan_bound": (fastcl.donsker_varadhan_bound, PAIR),
    "in_batch": (lambda x, y, z, *t: fastcl.info_nce(x, y, z, *t, in_batch=True), (*PAIR, (5, 4))),
    "as they are": (lambda x, y, z, *t: fastcl.info_nce(x, y, z, *t, normalize=False), (*PAIR, (5, 4))),
    "weighted_info_nce": (weighted, PAIR),
    "siglip_loss": (lambda x, y, s=3.0: fastcl.siglip_loss(x, y, s, -1.0), PAIR),
    "nce_loss": (lambda q, p, n, *t: fastcl.nce_loss(q, p, n, *t, log_z=0.5), (*PAIR, (5, 4))),
    "jsd_loss": (lambda x, y: fastcl.jsd_loss(x, y, by_row(x, torch.tensor([0, 2, 1]))), PAIR),
    "triplet_loss": (fastcl.triplet_loss, PAIR),
    "batch_hard_triplet_loss": (
        lambda x: fastcl.batch_hard_triplet_loss(x, by_row(x, torch.tensor([0, 1]))),
        ((6, 4),),
    ),
}
UNSCALED = {"alignment", "jsd_loss", "triplet_loss", "batch_hard_triplet_loss"}
SCALED = [name for name in OBJECTIVES if name not in UNSCALED and "bound" not in name]
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


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
    function, shapes = OBJECTIVES[name]
    inputs = [x.to(dtype) for x in rows(*shapes)]
    (value,), grads = testing.value_and_grads(function, inputs)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [(g.dtype, g.shape) for g in grads] == [(x.dtype, x.shape) for x in inputs]


@every_objective
def test_autocast_changes_nothing(name):
    function, shapes = OBJECTIVES[name]
    inputs = [x.float() for x in rows(*shapes)]
    wanted = testing.value_and_grads(function, inputs)

    def under_autocast(*tensors):
        with torch.autocast(testing.DEVICE.type, dtype=torch.bfloat16):
            return function(*tensors)

    got = testing.value_and_grads(under_autocast, inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@every_objective
def test_meta_tensors(name):
    function, shapes = OBJECTIVES[name]
    if name == "prototype_nce":
        nobody = ASSIGNED.to("meta")
        value = fastcl.prototype_nce(*(x.to("meta") for x in rows(*shapes)), nobody)
    else:
        value = function(*(x.float().to("meta") for x in rows(*shapes)))
    assert value.shape == ()
    assert value.device.type == "meta"


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_may_be_tensors_of_one_element(name, shape):
    function, shapes = OBJECTIVES[name]
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
    function, shapes = OBJECTIVES[name]
    bad = torch.tensor(torch.nan if name in ("uniformity", "siglip_loss") else 0.0)
    assert function(*(x.float() for x in rows(*shapes)), bad).isnan()


@every_objective
def test_frozen_sides_cost_no_gradient(name):
    function, shapes = OBJECTIVES[name]
    inputs = [x.requires_grad_(i == 0) for i, x in enumerate(rows(*shapes))]
    function(*inputs).backward()
    (_, grads) = testing.value_and_grads(function, [x.detach() for x in inputs])
    torch.testing.assert_close(inputs[0].grad, grads[0])
    with torch.no_grad():
        assert not function(*inputs).requires_grad


# the logistic sums' chunks are counted as the graph is made
@pytest.mark.parametrize(
    "name", [name for name in OBJECTIVES if name not in ("siglip_loss", "nce_loss", "jsd_loss")]
)
def test_one_graph_serves_all_batch_sizes(name):
    function, shapes = OBJECTIVES[name]
    torch._dynamo.reset()
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counted)
    for count in (6, 9, 12):
        batch = shapes if name == "prototype_nce" else [(count, width) for _, width in shapes]
        inputs = rows(*batch)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert len(graphs) == 1
