"""Recipes are read strictly: every mistake is named with what is allowed."""

import pytest

from workbench import config
from workbench.config import RECIPE_FOLDER, read_recipe, read_yaml, recipe_names
from workbench.errors import RecipeError
from workbench.papers import PAPERS, load_recipe

SMALL = """
paper: hyper_cl
title: Small
seeds: [0]
data: {source: bundled, name: bundled}
training: {epochs: 1, batch_size: 8, learning_rate: 1e-3}
models:
  - {name: hadamard, kind: hadamard}
  - {name: hyper, kind: hyper, rank: 4}
"""


@pytest.fixture
def own(tmp_path):
    """Write a recipe of one's own and return its path."""

    def write(text, name="own.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Write recipes as if they came with the package."""
    monkeypatch.setattr(config, "RECIPE_FOLDER", tmp_path)

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")

    return write


def refusal(path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- keys and values ----------------------------------------------------------------------------------------


def test_an_unknown_key_lists_the_allowed_ones(own):
    said = refusal(own(SMALL + "epochs: 3\n"))
    assert said.startswith("recipe own: unknown key 'epochs' (allowed here: bars, data, encoder, ")
    assert "training" in said


def test_an_unknown_nested_key_lists_those_of_its_place(own):
    said = refusal(own(SMALL.replace("epochs: 1", "epoch: 1")))
    allowed = "batch_size, betas, clip, epochs, learning_rate, schedule, warmup, weight_decay"
    assert f"unknown key 'training.epoch' (allowed here: {allowed})" in said
    assert "key 'training.epochs' is missing" in said


def test_an_unknown_key_of_a_model_names_the_model_and_lists_a_models_keys(own):
    said = refusal(own(SMALL.replace("rank: 4", "rnak: 4")))
    assert "unknown key 'models.1.rnak' (allowed here: " in said
    allowed = said.partition("allowed here: ")[2].partition(")")[0].split(", ")
    assert {"name", "kind", "rank", "pooling", "learning_rate"} <= set(allowed)
    assert "training" not in allowed  # that is a key of the recipe


def test_all_mistakes_are_told_at_once(own):
    said = refusal(
        own(SMALL.replace("epochs: 1", "epochs: 0").replace("title: Small", "title: 7") + "x: 1\n")
    )
    assert all(part in said for part in ("training.epochs", "'title' is '7'", "unknown key 'x'"))


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("epochs: 1", 'epochs: "1"', "training.epochs"),  # text for a number
        ("epochs: 1", "epochs: 1.5", "training.epochs"),
        ("epochs: 1", "epochs: true", "training.epochs"),  # bool is not a number here
        ("title: Small", "title: 007", "title"),
        ("seeds: [0]", "seeds: 0", "seeds"),
        ("seeds: [0]", "seeds: []", "seeds"),
        ("seeds: [0]", "seeds: [-1]", "seeds.0"),
        ("seeds: [0]", "seeds: [99999999999999999999]", "seeds.0"),
        ("source: bundled", "source: web", "data.source"),
        ("epochs: 1", "epochs: 0", "training.epochs"),
        ("learning_rate: 1e-3", "learning_rate: 0", "training.learning_rate"),
        ("learning_rate: 1e-3", "learning_rate: .nan", "training.learning_rate"),
        ("rank: 4", "rank: -4", "models.1.rank"),
        ("rank: 4", "dropout: 1.0", "models.1.dropout"),
        ("kind: hyper,", "kind: hypper,", "models.1.kind"),
        ("name: hyper,", "name: ../hyper,", "models.1.name"),
        ("name: bundled}", "name: bundled, label_range: [1, 0]}", "data"),
        ("title: Small", "title: Small\nname: ../../evil", "name"),
        ("title: Small", "title: Small\nsets: [nightly]", "sets.0"),
    ],
)
def test_a_wrong_type_or_a_value_out_of_range_names_its_key(own, old, new, key):
    assert f"key '{key}' is " in refusal(own(SMALL.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "kind: hadamard}",
            "kind: hadamard, rank: 4}",
            "rank and identity go with kind: hyper, not hadamard",
        ),
        (
            "kind: hadamard}",
            "kind: cosine, pooling: condition}",
            "has no pooling to learn",
        ),
        ("name: hyper,", "name: hadamard,", "every name once"),
        ("title: Small", "title: Small\nreference: absent", "'absent' is not one of the models"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(own, old, new, message):
    assert message in refusal(own(SMALL.replace(old, new)))


def test_an_unknown_paper_lists_the_known_ones(own):
    said = refusal(own(SMALL.replace("hyper_cl", "hyper")))
    assert f"key 'paper' is 'hyper'; allowed: {(*PAPERS,)}" in said


def test_a_value_given_on_the_command_line_is_checked_like_one_in_the_file():
    with pytest.raises(RecipeError, match=r"key 'seeds\.0' is '-3'"):
        load_recipe("hyper_cl_bundled_tiny", {"seeds": [-3]})


# --- YAML ---------------------------------------------------------------------------------------------------


def test_numbers_with_an_exponent_are_numbers(own):
    for text in ("1e-3", "1E-3", "+1e-3", "1.0e-3", "0.001"):
        recipe = load_recipe(own(SMALL.replace("1e-3", text)))
        assert recipe.training.learning_rate == 0.001


@pytest.mark.parametrize("text", ["29e74ce4", "1e5x", "12e3-4", "007e", "1e", "e3"])
def test_a_hash_that_begins_like_a_number_stays_text(own, text):
    assert load_recipe(own(SMALL.replace("Small", text))).title == text


def test_a_quoted_number_stays_text(own):
    assert load_recipe(own(SMALL.replace("Small", '"1e-3"'))).title == "1e-3"


@pytest.mark.parametrize(
    ("text", "key"),
    [(SMALL + "title: Again\n", "title"), (SMALL.replace("epochs: 1", "epochs: 1, epochs: 2"), "epochs")],
)
def test_a_key_given_twice_is_refused(own, text, key):
    assert f"key given twice: {key}" in refusal(own(text))


@pytest.mark.parametrize(
    "text",
    [
        "models: [",
        "\tpaper: x",
        "title: !!python/object/apply:os.system [echo]",
        "a: b: c",
        "? [a]\n: b",
        "x: \x07",
        "title: " + "[" * 3000 + "]" * 3000,
    ],
)
def test_what_is_not_valid_yaml_is_refused_with_the_file(own, text):
    said = refusal(own(text))
    assert "own.yaml" in said
    assert "is not valid YAML" in said


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a", "list"), ("just text", "str")])
def test_a_file_that_is_no_mapping_is_refused(own, text, kind):
    assert f"must hold keys and values, got {kind}" in refusal(own(text))


@pytest.mark.parametrize("text", ["title: 2020-01-01", "1: 2", "title: &a [*a]", "title: !!binary aGk="])
def test_values_that_are_no_settings_are_refused(own, text):
    said = refusal(own(SMALL.replace("title: Small", text)))
    assert said.startswith("recipe own: ")
    assert "use numbers, text, lists and mappings only" in said


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refusal(str(tmp_path / "own.yaml"))


# --- extends ------------------------------------------------------------------------------------------------


def test_extending_merges_mappings_key_by_key_and_replaces_everything_else(shipped):
    shipped(
        base=SMALL,
        small="extends: base\ntraining: {epochs: 7}\nseeds: [4, 5]\n"
        "models: [{name: hadamard, kind: hadamard}]\n",
    )
    content = read_recipe("small")
    assert content["training"] == {"epochs": 7, "batch_size": 8, "learning_rate": 0.001}
    assert [model["name"] for model in content["models"]] == ["hadamard"]
    assert content["seeds"] == [4, 5]
    assert content["title"] == "Small"
    assert content["name"] == "small"
    assert "extends" not in content


def test_what_describes_one_recipe_only_is_not_taken_over(shipped):
    apart = """
sets: [embedded]
bars: [{model: hyper, metric: auc, split: test, at_least: 0.5}]
published: [{model: hyper, metric: auc, split: test, value: 0.5, table: T1, source: p. 1}]
"""
    shipped(base=SMALL + apart, small="extends: base\n")
    assert load_recipe("base").bars
    small = load_recipe("small")
    assert small.sets == small.bars == small.published == ()


def test_extending_a_recipe_that_extends_another_is_refused(shipped):
    shipped(base=SMALL, small="extends: base\n", smaller="extends: small\n")
    with pytest.raises(RecipeError, match="recipe smaller extends small, which extends another; one step"):
        read_recipe("smaller")


def test_extending_itself_is_refused(shipped):
    shipped(base="extends: base\n")
    with pytest.raises(RecipeError, match="one step is allowed"):
        read_recipe("base")


def test_extending_what_is_not_there_lists_what_is(own):
    assert f"no recipe named 'absent'; there are: {recipe_names()[0]}, " in refusal(own("extends: absent\n"))


def test_a_recipe_of_ones_own_may_extend_a_shipped_one(own):
    recipe = load_recipe(own("extends: hyper_cl_bundled\ntraining: {epochs: 1}\n", "mine.yaml"))
    assert recipe.name == "mine"
    assert recipe.training.epochs == 1
    assert recipe.training.batch_size == load_recipe("hyper_cl_bundled").training.batch_size
    assert recipe.sets == ()


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "",
        ".",
        "hyper_cl_bundled.",
        "hyper_cl_bundled\n",
        "Hyper_CL",
        "a" * 300,
        "CON",
        "x\0y",
    ],
)
def test_a_name_that_is_no_recipes_is_refused_with_the_list(name):
    said = refusal(name)
    assert "no recipe named " in said
    assert f"there are: {', '.join(recipe_names()[:8])} and" in said
    assert len(said) < 600


