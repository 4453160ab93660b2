"""CLIPModel and SiglipModel of transformers after use_fastcl: the same model, another way to its loss."""

import copy
import inspect
import pickle

import pytest
import torch
from peer_checks import Watch
from torch import nn

pytest.importorskip("fastcl.integrations.transformers")

import transformers

from fastcl.integrations import transformers as ours

TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TEXT, "image_size": 8, "patch_size": 4}
TEXT = {**TEXT, "vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 19, "bos_token_id": 0}


def clip(**options):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8, **options)
    return transformers.CLIPModel(config)


def siglip(**options):
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=TEXT, vision_config=VISION, **options)
    )


def inputs(count=6):
    return {"input_ids": torch.randint(0, 20, (count, 6)), "pixel_values": torch.randn(count, 3, 8, 8)}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(params=[clip, siglip])
def pair(request):
    """A model as it was and a copy of it that uses fastcl."""
    model = request.param().double()
    fused = copy.deepcopy(model)
    assert ours.use_fastcl(fused) is fused
    return model, fused


def test_outputs_and_gradients(pair):
    given = inputs()
    given["pixel_values"] = given["pixel_values"].double()
    found = []
    for model in pair:
        outputs = model(**given, return_loss=True)
        outputs.loss.backward()
        found.append((dict(outputs.items()), gradients(model)))
    (exact, exact_grads), (got, grads) = found
    assert list(got) == list(exact)
    for name in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        torch.testing.assert_close(got[name], exact[name])
    torch.testing.assert_close(grads, exact_grads)
    assert grads["logit_scale"] is not None


def test_it_is_called_as_before(pair):
    given = {k: x.double() if x.is_floating_point() else x for k, x in inputs().items()}
    positional = given["input_ids"], given["pixel_values"], None, None, True
    exact, got = (model(*positional) for model in pair)
    torch.testing.assert_close(got.loss, exact.loss)
    assert all(model(**given).loss is None for model in pair)
    exact, got = (model(**given, return_loss=True, return_dict=False) for model in pair)
    assert type(got) is type(exact) is tuple
    assert len(got) == len(exact)
    torch.testing.assert_close(got[:5], exact[:5])
    if isinstance(pair[0], transformers.SiglipModel):  # CLIPModel itself cannot
        for model in pair:
            model.config.return_dict = False
        assert all(type(model(**given)) is tuple for model in pair)
    exact, got = (inspect.signature(model.forward) for model in pair)
    assert str(got) == str(exact)  # by which Trainer chooses the columns


def test_twice_is_once_and_nothing_else_changes(pair, tmp_path):
    model, fused = pair
    assert ours.use_fastcl(fused) is fused
    assert isinstance(fused, type(model))
    assert list(fused.state_dict()) == list(model.state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    assert type(copied) is type(fused)
    fused.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.architectures == [type(model).__name__]
    torch.testing.assert_close(dict(again.double().state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("make", [clip, siglip])
def test_the_loss_is_fused(make):
    """It adds one of fastcl's ops, and no tensor as large as the logits, which are an output."""
    model, given = ours.use_fastcl(make()), inputs(61)
    seen = []
    for return_loss in (False, True):
        with Watch() as watch:
            outputs = model(**given, return_loss=return_loss)
        seen.append((watch.sizes.count(61 * 61), bool(watch.ops)))
    assert seen[0] == (seen[1][0], False)
    assert seen[1][1]
    with Watch() as watch:
        outputs.loss.backward()
    assert watch.sizes.count(61 * 61) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_losss_dtype_is_the_originals(dtype):
    for make in (clip, siglip):
        given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs().items()}
        model = make().to(dtype)
        exact = model(**given, return_loss=True).loss
        got = ours.use_fastcl(model)(**given, return_loss=True).loss
        assert got.dtype == exact.dtype
        torch.testing.assert_close(got, exact, rtol=torch.finfo(dtype).eps, atol=0)


class Subclass(transformers.CLIPModel):
    pass


def test_other_models_are_refused_by_name():
    with pytest.raises(TypeError, match=r"torch\.nn\.modules\.linear\.Linear"):
        ours.use_fastcl(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="CLIPTextModel"):
        ours.use_fastcl(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)))
    with pytest.raises(TypeError, match="Subclass"):
        ours.use_fastcl(Subclass(clip().config))
    with pytest.raises(TypeError, match=r"builtins\.str"):
        ours.use_fastcl("openai/clip-vit-base-patch32")
