"""The ops as torch sees them: registration, compilation, derivatives, autocast."""

import warnings
from functools import partial

import pytest
import torch
from loss_table import LOSSES
from torch.library import opcheck
from torch.overrides import TorchFunctionMode

import fastcl
from fastcl import testing
from fastcl.backends import native
from fastcl.similarity.problem import Problem

OPS = torch.ops.fastcl
STREAMING = [name for name in testing.backends() if name != "reference"]
WHOLE_LOSS = "one_positive_by" if testing.INTERPRETED else "one_positive"
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="finite differences need float64")
streaming = pytest.mark.parametrize("name", STREAMING)

PROBLEMS = {
    "pair sets": {"sets": True},
    "plain": {},
    "normalized": {"normalize": True},
    "columns": {"columns": True},
    "labels": {"labels": True},
    "labels and columns": {"labels": True, "columns": True, "normalize": True},
    "bias and scale": {"extras": True, "columns": True},
    "symmetric": {"symmetric": True, "normalize": True},
    "symmetric labels": {"symmetric": True, "labels": True},
    "strided": {"strided": True},
    "bfloat16": {"dtype": torch.bfloat16, "normalize": True},
    "empty": {"shape": (0, 5, 3)},
}


def problem(
    shape=(6, 7, 5),
    dtype=torch.float32,
    normalize=False,
    columns=False,
    labels=False,
    extras=False,
    symmetric=False,
    strided=False,
    sets=False,
):
    case = testing.make_case("random", shape)
    query, key = (x.to(dtype).requires_grad_() for x in (case.query, case.key))
    if strided:
        query = query.detach().T.contiguous().T.requires_grad_()
    (query_labels, key_labels), (query_ids, key_ids) = case.labels, case.ids
    if symmetric:
        key, key_labels, key_ids = query, query_labels, query_ids
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    extra = [torch.rand(len(key), dtype=dtype, requires_grad=True) if extras else None for _ in range(2)]
    positive = (query_labels, key_labels) if labels else (None, None)
    more = {}
    if sets:
        mask = torch.rand(len(query), len(key)) < 0.3
        keys = torch.randint(-1, len(key), (len(query), 2))
        more = {"exclude_keys": keys, "positive_more": [mask], "exclude_more": [query_labels, key_labels]}
    return Problem(
        query,
        key,
        scale,
        *extra,
        *positive,
        exclude_query=query_ids,
        exclude_key=key_ids,
        normalize=normalize,
        columns=columns,
        symmetric=symmetric,
        **more,
    )


@streaming
@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_stats_ops(options, name):
    arguments = problem(**options)
    opcheck(OPS.stats_forward.default, (*arguments, False, name))
    if (
        not options.get("labels")
        and not options.get("sets")
        and not options.get("columns")
        and not options.get("symmetric")
    ):
        opcheck(OPS.stats_forward.default, (*arguments, True, name), test_utils="test_faketensor")
    rows, row_state, columns, column_state, _ = OPS.stats_forward(*arguments, False, name)
    states = [
        x.detach() for x in (torch.randn_like(rows), torch.randn_like(columns), row_state, column_state)
    ]
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    if arguments.symmetric:
        plain[1] = plain[0]
    present = [x is not None for x in arguments[:5]]
    opcheck(OPS.stats_backward.default, (*plain, *states, present, name))
    for one in range(2):
        needs = [i == one for i in range(5)]
        opcheck(OPS.stats_backward.default, (*plain, *states, needs, name), test_utils="test_faketensor")


