"""Every public call as one dense float64 matrix, written from the formulas; and how far rounding may move it.

No code of fastcl. The losses with one positive are ``log(1 + sum exp(l_neg - l_pos))``, which float64
holds on converged pairs too.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

NORM_EPS = 1e-12


class Block(NamedTuple):
    """Logits ``factor * <left_i, right_j>`` of one kind, and whose gradients they reach.

    ``terms``: the sizes of what is added up to each logit's gradient; None where nothing cancels there.
    ``left`` and ``right`` take what rounding may do to each row and say which inputs' rows those are.
    """

    logits: torch.Tensor  # (n, m)
    factor: torch.Tensor  # broadcasts to (n, m), positive
    left_norms: torch.Tensor  # (n,)
    right_norms: torch.Tensor  # (m,), or (n, m) where each row has its own keys
    left: object
    right: object
    terms: torch.Tensor | None = None
    offset: torch.Tensor | float = 0.0  # sizes of what is added to the logits
    columns: bool = False  # whether exponentials are summed along columns too


class Exact(NamedTuple):
    outputs: tuple  # differentiable
    blocks: tuple
    rows: tuple = ()  # of a loss: its rows before the reduction, and the weight of each


def norms(x):
    return x.detach().norm(dim=-1)


def unit(x, normalize=True):
    """A zero row stays zero, and its gradient is zero, as fastcl defines it."""
    if not normalize:
        return x
    zero = (x == 0).all(dim=-1, keepdim=True)
    return (x / x.norm(dim=-1, keepdim=True).clamp_min(NORM_EPS)).masked_fill(zero, 0.0)


def product(a, b):
    """``a @ b.T`` by blocks of components: float64's own error must not show where float64 is tested."""
    return sum(x @ y.T for x, y in zip(a.split(256, 1), b.split(256, 1), strict=True))


def lse(logits, mask):
    empty = ~mask.any(dim=1)
    kept = logits.masked_fill(~mask, -torch.inf).masked_fill(empty[:, None], 0.0)
    if not kept.shape[1]:
        return logits.new_full(empty.shape, -torch.inf)
    return kept.logsumexp(dim=1).masked_fill(empty, -torch.inf)


def weights_like(x):
    """The weight of each element of an output, as fastcl.testing.value_and_grads gives it."""
    return 1 + 0.5 * (torch.arange(x.numel()) % 3).reshape(x.shape).double()


def reduced(rows, reduction):
    """The loss, and the weight with which each row comes into what is differentiated."""
    if reduction == "none":
        return rows, weights_like(rows)
    loss = rows.sum() if reduction == "sum" else rows.mean()
    return loss, torch.full_like(rows, 1.0 if reduction == "sum" else 1.0 / max(len(rows), 1)).detach()


def _only(name):
    return lambda floor: {name: floor}


def _nothing(floor):
    return {}


def _one_positive(positive, negative, mask, reduction, blocks):
    rows = torch.logaddexp(lse(negative, mask) - positive, torch.zeros_like(positive))
    loss, weights = reduced(rows, reduction)
    return Exact((loss,), tuple(blocks), (rows.detach(), weights))


def info_nce(x, o):
    s = 1 / x["temperature"]
    size = s.detach().abs()
    q, p = unit(x["query"]), unit(x["positive_key"])
    qn, pn = norms(q), norms(p)
    if o["form"] == "batch":
        logits = product(q, p) * s
        mask = ~torch.eye(len(q), dtype=torch.bool)
        block = Block(logits, size, qn, pn, _only("query"), _only("positive_key"))
        return _one_positive(logits.diagonal(), logits, mask, o["reduction"], [block])
    positive = (q * p).sum(1, keepdim=True) * s
    blocks = [Block(positive, size, qn, pn[:, None], _only("query"), _only("positive_key"))]
    if o["form"] == "paired":
        k = unit(x["negative_keys"])
        negative = (q[:, None] * k).sum(2) * s
    else:
        k = x["keys"] if o["form"] == "queue" else unit(x["negative_keys"])
        negative = product(q, k) * s
    mask = torch.ones_like(negative, dtype=torch.bool)
    if o.get("query_ids") is not None:
        mask = o["query_ids"][:, None] != o["key_ids"]
    blocks.append(Block(negative, size, qn, norms(k), _only("query"), _only("negative_keys")))
    return _one_positive(positive[:, 0], negative, mask, o["reduction"], blocks)


