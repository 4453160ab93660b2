"""Each method's page: its code is run, and is the paper's formula, values and gradients."""

import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcl
from fastcl import testing

PAGES = {page.stem: page for page in (Path(__file__).parents[2] / "docs" / "methods").glob("*.md")}
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
N, D = 7, 5
LABELS = torch.tensor([2, 0, 1, 1, 0, 3, 4])


class Recipe(NamedTuple):
    """``formula`` and ``call``: of ``count`` (N, D) tensors; ``call`` gets the page's function first."""

    formula: Callable
    call: Callable = lambda loss, *tensors: loss(*tensors)
    count: int = 2


def queue(with_ids=True):
    made = fastcl.NegativeQueue(11, D, with_ids=with_ids)
    made.keys.copy_(F.normalize(torch.randn(11, D, generator=testing.generator(7)), dim=1))
    if with_ids:
        made.ids.copy_(torch.arange(11) % 6 - 1)
    return made


def cosines(x, y):
    return (x / x.norm(dim=1, keepdim=True)) @ (y / y.norm(dim=1, keepdim=True)).T


def cross_entropy(logits, target=None):
    """The mean of ``-log softmax`` at ``target``, by default the diagonal."""
    target = torch.arange(len(logits)) if target is None else target
    return -(logits.exp() / logits.exp().sum(1, keepdim=True))[torch.arange(len(logits)), target].log().mean()


def others(table):
    return ~torch.eye(len(table), dtype=torch.bool)


def cmc(*views):
    total = 0
    for a, b in combinations(views, 2):
        total = total + cross_entropy(cosines(a, b) / 0.07) + cross_entropy(cosines(b, a) / 0.07)
    return total


def pirl(image, patches, memory):
    bank = queue()
    total = 0
    for query in (patches, image):
        own = (cosines(query, memory).diag() / 0.07).exp()
        # the queue's rows are used as they are stored
        rest = (F.normalize(query) @ bank.keys.double().T / 0.07).exp() * (LABELS[:, None] != bank.ids)
        total = total - 0.5 * (own / (own + rest.sum(1))).log().mean()
    return total


def graphcl(z1, z2):
    table = (cosines(z1, z2) / 0.5).exp()
    return -(table.diag() / (table * others(table)).sum(1)).log().mean()


def invaspread(z, augmented):
    taken = (cosines(z, z) / 0.1).exp()
    probability = taken / taken.sum(0)  # of image i, given image j
    spread = -(1 - probability)[others(taken)].log().sum() / len(z)
    return cross_entropy(cosines(augmented, z) / 0.1) + spread


def moco_v3(q1, q2, k1, k2):
    k1, k2 = k1.detach(), k2.detach()
    return 0.4 * (cross_entropy(cosines(q1, k2) / 0.2) + cross_entropy(cosines(q2, k1) / 0.2))


def simcse(premise, entailment, contradiction):
    return cross_entropy(torch.cat([cosines(premise, entailment), cosines(premise, contradiction)], 1) / 0.05)


def n_pair(anchor, positive):
    each = []
    for i in range(len(anchor)):
        apart = [anchor[i] @ positive[j] - anchor[i] @ positive[i] for j in range(len(anchor)) if j != i]
        each.append((1 + torch.stack(apart).exp().sum()).log())
    lengths = anchor.norm(dim=1) ** 2 + positive.norm(dim=1) ** 2
    return torch.stack(each).mean() + 0.002 * lengths.mean()


def simsiam(p1, p2, z1, z2):
    return -(cosines(p1, z2.detach()).diag().mean() + cosines(p2, z1.detach()).diag().mean()) / 2


def maps():
    torch.manual_seed(3)
    return [nn.Linear(D, D, bias=False).double() for _ in range(2)]


def sequences(x):
    """(2, 7, D): a batch of two sequences of seven times."""
    return torch.stack([x, x.flip(0) * 0.7 + 0.1])


