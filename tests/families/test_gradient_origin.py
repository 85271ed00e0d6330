"""Gradient origin networks: the code by hand, the second derivative, and the closed form beside them."""

import json

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from workbench.errors import RecipeError
from workbench.families import gradient_origin
from workbench.families.gradient_origin import Autoencoder, GradientOrigin, GradientOriginModel, components
from workbench.papers import load_recipe

TINY = {
    "name": "tiny", "paper": "gradient_origin", "title": "tiny", "seeds": [0], "data": {"name": "digits"},
    "metric": "squared_error", "reference": "origin", "code": 4,
    "training": {"epochs": 1, "batch_size": 70, "learning_rate": 3e-3},
    "models": [{"name": "origin", "kind": "gradient_origin", "width": 16}],
}  # fmt: skip


def recipe(**changes):
    return gradient_origin.RECIPE.model_validate_json(json.dumps({**TINY, **changes}))


def run(kind, folder, settings=None, width=16):
    settings = settings or recipe()
    torch.manual_seed(0)
    model = GradientOriginModel(name="one", kind=kind, width=width)
    return gradient_origin.measure(settings, gradient_origin.load_data(settings).content, model, 0, folder)


def test_with_a_linear_decoder_the_code_is_twice_the_correlation_with_its_columns():
    # |x - (W z + b)|^2 at z = 0 has gradient -2 W^T (x - b).
    net = GradientOrigin(3, 8)
    net.decoder = nn.Linear(3, 64)
    images = torch.randn(5, 64)
    by_hand = 2 * (images - net.decoder.bias) @ net.decoder.weight
    assert torch.allclose(net.codes(images), by_hand, atol=1e-4)  # single precision, sums of 64


def test_each_images_code_depends_on_that_image_alone():
    net, images = GradientOrigin(3, 8), torch.randn(5, 64)
    assert torch.allclose(net.codes(images)[2], net.codes(images[2:3])[0], atol=1e-5)


def test_training_differentiates_through_the_code():
    # With the code cut off, the gradient of the loss in the decoder is another.
    torch.manual_seed(0)
    net, images = GradientOrigin(3, 8), torch.rand(5, 64)
    whole = torch.autograd.grad((net(images) - images).square().sum(), net.decoder[0].weight)[0]
    cut = net.decoder(net.codes(images).detach())
    short = torch.autograd.grad((cut - images).square().sum(), net.decoder[0].weight)[0]
    assert (whole - short).abs().max() > 1e-3


def test_asking_under_no_grad_builds_no_graph():
    with torch.no_grad():
        assert not GradientOrigin(3, 8).codes(torch.rand(2, 64)).requires_grad


def test_the_network_has_the_autoencoders_decoder_and_nothing_else():
    own, control = GradientOrigin(16, 128), Autoencoder(16, 128)
    sizes = [sum(one.numel() for one in part.parameters()) for part in (own, control.decoder, control)]
    # 16 x 128 + 128, 128 x 128 + 128, 128 x 64 + 64
    assert sizes == [26_944, 26_944, 53_840]


def test_components_agree_with_scikit_learn():
    draw = np.random.default_rng(0)
    train, test = draw.normal(size=(60, 64)), draw.normal(size=(9, 64))
    fitted = PCA(5).fit(train)
    expected = fitted.inverse_transform(fitted.transform(test))
    found = components(torch.from_numpy(train), torch.from_numpy(test), 5)
    assert found.numpy() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["gradient_origin", "autoencoder"])
def test_the_loss_falls_and_the_same_seed_gives_the_same_numbers(kind, tmp_path):
    first = run(kind, tmp_path / "a")
    assert first.values == run(kind, tmp_path / "b").values
    longer = run(kind, tmp_path / "c", recipe(training={**TINY["training"], "epochs": 3}))
    losses = [epoch["loss"] for epoch in longer.about["history"]]
    assert losses[2] < losses[1] < losses[0]


def test_test_images_are_never_trained_on(tmp_path):
    data = gradient_origin.load_data(recipe()).content
    changed = data.clone()
    changed[gradient_origin.TRAIN :] = 0.5
    found = []
    for images in (data, changed):
        torch.manual_seed(0)
        model = GradientOriginModel(name="one", kind="autoencoder", width=16)
        folder = tmp_path / str(len(found))
        found.append(gradient_origin.measure(recipe(), images, model, 0, folder).about["history"])
    assert found[0] == found[1]


def test_pictures_come_with_the_truth(tmp_path):
    curves = run("components", tmp_path).curves
    assert {*curves} == {f"digit_{n}{end}" for n in range(4) for end in ("", "_true")}


def test_a_code_wider_than_the_image_is_refused():
    with pytest.raises(RecipeError, match="code"):
        load_recipe("family_gradient_origin", {"code": 65})