class Recorder(TorchFunctionMode):
    """Keeps the calls of one op, as the losses make them."""

    def __init__(self, name):
        self.name, self.calls = name, []
        super().__init__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(self.name):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_name", ["nt_xent", "info_nce", "info_nce-negatives", "clip_loss"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_whole_loss_op(loss_name, dtype):
    loss = LOSSES[loss_name]
    case = testing.make_case("random", (6, 7, 5))
    factor = torch.tensor(loss.factor(0.5), dtype=torch.float64, requires_grad=True)
    with fastcl.use_backend(STREAMING[-1]), Recorder(f"fastcl.{WHOLE_LOSS}") as recorder:
        for frozen in range(3):
            inputs = [x.to(dtype, copy=True) for x in loss.inputs(case)]
            for x in inputs[: len(inputs) - frozen]:
                x.requires_grad_()
            loss.product(*inputs, factor, reduction=("mean", "sum")[frozen % 2])
    assert len(recorder.calls) == 3
    for op, arguments in recorder.calls:
        opcheck(op, arguments)


@pytest.mark.parametrize("name", testing.backends())
@pytest.mark.parametrize("excluded", [False, True])
def test_topk_op(name, excluded):
    case = testing.make_case("random", (6, 40, 5))
    ids = list(case.ids) if excluded else []
    arguments = (case.query.float(), case.key.float(), 4, ids, [], None, None, None, None, True, True)
    opcheck(OPS.topk.default, (*arguments, name))


@pytest.mark.parametrize(
    "loss", [loss for name, loss in LOSSES.items() if not name.endswith(("-unnormalized", "-2d", "-simclr"))]
)
@pytest.mark.parametrize("name", [name for name in STREAMING if name != "cpu"])
def test_compiles_as_one_graph(loss, name):
    """On the CPU: test_compile.py."""
    inputs = [x.float() for x in loss.inputs(testing.make_case("random", (6, 7, 5)))]
    torch._dynamo.reset()
    with fastcl.use_backend(name):
        factor = torch.tensor(loss.factor(0.1))  # a number, which may change: test_compile.py
        eager = partial(loss.product, reduction="none" if name == "chunked" else "mean")
        compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
        got, exact = (
            testing.value_and_grads(lambda *x, f=f: f(*x, factor), inputs) for f in (compiled, eager)
        )
        torch.testing.assert_close(got, exact)


def test_statistics_compile_as_one_graph(backend):
    case = testing.make_case("random", (6, 7, 5))
    torch._dynamo.reset()

    def uniformity(query, key):
        stats = fastcl.similarity_stats(query, key, rule=case.rule(), normalize=True, columns=True)
        return stats.lse_neg.mean() + stats.columns.pos_sum.sum()

    compiled = torch.compile(uniformity, fullgraph=True, backend="aot_eager")
    got, exact = (testing.value_and_grads(f, [case.query, case.key]) for f in (compiled, uniformity))
    torch.testing.assert_close(got, exact)


def test_compiles_with_inductor():
    torch._dynamo.reset()
    z = [x.float() for x in testing.make_case("random", (6, 7, 5))[:2]]
    compiled = torch.compile(fastcl.nt_xent, fullgraph=True)
    got, exact = (testing.value_and_grads(f, z) for f in (compiled, fastcl.nt_xent))
    torch.testing.assert_close(got, exact)


@in_float64
@every_loss
def test_first_and_second_derivatives(loss, backend):
    case = testing.make_case("random", (3, 4, 3), seed=1)
    inputs = [x.clone().requires_grad_() for x in loss.inputs(case)]
    inputs.append(torch.tensor(loss.factor(0.7), dtype=torch.float64, requires_grad=True))
    for reduction in ("mean", "none"):
        call = partial(loss.product, reduction=reduction)
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@in_float64
def test_derivatives_of_the_statistics(backend):
    case = testing.make_case("random", (4, 5, 3), seed=2)
    m = len(case.key)
    inputs = [
        case.query,
        case.key,
        torch.tensor(0.7).double(),
        torch.rand(m).double(),
        torch.rand(m).double(),
    ]
    inputs = [x.clone().requires_grad_() for x in inputs]

    def call(query, key, scale, key_bias, key_scale):
        stats = fastcl.similarity_stats(
            query, key, scale=scale, rule=case.rule(), key_bias=key_bias, key_scale=key_scale, columns=True
        )
        sides = (stats, stats.columns)
        fields = [x for side in sides for x in (side.lse_neg, side.lse_pos, side.pos_sum)]
        return torch.cat([x.masked_fill(x == -torch.inf, 0.0) for x in fields])

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["info_nce", "info_nce-negatives", "nt_xent", "clip_loss", "sup_con-in"])
@pytest.mark.parametrize("dtype", list({torch.float32: None, testing.WIDEST: None}), ids=str)
def test_second_derivatives_of_converged_pairs_are_finite(name, dtype, backend):
    """Logits 1/0.005 apart: the probability of every negative is zero in float32."""
    loss = LOSSES[name]
    rows = torch.eye(4, dtype=dtype)
    case = testing.Case(rows, rows, rows.roll(1, 0), (torch.arange(4),) * 2, (torch.arange(4),) * 2)
    leaves = [x.clone().requires_grad_() for x in loss.inputs(case)]
    value = loss.product(*leaves, loss.factor(0.005))
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in second)


