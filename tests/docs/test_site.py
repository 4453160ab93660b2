"""The site: its tables name what is there, its code runs, and nothing public is left out."""

import re
from pathlib import Path

import catalogue
import pytest
import site_tables as tables
import torch
import torch.nn.functional as F
from pages import DOCS, blocks_of
from test_recipes import RECIPES

import fastcl
from fastcl import testing
from fastcl.backends.registry import BACKENDS

ROOT = DOCS.parent
PAGES = [*catalogue.losses(), *catalogue.recipes()]
ROWS = [(page, method) for page in PAGES for method in page.methods]
# with code that stands by itself, on what `given` has
SNIPPETS = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "losses").glob("*.md"))]
NOT_RUN = {"processes.md", "training.md"}  # a process group; a data set

N, D = 16, 8


def names_in(test):
    """The words of a test, and those of the tables that it runs through."""
    text = test.read_text()
    if "LOSSES" in text:
        text += " ".join(loss.name for loss in testing.LOSSES.values())
    if "PLAIN" in text:
        text += (test.parent / "plain_table.py").read_text()
    return set(re.findall(r"\w+", text))


def given():
    """The names that the snippets of the site use, and torch."""
    source = testing.generator(1)

    def rows(*shape):
        return torch.randn(*shape, generator=source).requires_grad_()

    named = (
        "z1",
        "z2",
        "query",
        "positive_key",
        "image_features",
        "text_features",
        "anchor",
        "positive",
        "rows",
        "x",
    )
    labels = torch.arange(N) % 5
    return {
        **{name: rows(N, D) for name in named},
        "t": 2.0,
        "negative_keys": rows(24, D),
        "features": rows(N, 2, D),
        "labels": labels,
        "row_labels": labels,
        "different": labels > 2,
        "local": rows(N, D),
        "pooled": rows(4, D),
        "owner": torch.arange(N) % 4,
        "logit_scale": torch.tensor(2.0, requires_grad=True),
        "logit_bias": torch.tensor(-2.0, requires_grad=True),
        "torch": torch,
        "F": F,
    }


@pytest.mark.parametrize("path", [p for p in SNIPPETS if p.name not in NOT_RUN], ids=lambda path: path.name)
def test_code_on_a_page_runs(path):
    for block in blocks_of(path):
        namespace = given()
        exec(compile(block, path, "exec"), namespace)
        loss = namespace["loss"]
        assert loss.shape == ()
        loss.backward()
        grads = [x.grad for x in namespace.values() if isinstance(x, torch.Tensor) and x.is_leaf]
        grads = [grad for grad in grads if grad is not None]
        assert loss.isfinite()
        assert grads
        assert all(grad.isfinite().all() for grad in grads)


def test_the_pages_that_are_not_run_are_there():
    assert {path.name for path in SNIPPETS} > NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.source)
def test_a_page_shows_a_formula(page):
    assert "\n$$" in (DOCS / page.source).read_text()


@pytest.mark.parametrize("page", catalogue.losses(), ids=lambda page: page.source)
def test_a_loss_page_calls_what_it_documents(page):
    code = "\n".join(blocks_of(DOCS / page.source))
    functions = [name for name in page.functions if name.islower()]
    assert functions
    assert all(f"{name}(" in code for name in functions)


def test_every_public_objective_has_its_page():
    documented = [name for page in catalogue.losses() for name in page.functions]
    assert len(documented) == len(set(documented))
    objectives = {n for n in fastcl.__all__ if getattr(fastcl, n).__class__ is not str} - set(documented)
    assert not [n for n in objectives if getattr(fastcl, n).__module__.startswith("fastcl.losses")]


def test_the_map_has_a_row_for_each_of_fifty_methods():
    names = [method.name for _, method in ROWS]
    assert len(names) == len(set(names))
    assert len(names) >= 50


@pytest.mark.parametrize(("page", "method"), ROWS, ids=[method.name for _, method in ROWS])
def test_a_row_of_the_map_names_what_is_there(page, method):
    assert method.over
    assert all(name in fastcl.__all__ for name in (*method.over, *page.functions))
    assert set(method.over) <= {*page.functions, "NegativeQueue"}
    assert page.products
    assert page.memory
    assert method.paper.startswith("https://")
    assert 2000 < method.year < 2100
    if page.is_recipe:
        assert Path(page.source).stem in {name.partition(".")[0] for name in RECIPES}
    else:
        assert method.over[0] in names_in(ROOT / page.test)


def test_every_trainer_is_on_the_map():
    assert {tables.trainer_of(method) for _, method in ROWS} == {"", *tables.METHODS}
    (simclr,) = (method for _, method in ROWS if method.name == "SimCLR")
    assert tables.trainer_of(simclr) == "simclr"


def anchors_of(page):
    """Of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_into_the_tree_lead_somewhere(name):
    """Those of the site's own pages are checked where it is built."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / name).read_text()):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in anchors_of(ROOT / (path or name)), link


def test_every_backend_is_told_of():
    assert "{{ backends }}" in (DOCS / "backends.md").read_text().splitlines()
    told = re.findall(r"^\| `(\w+)` \|", tables.backends("backends.md"), re.MULTILINE)
    assert sorted(told) == sorted(BACKENDS)


def test_tables_are_whole():
    for table in (
        tables.literature("literature.md"),
        tables.which("which.md"),
        tables.trainers("training.md"),
        tables.backends("backends.md"),
    ):
        head, _, *rows = table.splitlines()
        assert rows
        for row in rows:
            cells = [cell.strip() for cell in row.strip("|").split(" | ")]
            assert len(cells) == head.count("|") - 1
            assert all(cells)


def test_the_reference_has_what_no_loss_page_has():
    listed = tables.reference("reference.md")
    documented = {name for page in catalogue.losses() for name in page.functions}
    for name in fastcl.__all__:
        assert (f"::: fastcl.{name}\n" in listed) == (name not in documented and name != "__version__")


def test_a_page_without_front_matter_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="front matter"):
        catalogue.read(page)
