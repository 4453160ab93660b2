"""Each method's page: its code is run, and is the paper's formula, values and gradients."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import recipe_formulas as formulas
import torch
import torch.nn.functional as F
from pages import METHODS, blocks_of, functions_of
from recipe_formulas import IMAGES, LABELS, D, N, bank, cosines, queue

from fastcl import testing


class Recipe(NamedTuple):
    """``formula`` and ``call``: of ``count`` (N, D) tensors; ``call`` gets the page's function first."""

    formula: Callable
    call: Callable = lambda loss, *tensors: loss(*tensors)
    count: int = 2


def _inst_disc(loss, z):
    return loss(z, IMAGES, bank(), formulas.NOISE, 8.0, proximal=0.3)


def _deepcluster(loss, z, weight, bias):
    return loss(z, SimpleNamespace(weight=weight, bias=bias[:, 0]), LABELS, LABELS.bincount())


def _dino(loss, a, b, c, t1, t2, *weights):
    return loss(torch.stack([a, b, c]), torch.stack([t1, t2]), *weights, formulas.CENTRE.to(a))


def _tsc(loss, query, keys, stored, centres):
    return loss(query, torch.cat([keys, stored]), formulas.DRAWN, centres[:5], LABELS, weight=0.4)


# by page, or by page and function
RECIPES = {
    "cmc": Recipe(formulas.cmc, lambda loss, *views: loss(views), 3),
    "pirl": Recipe(formulas.pirl, lambda loss, a, b, memory: loss(a, b, memory, queue(), LABELS), 3),
    "graphcl": Recipe(formulas.graphcl),
    "invaspread": Recipe(formulas.invaspread, lambda loss, a, b: loss(a, b, terms=45)),
    "moco_v3": Recipe(formulas.moco_v3, count=4),
    "simcse": Recipe(formulas.simcse, count=3),
    "n_pair": Recipe(formulas.n_pair),
    "simsiam_byol": Recipe(formulas.simsiam, count=4),
    "cpc": Recipe(
        formulas.cpc, lambda loss, a, b: loss(formulas.sequences(a), formulas.sequences(b), formulas.maps())
    ),
    "cross_batch_memory": Recipe(
        formulas.cross_batch_memory, lambda loss, z: loss(z, LABELS, queue()), count=1
    ),
    "inst_disc": Recipe(formulas.inst_disc, _inst_disc, 1),
    "deepcluster": Recipe(formulas.deepcluster, _deepcluster, 3),
    "pcl": Recipe(formulas.pcl, lambda loss, q, k: loss(q, k, queue(), IMAGES, formulas.clusterings())),
    "spcl": Recipe(formulas.spcl, lambda loss, z: loss(z, IMAGES, bank(), formulas.CLUSTERS), 1),
    "hcsc": Recipe(formulas.hcsc, lambda loss, q, k: loss(q, k, queue(), formulas.levels())),
    "i_mix": Recipe(formulas.i_mix, lambda loss, q, k: loss(q, k, formulas.PARTNER, formulas.SHARE)),
    "kcl_tsc.kcl": Recipe(formulas.kcl, lambda loss, q, *keys: loss(q, torch.cat(keys), formulas.DRAWN), 3),
    "kcl_tsc.tsc": Recipe(formulas.tsc, _tsc, 4),
    "dino_swav.dino": Recipe(formulas.dino, _dino, 7),
    "dino_swav.swav": Recipe(formulas.swav, lambda loss, *x: loss(torch.stack(x[:3]), x[3]), 4),
    "false_negatives": Recipe(
        formulas.false_negatives, lambda loss, a, b, *s: loss(a, b, torch.stack(s), k=3), 4
    ),
    "unicl": Recipe(formulas.unicl, lambda loss, a, b: loss(a, b, LABELS, 12.0)),
    "arcface_cosface": Recipe(
        formulas.arcface, lambda loss, z, classes: loss(z, classes, LABELS, 9.0, 0.5, 0.1)
    ),
    "rare.looc": Recipe(
        formulas.looc, lambda loss, *x: loss(*formulas.looc_spaces(*x), formulas.queues(3)), 6
    ),
    "rare.mice": Recipe(formulas.mice, lambda loss, *x: loss(*formulas.mice_rows(*x), formulas.queues(2)), 4),
    "rare.contragan": Recipe(formulas.contragan, lambda loss, z, classes: loss(z, LABELS, classes, 0.5)),
}
HELPERS = {"pcl.cluster", "hcsc.keep"}  # run by what calls the recipes above

pytestmark = pytest.mark.skipif(not testing.IN_FLOAT64, reason="formulas are compared in float64")


def loss_of(name):
    page, _, function = name.partition(".")
    return functions_of(page)[function or "loss"]


def inputs_of(name):
    generator = testing.generator(11)
    return [torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(RECIPES[name].count)]


def test_every_function_on_a_page_has_its_formula():
    found = {f"{page}.{name}" for page in METHODS for name in functions_of(page)}
    assert found == {name if "." in name else f"{name}.loss" for name in {*RECIPES, *HELPERS}}


@pytest.mark.parametrize("page", METHODS.values(), ids=METHODS)
def test_code_is_at_most_ten_lines(page):
    for block in blocks_of(page):
        assert len([line for line in block.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("name", RECIPES)
def test_formula(name, backend):
    recipe, loss, inputs = RECIPES[name], loss_of(name), inputs_of(name)
    try:
        (got,), got_grads = testing.value_and_grads(lambda *x: recipe.call(loss, *x), inputs)
    except RuntimeError as error:
        if "has no kernel yet" not in str(error):
            raise
        pytest.skip(str(error))
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
    left_out = formulas.invaspread(z, augmented) - loss(z, augmented)
    table = (cosines(z, z) / 0.1).exp()
    probability = (table / table.sum(0))[formulas.others(table)]
    assert probability.max() <= 0.5
    assert 0 <= left_out <= 2 * (probability**9 / 9).sum() / len(z)


def test_byol_is_four_more_than_four_times_simsiam():
    p1, p2, z1, z2 = inputs_of("simsiam_byol")
    byol = sum((F.normalize(p) - F.normalize(z)).square().sum(1).mean() for p, z in ((p1, z2), (p2, z1)))
    torch.testing.assert_close(4 + 4 * loss_of("simsiam_byol")(p1, p2, z1, z2), byol)
