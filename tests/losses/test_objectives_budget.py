"""Objectives without a grid of their own: in float32 and bfloat16 as near to float64 as plain PyTorch is."""

import pytest
import torch
import torch.nn.functional as F
from objective_checks import check, rows

import fastcl
from fastcl import testing

N, M, D = 33, 20, 12
LABELS = torch.arange(N) % 5
TARGETS = torch.stack([torch.arange(N) % M, torch.arange(N) * 7 % M], 1)
WEIGHTS = torch.tensor([0.75, 0.5]).expand(N, 2)
OWNER = torch.arange(N) % M


def _unit(x):
    return F.normalize(x, dim=-1)


def _squared(x, y):
    return (x[:, None] - y).square().sum(2)


def triplet(anchor, positive):
    x, y = _unit(anchor), _unit(positive)
    distances = _squared(x, y)
    nearest = (distances + 9 * torch.eye(N, dtype=x.dtype)).argmin(1)
    return (distances.diagonal() - distances.gather(1, nearest[:, None])[:, 0] + 0.3).clamp_min(0).mean()


def batch_hard(features):
    x = _unit(features)
    distances, same = _squared(x, x), LABELS[:, None] == LABELS
    farthest = distances.masked_fill(~same, -1).amax(1)
    nearest = distances.masked_fill(same, 9).amin(1)
    return (farthest - nearest + 0.3).clamp_min(0).mean()


def weighted(query, key):
    log_p = (_unit(query) @ _unit(key).T / 0.2).log_softmax(1)
    return -(WEIGHTS.to(log_p) * log_p.gather(1, TARGETS)).sum(1).mean()


def siglip(image, text):
    signs = 2 * torch.eye(N, dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (5 * _unit(image) @ _unit(text).T - 2)).sum(1).mean()


def nce(query, positive, noise):
    own = (_unit(query) * _unit(positive)).sum(1) / 0.2 - 1
    return (-F.logsigmoid(own) - F.logsigmoid(1 - _unit(query) @ _unit(noise).T / 0.2).sum(1)).mean()


def jensen_shannon(local, pooled):
    logits, owned = local @ pooled.T, OWNER[:, None] == torch.arange(M)
    return -F.logsigmoid(logits[owned]).mean() - F.logsigmoid(-logits[~owned]).mean()


# the objective, its formula, the rows of its inputs, and the size of its logits or distances
OBJECTIVES = {
    "triplet": (lambda a, p: fastcl.triplet_loss(a, p, margin=0.3, mining="hard"), triplet, (N, N), 4.0),
    "batch hard": (
        lambda x: fastcl.batch_hard_triplet_loss(x, LABELS, margin=0.3),
        batch_hard,
        (N,),
        4.0,
    ),
    "weighted": (lambda q, k: fastcl.weighted_info_nce(q, k, TARGETS, WEIGHTS), weighted, (N, M), 5.0),
    "siglip": (lambda a, b: fastcl.siglip_loss(a, b, 5.0, -2.0), siglip, (N, N), 7.0),
    "nce": (lambda q, p, n: fastcl.nce_loss(q, p, n, 0.2, log_z=1.0), nce, (N, N, M), 6.0),
    "jensen-shannon": (lambda x, y: fastcl.jsd_loss(x, y, OWNER), jensen_shannon, (N, M), 20.0),
}
KINDS = {"random": 1.0, "alike": 0.02}  # how far rows are from a common one


def inputs_of(name, kind):
    """Rows around a common one, one row apart from another's."""
    *_, counts, _ = OBJECTIVES[name]
    (centre,) = rows((D,), seed=5)
    spread = KINDS[kind]
    return [centre * (spread < 1) + spread * x for x in rows(*((count, D) for count in counts), seed=6)]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [testing.WIDEST, torch.float32, torch.bfloat16], ids=str)
def test_within_the_budget(name, kind, dtype):
    function, formula, _, logit = OBJECTIVES[name]
    check(function, formula, inputs_of(name, kind), dtype, logit=logit)
