"""What a call takes: temperatures of any shape, mixed dtypes under autocast, queues of inference mode."""

from functools import partial

import formulas
import pytest
import torch
from loss_table import LOSSES
from test_transforms import mochi_case

import fastcl
from fastcl import testing
from fastcl.backends import cpu

pytestmark = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def same(got, exact):
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)


@every_loss
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tensor_of_one_element(loss, shape, reduction, backend):
    inputs = loss.inputs(testing.make_case("random", (6, 7, 5)))
    factor = torch.tensor(loss.factor(0.4), dtype=torch.float64)
    got, grads = testing.value_and_grads(
        partial(loss.product, reduction=reduction), [*inputs, factor.reshape(shape)]
    )
    exact, exact_grads = testing.value_and_grads(
        partial(loss.formula, reduction=reduction), [*inputs, factor]
    )
    same(got, exact)
    same(grads[:-1], exact_grads[:-1])
    same(grads[-1], exact_grads[-1].reshape(shape))


def test_integers_and_half_types(backend):
    x, y = testing.make_case("random", (6, 7, 5))[:2]
    for dtype in (torch.int64, torch.uint8, torch.float16):
        two = torch.full((1,), 2, dtype=dtype)
        same(fastcl.nt_xent(x, y, two), formulas.nt_xent(x, y, temperature=2))
        same(fastcl.clip_loss(x, y, two), formulas.clip_loss(x, y, logit_scale=2))
        dense = testing.dense_stats(x, y, scale=2.0)
        same(fastcl.similarity_stats(x, y, scale=two).lse_neg, dense.lse_neg)
    half = torch.full((1, 1), 0.5, dtype=torch.float16, requires_grad=True)
    fastcl.nt_xent(x, y, half).backward()
    assert (half.grad.shape, half.grad.dtype) == ((1, 1), torch.float16)


def rows_formula(query, positive, negatives, temperature, reduction):
    """Each row alone, with its own temperature."""
    losses = []
    for i in range(len(query)):
        others = negatives
        if negatives is None:
            others = torch.cat([positive[:i], positive[i + 1 :]])
        elif negatives.dim() == 3:
            others = negatives[i]
        row = slice(i, i + 1)
        losses.append(formulas.info_nce(query[row], positive[row], others, temperature=temperature[i, 0]))
    losses = torch.stack(losses)
    return losses if reduction == "none" else losses.mean()


@pytest.mark.parametrize("kind", ["in batch", "unpaired", "paired", "queue"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_temperature_per_row(kind, reduction, backend):
    query, positive, key = testing.make_case("random", (6, 7, 5))[:3]
    temperature = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)[:, None]
    queue = fastcl.NegativeQueue(7, 5)
    negatives = {"in batch": None, "unpaired": key, "paired": key[:6, None] + query, "queue": queue}[kind]
    mode = "paired" if kind == "paired" else "unpaired"
    dense = queue.keys.double() if kind == "queue" else negatives
    inputs = [query, positive, temperature] + ([negatives] if kind in ("unpaired", "paired") else [])

    def ours(q, p, t, n=negatives):
        return fastcl.info_nce(q, p, n, t, reduction, mode)

    def formula(q, p, t, n=dense):
        return rows_formula(q, p, n, t, reduction)

    tolerances = {"rtol": 1e-6, "atol": 1e-7} if kind == "queue" else {"rtol": 1e-9, "atol": 1e-11}
    got, exact = (testing.value_and_grads(f, inputs) for f in (ours, formula))
    torch.testing.assert_close(got, exact, **tolerances)
    for bad in (0.0, torch.inf, torch.nan):
        losses = fastcl.info_nce(
            query, positive, negatives, temperature.index_fill(0, torch.tensor(2), bad), "none", mode
        )
        assert losses.isnan().tolist() == [i == 2 for i in range(6)]


def mixed(loss, wide):
    """Every input but one in bfloat16, that one in float32, and the other way round."""
    inputs = [x.bfloat16() for x in loss.inputs(testing.make_case("random", (6, 7, 5)))]
    return [x.float() if (i == 0) == wide else x for i, x in enumerate(inputs)]


@every_loss
@pytest.mark.parametrize("wide", [True, False])
def test_dtypes_may_differ_under_autocast(loss, wide, backend):
    inputs = mixed(loss, wide)
    if len(inputs) > 1:
        with pytest.raises(TypeError, match="must have dtype"):
            loss.product(*inputs, loss.factor(0.4), reduction="mean")
    for reduction in ("mean", "none"):

        def call(*x, reduction=reduction):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss.product(*x, loss.factor(0.4), reduction=reduction)

        got, grads = testing.value_and_grads(call, inputs)
        exact, exact_grads = testing.value_and_grads(
            lambda *x, r=reduction: loss.formula(*x, loss.factor(0.4), reduction=r),
            [x.double() for x in inputs],
        )
        all_half = all(x.dtype == torch.bfloat16 for x in inputs)
        torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-2 if all_half else 1e-5, atol=1e-5)
        for x, grad, expected in zip(inputs, grads, exact_grads, strict=True):
            assert grad.dtype == x.dtype
            torch.testing.assert_close(grad.double(), expected, rtol=2e-2, atol=5e-3)