def test_a_name_close_to_a_recipe_is_answered_with_it():
    assert "did you mean hyper_cl_wn18rr?" in refusal("hyper_cl_wn18r")


def test_a_path_that_is_not_there_is_named():
    assert "cannot read ../x.yaml" in refusal("../x.yaml")


# --- the hash -----------------------------------------------------------------------------------------------


def test_the_hash_ignores_what_changes_no_number(own):
    plain = load_recipe(own(SMALL)).hash
    apart = SMALL.replace("Small", "Another title") + "sets: [tiny]\nname: other\n"
    apart += "bars: [{model: hyper, metric: auc, split: test, at_least: 0.5}]\n"
    assert load_recipe(own(apart)).hash == plain


def test_the_hash_does_not_depend_on_how_the_file_is_written(own):
    lines = SMALL.strip().splitlines()
    turned = (
        "\n".join([*lines[1:5], lines[0], *lines[5:]])
        .replace("1e-3", "0.001")
        .replace("hadamard}", "hadamard }")
    )
    assert load_recipe(own(turned)).hash == load_recipe(own(SMALL)).hash


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epochs: 1", "epochs: 2"),
        ("batch_size: 8", "batch_size: 9"),
        ("1e-3", "1e-4"),
        ("1e-3", "1e-3, clip: 1.0"),
        ("seeds: [0]", "seeds: [1]"),
        ("seeds: [0]", "seeds: [0, 1]"),
        ("rank: 4", "rank: 8"),
        ("rank: 4", "rank: 4, identity: true"),
        ("rank: 4", "rank: 4, temperature: 1.0"),
        ("rank: 4", "rank: 4, contrastive: 0.0"),
        ("name: bundled}", "name: bundled, limit: 40}"),
        ("title: Small", "title: Small\nencoder: other"),
        ("title: Small", "title: Small\nresamples: 200"),
    ],
)
def test_the_hash_changes_with_any_setting_that_can_change_a_number(own, old, new):
    assert load_recipe(own(SMALL.replace(old, new))).hash != load_recipe(own(SMALL)).hash


# --- the shipped recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_named_like_its_file(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.title
    assert read_yaml(RECIPE_FOLDER / f"{name}.yaml", RecipeError).get("extends") or recipe.models
    models = {model.name for model in recipe.models}
    assert {bar.model for bar in recipe.bars} | {item.model for item in recipe.published} <= models


def test_a_tiny_recipe_is_a_smaller_variant_of_the_one_it_is_named_for():
    names = set(recipe_names())
    full = {name.removesuffix("_tiny") for name in names if name.endswith("_tiny")}
    papers = {"hyper_cl_bundled", "hyper_cl_e2e", "hyper_cl_csts", "hyper_cl_wn18rr"}
    assert full == papers | {
        "hyper_clip_scenes",
        "hyper_clip_photos",
        "hyper_align_scenes",
        "hyper_align_flickr8k",
        "family_aspect",
    }
    assert full <= names
    for name in full:
        tiny, whole = load_recipe(f"{name}_tiny"), load_recipe(name)
        assert set(tiny.sets) <= {"tiny"}
        assert len(tiny.seeds) == 1
        assert tiny.training.epochs <= whole.training.epochs


def test_settings_cannot_be_changed_after_reading(own):
    recipe = load_recipe(own(SMALL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.title = "other"
