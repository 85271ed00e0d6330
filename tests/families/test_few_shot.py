"""Few-shot classification: prototypes as a linear layer, the generator around them, glyphs."""

import json

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from tests.families.histories import mean_loss
from workbench.errors import RecipeError
from workbench.families import few_shot
from workbench.families.few_shot import FewShotModel, FewShotNet
from workbench.families.glyphs import CLASSES, HELD_OUT, QUESTIONS, draw_glyphs, episodes
from workbench.papers import load_recipe

TINY = {
    "name": "tiny", "paper": "few_shot", "title": "tiny", "seeds": [0], "data": {"name": "glyphs"},
    "metric": "accuracy", "reference": "residual", "steps": 10, "test_episodes": 10,
    "training": {"epochs": 1, "batch_size": 2, "learning_rate": 3e-3},
    "models": [{"name": "residual", "kind": "residual", "channels": 4}],
}  # fmt: skip


def recipe(**changes):
    return few_shot.RECIPE.model_validate_json(json.dumps({**TINY, **changes}))


def one(kind):
    return FewShotModel(name="one", kind=kind, channels=4)


def run(kind, folder, settings=None):
    settings = settings or recipe()
    torch.manual_seed(0)
    return few_shot.measure(settings, few_shot.load_data(settings).content, one(kind), 0, folder)


def some(examples=1, count=2, seed=0):
    strokes = few_shot.load_data(recipe()).content
    return episodes(strokes, count, examples, torch.Generator().manual_seed(seed), held_out=False)


def test_the_nearest_mean_is_a_linear_layer():
    draw = torch.Generator().manual_seed(0)
    means, inputs = torch.randn(1, CLASSES, 6, generator=draw), torch.randn(1, 9, 6, generator=draw)
    flat = few_shot.linear_form(means)
    weight, bias = flat[0, :30].view(CLASSES, 6), flat[0, 30:]
    distances = -torch.cdist(inputs, means).square()[0]
    linear = inputs[0] @ weight.T + bias - inputs[0].square().sum(1, keepdim=True)
    assert torch.allclose(distances, linear, atol=1e-5)


def test_without_its_correction_the_residual_row_answers_as_the_prototypes_do():
    torch.manual_seed(0)
    residual, plain = FewShotNet(one("residual")), FewShotNet(one("prototypes"))
    plain.encoder.load_state_dict(residual.encoder.state_dict())
    torch.nn.init.zeros_(residual.head.generator.head.weight)
    with torch.no_grad():
        generated, nearest = residual(*some()), plain(*some())
    assert torch.allclose(generated.softmax(-1), nearest.softmax(-1), atol=1e-4)


def test_without_what_is_generated_all_layers_answer_as_the_prototypes_do():
    torch.manual_seed(0)
    whole, plain = FewShotNet(one("layers")), FewShotNet(one("prototypes"))
    plain.encoder.load_state_dict(whole.encoder.target.state_dict())
    # Every convolution and norm of the encoder, (25 + 1) 4 + 2 (36 + 1) 4 + 3 x 8 numbers.
    assert whole.encoder.spec.numel == 4 * 26 + 2 * 4 * 37 + 24
    with torch.no_grad():
        torch.nn.init.normal_(whole.encoder.generator.head.weight)
        assert not torch.allclose(whole(*some()), plain(*some()), atol=1e-2)
        torch.nn.init.zeros_(whole.encoder.generator.head.weight)
        torch.testing.assert_close(whole(*some()), plain(*some()), rtol=1e-3, atol=1e-3)


def test_what_is_generated_for_an_episode_is_of_its_own_examples_and_their_labels():
    torch.manual_seed(0)
    net = FewShotNet(one("layers"))
    torch.nn.init.normal_(net.encoder.generator.head.weight)
    examples, questions = some()
    with torch.no_grad():
        both = net(examples, questions)
        torch.testing.assert_close(net(examples[:1], questions[:1]), both[:1], rtol=1e-3, atol=1e-3)
        tokens = net.tokens(examples)
    assert torch.equal(tokens[0, :, -CLASSES:], torch.eye(CLASSES))
    assert tokens[..., :-CLASSES].mean(-1).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["residual", "layers"])
