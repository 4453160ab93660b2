"""User errors name the argument and what came; degenerate inputs have defined results."""

import math
import warnings

import pytest
import torch

import fastcl
from fastcl import PairRule
from fastcl.backends import choice, native

Z, W = torch.ones(4, 3), torch.ones(5, 3)
IDS = torch.arange(4)


def pair(function):
    return lambda *arguments, **options: lambda: function(*arguments, **options)


info_nce, nt_xent, sup_con = pair(fastcl.info_nce), pair(fastcl.nt_xent), pair(fastcl.sup_con)
clip_loss, stats, topk = pair(fastcl.clip_loss), pair(fastcl.similarity_stats), pair(fastcl.similarity_topk)

SHAPE_ERRORS = {
    # the call: the argument it must name, and the shapes it must show
    info_nce(torch.ones(4), Z): ("query", (4,)),
    info_nce(Z, torch.ones(4, 3, 1)): ("positive_key", (4, 3, 1)),
    info_nce(Z, W): ("positive_key", (4, 3), (5, 3)),
    info_nce(Z, torch.ones(4, 2)): ("positive_key", (4, 3), (4, 2)),
    info_nce(Z, Z, torch.ones(4, 2, 3)): ("negative_keys", (4, 2, 3)),
    info_nce(Z, Z, W, negative_mode="paired"): ("negative_keys", (5, 3)),
    info_nce(Z, Z, torch.ones(5, 2, 3), negative_mode="paired"): ("negative_keys", (4, 3), (5, 2, 3)),
    info_nce(Z, Z, torch.ones(5, 2)): ("negative_keys", (4, 3), (5, 2)),
    nt_xent(torch.ones(4), Z): ("z1", (4,)),
    nt_xent(Z, torch.ones(4)): ("z2", (4,)),
    nt_xent(Z, W): ("z2", (4, 3), (5, 3)),
    nt_xent(Z, torch.ones(4, 2)): ("z2", (4, 3), (4, 2)),
    clip_loss(torch.ones(4), Z, 1.0): ("image_features", (4,)),
    clip_loss(Z, torch.ones(4), 1.0): ("text_features", (4,)),
    clip_loss(Z, W, 1.0): ("text_features", (4, 3), (5, 3)),
    clip_loss(Z, torch.ones(4, 2), 1.0): ("text_features", (4, 3), (4, 2)),
    sup_con(torch.ones(4)): ("features", (4,)),
    sup_con(torch.ones(4, 2, 3, 1)): ("features", (4, 2, 3, 1)),
    sup_con(Z, torch.arange(5)): ("labels", (4, 3), (5,)),
    sup_con(Z, IDS[:, None]): ("labels", (4, 1)),
    sup_con(Z, mask=torch.ones(5, 5)): ("mask", (4, 3), (5, 5)),
    sup_con(Z, mask=torch.ones(4)): ("mask", (4, 3), (4,)),
    stats(torch.ones(4), Z): ("query", (4,)),
    stats(Z, torch.ones(4)): ("key", (4,)),
    stats(Z, torch.ones(4, 2)): ("key", (4, 3), (4, 2)),
    stats(Z, W, key_bias=torch.ones(4)): ("key_bias", (5, 3), (4,)),
    stats(Z, W, key_scale=torch.ones(5, 1)): ("key_scale", (5, 1)),
    stats(Z, W, rule=PairRule(positive=(IDS, IDS))): ("positive key_ids", (5, 3), (4,)),
    stats(Z, W, rule=PairRule(exclude=(torch.arange(5), torch.arange(5)))): (
        "exclude query_ids",
        (4, 3),
        (5,),
    ),
    pair(PairRule)(positive=(IDS[:, None], IDS)): ("positive query_ids", (4, 1)),
    topk(torch.ones(4), Z, 1): ("query", (4,)),
    topk(Z, torch.ones(5, 2), 1): ("key", (4, 3), (5, 2)),
    topk(Z, W, 1, rule=PairRule(exclude=(IDS, IDS))): ("exclude key_ids", (5, 3), (4,)),
}


