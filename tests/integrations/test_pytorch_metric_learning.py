"""pytorch-metric-learning's losses: with labels, miners, references, and inside its wrappers."""

import pytest
import torch
import torch.distributed as dist
from peer_checks import assert_fused, assert_not_fused, assert_same, assert_same_signature
from processes import on_every_rank

pytest.importorskip("fastcl.integrations.pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from fastcl.integrations import pytorch_metric_learning as ours

NAMES = "NTXentLoss", "SupConLoss"
LABELS = torch.tensor([0, 0, 1, 1, 1, -2, 3, -2])  # one sample is alone
REF_LABELS = torch.tensor([1, 0, 3, 3, 7])


def rows(*counts, dtype=torch.float64):
    return [torch.randn(count, 5, dtype=dtype) for count in counts]


def pair(name, **options):
    return [getattr(module, name)(**options) for module in (ours, losses)]


def called(pair, *args, **kwargs):
    return [lambda x, *ref, f=f: f(x, *args, *ref, **kwargs) for f in pair]


@pytest.mark.parametrize("name", NAMES)
def test_names_signatures_and_defaults(name):
    assert_same_signature(getattr(ours, name), getattr(losses, name), "forward", "compute_loss")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"distance": distances.DotProductSimilarity()},
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False), "temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_labels(name, options, dtype):
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    both = pair(name, **options)
    assert_same(*called(both, LABELS), rows(8, dtype=dtype), rtol)
    assert_fused(called(both, LABELS)[0], rows(8), below=8 * 8 * 5)


@pytest.mark.parametrize("name", NAMES)
def test_references(name):
    both = pair(name)
    x, ref = rows(8, 5)
    with_ref = [lambda a, b, f=f: f(a, LABELS, None, b, REF_LABELS) for f in both]
    assert_same(*with_ref, [x, ref])
    assert_fused(with_ref[0], [x, ref], below=8 * 8 * 5)
    own_labels = [lambda a, b, f=f: f(a, LABELS, None, b, LABELS) for f in both]  # the very same tensor
    assert_same(*own_labels, rows(8, 8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("labels", "ref_labels"),
    [
        ([0, 0, 0], None),  # no negatives
        ([0, 1, 2], None),  # no positives
        ([0], [0, 1]),  # one pair of either
        ([0, 0, 1], [0, 0, 0]),  # an anchor without positives, others without negatives
    ],
)
def test_what_lacks_pairs_has_no_loss(name, labels, ref_labels):
    labels = torch.tensor(labels)
    ref_labels = labels if ref_labels is None else torch.tensor(ref_labels)
    calls = [lambda a, b, f=f: f(a, labels, None, b, ref_labels) for f in pair(name)]
    assert_same(*calls, rows(len(labels), len(ref_labels)))


@pytest.mark.parametrize("name", NAMES)
def test_miners(name):
    both, (x,) = pair(name), rows(8)
    mined = miners.MultiSimilarityMiner(epsilon=0.5)(x, LABELS)
    assert 0 < len(mined[0]) < 12
    calls = called(both, LABELS, mined)
    assert_same(*calls, [x])
    assert_fused(calls[0], [x], below=8 * 8 * 5)
    assert_same(*called(both, None, mined), [x])
    triplets = miners.TripletMarginMiner(margin=0.5, type_of_triplets="all")(x, LABELS)
    assert len(triplets) == 3
    assert_same(*called(both, LABELS, triplets), [x])
    assert_not_fused(called(both, LABELS, triplets)[0], [x])  # each counts as often as it is listed


@pytest.mark.parametrize("name", NAMES)
def test_cross_batch_memory(name):
    memories = [losses.CrossBatchMemory(f, embedding_size=5, memory_size=20) for f in pair(name)]
    for _ in range(4):
        x = rows(8)
        grads = []
        for memory in memories:
            leaf = x[0].clone().requires_grad_()
            loss = memory(leaf, LABELS)
            loss.backward()
            grads.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(*(memory.embedding_memory for memory in memories))


@pytest.mark.parametrize("name", NAMES)
def test_the_self_supervised_wrapper(name):
    assert_same(*(losses.SelfSupervisedLoss(f) for f in pair(name)), rows(8, 8))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("NTXentLoss", {"distance": distances.LpDistance()}),
        ("SupConLoss", {"distance": distances.LpDistance()}),
        ("SupConLoss", {"distance": distances.CosineSimilarity(power=3)}),
        ("NTXentLoss", {"reducer": reducers.ThresholdReducer(low=1.0)}),
        ("NTXentLoss", {"embedding_regularizer": regularizers.LpRegularizer()}),
    ],
)
def test_what_is_not_fused_is_the_originals(name, options):
    calls = called(pair(name, **options), LABELS)
    assert_same(*calls, rows(8))
    assert_not_fused(calls[0], rows(8))


@pytest.mark.parametrize(
    "options",
    [
        {"reducer": reducers.MeanReducer()},
        {"reducer": reducers.PerAnchorReducer()},
        {"embedding_regularizer": regularizers.LpRegularizer()},
    ],
    ids=str,
)
def test_any_reducer_and_regularizer_of_supcon(options):
    calls = called(pair("SupConLoss", **options), LABELS)
    assert_same(*calls, rows(8))
    assert_fused(calls[0], rows(8), below=8 * 8 * 5)


def test_labels_that_are_no_integers_are_the_originals():
    assert_same(*called(pair("NTXentLoss"), LABELS + 0.5), rows(8))


def test_the_default_form_is_fused():
    labels = torch.arange(32).repeat(2)
    for name in NAMES:
        assert_fused(called(pair(name), labels)[0], rows(64, dtype=torch.float32), below=64 * 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_losss_dtype_is_the_originals(dtype):
    for name in NAMES:
        got, exact = (f(rows(8, dtype=dtype)[0], LABELS) for f in pair(name))
        assert got.dtype == exact.dtype == dtype


def test_labels_or_pairs_are_needed():
    with pytest.raises(ValueError, match="labels"):
        ours.NTXentLoss()(*rows(8))


def check_distributed_wrapper(group):
    torch.manual_seed(dist.get_rank(group))
    for name in NAMES:
        for efficient in (False, True):
            calls = called((DistributedLossWrapper(f, efficient) for f in pair(name)), LABELS)
            assert_same(*calls, rows(8))


def test_over_ranks_the_distributed_wrapper_takes_it(tmp_path):
    on_every_rank([check_distributed_wrapper], 2, tmp_path)
