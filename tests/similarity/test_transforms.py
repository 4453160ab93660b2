"""torch.func, forward mode, and shared memory layouts: values of a plain formula in float64."""

from functools import partial

import formulas
import pytest
import torch
from loss_table import LOSSES, MASKED
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fastcl
from fastcl import testing

ALL = {**LOSSES, **MASKED}
every_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL.keys())
every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])
pytestmark = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")


def case_of(loss, seed=50):
    """Float64 inputs and a factor."""
    inputs = list(loss.inputs(testing.make_case("random", (4, 5, 3), seed=seed)))
    return [*inputs, torch.tensor(loss.factor(0.4), dtype=torch.float64)]


def both(loss, reduction="mean"):
    return (partial(f, reduction=reduction) for f in (loss.product, loss.formula))


def same(got, exact):
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)


@every_loss
@every_reduction
def test_forward_mode(loss, reduction, request):
    inputs = tuple(case_of(loss))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    for name in testing.backends():
        if name == "cpu" and "mask" in request.node.callspec.id:
            continue
        with fastcl.use_backend(name):
            got, exact = (jvp(f, inputs, tangents) for f in both(loss, reduction))
            same(got, exact)
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(*x) for x in zip(inputs, tangents, strict=True)]
                same(tuple(forward_ad.unpack_dual(next(both(loss, reduction))(*duals))), exact)


@every_loss
def test_backward_transforms(loss):
    inputs = tuple(case_of(loss))
    positions = tuple(range(len(inputs)))
    product, formula = both(loss)
    same(grad(product, positions)(*inputs), grad(formula, positions)(*inputs))
    product, formula = both(loss, "none")
    weights = torch.rand_like(formula(*inputs))
    same(vjp(product, *inputs)[1](weights), vjp(formula, *inputs)[1](weights))
    same(jacrev(product, positions)(*inputs), jacrev(formula, positions)(*inputs))
    same(jacfwd(product, positions)(*inputs), jacfwd(formula, positions)(*inputs))


@every_loss
def test_second_derivatives_any_way_round(loss):
    inputs = tuple(case_of(loss))
    product, formula = both(loss)
    exact = hessian(formula)(*inputs)
    for way in (
        hessian,
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacrev(jacrev(f)),
        lambda f: jacfwd(jacfwd(f)),
    ):
        same(way(product)(*inputs), exact)
    tangent = torch.randn_like(inputs[0])
    forwards = lambda f: jvp(lambda x: grad(f)(x, *inputs[1:]), (inputs[0],), (tangent,))  # noqa: E731
    same(forwards(product), forwards(formula))


@every_loss
@every_reduction
def test_batches_of_any_argument(loss, reduction):
    first, second = case_of(loss, 51), case_of(loss, 52)
    second[-1] = second[-1] * 1.5
    product, formula = both(loss, reduction)
    for batched in (*range(len(first)), None):
        dims = tuple(0 if batched in (i, None) else None for i in range(len(first)))
        given = [
            torch.stack(pair) if dim == 0 else pair[0] for *pair, dim in zip(first, second, dims, strict=True)
        ]
        exact = [
            formula(*(x if dim is None else x[i] for x, dim in zip(given, dims, strict=True)))
            for i in range(2)
        ]
        same(vmap(product, dims)(*given), torch.stack(exact))
    if reduction == "mean":
        exact = [
            torch.stack(x)
            for x in zip(*(grad(formula, (0, -1 + len(first)))(*x) for x in (first, second)), strict=True)
        ]
        given = [torch.stack(pair) for pair in zip(first, second, strict=True)]
        same(vmap(grad(product, (0, -1 + len(first))))(*given), tuple(exact))