@pytest.mark.parametrize(
    ("call", "said"), SHAPE_ERRORS.items(), ids=lambda x: str(x) if type(x) is tuple else ""
)
def test_shapes_that_do_not_fit(call, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert all(str(word) in str(caught.value) for word in said), caught.value


ONE_D = torch.ones(3)
VALUE_ERRORS = {
    info_nce(Z, Z, negative_mode="both"): ("negative_mode", "both"),
    info_nce(Z, Z, query_ids=IDS): ("query_ids",),
    sup_con(Z, IDS, torch.ones(4, 4)): ("labels", "mask"),
    sup_con(Z): ("features", "(4, 3)", "labels"),
    info_nce(Z, Z, temperature=torch.ones(4)): ("temperature", "(4,)", "(4, 1)", "info-nce-pytorch"),
    nt_xent(Z, Z, torch.ones(4, 1)): ("temperature", "(4, 1)"),
    sup_con(Z, IDS, contrast_mode="two"): ("contrast_mode", "two"),
    sup_con(Z, IDS, variant="over"): ("variant", "over"),
    sup_con(Z, IDS, base_temperature=0.0): ("base_temperature", "0.0"),
    sup_con(Z, mask=torch.full((4, 4), 0.5)): ("mask",),
    stats(Z, Z, scale=math.inf): ("scale", "inf"),
    stats(Z, Z, scale=-1e39): ("scale", "-1e+39"),
    stats(Z, Z, scale=ONE_D): ("scale", "(3,)"),
    stats(Z, Z, backend="gpu"): ("backend", "gpu"),
    topk(Z, Z, 0): ("k", "0"),
    topk(Z, Z, -3): ("k", "-3"),
    topk(Z, Z, 1, backend="gpu"): ("backend", "gpu"),
    clip_loss(Z, Z, math.nan): ("logit_scale", "nan"),
    clip_loss(Z, Z, ONE_D): ("logit_scale", "(3,)"),
    pair(fastcl.use_backend)("gpu"): ("backend", "gpu"),
}
for _name in ("info_nce", "nt_xent", "clip_loss"):
    _arguments = (Z, Z, 1.0) if _name == "clip_loss" else (Z, Z)
    VALUE_ERRORS[pair(getattr(fastcl, _name))(*_arguments, reduction="max")] = ("reduction", "max")
VALUE_ERRORS[sup_con(Z, IDS, reduction="max")] = ("reduction", "max")
for _name, _arguments in {"logit_scale": (Z[:, 0], 0.0), "logit_bias": (1.0, Z[:, 0])}.items():
    VALUE_ERRORS[pair(fastcl.siglip_loss)(Z, Z, *_arguments)] = (
        _name,
        "one element",
        str(tuple(Z[:, 0].shape)),
    )
for _bad in (0, 0.0, math.nan, math.inf, -math.inf, ONE_D, torch.ones(2, 2)):
    _said = ("temperature", str(tuple(_bad.shape)) if isinstance(_bad, torch.Tensor) else str(_bad))
    VALUE_ERRORS[info_nce(Z, Z, temperature=_bad)] = _said
    VALUE_ERRORS[nt_xent(Z, Z, _bad)] = _said
    VALUE_ERRORS[sup_con(Z, IDS, temperature=_bad)] = _said

TYPE_ERRORS = {
    info_nce(IDS[:, None], IDS[:, None]): ("query", "int64"),
    info_nce([[1.0]], Z): ("query", "list"),
    info_nce(Z.to_sparse(), Z): ("query", "dense", "sparse_coo"),
    info_nce(Z, Z.double()): ("positive_key", "float32", "float64"),
    info_nce(Z, Z, W.half()): ("negative_keys", "float32", "float16"),
    info_nce(Z, Z, temperature="cold"): ("temperature", "str"),
    info_nce(Z, Z, temperature=torch.tensor(True)): ("temperature", "bool"),
    nt_xent(Z, Z.bfloat16()): ("z2", "float32", "bfloat16"),
    nt_xent(Z.long(), Z.long()): ("z1", "int64"),
    nt_xent(Z, Z, True): ("temperature", "bool"),
    nt_xent(Z.to(torch.complex64), Z): ("z1", "complex64"),
    clip_loss(Z.long(), Z, 1.0): ("image_features", "int64"),
    clip_loss(Z, Z.half(), 1.0): ("text_features", "float32", "float16"),
    clip_loss(Z, Z, None): ("logit_scale", "NoneType"),
    sup_con(Z.long()): ("features", "int64"),
    sup_con(Z, IDS.float()): ("labels", "float32"),
    stats(Z, Z.double()): ("key", "float32", "float64"),
    stats(Z, Z, key_bias=IDS): ("key_bias", "int64"),
    stats(Z, Z, key_scale=2.0): ("key_scale", "float"),
    stats(Z, Z, rule=(IDS, IDS)): ("rule", "tuple"),
    pair(PairRule)(positive=(IDS.float(), IDS)): ("positive query_ids", "float32"),
    pair(PairRule)(exclude=(IDS, IDS.bool())): ("exclude key_ids", "bool"),
    pair(PairRule)(exclude=IDS): ("exclude", "pair"),
    pair(PairRule)(exclude=(IDS, IDS, IDS)): ("exclude", "pair", "1-dimensional"),
    pair(fastcl.triplet_loss)(Z, Z, Z, margin=torch.tensor(0.2)): ("margin must be a number, got", "Tensor"),
    sup_con(Z, IDS.to(torch.uint16)): ("labels", "int64, int32, int16, int8, uint8", "uint16"),
    topk(Z, Z, 1.5): ("k", "float"),
    topk(Z, Z, True): ("k", "bool"),
    topk(Z, Z.double(), 1): ("key", "float32", "float64"),
}


@pytest.mark.parametrize(
    ("call", "said"), VALUE_ERRORS.items(), ids=lambda x: str(x) if type(x) is tuple else ""
)
def test_values_that_are_not_allowed(call, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert all(word in str(caught.value) for word in said), caught.value


@pytest.mark.parametrize(
    ("call", "said"), TYPE_ERRORS.items(), ids=lambda x: str(x) if type(x) is tuple else ""
)
def test_types_that_are_not_allowed(call, said):
    with pytest.raises(TypeError) as caught:
        call()
    assert all(word in str(caught.value) for word in said), caught.value


def test_topk_rule_must_be_a_rule():
    with pytest.raises(TypeError, match=r"rule.*tuple"):
        fastcl.similarity_topk(Z, Z, 1, rule=(IDS, IDS))


def test_merge_wants_equal_rows_and_no_columns():
    four, five = fastcl.similarity_stats(Z, Z), fastcl.similarity_stats(W, Z)
    with pytest.raises(ValueError, match=r"\(4,\).*\(5,\)"):
        four.merge(five)
    with pytest.raises(ValueError, match="columns"):
        four.merge(fastcl.similarity_stats(Z, Z, columns=True))
    with pytest.raises(ValueError, match="columns"):
        fastcl.similarity_stats(Z, Z, columns=True).merge(four)


@pytest.mark.parametrize("value", [0.0, math.nan])
@pytest.mark.parametrize("other_view", [1.0, -1.0])
def test_a_tensor_temperature_is_not_read(value, other_view, backend):
    z1 = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    z2 = other_view * z1
    temperature = torch.tensor(value)
    for loss in (
        fastcl.nt_xent(z1, z2, temperature),
        fastcl.info_nce(z1, z2, temperature=temperature),
        fastcl.info_nce(z1, z2, z1, temperature=temperature),
        fastcl.sup_con(torch.stack([z1, z2], 1), temperature=temperature),
        fastcl.clip_loss(z1, z2, 1 / temperature),
    ):
        assert loss.isnan()


class TestMissingExtension:
    @pytest.fixture(autouse=True)
    def _missing(self, monkeypatch):
        monkeypatch.setattr(native, "_missing", "it was left at home")
        monkeypatch.setattr(choice, "_warned", False)

    def test_show_config_says_why(self):
        line = next(x for x in fastcl.show_config().splitlines() if x.split()[:1] == ["cpu"])
        assert "it was left at home" in line

    def test_auto_warns_once_and_uses_chunked(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = [fastcl.nt_xent(Z, Z) for _ in range(3)]
        assert len(caught) == 1
        assert "it was left at home" in str(caught[0].message)
        with fastcl.use_backend("chunked"):
            assert torch.equal(got[0], fastcl.nt_xent(Z, Z))

    def test_asking_for_it_by_name_raises(self):
        with pytest.raises(RuntimeError, match=r"'cpu'.*left at home"):
            fastcl.use_backend("cpu")
        with pytest.raises(RuntimeError, match=r"'cpu'.*left at home"):
            fastcl.similarity_stats(Z, Z, backend="cpu")
        with pytest.raises(RuntimeError, match=r"'cpu'.*left at home"):
            fastcl.similarity_topk(Z, Z, 1, backend="cpu")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_other_missing_backends_raise_with_a_reason(name):
    with pytest.raises(RuntimeError, match=f"'{name}' is not available: ."):
        fastcl.use_backend(name)


def test_a_failed_selection_changes_nothing():
    before = choice._selected
    for name in ("gpu", "cuda"):
        with pytest.raises((ValueError, RuntimeError)):
            fastcl.use_backend(name)
    assert choice._selected == before
