"""torch.compile and torch.export: what a graph keeps, what it may not, and second derivatives of it."""

import contextlib
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from grids import pairwise
from loss_table import LOSSES
from torch._subclasses.fake_tensor import FakeTensorMode

import fastcl
from fastcl import testing
from fastcl.backends import choice, cuda
from fastcl.backends.registry import BACKENDS
from fastcl.losses.families.mochi import Mochi

pytestmark = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")
# those whose graphs differ by more than an argument's value
GRAPHS = [name for name in LOSSES if not name.endswith(("-unnormalized", "-2d", "-simclr"))]
every_loss = pytest.mark.parametrize("loss", [LOSSES[name] for name in GRAPHS], ids=GRAPHS)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])
EACH_OP = ("nt_xent", "info_nce-negatives", "sup_con")
# a whole loss by one op, and statistics with a formula on top
STREAMING = [
    (name, reduction)
    for name, reduction in (("cpu", "mean"), ("chunked", "none"))
    if name in testing.backends()
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    fastcl.use_backend("auto")


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def same(got, exact):
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)


def tensors(loss, seed=60, shape=(6, 7, 5)):
    return [x.double() for x in loss.inputs(testing.make_case("random", shape, seed=seed))]


def right_or_refused(function, inputs, wanted):
    """A gradient penalty through a compiled function: torch's own double backward, or an error."""

    def penalty(f):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        chosen = [leaves[i] for i in wanted]
        grads = torch.autograd.grad(f(*leaves).sum(), chosen, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), chosen)

    with pytest.raises(RuntimeError, match="double backward"):
        penalty(compiled(function))
    assert all(x.any() for x in penalty(function))


@pytest.mark.parametrize(
    "row",
    pairwise(loss=EACH_OP, way=STREAMING, wanted=("all", "first", "factor", "first of bfloat16")),
    ids=lambda row: "-".join(map(str, row.values())),
)
def test_second_derivatives_of_a_compiled_loss_are_refused(row):
    loss, (name, reduction) = LOSSES[row["loss"]], row["way"]
    fastcl.use_backend(name)
    inputs = tensors(loss)
    wanted = {"all": range(len(inputs) + 1), "factor": [len(inputs)]}.get(row["wanted"], [0])
    if "bfloat16" in row["wanted"]:
        inputs = [x.bfloat16() for x in inputs]
    factor = torch.tensor(loss.factor(0.5)).double()
    right_or_refused(partial(loss.product, reduction=reduction), [*inputs, factor], wanted)


@pytest.mark.parametrize("wanted", [[0], [0, 1]], ids=["frozen keys", "all"])
@pytest.mark.parametrize("normalize", [False, True])
def test_second_derivatives_of_compiled_statistics_are_refused(wanted, normalize, backend):
    if backend == "reference":
        pytest.skip("plain torch: what torch does")

    def call(query, key):
        return fastcl.similarity_stats(query, key, scale=2.0, normalize=normalize).lse_neg

    right_or_refused(call, list(testing.make_case("random", (6, 7, 5))[:3:2]), wanted)


def test_second_derivatives_of_a_compiled_mochi_loss_are_refused(backend):
    if backend == "reference":
        pytest.skip("plain torch: what torch does")
    queue = fastcl.NegativeQueue(20, 5)
    case = testing.make_case("random", (4, 1, 5))
    draws = fastcl.losses.mochi._draw(case.query, 6, 3, 2, None)

    def call(x, y):
        return fastcl.mochi_loss(x, y, queue, n_hard=6, n_mix=3, n_query_mix=2, draws=draws)

    right_or_refused(call, [case.query, case.positive], [0, 1])


@every_loss
@pytest.mark.parametrize("dynamic", [True, None])
def test_a_number_that_changes(loss, dynamic):
    inputs = tensors(loss)
    call = compiled(partial(loss.product, reduction="mean"), dynamic=dynamic)
    for temperature in (0.1, 0.2, 0.35, 1):
        factor = loss.factor(temperature)
        got = testing.value_and_grads(lambda *x, f=factor: call(*x, f), inputs)
        same(got, testing.value_and_grads(lambda *x, f=factor: loss.formula(*x, f, reduction="mean"), inputs))


@pytest.mark.parametrize("dynamic", [True, None])
def test_modules_whose_numbers_change(dynamic):
    x, y = testing.make_case("random", (6, 7, 5))[:2]
    views, labels = torch.stack([x, y], 1), torch.arange(6) % 3
    for temperature in (0.1, 0.2, 0.35):
        same(
            compiled(fastcl.InfoNCE(temperature), dynamic=dynamic)(x, y),
            fastcl.InfoNCE(temperature)(x, y),
        )
        module = fastcl.SupConLoss(temperature, base_temperature=0.5 * temperature)
        same(compiled(module, dynamic=dynamic)(views, labels), module(views, labels))


def test_bad_numbers_are_refused_in_a_graph():
    z = torch.randn(4, 3)
    for bad in (0.0, math.inf, math.nan):
        with pytest.raises(Exception, match="temperature"):
            compiled(fastcl.nt_xent)(z, z, bad)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce-negatives", "sup_con", "sup_con-one"])