def test_batches_of_labels_masks_and_queue_ids():
    features = torch.randn(4, 2, 3, dtype=torch.float64)
    labels = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    masks = (labels[:, :, None] == labels[:, None]).double()
    exact = torch.stack([formulas.sup_con(features, x, temperature=0.3) for x in labels])
    call = partial(fastcl.sup_con, features, temperature=0.3)
    same(vmap(lambda x: call(labels=x))(labels), exact)
    same(vmap(lambda x: call(mask=x))(masks), exact)
    queue = fastcl.NegativeQueue(5, 3, with_ids=True)
    queue.enqueue(torch.randn(5, 3), torch.arange(5) % 2)
    x, y = features.unbind(1)
    got = vmap(lambda ids: fastcl.info_nce(x, y, queue, query_ids=ids))(labels)
    same(got, torch.stack([fastcl.info_nce(x, y, queue, query_ids=ids) for ids in labels]))


STATISTICS = ("lse_neg", "lse_pos", "pos_sum")


def statistics(function, case, query, key, scale, bias, factor, ids, **options):
    rule = fastcl.PairRule(positive=(ids, case.labels[1]), exclude=case.ids)
    stats = function(
        query,
        key,
        scale=scale,
        key_bias=bias,
        key_scale=factor,
        rule=rule,
        normalize=True,
        columns=True,
        **options,
    )
    # a set without pairs is -inf, whose difference from itself says nothing
    fields = [getattr(side, name) for side in (stats, stats.columns) for name in STATISTICS]
    return torch.cat([x.masked_fill(x == -torch.inf, 0.0) for x in fields])


def test_the_statistics(backend):
    case = testing.make_case("random", (6, 5, 3), seed=53)
    inputs = [
        case.query,
        case.key,
        torch.tensor(2.0).double(),
        torch.randn(5).double(),
        torch.rand(5).double(),
    ]
    ours = partial(statistics, fastcl.similarity_stats, case, backend=backend)
    dense = partial(statistics, testing.dense_stats, case)
    ids, tangents = case.labels[0], tuple(torch.randn_like(x) for x in inputs)
    got, exact = (jvp(lambda *x, f=f: f(*x, ids), tuple(inputs), tangents) for f in (ours, dense))
    same(got, exact)
    got, exact = (jacrev(f, tuple(range(5)))(*inputs, ids) for f in (ours, dense))
    same(got, exact)
    everything = [torch.stack([x, x.flip(0) if x.dim() else 2 * x]) for x in (*inputs, ids)]
    for batched in range(6):
        dims = tuple(0 if i == batched else None for i in range(6))
        given = [x if d == 0 else x[0] for x, d in zip(everything, dims, strict=True)]
        expected = [
            dense(*(x[i] if d == 0 else x for x, d in zip(given, dims, strict=True))) for i in range(2)
        ]
        same(vmap(ours, dims)(*given), torch.stack(expected))


def test_the_most_similar_keys_carry_no_tangent(backend):
    case = testing.make_case("random", (6, 9, 3), seed=54)
    find = partial(fastcl.similarity_topk, k=4, normalize=True)
    values, indices = find(case.query, case.key)
    (same_values, same_indices), (tangent, _) = jvp(
        lambda x: tuple(y.double() for y in find(x, case.key)), (case.query,), (case.query.flip(0),)
    )
    same(same_values, values)
    assert torch.equal(same_indices.long(), indices)
    assert not tangent.any()
    batched, _ = vmap(lambda x: find(x, case.key))(torch.stack([case.query, case.query.flip(0)]))
    same(batched, torch.stack([values, values.flip(0)]))