def nt_xent(x, o):
    s = 1 / x["temperature"]
    z = unit(torch.cat([x["z1"], x["z2"]]))
    n = len(z) // 2
    logits = product(z, z) * s
    rows = torch.arange(2 * n)
    other = rows.roll(n)
    mask = (rows[:, None] != rows) & (other[:, None] != rows)

    def place(floor):
        return {"z1": floor[:n], "z2": floor[n:]}

    block = Block(logits, s.detach().abs(), norms(z), norms(z), place, place)
    return _one_positive(logits[rows, other], logits, mask, o["reduction"], [block])


def clip_loss(x, o):
    s = x["logit_scale"]
    a, b = (unit(x[name], o["normalize"]) for name in ("image_features", "text_features"))
    logits = product(a, b) * s
    mask = ~torch.eye(len(a), dtype=torch.bool)
    both = [
        torch.logaddexp(lse(table, mask) - table.diagonal(), torch.zeros_like(table.diagonal()))
        for table in (logits, logits.T)
    ]
    rows = (both[0] + both[1]) / 2
    loss, weights = reduced(rows, o["reduction"])
    sides = _only("image_features"), _only("text_features")
    block = Block(logits, s.detach().abs(), norms(a), norms(b), *sides, columns=True)
    return Exact((loss,), (block,), (rows.detach(), weights))


def sup_con(x, o):
    s = 1 / x["temperature"]
    f = x["features"][:, None] if x["features"].dim() == 2 else x["features"]
    samples, views, _ = f.shape
    z = unit(f.transpose(0, 1).flatten(0, 1), o["normalize"])
    count = len(z) if o["contrast_mode"] == "all" else samples
    logits = product(z[:count], z) * s
    sample = torch.arange(samples).repeat(views)
    if o["mask"] is not None:
        table = o["mask"].bool()
    else:
        labels = torch.arange(samples) if o["labels"] is None else o["labels"]
        table = labels[:, None] == labels
    others = torch.arange(count)[:, None] != torch.arange(len(z))
    positive = table[sample[:count]][:, sample] & others
    n = positive.sum(1).to(z.dtype)
    whole = lse(logits, others)
    if o["variant"] == "out":
        of_positives = (logits * positive).sum(1) / n.clamp_min(1)
        share = positive / n.clamp_min(1)[:, None]
    else:
        of_positives = lse(logits, positive) - n.clamp_min(1).log()
        share = (logits - lse(logits, positive)[:, None]).masked_fill(~positive, -torch.inf).exp()
    live = n > 0
    rows = torch.where(live, whole.masked_fill(~live, 0) - of_positives.masked_fill(~live, 0), 0.0)
    if o["base_temperature"] is not None:
        rows = rows * x["temperature"] / o["base_temperature"]
    loss, weights = reduced(rows, o["reduction"])
    softmax = (logits - whole[:, None]).masked_fill(~others | ~live[:, None], -torch.inf).exp()
    by = 1.0 if o["base_temperature"] is None else (x["temperature"] / o["base_temperature"]).detach().abs()
    terms = (weights * by)[:, None] * (softmax + share.nan_to_num()).detach()

    def right(floor):
        floor = floor.reshape(views, samples).T
        return {"features": floor[:, 0] if x["features"].dim() == 2 else floor}

    def left(floor):
        return right(F.pad(floor, (0, len(z) - count)))

    zn = norms(z)
    block = Block(logits, s.detach().abs(), zn[:count], zn, left, right, terms)
    return Exact((loss,), (block,), (rows.detach(), weights))


