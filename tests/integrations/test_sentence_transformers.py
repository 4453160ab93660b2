"""sentence-transformers' losses, over a stub of a model that maps features to embeddings."""

import itertools

import pytest
import torch
import torch.distributed as dist
from peer_checks import assert_fused, assert_not_fused, assert_same, assert_same_signature
from processes import on_every_rank
from torch import nn

pytest.importorskip("fastcl.integrations.sentence_transformers")

from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import dot_score, euclidean_sim
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastcl.integrations import _gist
from fastcl.integrations import sentence_transformers as ours

NAMES = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "GISTEmbedLoss"
WIDTH = 6
EVERY = "query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"
DIRECTIONS = [("query_to_doc", *more) for n in range(4) for more in itertools.combinations(EVERY[1:], n)]


class Words(nn.Module):
    """Embeds a text as the sum of its tokens' vectors, through a layer."""

    max_seq_length = 4

    def __init__(self, words="abcdefghij", dtype=torch.float64):
        super().__init__()
        vocabulary = {word: i for i, word in enumerate(("[UNK]", "[PAD]", *words))}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
        )
        self.vectors = nn.Embedding(len(vocabulary), WIDTH, dtype=dtype)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.device = torch.device("cpu")

    def __getitem__(self, index):
        return self.layer

    def get_embedding_dimension(self):
        return WIDTH

    def preprocess(self, texts):
        return {"input_ids": self.tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]}

    def forward(self, features):
        features["sentence_embedding"] = self.layer(self.vectors(features["input_ids"]).sum(1)).tanh()
        return features


def columns(count, rows=7):
    ids = [torch.randint(2, 12, (rows, 4)) for _ in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def trained(loss, features):
    """The loss and the gradients that the model receives of it."""
    loss.model.zero_grad()
    value = loss([dict(column) for column in features], None)
    value.backward()
    return value.detach(), [p.grad.clone() for p in loss.model.parameters()]


def embeddings(count, rows=7, dtype=torch.float64):
    return [torch.randn(rows, WIDTH, dtype=dtype) for _ in range(count)]


def ranking(module, **options):
    loss = module.MultipleNegativesRankingLoss(nn.Identity(), **options)
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


def both(function, **options):
    return [function(module, **options) for module in (ours, theirs)]


@pytest.mark.parametrize("name", NAMES)
def test_names_signatures_and_defaults(name):
    assert_same_signature(getattr(ours, name), getattr(theirs, name), "forward", "get_config_dict")


@pytest.mark.parametrize("hard_negatives", [0, 1, 2])
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
def test_every_direction(directions, hard_negatives):
    modes = ["joint"] if set(directions) & {"query_to_query", "doc_to_doc"} else ["joint", "per_direction"]
    for partition_mode in modes:
        pair = both(ranking, directions=directions, partition_mode=partition_mode, scale=5.0)
        assert_same(*pair, embeddings(2 + hard_negatives))


@pytest.mark.parametrize("hard_negatives", [0, 2])
@pytest.mark.parametrize("hardness_mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize("directions", [EVERY[:1], EVERY], ids=["one direction", "all"])
def test_every_hardness(hardness_mode, hard_negatives, directions):
    options = {"hardness_mode": hardness_mode, "hardness_strength": 3.0, "directions": directions}
    assert_same(*both(ranking, scale=5.0, **options), embeddings(2 + hard_negatives))


def test_dot_products_one_row_and_float32():
    assert_same(*both(ranking, similarity_fct=dot_score, scale=1.0), embeddings(3))
    for directions in (EVERY[:1], EVERY):
        assert_same(*both(ranking, directions=directions), embeddings(2, rows=1))
    assert_same(*both(ranking), embeddings(3, dtype=torch.float32), 1e-4)
    got, exact = (f(*embeddings(2, dtype=torch.bfloat16)) for f in both(ranking))
    assert got.dtype == exact.dtype == torch.float32


def test_another_similarity_is_the_originals():
    pair = both(ranking, similarity_fct=euclidean_sim, scale=1.0)
    assert_same(*pair, embeddings(2))
    assert_not_fused(pair[0], embeddings(2))


def test_errors_and_settings_are_the_originals():
    with pytest.raises(ValueError, match="at least 2"):
        ranking(ours)(*embeddings(1))
    with pytest.raises(ValueError, match="per_direction"):
        ranking(ours, directions=EVERY, partition_mode="per_direction")
    for name in NAMES:
        arguments = [Words()] if name != "GISTEmbedLoss" else [Words()] * 2
        got, exact = (getattr(module, name)(*arguments) for module in (ours, theirs))
        assert got.get_config_dict() == exact.get_config_dict()
        assert got.citation == exact.citation


@pytest.mark.parametrize(
    "options",
    [
        {"mini_batch_size": 3},
        {"mini_batch_num_tokens": 8},
        {
            "mini_batch_size": 2,
            "directions": EVERY,
            "hardness_mode": "all_negatives",
            "hardness_strength": 2.0,
        },
        {"directions": EVERY[::2], "partition_mode": "per_direction"},
        {"mini_batch_size": 3, "similarity_fct": euclidean_sim},
    ],
    ids="+".join,
)
def test_the_cached_loss(options):
    model, features = Words(), columns(3)
    pair = [module.CachedMultipleNegativesRankingLoss(model, **options) for module in (ours, theirs)]
    torch.testing.assert_close(*(trained(loss, features) for loss in pair))
    with torch.no_grad():
        torch.testing.assert_close(*(loss([dict(x) for x in features], None) for loss in pair))


@pytest.mark.parametrize("name", NAMES)
def test_inside_matryoshka(name):
    model, guide, features = Words(), Words(), columns(3)
    arguments = [model, guide] if name == "GISTEmbedLoss" else [model]
    pair = [getattr(module, name)(*arguments) for module in (ours, theirs)]
    pair = [theirs.MatryoshkaLoss(model, loss, [WIDTH, 3]) for loss in pair]
    torch.testing.assert_close(*(trained(loss, features) for loss in pair))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.1, "margin": 0.2},
        {"margin_strategy": "relative", "margin": 0.1},
        {"contrast_anchors": False},
        {"contrast_positives": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("words", ["abcdefghij", "badcfe"], ids=["same tokens", "other tokens"])
def test_gist(options, count, words, monkeypatch):
    monkeypatch.setattr(_gist, "_ROWS", 3)
    model, guide, features = Words(), Words(words), columns(count)
    features[1]["input_ids"][2:4] = features[0]["input_ids"][2]  # copies, where the guide's numbers are equal
    features[1]["input_ids"][5] = features[1]["input_ids"][6]
    pair = [module.GISTEmbedLoss(model, guide, **options) for module in (ours, theirs)]
    assert pair[0].must_retokenize == (words == "badcfe")
    torch.testing.assert_close(*(trained(loss, features) for loss in pair))


def test_gist_of_texts_in_one_row():
    ids = torch.randint(2, 12, (1, 9))
    column = {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 2, 5, 9])}
    assert [len(text) for text in _gist._tokens(column)] == [2, 3, 4]
    assert torch.equal(torch.cat(_gist._tokens(column)), ids[0])


