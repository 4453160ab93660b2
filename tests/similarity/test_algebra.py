"""Pair sets, joined logits, the three forms, sums of softplus, soft targets: against dense formulas."""

import pytest
import torch
import torch.nn.functional as F

import fastcl
from fastcl import PairRule, testing

N, M, D = 30, 70, 8
ROW, KEY = torch.arange(N), torch.arange(M)


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator, dtype=torch.float64).requires_grad_()


def mask(share, seed):
    return torch.rand(N, M, generator=torch.Generator().manual_seed(seed)) < share


def same(got, exact):
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)


A, B = mask(0.2, 1), mask(0.3, 2)
NAMED = torch.randint(-1, M, (N, 4), generator=torch.Generator().manual_seed(3))
IS_NAMED = (NAMED[:, :, None] == KEY).any(1)
SAME_CLASS = ROW[:, None] % 5 == KEY % 5
RULES = {  # a rule, and which pairs it excludes and takes for positives
    "masks": (PairRule(positive=A, exclude=B), B, A),
    "lists": (
        PairRule(positive=[(ROW % 5, KEY % 5), A], exclude=[B, (ROW, KEY), (ROW // 3, KEY // 2)]),
        B | (ROW[:, None] == KEY) | (ROW[:, None] // 3 == KEY // 2),
        SAME_CLASS | A,
    ),
    "within": (
        PairRule(positive=(ROW % 5, KEY % 5), within=(ROW // 10, KEY // 10)),
        ROW[:, None] // 10 != KEY // 10,
        SAME_CLASS,
    ),
    "keys": (PairRule(exclude_keys=NAMED), IS_NAMED, torch.zeros_like(A)),
    "all": (
        PairRule(positive=[A], exclude=[B], within=(ROW % 2, KEY % 2), exclude_keys=NAMED),
        B | (ROW[:, None] % 2 != KEY % 2) | IS_NAMED,
        A,
    ),
    "everything excluded": (PairRule(exclude=torch.ones_like(A)), torch.ones_like(A), A & False),
}


COMPARED = ("lse_neg", "lse_pos", "pos_sum", "pos_count", "max_neg")


def dense(query, key, excluded, positive, transposed=False):
    logits = 2.0 * query @ key.T
    negative, positive = ~excluded & ~positive, ~excluded & positive
    if transposed:
        logits, negative, positive = logits.T, negative.T, positive.T

    def lse(kept):
        empty = ~kept.any(1, keepdim=True)
        filled = logits.masked_fill(~kept, -torch.inf).masked_fill(empty, 0)
        return filled.logsumexp(1).masked_fill(empty[:, 0], -torch.inf)

    largest = F.pad(logits.masked_fill(~negative, -torch.inf), (0, 1), value=-torch.inf).amax(1).detach()
    pos_sum = (logits * positive).sum(1)
    return [lse(negative), lse(positive), pos_sum, positive.sum(1).double(), largest]


def grads(outputs, inputs):
    live = [x for x in outputs if x.requires_grad]
    total = sum((x.where(x.isfinite(), 0) * torch.arange(1.0, 1 + len(x))).sum() for x in live)
    return torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_statistics_of_pair_sets(name, columns, backend):
    rule, excluded, positive = RULES[name]
    query, key = rows(N, 4), rows(M, 5)
    stats = fastcl.similarity_stats(query, key, scale=2.0, rule=rule, columns=columns)
    got = testing.every_statistic(stats, COMPARED)
    exact = dense(query, key, excluded, positive)
    exact += dense(query, key, excluded, positive, True) if columns else []
    for x, y in zip(got, exact, strict=True):
        same(x, y)
    for x, y in zip(grads(got, [query, key]), grads(exact, [query, key]), strict=True):
        same(x, y)


ASYMMETRIC = {  # of the same rows on both sides: a rule, and which pairs it excludes and takes for positives
    "positive": (PairRule(positive=(ROW % 3, ROW % 4)), A[:, :N] & False, ROW[:, None] % 3 == ROW % 4),
    "exclude": (PairRule(exclude=(ROW % 3, ROW % 4)), ROW[:, None] % 3 == ROW % 4, A[:, :N] & False),
    "within": (PairRule(within=(ROW % 3, ROW % 4)), ROW[:, None] % 3 != ROW % 4, A[:, :N] & False),
    "exclude_keys": (
        PairRule(exclude_keys=NAMED % N),
        ((NAMED % N)[:, :, None] == ROW).any(1),
        A[:, :N] & False,
    ),
    "mask": (PairRule(positive=A[:, :N]), A[:, :N] & False, A[:, :N]),
}


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", ASYMMETRIC)
def test_equal_rows_under_a_rule_of_one_side_are_not_symmetric(name, columns, backend):
    rule, excluded, positive = ASYMMETRIC[name]
    x = rows(N, 4)
    stats = fastcl.similarity_stats(x, x, scale=2.0, rule=rule, columns=columns)
    got = testing.every_statistic(stats, COMPARED)
    exact = dense(x, x, excluded, positive)
    exact += dense(x, x, excluded, positive, True) if columns else []
    for a, b in zip((*got, *grads(got, [x])), (*exact, *grads(exact, [x])), strict=True):
        same(a, b)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("among", ["all", "negative", "positive"])
@pytest.mark.parametrize("name", RULES)
def test_topk_of_pair_sets(name, among, largest, bounded, backend):
    rule, excluded, positive = RULES[name]
    query, key = rows(N, 6).detach(), rows(M, 7).detach()
    similarity, nothing = query @ key.T, -torch.inf if largest else torch.inf
    dropped = excluded | {"all": excluded, "negative": positive, "positive": ~positive}[among]
    bound = similarity.median(1).values + 1e-6 if bounded else None  # none is equal to it
    if bounded:
        dropped = dropped | (similarity >= bound[:, None])
    wanted = similarity.masked_fill(dropped, nothing).sort(dim=1, descending=largest, stable=True)
    values, indices = fastcl.similarity_topk(
        query, key, 60, rule=rule, among=among, largest=largest, below=bound
    )
    same(values, wanted.values[:, :60])
    assert torch.equal(indices, wanted.indices[:, :60].masked_fill(wanted.values[:, :60] == nothing, -1))


def test_joined_logits_and_the_three_forms():
    query, key, own = rows(N, 8), rows(M, 9), rows(N, 10)
    pad = torch.rand(N, D, generator=torch.Generator().manual_seed(0)) < 0.3
    logits = own.masked_fill(pad, -torch.inf)
    rule = PairRule(positive=A, exclude=B)
    for side in ("negatives", "positives"):
        stats = fastcl.similarity_stats(query, key, scale=2.0, rule=rule).join(**{side: logits})
        table = torch.cat([2.0 * query @ key.T, own], 1)
        excluded = torch.cat([B, pad], 1)
        positive = torch.cat([A, torch.full_like(pad, side == "positives")], 1)
        pos, neg = positive & ~excluded, ~positive & ~excluded
        lse = [table.masked_fill(~kept, -torch.inf).logsumexp(1) for kept in (neg, pos)]
        mean = (table * pos).sum(1) / pos.sum(1)
        same(stats.pos_count, pos.sum(1).double())
        same(stats.max_neg, table.masked_fill(~neg, -torch.inf).amax(1).detach())
        forms = [
            (stats.any_positive(), torch.logaddexp(*lse) - lse[1]),
            (stats.each_positive(), torch.logaddexp(*lse) - mean),
            (stats.decoupled(), lse[0] - mean),
        ]
        for got, exact in forms:
            same(got, exact)
            for x, y in zip(grads([got], [query, key, own]), grads([exact], [query, key, own]), strict=True):
                same(x, y)
    with pytest.raises(ValueError, match=r"negatives .* row of logits"):
        stats.join(negatives=logits[1:])
    with pytest.raises(ValueError, match="columns"):
        fastcl.similarity_stats(query, key, columns=True).join(negatives=logits)
    alone = fastcl.similarity_stats(query, key, rule=PairRule(exclude=torch.ones_like(A)))
    for form in (alone.any_positive(), alone.each_positive(), alone.decoupled()):
        assert torch.equal(form, torch.zeros(N, dtype=torch.float64))
        assert not any(g.any() for g in grads([form], [query, key]))


@pytest.mark.parametrize("name", RULES)
def test_sums_of_softplus(name):
    rule, excluded, positive = RULES[name]
    query, key, bias = rows(N, 11), rows(M, 12), rows(N, 13)[:, 0].detach().requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    logits = scale * query @ key.T + bias[:, None]
    exact = (
        (F.softplus(logits, threshold=700) * (~positive & ~excluded)).sum(1),
        (F.softplus(-logits, threshold=700) * (positive & ~excluded)).sum(1),
    )
    inputs = [query, key, bias, scale]
    for backend in ("reference", "chunked", "auto"):
        got = fastcl.similarity_logistic(query, key, scale=scale, bias=bias, rule=rule, backend=backend)
        for x, y in zip(got, exact, strict=True):
            same(x, y)
        for x, y in zip(grads(got, inputs), grads(exact, inputs), strict=True):
            same(x, y)


def test_cross_entropy_with_soft_targets():
    query, key = rows(2 * N, 14).reshape(2, N, D), rows(M, 15)
    teacher, target_key, bias = rows(3 * N, 16).reshape(3, N, D), rows(M, 17), rows(M, 18)[:, 0]
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    unit = [F.normalize(x, dim=-1) for x in (query, key, teacher, target_key)]
    target = ((unit[2] @ unit[3].T) / 0.05 + bias).masked_fill(B, -torch.inf).softmax(-1).mean(0).detach()
    log_p = (unit[0] @ unit[1].T / temperature).masked_fill(B, -torch.inf).log_softmax(-1)
    exact = -(target * log_p.masked_fill(B, 0)).sum(-1)
    got = fastcl.soft_cross_entropy(
        query,
        key,
        teacher,
        target_key,
        temperature=temperature,
        target_bias=bias,
        rule=PairRule(exclude=B),
        reduction="none",
    )
    same(got, exact)
    inputs = [query, key, temperature]
    for x, y in zip(
        torch.autograd.grad(got.mean(), inputs), torch.autograd.grad(exact.mean(), inputs), strict=True
    ):
        same(x, y)
    assert not torch.autograd.grad(got.mean() * 0 + teacher.sum() * 0, teacher)[0].any()
    with pytest.raises(ValueError, match="target_bias"):
        fastcl.soft_cross_entropy(query, key, teacher, target_key, target_bias=bias[1:])
    with pytest.raises(ValueError, match="target_query"):
        fastcl.soft_cross_entropy(query, key, teacher[:, 1:], target_key)


@pytest.mark.parametrize("steps", [1, 3])
def test_targets_under_which_keys_are_used_equally(steps):
    query, key = rows(N, 19), rows(12, 20)
    bias = fastcl.sinkhorn(query, key, temperature=0.5, steps=steps)
    scores = (F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.5).detach()
    table = scores.exp().T  # SwAV's loop
    for _ in range(steps):
        table = table / table.sum(1, keepdim=True)
        table = table / table.sum(0, keepdim=True)
    same((scores + bias).softmax(1), table.T)
    assert not bias.requires_grad
    assert fastcl.sinkhorn(query * 1e6, key * 1e6, temperature=1e-4, normalize=False).isfinite().all()


def test_bad_pair_sets():
    query, key = rows(N, 21), rows(M, 22)
    bad = {
        "a bool mask, or a list of such, got a 2-dimensional tensor of torch.int32": {"positive": A.int()},
        r"shape \(30, 70\)": {"exclude": A[1:]},
        "from -1 to 69": {"exclude_keys": NAMED.masked_fill(NAMED == -1, 70)},
        "exclude_keys must be an int64": {"exclude_keys": NAMED.int()},
        "row per query": {"exclude_keys": NAMED[1:]},
        "rule.within": {"within": (ROW, KEY[1:])},
    }
    for message, options in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            fastcl.similarity_stats(query, key, rule=PairRule(**options))
    with pytest.raises(ValueError, match="below"):
        fastcl.similarity_topk(query, key, 3, below=torch.zeros(3))
    with pytest.raises(ValueError, match="among"):
        fastcl.similarity_topk(query, key, 3, among="some")
