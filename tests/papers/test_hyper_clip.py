"""HyperCLIP: equations by hand on small towers, and what every model of a comparison has to keep."""

import math
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from open_clip import SimpleTokenizer
from torch import Tensor, nn
from torch.nn import functional

from workbench.datasets.class_sets import Captioned
from workbench.datasets.scenes import SceneData, load_scenes
from workbench.errors import RecipeError, RunError
from workbench.hypernetworks import ConditionedNorm, GeneratedWeights
from workbench.papers import load_recipe
from workbench.papers.hyper_clip import ClipLoss, HyperCLIP, build_clip
from workbench.papers.hyper_clip_comparison import build_model
from workbench.papers.hyper_clip_settings import ClipModelSettings, HyperCLIPRecipe, ImageTower, TextTower
from workbench.training import Training, fit, seed_everything

D, WIDTH = 16, 384  # joint width, width of the sentence embeddings
KINDS = {
    "siglip": {"kind": "siglip"},
    "replace": {"kind": "hyper"},
    "residual": {"kind": "hyper", "mode": "residual"},
    "token_control": {"kind": "token_control", "tokens": 4},
    "adapter": {"kind": "adapter"},
    "linear": {"kind": "hyper", "generates": "linear"},
    "convolutions": {"kind": "hyper", "generates": "convolutions"},
}
GENERATING = [name for name in KINDS if name not in ("siglip", "adapter")]
# Sums in another order: single precision over a dozen layers.
ROUNDING = {"rtol": 0, "atol": 1e-5}


def model_of(
    name: str, *, tower: str = "test_efficientnet", seed: int = 0, moved: float = 0.0, size: int = 32, **more
) -> HyperCLIP:
    """A small model at its start; ``moved`` spreads what the generator's head yields."""
    seed_everything(seed)
    image = ImageTower(timm_model_name=tower, image_size=size, checkpointing=more.pop("checkpointing", False))
    clip = build_clip(image, TextTower(hidden=24), D, -math.log(31), WIDTH)
    settings = ClipModelSettings(**{"name": name, "width": 16, "bottleneck": 4, **KINDS[name], **more})
    model = HyperCLIP(settings, clip, D)
    if moved:
        nn.init.normal_(model.generator.head.weight, std=moved)
    return model.eval()


def texts_of(count: int = 6, seed: int = 1) -> Tensor:
    """Sentence embeddings of unit norm."""
    draw = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(draw, dim=-1)


def pixels_of(count: int = 3, seed: int = 2, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def used(model: HyperCLIP) -> HyperCLIP:
    """Give every norm a scale, a shift and BatchNorm statistics that are not those of a fresh one."""
    draw = torch.Generator().manual_seed(5)
    for module in model.clip.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=draw) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.5)
        if isinstance(module, ConditionedNorm):
            module.scale.data.copy_(torch.rand(module.scale.shape, generator=draw) + 0.5)
            module.shift.data.copy_(torch.randn(module.shift.shape, generator=draw) * 0.1)
    return model


@cache
def _scenes() -> Captioned:
    train, _ = load_scenes(SceneData(source="scenes", train=100, test=100, size=32))
    return train


@pytest.fixture(scope="module")
def scenes() -> Captioned:
    """32 scenes in a fixed order with all their captions."""
    whole = _scenes()
    return Captioned(whole.pixels[:32], whole.texts, whole.choices[:32], whole.kinds, whole.meaning)


@pytest.fixture(scope="module")
def inputs(scenes, word_store) -> Tensor:
    return word_store.embed(scenes.texts)


def trained(
    model: HyperCLIP, scenes: Captioned, inputs: Tensor, folder: Path, *, steps: int = 20, kinds: int = 1
) -> tuple[HyperCLIP, list[dict]]:
    loss = ClipLoss(model, scenes, inputs, kinds)
    training = Training(epochs=steps, batch_size=32, learning_rate=3e-3)
    history = fit(model, loss, loss.count, training, folder, seed=0, rates={"generator.": 1e-3})
    model.use(None)
    return model, history


# --- the equations ------------------------------------------------------------------------------------------


def test_texts_are_projected_from_entries_of_unit_variance_to_unit_norm():  # (1)
    model, texts = model_of("siglip"), texts_of()
    first, _, last = model.clip.text.projection
    inner = functional.gelu(texts * math.sqrt(WIDTH) @ first.weight.T + first.bias)
    found = inner @ last.weight.T + last.bias
    expected = found / found.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.embed_texts(texts), expected, **ROUNDING)