def mochi_case():
    generator = torch.Generator().manual_seed(55)
    queue = fastcl.NegativeQueue(12, 5)
    query, positive = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)

    def ranks(count):
        return torch.randint(6, (4, count), generator=generator)

    alpha, beta = (torch.rand(4, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    draws = fastcl.MochiDraws(ranks(3), ranks(3), alpha, ranks(2), beta / 2)
    return query, positive, queue, draws


def mochi_formula(query, positive, temperature, queue, draws):
    """MoCHi section 3; the synthetic negatives are constants."""
    unit = partial(torch.nn.functional.normalize, dim=-1)
    q, p, keys = unit(query), unit(positive), queue.keys.double()
    hard = keys[(unit(query.detach()) @ keys.T).argsort(dim=1, descending=True)]
    rows = torch.arange(len(q))[:, None]
    alpha, beta = draws.alpha[..., None], draws.beta[..., None]
    first = alpha * hard[rows, draws.first] + (1 - alpha) * hard[rows, draws.second]
    second = beta * q.detach()[:, None] + (1 - beta) * hard[rows, draws.partner]
    synthetic = unit(torch.cat([first, second], 1))
    logits = torch.cat([(q * p).sum(1, keepdim=True), q @ keys.T, (synthetic * q[:, None]).sum(2)], 1)
    return (logits / temperature).logsumexp(1) - logits[:, 0] / temperature


def test_mochi(backend):
    query, positive, queue, draws = mochi_case()
    inputs = (query, positive, torch.tensor(0.3).double())
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def ours(x, y, t):
        return fastcl.mochi_loss(
            x, y, queue, temperature=t, n_hard=6, n_mix=3, n_query_mix=2, draws=draws, reduction="none"
        )

    formula = partial(mochi_formula, queue=queue, draws=draws)
    same(jvp(ours, inputs, tangents), jvp(formula, inputs, tangents))
    same(jacrev(ours, (0, 1, 2))(*inputs), jacrev(formula, (0, 1, 2))(*inputs))
    pair = torch.stack([query, query.flip(0)])
    same(vmap(ours, (0, None, None))(pair, *inputs[1:]), torch.stack([formula(x, *inputs[1:]) for x in pair]))


@pytest.mark.parametrize("what", ["keys", "every second column", "query", "positive", "first", "alpha"])
def test_mochi_of_any_layout(what, backend):
    query, positive, queue, draws = mochi_case()
    plain = partial(fastcl.mochi_loss, temperature=0.3, n_hard=6, n_mix=3, n_query_mix=2, reduction="none")
    exact = mochi_formula(query, positive, 0.3, queue, draws)
    exact_grads = torch.autograd.functional.jacobian(
        lambda x, y: mochi_formula(x, y, 0.3, queue, draws).sum(), (query, positive)
    )
    transposed = lambda x: x.T.contiguous().T  # noqa: E731
    if what == "keys":
        queue.keys = transposed(queue.keys)
    elif what == "every second column":
        queue.keys = torch.stack([queue.keys, queue.keys * torch.nan], -1).flatten(1)[:, ::2]
        assert queue.keys.stride(-1) == 2
    elif what in draws._fields:
        draws = draws._replace(**{what: transposed(getattr(draws, what))})
    leaves = [
        (transposed(x) if name == what else x).detach().requires_grad_()
        for name, x in (("query", query), ("positive", positive))
    ]
    got = plain(*leaves, queue, draws=draws)
    same(got.detach(), exact)
    same(torch.autograd.grad(got.sum(), leaves), exact_grads)


def test_an_op_refuses_a_tangent():
    """The ops have no forward-mode derivative: to drop the tangent would be wrong without a word."""
    z = torch.randn(4, 3)
    arguments = (z, z, None, torch.tensor(2.0).double(), None, None, 0, True, True, False, True, 0, 0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z, z)
        assert torch.ops.fastcl.one_positive(*arguments)[0].isfinite()
        with pytest.raises(RuntimeError, match="one_positive has no forward-mode derivative"):
            torch.ops.fastcl.one_positive(dual, *arguments[1:])


ROWS = {"one row": torch.ones(1, 3), "no row of its class": torch.eye(3)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_sup_con_in_without_positives(name, masked, backend):
    features = ROWS[name].double().requires_grad_()
    count = len(features)
    given = {"mask": torch.zeros(count, count)} if masked else {"labels": torch.arange(count)}
    loss = fastcl.sup_con(features, **given, variant="in", reduction="none")
    (first,) = torch.autograd.grad(loss.sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), features)
    assert not loss.any()
    assert not first.any()
    assert not second.any()