def cpc(context, latents):
    context, latents = sequences(context), sequences(latents)
    each = []
    for k, step in enumerate(maps(), 1):
        predicted = torch.cat([row[:-k] @ step.weight.T for row in context])
        each.append(cross_entropy(predicted @ torch.cat([row[k:] for row in latents]).T))
    return sum(each) / len(each)


def cross_batch_memory(z):
    past = queue()
    keys, key_labels = torch.cat([z, past.keys.double()]), torch.cat([LABELS, past.ids])
    logits, losses = cosines(z, keys) / 0.1, []
    for i in range(len(z)):
        takes_part = torch.arange(len(keys)) != i
        positive = takes_part & (key_labels == LABELS[i])
        log_probability = logits[i] - logits[i][takes_part].exp().sum().log()
        losses.append(-log_probability[positive].mean() if positive.any() else 0 * logits[i].sum())
    return torch.stack(losses).mean()


RECIPES = {
    "cmc": Recipe(cmc, lambda loss, *views: loss(views), 3),
    "pirl": Recipe(pirl, lambda loss, a, b, memory: loss(a, b, memory, queue(), LABELS), 3),
    "graphcl": Recipe(graphcl),
    "invaspread": Recipe(invaspread, lambda loss, a, b: loss(a, b, terms=45)),
    "moco_v3": Recipe(moco_v3, count=4),
    "simcse": Recipe(simcse, count=3),
    "n_pair": Recipe(n_pair),
    "simsiam_byol": Recipe(simsiam, count=4),
    "cpc": Recipe(cpc, lambda loss, a, b: loss(sequences(a), sequences(b), maps())),
    "cross_batch_memory": Recipe(cross_batch_memory, lambda loss, z: loss(z, LABELS, queue()), 1),
}

pytestmark = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")


def loss_of(name):
    (block,) = BLOCK.findall(PAGES[name].read_text())
    namespace = {}
    exec(compile(block, PAGES[name], "exec"), namespace)
    return namespace["loss"]


def inputs_of(name):
    generator = testing.generator(11)
    return [torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(RECIPES[name].count)]


def test_every_page_has_its_formula():
    assert set(PAGES) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_page_is_at_most_ten_lines_of_code(name):
    text = PAGES[name].read_text()
    (block,) = BLOCK.findall(text)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    assert text.startswith("# ")
    assert "https://" in text or "NeurIPS" in text


@pytest.mark.parametrize("name", RECIPES)
def test_formula(name, backend):
    recipe, loss, inputs = RECIPES[name], loss_of(name), inputs_of(name)
    (got,), got_grads = testing.value_and_grads(lambda *x: recipe.call(loss, *x), inputs)
    (exact,), exact_grads = testing.value_and_grads(recipe.formula, inputs)
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got_grads, exact_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", RECIPES)
def test_half_inputs_give_a_finite_float32_loss(name):
    recipe, loss = RECIPES[name], loss_of(name)
    if name == "cpc":
        pytest.skip("whose maps are of one dtype")
    inputs = [x.bfloat16() for x in inputs_of(name)]
    (got,), grads = testing.value_and_grads(lambda *x: recipe.call(loss, *x), inputs)
    assert got.dtype == torch.float32
    exact = recipe.formula(*(x.double() for x in inputs))
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=1e-2)
    assert all(grad.isfinite().all() for grad in grads)


def test_invaspread_leaves_out_what_its_page_says():
    loss, (z, augmented) = loss_of("invaspread"), inputs_of("invaspread")
    left_out = invaspread(z, augmented) - loss(z, augmented)
    table = (cosines(z, z) / 0.1).exp()
    probability = (table / table.sum(0))[others(table)]
    assert probability.max() <= 0.5
    assert 0 <= left_out <= 2 * (probability**9 / 9).sum() / len(z)


def test_byol_is_four_more_than_four_times_simsiam():
    p1, p2, z1, z2 = inputs_of("simsiam_byol")
    byol = sum((F.normalize(p) - F.normalize(z)).square().sum(1).mean() for p, z in ((p1, z2), (p2, z1)))
    torch.testing.assert_close(4 + 4 * loss_of("simsiam_byol")(p1, p2, z1, z2), byol)