def test_weights_are_the_mean_over_the_set_through_bottleneck_and_head():  # (2)
    model = model_of("replace", moved=0.1)
    generator, texts = model.generator, model.embed_texts(texts_of())
    members = generator.transformer(generator.enter(texts[None] * math.sqrt(D)))
    summary = generator.narrow(members)[0].mean(0)
    coefficients = generator.head.weight @ summary + generator.head.bias
    found = model.generate(texts)
    flat = torch.cat([tensor[0] for tensor in found.tensors.values()])
    torch.testing.assert_close(flat, coefficients, **ROUNDING)  # norms have gain 1
    assert len(found) == 1
    assert list(found.tensors)[:2] == ["trunk.bn1.scale", "trunk.bn1.shift"]


@pytest.mark.parametrize("tower", ["test_efficientnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("mode", ["replace", "residual"])
def test_images_are_those_of_a_plain_tower_that_holds_the_generated_norms(mode, tower):  # (3)
    model = used(model_of(mode, tower=tower, moved=0.1))
    plain = build_clip(
        ImageTower(timm_model_name=tower, image_size=32), TextTower(hidden=24), D, 0.0, WIDTH
    ).visual.eval()
    with torch.no_grad():
        weights = model.generate(model.embed_texts(texts_of()))
        state = {}
        for name, tensor in model.clip.visual.state_dict().items():
            owner = next((path for path in model.target.norms if name.startswith(f"{path}.")), None)
            if owner is not None:
                part = name.removeprefix(f"{owner}.").removeprefix("norm.")
                if part in ("scale", "shift"):
                    tensor = tensor + weights.tensors[f"{owner}.{part}"][0]
                part = {"scale": "weight", "shift": "bias"}.get(part, part)
                name = f"{owner}.{part}"
            state[name] = tensor
        plain.load_state_dict(state)
        model.use(weights)
        found = model.embed_images(pixels_of())
        expected = functional.normalize(plain(pixels_of().float() / 127.5 - 1), dim=-1)
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_the_loss_is_the_sum_over_texts_of_equation_4():
    """Three images; the first two share a statement, so that neither's caption is a negative of the other."""
    model, inputs = model_of("replace", moved=0.1), texts_of(4)
    # One caption each, so that nothing is drawn: texts 2, 0 and 3; text 1 is not in the batch.
    choices, meaning = torch.tensor([[2], [0], [3]]), torch.tensor([7, 1, 7, 4])
    data = Captioned(pixels_of(), ["a", "b", "c", "d"], choices, torch.tensor([0]), meaning)
    with torch.no_grad():
        found = ClipLoss(model, data, inputs)(torch.tensor([0, 1, 2])).item()
        texts = model.embed_texts(inputs[torch.tensor([0, 2, 3])])
        model.use(model.generate(texts))
        images = model.embed_images(data.pixels)
    scale, bias = 10.0, -math.log(31)
    total = 0.0
    for image in range(3):
        for column, text in enumerate((0, 2, 3)):
            sign = 1 if (image, text) in {(0, 0), (0, 2), (1, 0), (1, 2), (2, 3)} else -1
            logit = sign * (scale * float(images[image] @ texts[column]) + bias)
            total += math.log(1 + math.exp(-logit))
    assert found == pytest.approx(total / 3, rel=1e-4)  # single precision


# --- sets ---------------------------------------------------------------------------------------------------


def adapted(model: HyperCLIP, texts: Tensor, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        model.use(model.generate(texts))
        return model.embed_images(pixels)


@pytest.mark.parametrize("name", GENERATING)
def test_the_order_of_a_set_and_repeating_it_change_no_image_embedding(name):
    model = model_of(name, moved=0.1)
    with torch.no_grad():
        texts = model.embed_texts(texts_of())
    plain = adapted(model, texts, pixels_of())
    for other in (texts[torch.tensor([3, 0, 5, 1, 4, 2])], texts.repeat(3, 1)):
        torch.testing.assert_close(adapted(model, other, pixels_of()), plain, **ROUNDING)
    changed = adapted(model, texts[:3], pixels_of())
    assert torch.allclose(changed, plain) == (name == "token_control")


def test_the_token_control_ignores_the_texts_and_trains_its_own():
    model = model_of("token_control", moved=0.1)
    one, other = (model.generate(model.embed_texts(texts_of(count, seed=count))) for count in (3, 5))
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    with torch.no_grad():
        model.generator.tokens.add_(1)
    third = model.generate(model.embed_texts(texts_of(3, seed=3)))
    assert not all(torch.equal(one.tensors[name], third.tensors[name]) for name in one.tensors)


def test_many_sets_at_once_are_the_sets_one_by_one():
    model = model_of("residual", moved=0.1)
    with torch.no_grad():
        sets = torch.stack([model.embed_texts(texts_of(seed=seed)) for seed in (1, 2)])
        model.use(model.generate(sets), torch.tensor([1, 0, 1]))
        found = model.embed_images(pixels_of())
    for row, which in enumerate((1, 0, 1)):
        expected = adapted(model, sets[which], pixels_of()[row : row + 1])[0]
        torch.testing.assert_close(found[row], expected, **ROUNDING)


# --- the start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KINDS if name != "siglip"])
def test_every_model_starts_almost_as_the_plain_tower(name):
    # In training mode, as at the first step: a fresh BatchNorm's own statistics would be nobody's.
    pixels = pixels_of(16)
    plain = model_of("siglip").train().embed_images(pixels)
    model = model_of(name)
    with torch.no_grad():
        weights = model.generate(model.embed_texts(texts_of()))
    model.train().use(weights)
    # The head starts with a deviation of 1e-3; the adapter's last layer is exactly zero.
    largest = (model.embed_images(pixels) - plain).abs().max().item()
    assert largest < (1e-6 if name == "adapter" else 0.02)
    assert (largest > 0) == (name != "adapter")


def test_replace_has_no_encoder_until_texts_are_given():
    model = model_of("replace")
    with pytest.raises(RunError, match=r"model replace generates its norms.*call adapt\(class_names\) first"):
        model.embed_images(pixels_of())
    adapted(model, model.embed_texts(texts_of()), pixels_of())
    model.use(None)
    with pytest.raises(RunError, match="mode: residual"):
        model.embed_images(pixels_of())


@pytest.mark.parametrize("name", ["siglip", "residual", "adapter"])
def test_other_models_have_a_neutral_encoder(name):
    model = model_of(name)
    neutral = model.embed_images(pixels_of())
    torch.testing.assert_close(neutral.norm(dim=1), torch.ones(3))
    if model.generator is not None:
        nn.init.normal_(model.generator.head.weight, std=0.1)
    away = adapted(model, model.embed_texts(texts_of()), pixels_of())
    assert torch.allclose(away, neutral, atol=1e-3) == (name != "residual")
    model.use(None)
    assert torch.equal(model.embed_images(pixels_of()), neutral)


@pytest.mark.parametrize("more", [{}, {"width": 128, "bottleneck": 32}, {"layers": 2, "width": 32}])
def test_the_adapter_has_as_many_parameters_as_the_generator(more):
    wanted = sum(one.numel() for one in model_of("replace", **more).generator.parameters())
    found = sum(one.numel() for one in model_of("adapter", **more).adapter.parameters())
    assert found == pytest.approx(wanted, rel=0.01)


def test_the_logit_bias_starts_at_the_log_odds_of_a_match():
    recipe = recipe_of(training={"epochs": 1, "batch_size": 33, "learning_rate": 0.001})
    model = build_model(recipe, recipe.models[0], WIDTH)
    scale, bias = model.scale_and_bias()
    assert bias.item() == pytest.approx(-math.log(32))  # 1 match, 32 others
    assert scale.item() == pytest.approx(10)
    own = build_model(recipe_of(logit_bias=-2.5), recipe.models[0], WIDTH)
    assert own.scale_and_bias()[1].item() == -2.5


def test_the_logit_scale_is_bounded_as_in_open_clip():
    model = model_of("siglip")
    with torch.no_grad():
        model.clip.logit_scale.fill_(9.0)
    assert model.scale_and_bias()[0].item() == 100


@pytest.mark.parametrize("name", ["siglip", "replace", "linear", "adapter"])
def test_centring_gives_images_and_texts_a_mean_of_zero(name):
    model, pixels, texts = used(model_of(name)), pixels_of(16), texts_of(20)
    model.centre(pixels, texts)
    # Generated norms move a little with the texts, which were moved after the images.
    slack = 1e-5 if name == "siglip" else 0.02
    with torch.no_grad():
        model.use(model.generate(model.embed_texts(texts)))
        images = model.clip.visual(pixels.float() / 127.5 - 1)
        assert images.mean(0).abs().max() < slack * max(1, images.std().item())
        assert model.clip.text(texts).mean(0).abs().max() < 1e-5
        assert images.std(0).max() > 1e-3


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "mobilenetv3_small_050"])
def test_other_towers_are_centred_too(name):
    model, pixels = model_of("siglip", tower=name), pixels_of(4)
    model.centre(pixels, texts_of())
    with torch.no_grad():
        assert model.clip.visual(pixels.float() / 127.5 - 1).mean(0).abs().max() < 1e-5


# --- gradients and training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_reaches_all_that_is_trained_and_nothing_else(name, scenes, inputs):
    model = model_of(name).train()
    ClipLoss(model, scenes, inputs)(torch.arange(32)).backward()
    norms = {
        f"clip.visual.{path}.{part}"
        for path, norm in getattr(model.target, "norms", {}).items()
        for part in ("scale", "shift")
    }
    frozen = {path for path, one in model.named_parameters() if not one.requires_grad}
    assert frozen == (norms if name in ("replace", "token_control") else set())
    for path, one in model.named_parameters():
        if path in frozen:
            assert one.grad is None, path
        elif not path.endswith("_attn.in_proj_bias"):  # the key's bias shifts all scores of a query alike
            assert one.grad is not None, path
            assert torch.isfinite(one.grad).all(), path
    reached = {
        path for path, one in model.named_parameters() if one.grad is not None and one.grad.abs().max() > 0
    }
    wanted = {"clip.text.projection.0.weight", "clip.logit_bias", "clip.logit_scale"}
    wanted |= {
        f"clip.visual.trunk.{layer}.weight" for layer in ("conv_head", "blocks.0.0.conv", "classifier")
    }
    if model.generator is not None:
        wanted |= {"generator.head.weight", "generator.enter.weight", "generator.narrow.weight"}
    if name == "token_control":
        wanted |= {"generator.tokens"}
    assert {path.replace(".own", ".weight") for path in reached} >= wanted


def test_texts_that_are_detached_get_no_gradient_through_the_weights():
    for detach in (False, True):
        model = model_of("replace", moved=0.1, detach_texts=detach)
        model.use(model.generate(model.embed_texts(texts_of())))
        model.embed_images(pixels_of())[0, 0].backward()
        reached = model.clip.text.projection[0].weight.grad
        assert (reached is None) == detach


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_falls_in_20_steps_and_frozen_parts_stay_as_they_were(name, scenes, inputs, tmp_path):
    model, before = model_of(name), inputs.clone()
    frozen = {path: one.clone() for path, one in model.named_parameters() if not one.requires_grad}
    pictures, texts = scenes.pixels.clone(), list(scenes.texts)
    model.centre(scenes.pixels, inputs[:64])
    model, history = trained(model, scenes, inputs, tmp_path)
    losses = [one["loss"] for one in history]
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    assert torch.equal(inputs, before)
    assert torch.equal(scenes.pixels, pictures)
    assert scenes.texts == texts
    after = dict(model.named_parameters())
    assert all(torch.equal(after[path], one) for path, one in frozen.items())
    assert (name in ("replace", "token_control")) == bool(frozen)


def test_the_same_seed_gives_the_same_numbers(scenes, inputs, tmp_path):
    first, again, other = (
        trained(model_of("residual", seed=seed), scenes, inputs, tmp_path / f"{n}", steps=2)[0]
        for n, seed in enumerate((1, 1, 2))
    )
    one, two, three = (model.embed_images(scenes.pixels) for model in (first, again, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


class Killed(Exception):
    """Stands for the end of a process."""


def test_a_training_that_goes_on_from_its_checkpoint_ends_bit_equal(scenes, inputs, tmp_path):
    """Every random choice is in play: kinds, captions, neutral steps, subsets, and BatchNorm's statistics."""
    settings = Training(epochs=3, batch_size=16, learning_rate=3e-3)

    def run(folder: Path, last: int | None, seed: int) -> HyperCLIP:
        model = model_of("residual", neutral=0.4, most_texts=3, seed=seed)
        loss, calls = ClipLoss(model, scenes, inputs, 3), iter(range(100))

        def step(items: Tensor) -> Tensor:
            if next(calls) == last:
                raise Killed
            return loss(items)

        fit(model, step, 32, settings, folder, seed=0, checkpoint_seconds=0.0)
        return model

    whole = run(tmp_path / "whole", None, 0)
    with pytest.raises(Killed):
        run(tmp_path / "cut", 4, 0)
    resumed = run(tmp_path / "cut", None, 9)  # another start: all has to come from the checkpoint
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("tower", ["test_efficientnet", "test_vit"])
@pytest.mark.parametrize("name", ["replace", "convolutions"])
def test_checkpointing_gives_the_same_gradients(name, tower, scenes, inputs):
    if (name, tower) == ("convolutions", "test_vit"):
        name = "residual"
    gradients = []
    for checkpointing in (False, True):
        model = model_of(name, tower=tower, moved=0.05, checkpointing=checkpointing).train()
        seed_everything(4)
        ClipLoss(model, scenes, inputs)(torch.arange(12)).backward()
        gradients.append({path: one.grad for path, one in model.named_parameters() if one.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for path, gradient in plain.items():
        # What is computed again is computed alike.
        torch.testing.assert_close(again[path], gradient, rtol=1e-4, atol=1e-6, msg=path)


# --- batches ------------------------------------------------------------------------------------------------


def watched(model: HyperCLIP, scenes: Captioned, steps: int, **settings) -> list[dict]:
    """What each step compares, and what its weights were generated from."""
    numbers = torch.arange(len(scenes.texts), dtype=torch.float32)[:, None]
    seen: list[dict] = []
    generate, use = model.generate, model.use
    known = functional.normalize(torch.randn(len(scenes.texts), D), dim=-1)

    def embed_texts(inputs: Tensor) -> Tensor:
        seen.append({"texts": inputs[:, 0].long().tolist(), "told": None})
        return known[inputs[:, 0].long()]

    def generated(texts: Tensor):
        seen[-1]["told"] = (texts @ known.T).argmax(1).tolist()
        return generate(texts)

    def use_seen(weights: GeneratedWeights | None, rows: None = None) -> None:
        seen[-1]["plain"] = weights is None
        use(weights, rows)

    model.embed_texts, model.generate, model.use = embed_texts, generated, use_seen
    loss = ClipLoss(model, scenes, numbers, **settings)
    with torch.no_grad():
        for _ in range(steps):
            loss(torch.arange(len(scenes)))
    return seen


@pytest.fixture
def few(scenes) -> Captioned:
    return Captioned(scenes.pixels[:8], scenes.texts, scenes.choices[:8], scenes.kinds, scenes.meaning)


@pytest.mark.parametrize("most", [1, 3])
def test_a_batch_mixes_as_many_kinds_of_caption_as_is_allowed(few, most):
    kind_of = {int(text): int(kind) for row in few.choices for text, kind in zip(row, few.kinds, strict=True)}
    kinds = [
        {kind_of[text] for text in step["texts"]}
        for step in watched(model_of("replace"), few, 40, kinds_at_once=most)
    ]
    assert {len(one) for one in kinds} == set(range(1, most + 1))
    assert set.union(*kinds) == set(range(10))  # all have their turn
    for step in watched(model_of("replace"), few, 3, kinds_at_once=most):
        assert len(set(step["texts"])) == len(step["texts"]) <= 8
        assert step["told"] == step["texts"]


def test_several_captions_of_an_image_are_compared_and_told_and_each_is_its_own(few):
    one, four = (
        [step["texts"] for step in watched(model_of("replace"), few, 40, captions_at_once=count)]
        for count in (1, 4)
    )
    assert max(map(len, one)) <= 8 < max(map(len, four)) <= 32
    own = [set(row.tolist()) for row in few.choices]
    for texts in four:
        assert len(set(texts)) == len(texts)  # each is encoded once
        assert set(texts) <= set.union(*own)
    for step in watched(model_of("replace"), few, 3, captions_at_once=4):
        assert step["told"] == step["texts"]


@pytest.fixture
def classed() -> Captioned:
    """Twenty pictures: three of each of five classes, in turn, and five that are alone in what they say."""
    said = [f"class {row % 5}" if row < 15 else f"picture {row}" for row in range(20)]
    texts = list(dict.fromkeys(said))
    choices = torch.tensor([[texts.index(one)] for one in said])
    pixels = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    return Captioned(pixels, texts, choices, torch.zeros(1, dtype=torch.long), torch.arange(len(texts)))


def drawn_of(classed: Captioned, most: int, steps: int = 60) -> list[list[str]]:
    """What the pictures of each batch say; the first item of step s is picture s."""
    loss = ClipLoss(model_of("siglip"), classed, texts_of(), classes_at_once=most)
    batches = [torch.arange(step, step + 12) % 20 for step in range(steps)]
    return [
        [classed.texts[classed.choices[row, 0]] for row in loss._of_few_classes(items).tolist()]
        for items in batches
    ]


@pytest.mark.parametrize("most", [2, 4])
def test_a_batch_may_be_of_a_few_classes_as_a_task_is(classed, most):
    torch.manual_seed(0)
    sizes = set()
    for step, said in enumerate(drawn_of(classed, most)):
        assert len(said) == 12
        if step % 20 < 15:
            assert all(one.startswith("class") for one in said)
            assert len(set(said)) <= most
            sizes.add(len(set(said)))
        else:  # those that are alone in their class go together
            assert all(one.startswith("picture") for one in said)
    assert max(sizes) == most
    firsts = [f"class {step % 20 % 5}" for step in range(60) if step % 20 < 15]
    seen = [said for step, said in enumerate(drawn_of(classed, most)) if step % 20 < 15]
    hits = sum(first in said for first, said in zip(firsts, seen, strict=True))
    assert hits > 0.8 * len(seen)  # the first picture's class is among them; a draw of twelve may miss it


def test_any_pictures_go_together_if_classes_are_not_asked_for(classed):
    loss = ClipLoss(model_of("siglip"), classed, texts_of(), classes_at_once=0)
    assert not loss.members


def test_more_kinds_than_there_are_mean_all_of_them(few):
    assert ClipLoss(model_of("siglip"), few, texts_of(), 99).kinds_at_once == 10


def test_sets_are_cut_to_random_subsets_of_two_or_more(few):
    steps = watched(model_of("replace", most_texts=3), few, 60, kinds_at_once=1)
    sizes = {len(step["told"]) for step in steps if len(step["texts"]) > 3}
    assert sizes == {2, 3}
    for step in steps:
        assert set(step["told"]) <= set(step["texts"])
        if len(step["texts"]) <= 3:
            assert step["told"] == step["texts"]
    assert len({tuple(sorted(step["told"])) for step in steps}) > 10


def test_a_share_of_steps_is_neutral(few):
    steps = watched(model_of("residual", neutral=0.3), few, 100)
    share = sum(step["plain"] for step in steps) / 100
    assert 0.1 < share < 0.5  # four deviations of a share of 100
    assert all((step["told"] is None) == step["plain"] for step in steps)
    assert not any(step["plain"] for step in watched(model_of("residual"), few, 10))


def test_a_caption_of_any_kind_is_true_of_its_image(scenes, inputs, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "workbench.papers.hyper_clip.sigmoid_contrastive",
        lambda images, texts, match, *_: (seen.append(match), images.sum())[1],
    )
    model = model_of("siglip")
    embedded = []
    whole = model.embed_texts
    model.embed_texts = lambda one: (embedded.append(one), whole(one))[1]
    ClipLoss(model, scenes, inputs, 10)(torch.arange(32))
    rows = [(inputs == one).all(1).nonzero().item() for one in embedded[0]]
    for image in range(32):
        true = {int(number) for number in scenes.meaning[scenes.choices[image]]}
        assert seen[0][image].tolist() == [int(scenes.meaning[row]) in true for row in rows]
    assert seen[0].any(1).all()


# --- calibration --------------------------------------------------------------------------------------------


def with_own_statistics(model: HyperCLIP, weights: GeneratedWeights, pixels: Tensor, asked: Tensor) -> Tensor:
    """The plain way: set every running statistic to that of the images under the weights, then embed."""
    model.use(weights)
    layers = [norm.norm for norm in model.target.norms.values()]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average: of one batch its own statistics
        layer.train()
    model.embed_images(pixels)
    for layer in layers:
        layer.eval()
    return model.embed_images(asked)


@pytest.mark.parametrize("name", ["replace", "residual", "token_control"])
@pytest.mark.parametrize("tower", ["test_efficientnet", "mobilenetv3_small_050"])
def test_calibrated_weights_act_as_statistics_of_the_calibration_images(name, tower):
    model, other = (used(model_of(name, tower=tower, moved=0.05)) for _ in range(2))
    images, asked = pixels_of(24, seed=8), pixels_of(3)
    model.calibration = images
    with torch.no_grad():
        texts = model.embed_texts(texts_of())
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        weights = model.generate(texts)
        found = model.calibrate(weights)
        after = model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
        assert not model.adapted
        assert not any(module.training for module in model.modules())
        assert list(found.tensors) == list(weights.tensors)
        model.use(found)
        calibrated = model.embed_images(asked)
        expected = with_own_statistics(other, other.generate(texts), images, asked)
        model.use(weights)
        plain = model.embed_images(asked)
    torch.testing.assert_close(calibrated, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(calibrated, plain, atol=1e-2)


def test_calibrating_twice_starts_from_the_same_statistics():
    model = used(model_of("residual", moved=0.05))
    model.calibration = pixels_of(16, seed=8)
    with torch.no_grad():
        weights = model.generate(model.embed_texts(texts_of()))
        first, again = model.calibrate(weights), model.calibrate(weights)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)


@pytest.mark.parametrize(
    ("name", "tower", "images"),
    [
        ("residual", "test_vit", 8),  # no BatchNorm
        ("residual", "test_efficientnet", 0),  # no images
        ("convolutions", "test_efficientnet", 8),  # no generated norms
    ],
)
def test_without_batchnorm_or_images_calibration_changes_nothing(name, tower, images):
    model = model_of(name, tower=tower, moved=0.05)
    model.calibration = pixels_of(images)
    with torch.no_grad():
        weights = model.generate(model.embed_texts(texts_of()))
        assert model.calibrate(weights) is weights


# --- towers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["mobilenetv3_small_050", "mobilenetv4_conv_small_035", "tinynet_e"])
def test_towers_whose_head_is_wider_than_their_features_build(tower):
    # open_clip's own projection crashes on MobileNetV3 and V4: 576 features, but 1,024 after the head.
    model = model_of("residual", tower=tower)
    assert model.embed_images(pixels_of()).shape == (3, D)
    plain = timm.create_model(tower, num_classes=D)
    assert sum(one.numel() for one in model.clip.visual.parameters()) == sum(
        one.numel() for one in plain.parameters()
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"timm_model_name": "resnet_of_mine"}, "image tower resnet_of_mine: .*resnet_of_mine"),
        ({"timm_model_name": "test_efficientnet.no_such_weights"}, "image tower test_efficientnet"),
    ],
)
def test_an_impossible_tower_is_one_message(image, message):
    with pytest.raises(RecipeError, match=message):
        build_clip(ImageTower(**{"image_size": 32, **image}), TextTower(), D, 0.0, WIDTH)


def test_a_causal_transformer_is_trained_as_text_tower(scenes, tmp_path):
    seed_everything(0)
    # As wide as the joint space: its last linear layer is not its output, and centring leaves it alone.
    text = TextTower(kind="transformer", width=D, layers=1, heads=2, context=12)
    clip = build_clip(ImageTower(timm_model_name="test_efficientnet", image_size=32), text, D, -3.4, 0)
    settings = ClipModelSettings(name="replace", kind="hyper", width=16, bottleneck=4)
    model = HyperCLIP(settings, clip, D).eval()
    tokens = SimpleTokenizer(context_length=12)(scenes.texts)
    before = {path: one.clone() for path, one in model.clip.text.named_parameters()}
    model.centre(scenes.pixels, tokens[:32])
    assert all(torch.equal(one, before[path]) for path, one in model.clip.text.named_parameters())
    with torch.no_grad():
        short = model.embed_texts(tokens[:2])
        longer = torch.cat([tokens[:2], tokens[:2]])
        torch.testing.assert_close(model.embed_texts(longer)[:2], short, **ROUNDING)
    model, history = trained(model, scenes, tokens, tmp_path, steps=12)
    assert history[-1]["loss"] < 0.97 * history[0]["loss"]
    moved = {path for path, one in model.clip.text.named_parameters() if not torch.equal(one, before[path])}
    assert moved == set(before)


def test_a_pretrained_tower_starts_as_its_encoder_and_trains_affines_and_projection(
    prepared, scenes, inputs, tmp_path
):
    prepared("encoders-mobilenet-int8")
    from workbench.image_encoders import open_image_encoder

    encoder = open_image_encoder("mobilenet_v1_025")
    image = ImageTower(encoder="mobilenet_v1_025", image_size=32)
    for name in ("siglip", "replace", "residual"):
        seed_everything(0)
        settings = ClipModelSettings(**{"name": name, "width": 16, "bottleneck": 4, **KINDS[name]})
        model = HyperCLIP(settings, build_clip(image, TextTower(hidden=24), D, -3.4, WIDTH), D).eval()
        with torch.no_grad():
            model.use(None)
            found = model.clip.visual(scenes.pixels[:4].float() / 127.5 - 1)
            expected = model.clip.visual.projection(encoder(scenes.pixels[:4]))
        # Pixels go to -1..1 and back.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        trains = {path for path, one in model.clip.visual.named_parameters() if one.requires_grad}
        affines = {
            f"encoder.{path}.{part}"
            for path in encoder.affine_places()
            for part in (("weight", "bias") if name == "siglip" else ("scale", "shift"))
        }
        own = set() if name == "replace" else affines
        assert trains == {"projection.weight", "projection.bias"} | own
        assert len(affines) == 2 * 27  # a stem and 13 blocks of two convolutions
        before = {path: one.clone() for path, one in model.clip.visual.named_parameters()}
        trained(model, scenes, inputs, tmp_path / name, steps=1)
        moved = {
            path for path, one in model.clip.visual.named_parameters() if not torch.equal(one, before[path])
        }
        assert moved <= trains
        assert "projection.weight" in moved
        assert len(moved) > (len(trains) - 5)  # dead channels of a first step aside


def test_a_pretrained_towers_own_batchnorms_are_trained_by_the_baseline_too(prepared):
    prepared("encoders-cifar-resnet")
    image = ImageTower(encoder="cifar_resnet20", image_size=32)
    clip = build_clip(image, TextTower(hidden=24), D, -3.4, WIDTH)
    trains = {path for path, one in clip.visual.named_parameters() if one.requires_grad}
    assert "encoder.trunk.bn1.weight" in trains
    assert "encoder.trunk.conv1.weight" not in trains
    assert len(trains) == 2 + 2 * 19  # the projection, and a BatchNorm after each of 19 convolutions


# --- settings -----------------------------------------------------------------------------------------------


def recipe_of(**changes) -> HyperCLIPRecipe:
    return load_recipe("hyper_clip_scenes_tiny", changes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "siglip", "neutral": 0.2}, "neutral steps need kind hyper and mode residual"),
        ({"kind": "hyper", "neutral": 0.2}, "neutral steps need kind hyper and mode residual"),
        ({"kind": "hyper", "mode": "residual", "neutral": 1.0}, "neutral"),
        ({"kind": "hyper", "most_texts": 1}, "most_texts"),  # a set of one is no class set
        ({"kind": "hyper", "width": 18}, "width"),  # four heads
        ({"kind": "hyper", "calibration": 2000}, "calibration"),
        ({"kind": "hyper", "generates": "everything"}, "generates"),
        ({"kind": "hyper", "name": "Hyper CLIP"}, "name"),
        ({"kind": "film"}, "kind"),
    ],
)
def test_model_settings_that_make_no_sense_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        ClipModelSettings(**{"name": "own", **model})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"image_size": 40}}, "give either timm_model_name or encoder"),
        ({"image": {"timm_model_name": ""}}, "timm_model_name"),  # open_clip would build its largest ViT
        ({"image": {"timm_model_name": "a", "encoder": "b"}}, "give either timm_model_name or encoder"),
        (
            {"image": {"timm_model_name": "test_vit", "image_size": 64}},
            "image_size is 64 and data.size is 40",
        ),
        ({"text": {"kind": "transformer", "width": 30}}, "width 30 must be a multiple of heads 4"),
        ({"reference": "clip"}, "'clip' is not one of the models"),
        ({"data": {"source": "web"}}, "data"),
        ({"kinds_at_once": 0}, "kinds_at_once"),
        ({"resamples": 99}, "resamples"),
        ({"smallest_group": 0}, "smallest_group"),
    ],
)
def test_recipe_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(RecipeError, match=f"hyper_clip_scenes_tiny.*{message}"):
        recipe_of(**changes)


def test_norms_of_a_model_are_wrapped_once_and_in_the_order_of_the_tower():
    model = model_of("replace")
    norms = [
        path for path, module in model.clip.visual.named_modules() if isinstance(module, ConditionedNorm)
    ]
    assert list(model.target.norms) == norms
    assert len(norms) == 13
