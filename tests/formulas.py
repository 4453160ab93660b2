"""The losses as their papers state them, row by row: no rules, no statistics, no code of fastcl."""

import math

import torch


def _unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _reduce(losses, reduction):
    losses = torch.stack(losses)
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


def info_nce(query, positive, negatives=None, *, temperature, reduction="mean", negative_mode=None):
    """CPC eq. 4, MoCo eq. 1: -log of exp(q.k+ / t) over the sum of exp(q.k / t), k+ included.

    ``negatives`` (M, D) serve all queries, (N, M, D) one query each, as the mode would say; None: the
    other positives.
    """
    q, p = _unit(query), _unit(positive)
    losses = []
    for i in range(len(q)):
        if negatives is None:
            keys = torch.cat([p[:i], p[i + 1 :]])
        else:
            keys = _unit(negatives if negatives.dim() == 2 else negatives[i])
        positive_logit = q[i] @ p[i] / temperature
        losses.append(
            torch.cat([positive_logit[None], keys @ q[i] / temperature]).logsumexp(0) - positive_logit
        )
    return _reduce(losses, reduction)


def nt_xent(z1, z2, *, temperature, reduction="mean"):
    """SimCLR eq. 1: l(i, j) = -log of exp(sim(i, j) / t) over the sum of exp(sim(i, k) / t), k != i."""
    z = _unit(torch.cat([z1, z2]))
    losses = []
    for i in range(len(z)):
        j = (i + len(z1)) % len(z)
        others = torch.arange(len(z)) != i
        logits = z @ z[i] / temperature
        losses.append(logits[others].logsumexp(0) - logits[j])
    return _reduce(losses, reduction)


def clip_loss(image, text, *, logit_scale, normalize=True, reduction="mean"):
    """CLIP figure 3: the mean of the cross-entropies along both axes of the scaled cosines."""
    if normalize:
        image, text = _unit(image), _unit(text)
    logits = logit_scale * (image @ text.T)
    by_image = logits.logsumexp(1) - logits.diagonal()
    by_text = logits.logsumexp(0) - logits.diagonal()
    return _reduce(list((by_image + by_text) / 2), reduction)


def sup_con(
    features,
    labels=None,
    mask=None,
    *,
    temperature,
    base_temperature=None,
    contrast_mode="all",
    variant="out",
    normalize=True,
    reduction="mean",
):
    """SupCon eq. 2 ('out') and eq. 3 ('in'); P(i): positives of i but i, A(i): all but i.

    Anchors are view-major. An anchor without positives contributes 0. Eq. 2 and 3 sum over anchors;
    the reference code, which this follows, takes their mean, times t / base_temperature.
    """
    if features.dim() == 2:
        features = features[:, None]
    samples, views, _ = features.shape
    z = torch.cat([features[:, v] for v in range(views)])
    if normalize:
        z = _unit(z)
    if mask is None:
        classes = torch.arange(samples) if labels is None else labels
        mask = torch.stack([classes == c for c in classes])
    sample = torch.arange(samples).repeat(views)
    losses = []
    for i in range(len(z) if contrast_mode == "all" else samples):
        others = torch.arange(len(z)) != i
        positives = others & mask[sample[i]].bool()[sample]
        logits = z @ z[i] / temperature
        if not positives.any():
            losses.append(0.0 * logits.sum())
            continue
        log_prob = logits[positives] - logits[others].logsumexp(0)
        if variant == "out":
            losses.append(-log_prob.sum() / len(log_prob))
        else:
            losses.append(math.log(len(log_prob)) - log_prob.logsumexp(0))
    loss = _reduce(losses, reduction)
    return loss if base_temperature is None else loss * temperature / base_temperature