def test_the_default_form_is_fused(monkeypatch):
    rows, below = 64, 64 * 64
    x = embeddings(2, rows, torch.float32)
    assert_fused(ranking(ours), x, below)
    assert_fused(
        ranking(ours, directions=EVERY, hardness_mode="all_negatives", hardness_strength=1.0), x, below
    )
    cached = ours.CachedMultipleNegativesRankingLoss(Words())
    assert_fused(lambda *x: cached.calculate_loss([[column] for column in x]), x, below)
    monkeypatch.setattr(_gist, "_ROWS", 8)
    gist, guides = ours.GISTEmbedLoss(Words(), Words()), embeddings(2, rows, torch.float32)
    # what the guide says is one byte per pair
    assert_fused(lambda *x: gist._loss(list(x), guides, 0), x, below, mask_below=2 * below + 1)


def check_gathering(group):
    torch.manual_seed(0)
    model, guide = Words(), Words()
    torch.manual_seed(1 + dist.get_rank(group))
    features = columns(3, rows=4)
    for name, options in (
        ("MultipleNegativesRankingLoss", {}),
        ("MultipleNegativesRankingLoss", {"directions": EVERY}),
        ("MultipleNegativesRankingLoss", {"hardness_mode": "all_negatives", "hardness_strength": 2.0}),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 4, "directions": EVERY}),
        ("GISTEmbedLoss", {"guide": guide}),
    ):
        pair = [getattr(m, name)(model, gather_across_devices=True, **options) for m in (ours, theirs)]
        torch.testing.assert_close(*(trained(loss, features) for loss in pair))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_over_ranks_gradients_are_the_originals(tmp_path):
    on_every_rank([check_gathering], 2, tmp_path)