def test_dtypes_of_statistics_and_mochi_may_differ_under_autocast(backend):
    x, y = testing.make_case("random", (6, 7, 5))[:2]
    x, y = x.bfloat16().requires_grad_(), y.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fastcl.similarity_stats(x, y, normalize=True).lse_neg
        values = fastcl.similarity_topk(x, y, 3)[0]
    got.sum().backward()
    exact = testing.dense_stats(x.double(), y.double(), normalize=True).lse_neg
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        values.double(), (x.double() @ y.double().T).topk(3).values, rtol=1e-5, atol=1e-6
    )
    assert (x.grad.dtype, y.grad.dtype) == (torch.bfloat16, torch.float32)
    query, positive, queue, draws = mochi_case()
    options = {"n_hard": 6, "n_mix": 3, "n_query_mix": 2, "draws": draws}
    query, positive = query.bfloat16(), positive.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fastcl.mochi_loss(query, positive, queue, **options)
    torch.testing.assert_close(got, fastcl.mochi_loss(query.float(), positive, queue, **options))


def test_a_queue_of_inference_mode_serves_training(backend):
    with torch.inference_mode():
        queue = fastcl.NegativeQueue(9, 5, with_ids=True)
        queue.enqueue(torch.randn(4, 5), torch.arange(4))
    query, positive = testing.make_case("random", (6, 7, 5))[:2]
    assert not queue.keys.is_inference()
    temperature = torch.tensor(0.3).double()
    for reduction in ("mean", "none"):
        got = testing.value_and_grads(
            lambda q, p, t, r=reduction: fastcl.info_nce(q, p, queue, t, r), [query, positive, temperature]
        )
        exact = testing.value_and_grads(
            lambda q, p, t, r=reduction: formulas.info_nce(
                q, p, queue.keys.double(), temperature=t, reduction=r
            ),
            [query, positive, temperature],
        )
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-7)
    with torch.inference_mode():
        queue.keys = queue.keys.clone()
    loss = fastcl.info_nce(query.requires_grad_(), positive, queue)
    loss.backward()
    assert query.grad.any()


class Recorder:
    """The native ops, and the precision of products that each call asked for."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        def call(*arguments):
            self.asked.append((name, arguments[12]))
            return getattr(torch.ops.fastcl_native, name)(*arguments)

        return call


@pytest.mark.parametrize(("forward", "backward"), [("highest", "medium"), ("medium", "highest")])
@pytest.mark.skipif("cpu" not in testing.backends(), reason="of the native extension")
def test_the_forward_pass_decides_the_precision(forward, backward, monkeypatch):
    """A backward pass that rounded the logits in another way would not be its derivative."""
    x, y = (torch.randn(64, 128, requires_grad=True) for _ in range(2))
    calls = (
        lambda: fastcl.similarity_stats(x, y, normalize=True, scale=5.0, columns=True).lse_neg,
        lambda: fastcl.info_nce(x, y, reduction="none"),
        lambda: fastcl.sup_con(torch.stack([x, y], 1), torch.arange(64) % 5, reduction="none"),
    )

    def gradient(call, precision):
        recorder = Recorder()
        monkeypatch.setattr(cpu, "_native", recorder)
        torch.set_float32_matmul_precision(forward)
        try:
            loss = call().sum()
            torch.set_float32_matmul_precision(precision)
            return torch.autograd.grad(loss, x)[0], recorder.asked
        finally:
            torch.set_float32_matmul_precision("highest")

    for call in calls:
        got, asked = gradient(call, backward)
        assert [name for name, _ in asked] == ["stats_forward", "stats_backward"]
        assert {level for _, level in asked} == {0 if forward == "highest" else 2}
        assert torch.equal(got, gradient(call, forward)[0])


@pytest.mark.parametrize("width", [16, 48, 50, 64])
@pytest.mark.parametrize("precision", ["medium", "high"])
def test_rounded_products_of_rows_as_they_are(width, precision, backend):
    """Rows that need no preparation are read in place, also where products are of bfloat16."""
    x, y = (torch.randn(20, width, requires_grad=True) for _ in range(2))
    torch.set_float32_matmul_precision(precision)
    try:
        stats = fastcl.similarity_stats(x, y, scale=0.1)
        got = torch.autograd.grad(stats.lse_neg.sum(), [x, y])
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = torch.autograd.grad((0.1 * x.double() @ y.double().T).logsumexp(1).sum(), [x, y])
    torch.testing.assert_close(got, exact, rtol=0.02, atol=2e-3, check_dtype=False)
