"""The public contract: names, signatures, returned dtypes, and the packages that are replaced."""

import inspect
import subprocess
import sys
from dataclasses import fields

import formulas
import info_nce as pypi
import pytest
import torch
from loss_table import LOSSES, MASKED

import fastcl
from fastcl import testing
from fastcl.backends import native
from fastcl.backends.registry import BACKENDS
from fastcl.similarity.numerics import constant_when_compiled

ALL_NEGATIVE = inspect.signature(fastcl.similarity_stats).parameters["rule"].default

# what users rely on; further options may follow, by keyword
SIGNATURES = {
    "info_nce": "query, positive_key, negative_keys=None, temperature=0.1, reduction='mean', "
    "negative_mode='unpaired', *, query_ids=None",
    "InfoNCE": "temperature=0.1, reduction='mean', negative_mode='unpaired'",
    "nt_xent": "z1, z2, temperature=0.5, *, reduction='mean'",
    "sup_con": "features, labels=None, mask=None, *, temperature=0.07, base_temperature=None, "
    "contrast_mode='all', variant='out', normalize=True, reduction='mean'",
    "SupConLoss": "temperature=0.07, contrast_mode='all', base_temperature=0.07",
    "clip_loss": "image_features, text_features, logit_scale, *, normalize=True, reduction='mean'",
    "similarity_stats": "query, key, *, scale=1.0, rule=ALL_NEGATIVE, normalize=False, key_bias=None, "
    "key_scale=None, columns=False, group=None, ring=False, backend='auto'",
    "similarity_topk": "query, key, k, *, rule=ALL_NEGATIVE, normalize=False, among='all', "
    "largest=True, below=None, backend='auto'",
    "PairRule": "positive=None, exclude=None, *, within=None, exclude_keys=None",
    "use_backend": "name",
    "show_config": "",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    def described(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    expected, found = (
        described(f) for f in (eval(f"lambda {SIGNATURES[name]}: None"), getattr(fastcl, name))
    )
    assert found[: len(expected)] == expected
    for _, kind, default in found[len(expected) :]:
        assert kind is inspect.Parameter.KEYWORD_ONLY
        assert default is not inspect.Parameter.empty
    assert name in fastcl.__all__


def test_statistics_are_named():
    names = ["lse_neg", "lse_pos", "pos_sum", "pos_count", "max_neg", "columns"]
    assert [field.name for field in fields(fastcl.SimilarityStats)] == names
    assert list(inspect.signature(fastcl.SimilarityStats.merge).parameters) == ["self", "other"]


def test_the_native_extension_is_built():
    assert native.missing_reason() is None


def test_the_import_brings_nothing_heavy():
    heavy = "torch._dynamo", "triton", "lightning", "torchvision", "kornia", "timm", "matplotlib", "sympy"
    command = f"import sys, torch, fastcl; print(*(name for name in {heavy} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout
    assert found.split() == []


def test_constants_of_compiled_graphs_are_marked_as_torch_marks_them():
    ours, theirs = constant_when_compiled(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(theirs) != {}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_results_are_float32_or_float64_and_gradients_have_the_inputs_dtype(dtype, backend):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = testing.make_case("random", (6, 7, 5))
    for loss in (*LOSSES.values(), *MASKED.values()):
        for reduction in ("none", "mean", "sum"):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in loss.inputs(case)]
            got = loss.product(*leaves, loss.factor(0.1), reduction=reduction)
            assert got.dtype == wide
            got.sum().backward()
            assert all(x.grad.dtype == dtype for x in leaves)
    query, key = case.query.to(dtype), case.key.to(dtype)
    stats = fastcl.similarity_stats(query, key, columns=True)
    assert {x.dtype for x in testing.every_statistic(stats)} == {wide}
    assert [x.shape for x in (stats.lse_neg, stats.columns.lse_neg)] == [(6,), (7,)]
    assert stats.columns.columns is None
    values, indices = fastcl.similarity_topk(query, key, 3)
    assert (values.dtype, indices.dtype) == (wide, torch.int64)


def test_use_backend_is_a_setter_and_a_context_manager():
    def selected():
        return fastcl.show_config().split("selected backend: ")[1].split()[0]

    fastcl.use_backend("reference")
    try:
        with fastcl.use_backend("chunked"):
            assert selected() == "chunked"
            with fastcl.use_backend("auto"):
                assert selected() == "auto"
        assert selected() == "reference"
    finally:
        fastcl.use_backend("auto")


def test_show_config_prints_and_returns_every_backend(capsys):
    text = fastcl.show_config()
    assert capsys.readouterr().out.strip() == text.strip()
    for name in BACKENDS:
        assert name in text


INFO_NCE_CASES = {
    "in batch": ((6, 5), (6, 5), None, "unpaired"),
    "unpaired": ((6, 5), (6, 5), (9, 5), "unpaired"),
    "paired": ((6, 5), (6, 5), (6, 4, 5), "paired"),
    "in batch, mode ignored": ((6, 5), (6, 5), None, "paired"),
}


@pytest.mark.parametrize("shapes", INFO_NCE_CASES.values(), ids=INFO_NCE_CASES.keys())
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_info_nce_replaces_the_pypi_package(shapes, temperature, reduction, backend):
    *sizes, mode = shapes
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes if s is not None]
    negatives = [None] * (3 - len(inputs))
    got, exact = (
        testing.value_and_grads(lambda *x, f=f: f(*x, *negatives, temperature, reduction, mode), inputs)
        for f in (fastcl.info_nce, pypi.info_nce)
    )
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)
    ours, theirs = (
        module(temperature, reduction, mode)(*inputs) for module in (fastcl.InfoNCE, pypi.InfoNCE)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "shapes",
    [
        ((5,), (6, 5), None, "unpaired"),
        ((6, 5), (6, 5, 1), None, "unpaired"),
        ((6, 5), (6, 5), (6, 4, 5), "unpaired"),
        ((6, 5), (6, 5), (6, 5), "paired"),
        ((6, 5), (7, 5), None, "unpaired"),
        ((6, 5), (6, 5), (7, 4, 5), "paired"),
        ((6, 5), (6, 4), None, "unpaired"),
        ((6, 5), (6, 5), (6, 4), "unpaired"),
        ((6, 5), (6, 5), (6, 4, 4), "paired"),
    ],
)
def test_info_nce_raises_where_the_pypi_package_does(shapes):
    *sizes, mode = shapes
    arguments = [None if size is None else torch.ones(size) for size in sizes]
    for function in (pypi.info_nce, fastcl.info_nce):
        with pytest.raises(ValueError, match=r"query|positive_key|negative_keys"):
            function(*arguments, negative_mode=mode)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"contrast_mode": "one"}, {"base_temperature": 0.2}]
)
@pytest.mark.parametrize("given", ["labels", "labels (B, 1)", "mask", "neither"])
@pytest.mark.parametrize("shape", [(6, 2, 5), (6, 3, 2, 2)], ids=str)
def test_sup_con_loss_replaces_sup_contrast(options, given, shape, backend):
    """The features are used as they are, flattened to (B, V, D)."""
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    table = labels[:, None] == labels
    arguments = {"labels": (labels,), "labels (B, 1)": (labels[:, None],), "mask": (None, table.float())}
    settings = {"temperature": 0.07, "base_temperature": 0.07, **options}

    def formula(x):
        return formulas.sup_con(
            x.flatten(2), None if given == "neither" else labels, normalize=False, **settings
        )

    (got,), got_grads = testing.value_and_grads(
        lambda x: fastcl.SupConLoss(**options)(x, *arguments.get(given, ())), [features]
    )
    (exact,), exact_grads = testing.value_and_grads(formula, [features])
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(got_grads, exact_grads)


def test_sup_con_loss_wants_views():
    with pytest.raises(ValueError, match=r"features.*\(6, 5\)"):
        fastcl.SupConLoss()(torch.ones(6, 5))


@pytest.mark.parametrize("loss", [*testing.LOSSES.values(), *testing.MASKED.values()], ids=lambda x: x.name)
def test_registered_losses_are_public(loss):
    assert getattr(fastcl, loss.name) is loss.function
    assert loss.name in fastcl.__all__
    if loss.module is not None:
        assert loss.module.__name__ in fastcl.__all__
        assert not list(loss.module().parameters())


def test_modules_take_their_options():
    z = torch.randn(4, 3)
    got = fastcl.InfoNCE(temperature=0.5, reduction="none")(z, z.flip(0))
    torch.testing.assert_close(got, fastcl.info_nce(z, z.flip(0), temperature=0.5, reduction="none"))