def test_second_derivatives_without_negatives_are_finite(backend):
    query, positive = (torch.randn(3, 2, dtype=testing.WIDEST, requires_grad=True) for _ in range(2))
    value = fastcl.info_nce(query, positive, torch.empty(0, 2, dtype=testing.WIDEST))
    grads = torch.autograd.grad(value, [query, positive], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), [query, positive])
    assert all(not g.any() for g in second)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(loss, dtype, backend):
    inputs = [x.to(dtype) for x in loss.inputs(testing.make_case("random", (6, 7, 5)))]
    for reduction in ("mean", "none"):
        call = partial(loss.product, reduction=reduction)

        def under_autocast(*x, call=call):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(*x, loss.factor(0.1))

        got = testing.value_and_grads(under_autocast, inputs)
        exact = testing.value_and_grads(lambda *x, call=call: call(*x, loss.factor(0.1)), inputs)
        assert got[0][0].dtype == torch.float32
        torch.testing.assert_close(got, exact, rtol=0, atol=0)


def test_top_k_under_autocast(backend):
    case = testing.make_case("random", (6, 40, 5))
    query, key = case.query.float(), case.key.float()
    exact = fastcl.similarity_topk(query, key, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fastcl.similarity_topk(query, key, 5)
    torch.testing.assert_close(got, exact, rtol=0, atol=0)


def test_no_gradient_without_grad_mode(backend):
    z = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        assert not fastcl.nt_xent(z, z.flip(0)).requires_grad
    with torch.inference_mode():
        assert fastcl.nt_xent(z, z.flip(0)).isfinite()


def test_the_backward_pass_may_run_twice(backend):
    z1, z2 = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    loss = fastcl.nt_xent(z1, z2)
    first, second = (torch.autograd.grad(loss, [z1, z2], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_nothing_warns(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in LOSSES.values():
            inputs = [x.requires_grad_() for x in loss.inputs(testing.make_case("random", (6, 7, 5)))]
            loss.product(*inputs, loss.factor(0.1)).backward()


@pytest.mark.skipif(native.missing_reason() is not None, reason="needs the native extension")
def test_a_gradient_changed_in_place_spoils_no_second_backward_unnoticed():
    z1, z2 = (torch.randn(8, 4, requires_grad=True) for _ in range(2))
    loss = fastcl.nt_xent(z1, z2)
    expected = torch.autograd.grad(loss, z1, retain_graph=True)[0].clone()
    loss.backward(retain_graph=True)
    z1.grad.mul_(5)
    assert torch.autograd.grad(loss, z1, retain_graph=True)[0].equal(expected)
    torch.autograd.grad(loss, z1, retain_graph=True)[0].mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, z1)


def test_incoming_gradients_in_a_batch():
    z1, z2 = (torch.randn(8, 4, requires_grad=True) for _ in range(2))
    one, *others = torch.autograd.grad(
        fastcl.nt_xent(z1, z2), z1, torch.tensor([1.0, 2.0, -3.0]), is_grads_batched=True
    )[0]
    torch.testing.assert_close(torch.stack(others), torch.stack([2 * one, -3 * one]))
