"""similarity_topk is the head of a stable descending sort of the whole matrix."""

import pytest
import torch
import torch.nn.functional as F

import fastcl
from fastcl import PairRule, testing


def dense_topk(query, key, k, excluded=None):
    """Values and indices; missing candidates are -inf and -1."""
    similarity = query.double() @ key.double().T
    if excluded is not None:
        similarity = similarity.masked_fill(excluded, -torch.inf)
    similarity = F.pad(similarity, (0, k), value=-torch.inf)
    values, indices = similarity.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k]
    return values, torch.where(values == -torch.inf, -1, indices)


def integers(rows, width, seed, largest=2):
    """Small integers: every product is exact in every dtype, and many tie."""
    generator = testing.generator(seed)
    return torch.randint(-largest, largest + 1, (rows, width), generator=generator).to(testing.WIDEST)


def check(query, key, k, dtype=torch.float32, rule=PairRule()):  # noqa: B008
    excluded = None if rule.exclude is None else rule.exclude[0][:, None] == rule.exclude[1]
    values, indices = fastcl.similarity_topk(query.to(dtype), key.to(dtype), k, rule=rule)
    expected_values, expected_indices = dense_topk(query, key, k, excluded)
    assert values.tolist() == expected_values.tolist()
    assert indices.tolist() == expected_indices.tolist()


@pytest.mark.parametrize("k", [1, 2, 7, 64, 507, 600])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_order_and_ties(k, dtype, backend):
    check(integers(25, 6, 0), integers(507, 6, 1), k, dtype)


@pytest.mark.skipif(testing.INTERPRETED, reason="Triton's kernels take no bounds")
@pytest.mark.parametrize("largest", [True, False])
def test_a_bound_leaves_out_what_is_equal_to_it(largest, backend):
    query, key = integers(25, 6, 0), integers(60, 6, 1)
    similarity, nothing = query @ key.T, -torch.inf if largest else torch.inf
    below = similarity.median(1).values  # of the row, so that one is equal to it
    expected = similarity.masked_fill(similarity >= below[:, None], nothing)
    expected, order = expected.sort(dim=1, descending=largest, stable=True)
    values, indices = fastcl.similarity_topk(query, key, 60, largest=largest, below=below)
    assert torch.equal(values, expected)
    assert torch.equal(indices, order.masked_fill(expected == nothing, -1))


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_shapes(shape, backend):
    n, m, d = shape
    for k in (1, 3, m):
        check(integers(n, d, 2), integers(m, d, 3), k)


@pytest.mark.parametrize("k", [1, 100, 1024, 2048])
def test_large_k(k, backend):
    check(integers(3, 8, 4), integers(3000, 8, 5), k)


def test_all_keys_equal_come_in_order(backend):
    _, indices = fastcl.similarity_topk(torch.ones(2, 3), torch.ones(3000, 3), 2048)
    assert indices.tolist() == [list(range(2048))] * 2


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_sorted_keys(order, backend):
    key = torch.arange(3000.0)[:, None]
    check(torch.ones(2, 1), key if order == "rising" else key.flip(0), 500)


@pytest.mark.parametrize("k", [1, 5, 40, 60])
def test_excluded_keys_are_not_candidates(k, backend):
    ids = torch.tensor([-1, 3, 3 + (1 << 32), 9])
    rule = PairRule(exclude=(ids[torch.arange(10) % 4], ids[torch.arange(45) * 7 % 4]))
    check(integers(10, 5, 6), integers(45, 5, 7), k, rule=rule)


def test_positive_ids_do_not_matter(backend):
    query, key = integers(4, 5, 8), integers(9, 5, 9)
    rule = PairRule(positive=(torch.zeros(4, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)))
    got, expected = (fastcl.similarity_topk(query, key, 3, rule=r) for r in (rule, PairRule()))
    torch.testing.assert_close(got, expected)


def test_missing_candidates_are_padded(backend):
    query, key = torch.ones(3, 2), torch.ones(2, 2)
    rule = PairRule(exclude=(torch.tensor([0, 1, 5]), torch.tensor([0, 0])))
    values, indices = fastcl.similarity_topk(query, key, 4, rule=rule)
    inf = -torch.inf
    assert values.tolist() == [[inf] * 4, [2, 2, inf, inf], [2, 2, inf, inf]]
    assert indices.tolist() == [[-1] * 4, [0, 1, -1, -1], [0, 1, -1, -1]]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty(shape, backend):
    values, indices = fastcl.similarity_topk(torch.ones(shape[0], 3), torch.ones(shape[1], 3), 2)
    assert values.shape == indices.shape == (shape[0], 2)
    assert (values == (3.0 if shape[1] else -torch.inf)).all()
    assert shape[1] or (indices == -1).all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_random_rows(dtype, normalize, backend):
    case = testing.make_case("random", (64, 300, 33))
    query, key = case.query.to(dtype), case.key.to(dtype)
    values, indices = fastcl.similarity_topk(query, key, 20, normalize=normalize)

    def matrix(q, k):
        return (F.normalize(q, dim=1) @ F.normalize(k, dim=1).T) if normalize else q @ k.T

    exact, dense = matrix(query.double(), key.double()), matrix(query, key)
    largest = exact.abs().max().item()
    testing.assert_within_budget(
        values, exact.sort(1, True)[0][:, :20], dense.sort(1, True)[0][:, :20], unit=largest
    )
    picked = exact.gather(1, indices)
    testing.assert_within_budget(values, picked, dense.gather(1, indices).to(dense), unit=largest)
    assert (values.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == 20 for row in indices.tolist())


def test_layouts(backend):
    query, key = integers(9, 6, 10), integers(40, 6, 11)
    got = fastcl.similarity_topk(query.T.contiguous().T, torch.cat([key, key], 1)[:, :6], 5)
    torch.testing.assert_close(got, dense_topk(query, key, 5), check_dtype=False)


def test_no_gradient(backend):
    query, key = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    values, indices = fastcl.similarity_topk(query, key, 2)
    assert not values.requires_grad
    assert not indices.requires_grad


def test_a_key_of_nan_comes_first_among_many(backend):
    query, key = integers(3, 8, 14).float(), integers(3000, 8, 15).float()
    others, _ = fastcl.similarity_topk(query, key, 7)
    key[85] = torch.nan
    values, indices = fastcl.similarity_topk(query, key, 7)
    assert values[:, 0].isnan().all()
    assert (indices[:, 0] == 85).all()
    assert (values[:, 1:] >= others[:, 1:]).all()


def test_nan_neither_hangs_nor_crashes_and_spoils_its_own_row_only(backend):
    query, key = integers(6, 4, 12).float(), integers(30, 4, 13).float()
    expected = fastcl.similarity_topk(query, key, 5)
    query[2, 1] = torch.nan
    got = fastcl.similarity_topk(query, key, 5)
    others = torch.tensor([0, 1, 3, 4, 5])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a[others], b[others])
