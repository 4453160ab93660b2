"""InfoNCE with the batch's positives beside the given negatives, and on rows used as they are."""

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from objective_checks import check, check_compiled, check_derivatives, check_finite, objective, rows

import fastcl
from fastcl import testing

in_float64 = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")
_THREE = ((6, 4), (6, 4), (5, 4))
objective("in batch", lambda x, y, z, *t: fastcl.info_nce(x, y, z, *t, in_batch=True), *_THREE)
objective("as they are", lambda x, y, z, *t: fastcl.info_nce(x, y, z, *t, normalize=False), *_THREE)
KEYS = {"unpaired": (5, 4), "paired": (6, 3, 4)}
every_mode = pytest.mark.parametrize("mode", KEYS)
every_option = pytest.mark.parametrize(
    "options",
    [{"in_batch": True}, {"normalize": False}, {"in_batch": True, "normalize": False}],
    ids=str,
)


def formula(query, positive, negatives, temperature=0.1, *, in_batch=False, normalize=True, reduction="mean"):
    """Cross-entropy of the positive among itself, the negatives and the other queries' positives."""
    if normalize:
        query, positive, negatives = (F.normalize(x, dim=-1) for x in (query, positive, negatives))
    others = (query[:, None] @ negatives.mT).squeeze(1) if negatives.dim() == 3 else query @ negatives.T
    if in_batch:
        logits, targets = torch.cat([query @ positive.T, others], dim=1), torch.arange(len(query))
    else:
        logits = torch.cat([(query * positive).sum(1, keepdim=True), others], dim=1)
        targets = torch.zeros(len(query), dtype=torch.int64)
    return F.cross_entropy(logits / temperature, targets, reduction=reduction)


@in_float64
@every_mode
@every_option
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("per_row", [False, True])
def test_is_the_formula(backend, mode, options, reduction, per_row):
    temperature = torch.full((6, 1), 0.7, dtype=torch.float64) if per_row else torch.tensor(0.7).double()
    inputs = [*rows((6, 4), (6, 4), KEYS[mode]), temperature]
    check(
        lambda *x: fastcl.info_nce(*x, negative_mode=mode, reduction=reduction, **options),
        lambda *x: formula(*x, reduction=reduction, **options),
        inputs,
    )


@every_option
@pytest.mark.parametrize("kind", ["random", "peaked", "collapsed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_within_the_budget(backend, options, kind, dtype):
    case = testing.make_case(kind, (65, 63, 40), seed=3)
    inputs = [case.query, case.positive, case.key]
    if "normalize" in options:
        inputs = [F.normalize(x, dim=1) for x in inputs]
    check(lambda *x: fastcl.info_nce(*x, **options), lambda *x: formula(*x, **options), inputs, dtype)


@in_float64
@every_option
def test_on_a_queue(backend, options):
    queue = fastcl.NegativeQueue(7, 4)
    unit = partial(F.normalize, dim=1) if options.get("normalize", True) else torch.clone
    check(
        lambda *x: fastcl.info_nce(*x, queue, **options),
        lambda *x: formula(*map(unit, x), queue.keys.double(), **{**options, "normalize": False}),
        [x / 3 for x in rows((6, 4), (6, 4))],
    )


@in_float64
def test_queue_entries_are_excluded_by_id_and_the_batch_stays(backend):
    queue = fastcl.NegativeQueue(3, 4, with_ids=True)
    queue.enqueue(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    query, positive = rows((6, 4), (6, 4))
    ids = torch.zeros(6, dtype=torch.int64)
    got = fastcl.info_nce(query, positive, queue, query_ids=ids, in_batch=True)
    torch.testing.assert_close(got, formula(query, positive, queue.keys[1:].double(), in_batch=True))


def test_without_negatives_the_batch_is_all_there_is():
    query, positive = torch.randn(2, 6, 4)
    assert torch.equal(fastcl.info_nce(query, positive, in_batch=True), fastcl.info_nce(query, positive))


@every_mode
@every_option
def test_one_row_and_no_keys(backend, mode, options):
    shapes = {"unpaired": (0, 4), "paired": (1, 0, 4)}
    inputs = rows((1, 4), (1, 4), shapes[mode])
    assert check_finite(lambda *x: fastcl.info_nce(*x, negative_mode=mode, **options), inputs) == 0


@in_float64
@every_mode
@every_option
def test_derivatives(mode, options):
    inputs = rows((6, 4), (6, 4), KEYS[mode])
    check_derivatives(
        lambda *x: fastcl.info_nce(*x, 0.5, negative_mode=mode, **options),
        lambda *x: formula(*x, 0.5, **options),
        inputs,
    )


@every_mode
@every_option
def test_compiles(mode, options):
    inputs = rows((6, 4), (6, 4), KEYS[mode])
    check_compiled(lambda *x: fastcl.info_nce(*x, negative_mode=mode, **options), inputs)


@every_option
def test_module_is_the_function(options):
    inputs = [x.float() for x in rows((6, 4), (6, 4), (5, 4))]
    assert torch.equal(fastcl.InfoNCE(0.3, **options)(*inputs), fastcl.info_nce(*inputs, 0.3, **options))


@pytest.mark.parametrize("function", [fastcl.info_nce, fastcl.InfoNCE])
def test_options_go_by_keyword(function):
    parameters = inspect.signature(function).parameters
    for name, default in (("normalize", True), ("in_batch", False)):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is default