def test_swapping_two_examples_of_a_class_changes_nothing(kind):
    torch.manual_seed(0)
    net = FewShotNet(one(kind))
    examples, questions = some(examples=2)
    order = torch.tensor([1, 0, *range(2, 2 * CLASSES)])
    assert torch.allclose(net(examples, questions), net(examples[:, order], questions), atol=1e-4)


def test_ink_is_full_on_a_stroke_and_gone_far_from_it():
    stroke = torch.tensor([[[-0.8, 0.0], [0.8, 0.0]]]).expand(1, 3, 2, 2)
    image = draw_glyphs(stroke)[0]
    assert image.shape == (14, 14)
    # the two middle rows lie 1 / 13 from the stroke: 1.5 - (1 / 13) / 0.1
    assert torch.allclose(image[6:8, 3:11], torch.tensor(0.7308), atol=1e-4)
    assert (image[:3] == 0).all()
    assert torch.allclose(image, image.flip(0), atol=1e-5)


def test_held_out_glyphs_are_never_shown_in_training(tmp_path):
    strokes = few_shot.load_data(recipe()).content
    changed = strokes.clone()
    changed[-HELD_OUT:] = 0
    draw = [torch.Generator().manual_seed(1) for _ in range(4)]
    for held_out, same in ((False, True), (True, False)):
        one_set = episodes(strokes, 3, 1, draw.pop(), held_out=held_out)
        other = episodes(changed, 3, 1, draw.pop(), held_out=held_out)
        assert torch.equal(one_set[0], other[0]) == same


def test_the_nearest_neighbour_agrees_with_scikit_learn():
    examples, questions = some(examples=3, count=1)
    fitted = KNeighborsClassifier(1).fit(
        examples[0].flatten(1).numpy(), torch.arange(CLASSES).repeat_interleave(3).numpy()
    )
    expected = fitted.predict(questions[0].flatten(1).numpy())
    assert few_shot.nearest(examples, questions)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["prototypes", "residual", "scratch"])
def test_the_loss_falls_and_the_same_seed_gives_the_same_numbers(kind, tmp_path):
    first = run(kind, tmp_path / "a")
    assert first.values == run(kind, tmp_path / "b").values
    longer = run(kind, tmp_path / "c", recipe(steps=60))
    assert mean_loss(longer.about["history"]) < mean_loss(first.about["history"])


def test_the_gradient_reaches_the_generator_and_other_examples_give_other_weights():
    net = FewShotNet(one("scratch"))
    net(*some()).square().sum().backward()
    assert net.head.generator.head.weight.grad.abs().sum() > 0
    shown = net.encode(some(count=3)[0])
    assert (net.head.weights(shown).distances("weight").fill_diagonal_(1) > 0).all()


def test_the_scratch_row_differs_from_the_residual_one_in_the_prototypes_alone():
    torch.manual_seed(0)
    residual, scratch = FewShotNet(one("residual")), FewShotNet(one("scratch"))
    scratch.load_state_dict(residual.state_dict())
    shown = residual.encode(some()[0])
    with_means, without = (net.head.generator(shown).tensors["weight"] for net in (residual, scratch))
    means = few_shot.prototypes(shown)
    assert torch.allclose(with_means - without, 2 * means, atol=1e-5)


def test_the_card_reports_the_generator_and_pixels_train_nothing(tmp_path):
    about = run("residual", tmp_path / "a").about
    assert about["cost"]["generated_parameters"] == CLASSES * (9 * 4 + 1)
    assert about["health"]["conditions"] == 10
    pixels = run("pixels", tmp_path / "b")
    assert pixels.about == {"parameters": 0}
    assert pixels.count == 10 * CLASSES * QUESTIONS


def test_no_examples_are_refused():
    with pytest.raises(RecipeError, match="examples"):
        load_recipe("family_few_shot", {"examples": 0})