def test_what_fits_the_chip_is_asked_in_a_graph(name, grid, monkeypatch):
    monkeypatch.setattr(cuda, "_limits", lambda device: (6, 60 << 10, ""))
    limited = replace(BACKENDS["cpu"], unsupported_reasons=lambda r: cuda._beyond_the_device(r, 0))
    monkeypatch.setattr(choice, "BACKENDS", {"cpu": limited})
    monkeypatch.setattr(choice, "_NAMES", ("cpu", "auto"))
    loss = LOSSES[name]
    call = compiled(partial(loss.product, reduction="mean"), dynamic=True)
    for n in (6, 9, 20):
        inputs = [x.float() for x in tensors(loss, shape=(n, n, 5))]
        got, exact = (
            testing.value_and_grads(lambda *x, f=f: f(*x, 0.2), inputs) for f in (call, loss.product)
        )
        torch.testing.assert_close(got, exact)
    with pytest.raises(Exception, match="does not fit"):
        call(*(x.float() for x in tensors(loss, shape=(600, 600, 5))), 0.2)


def test_what_a_block_holds_of_hard_keys_is_what_the_kernel_says():
    for width, n_hard, n_mix in ((5, 3, 2), (128, 1024, 512), (128, 700, 512), (2048, 64, 9)):
        case = torch.empty(2, width)
        ranks = {"first": torch.empty(2, n_mix), "second": case, "partner": torch.empty(2, 3)}
        args = Mochi(case, case, case, case, **ranks, alpha=case, beta=case, n_hard=n_hard)
        for shared_bytes in range(1 << 10, 228 << 10, 1 << 10):
            expected = torch.ops.fastcl_native.mixing_fits(width, n_hard, n_mix + 3, shared_bytes)
            assert cuda.mixing_fits(args, shared_bytes) == expected


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *inputs):
        return self.call(*inputs)


@pytest.mark.parametrize("context", [torch.no_grad, contextlib.nullcontext], ids=["no_grad", "grad"])
@pytest.mark.parametrize("number", range(len(GRAPHS)), ids=GRAPHS)
def test_an_exported_loss_can_be_trained(number, context):
    """Neighbours in the table are of one family: each loss by both ways, each way without a gradient too."""
    loss = LOSSES[GRAPHS[number]]
    name, reduction = STREAMING[(number + (context is torch.no_grad)) % len(STREAMING)]
    fastcl.use_backend(name)
    inputs = (*tensors(loss), torch.tensor(loss.factor(0.5)).double())
    with context():
        module = torch.export.export(Module(partial(loss.product, reduction=reduction)), inputs).module()
    got, exact = (
        testing.value_and_grads(f, inputs) for f in (module, partial(loss.formula, reduction=reduction))
    )
    same(got, exact)


def test_frozen_keys_may_thaw_after_the_export(backend):
    case = testing.make_case("random", (6, 7, 5))

    def call(function, query, key):
        return function(query, key, normalize=True).lse_neg

    inputs = (case.query.requires_grad_(), case.key)
    module = torch.export.export(Module(partial(call, fastcl.similarity_stats)), inputs).module()
    detached = [x.detach() for x in inputs]
    got, exact = (testing.value_and_grads(f, detached) for f in (module, partial(call, testing.dense_stats)))
    same(got, exact)


@every_loss
@every_reduction
def test_fake_tensors(loss, reduction):
    """On fake tensors there is a shape, and a graph."""
    inputs, factor = tensors(loss), loss.factor(0.5)
    shape = loss.product(*inputs, factor, reduction=reduction).shape
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x).requires_grad_() for x in inputs]
        value = loss.product(*fake, factor, reduction=reduction)
        value.sum().backward()
        assert (value.shape, fake[0].grad.shape) == (shape, inputs[0].shape)


def test_meta_tensors_everywhere():
    x, y = (z.to("meta").requires_grad_() for z in testing.make_case("random", (6, 7, 5))[:2])
    queue = fastcl.NegativeQueue(8, 5, device="meta")
    negatives = torch.empty(6, 3, 5, device="meta", dtype=x.dtype, requires_grad=True)
    labels = torch.empty(6, dtype=torch.int64, device="meta")
    losses = {
        "paired": lambda: fastcl.info_nce(x, y, negatives, negative_mode="paired"),
        "queue": lambda: fastcl.info_nce(x, y, queue),
        "nt_xent": lambda: fastcl.nt_xent(x, y),
        "clip_loss": lambda: fastcl.clip_loss(x, y, 2.0),
        "sup_con": lambda: fastcl.sup_con(torch.stack([x, y], 1), labels),
        "mask": lambda: fastcl.sup_con(x, mask=torch.empty(6, 6, device="meta")),
        "mochi": lambda: fastcl.mochi_loss(x, y, queue, n_hard=4, n_mix=3, n_query_mix=2),
    }
    for call in losses.values():
        value = call()
        value.backward()
        assert (value.shape, value.device.type, x.grad.shape) == ((), "meta", x.shape)


def test_mochi_draws_for_any_number_of_rows():
    queue = fastcl.NegativeQueue(32, 8)
    graph = torch.compile(
        lambda q, k: fastcl.mochi_loss(q, k, queue, n_hard=8, n_mix=4, n_query_mix=4),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (6, 9):
        assert graph(torch.randn(rows, 8), torch.randn(rows, 8)).isfinite()