def mochi_loss(x, o):
    """Kalantidis et al., section 3; None where rounding may decide which keys are the hardest."""
    s = 1 / x["temperature"]
    q, p, keys = unit(x["query"]), unit(x["positive_key"]), x["keys"]
    similarity = product(q, keys)
    if o["order"] is None:
        o["order"] = similarity.detach().argsort(dim=1, descending=True, stable=True)
    order = o["order"]
    ranked = similarity.detach().gather(1, order)
    gaps = (ranked[:, :-1] - ranked[:, 1:]).abs()
    same = (keys[order[:, :-1]] == keys[order[:, 1:]]).all(2)
    if q.dtype == torch.float64 and ((gaps < 1e-5) & ~same).any():
        return None
    first, second, alpha, partner, beta = o["draws"]

    def hard(ranks):
        return keys[order.gather(1, ranks)]

    alpha, beta = alpha.to(q.dtype)[:, :, None], beta.to(q.dtype)[:, :, None]
    mixed = alpha * hard(first) + (1 - alpha) * hard(second)
    with_query = beta * q.detach()[:, None] + (1 - beta) * hard(partner)
    formed = torch.cat([mixed, with_query], 1)
    if q.dtype == torch.float64 and (formed.norm(dim=2) < 1e-3).any():
        return None  # opposite keys that all but cancel: their direction is rounding
    synthetic = unit(formed)
    positive = (q * p).sum(1, keepdim=True) * s
    negative = similarity * s
    mixes = (synthetic @ q[:, :, None]).squeeze(2) * s
    size, qn, pn = s.detach().abs(), norms(q), norms(p)
    blocks = [
        Block(positive, size, qn, pn[:, None], _only("query"), _only("positive_key")),
        Block(negative, size, qn, norms(keys), _only("query"), _nothing),
        Block(mixes, size, qn, norms(synthetic), _only("query"), _nothing),
    ]
    every = torch.cat([negative, mixes], 1)
    mask = torch.ones_like(every, dtype=torch.bool)
    return _one_positive(positive[:, 0], every, mask, o["reduction"], blocks)


STATISTICS = ("lse_neg", "lse_pos", "pos_sum", "pos_count", "max_neg")


def similarity_stats(x, o):
    """The outputs are the STATISTICS of the rows and then of the columns."""
    q = unit(x["query"], o["normalize"])
    k = q if "key" not in x else unit(x["key"], o["normalize"])
    factor = x["scale"] * x.get("key_scale", torch.ones(len(k), dtype=torch.float64))
    logits = product(q, k) * factor + x.get("key_bias", 0.0)
    excluded, positive = (
        torch.zeros(len(q), len(k), dtype=torch.bool) if ids is None else ids[0][:, None] == ids[1]
        for ids in (o["exclude"], o["positive"])
    )
    outputs, terms = [], torch.zeros_like(logits).detach()
    tables = logits, positive & ~excluded, ~positive & ~excluded
    for transposed in (False, True)[: 1 + o["columns"]]:
        t, pos, neg = (y.T if transposed else y for y in tables)
        lse_neg, lse_pos, pos_sum = lse(t, neg), lse(t, pos), (t * pos).sum(1)
        largest = F.pad(t.detach().masked_fill(~neg, -torch.inf), (0, 1), value=-torch.inf).amax(1)
        outputs += [lse_neg, lse_pos, pos_sum, pos.sum(1).double(), largest]
        with torch.no_grad():
            part = (t - lse_neg[:, None]).masked_fill(~neg, -torch.inf).exp()
            part = part + (t - lse_pos[:, None]).masked_fill(~pos, -torch.inf).exp() + pos
            part = weights_like(lse_neg)[:, None] * part
            terms = terms + (part.T if transposed else part)
    bias = x["key_bias"].detach().abs() if "key_bias" in x else 0.0
    sides = _only("query"), _only("query" if "key" not in x else "key")
    size = factor.detach().abs()
    block = Block(logits, size, norms(q), norms(k), *sides, terms, bias, o["columns"])
    return Exact(tuple(outputs), (block,))
