"""Recipes: reading, settings from the command line, the ones that ship, and the dictionaries they describe."""

import copy

import pytest

import saebench as sb
from saebench.errors import UserError
from saebench.recipes import Recipe, apply_setting, find_recipe, load_recipe, recipe_names

VALUES = {
    "name": "x",
    "activations": {"sites": ["a", "b"]},
    "dictionaries": [
        {"architecture": "topk", "d_sae": 64, "k": 4, "site": "a"},
        {"architecture": "topk", "id": "wide", "d_sae": 128, "k": 8, "site": "b"},
    ],
}


@pytest.fixture
def values():
    return copy.deepcopy(VALUES)


@pytest.mark.parametrize(
    ("setting", "place", "expected"),
    [
        ("training.lr=0.001", ("training", "lr"), 0.001),
        ("training.lr=1e-3", ("training", "lr"), 0.001),
        ("training.num_tokens=1_000", ("training", "num_tokens"), 1000),
        ("training.betas=[0.5, 0.9]", ("training", "betas"), [0.5, 0.9]),
        ("dictionaries.1.k=16", ("dictionaries", 1, "k"), 16),
        ("activations.sites.0=c", ("activations", "sites", 0), "c"),
        ("activations.sites=['c', 'd']", ("activations", "sites"), ["c", "d"]),
        ("model.name=gpt2", ("model", "name"), "gpt2"),
        ("model.name=openai-community/gpt2", ("model", "name"), "openai-community/gpt2"),
        ("model.name='123'", ("model", "name"), "123"),
        ("text.source=my text #2.txt", ("text", "source"), "my text #2.txt"),
        ("text.source=a=b", ("text", "source"), "a=b"),
        ("text.source=", ("text", "source"), ""),
        ("text={source = 'novels'}", ("text",), {"source": "novels"}),
        ("name=y", ("name",), "y"),
    ],
)
def test_a_setting_changes_one_key(values, setting, place, expected):
    untouched = copy.deepcopy(values)
    apply_setting(values, setting)
    found = values
    for part in place:
        found = found[part]
    assert found == expected
    for key in set(untouched) - {place[0]}:
        assert values[key] == untouched[key]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.lr", "--set 'training.lr' is not of the form key=value, such as training.lr=0.001"),
        ("=3", "--set '=3' is not of the form key=value"),
        ("training..lr=3", "is not of the form key=value"),
        ("dictionaries.2.k=3", "--set dictionaries.2.k: there is no entry '2'; the list has 2, counted from 0"),
        ("dictionaries.k=3", "--set dictionaries.k: there is no entry 'k'; the list has 2, counted from 0"),
        ("dictionaries.-1.k=3", "there is no entry '-1'"),
        ("name.first=3", "--set 'name.first=3': name is \"x\", not a table"),
        ("dictionaries.0.k.x=3", "k is 4, not a table"),
        ("other.0.x=3", "--set other.0.x: there is no entry '0'; the list has 0, counted from 0"),
    ],
)
def test_a_setting_that_fits_nowhere_is_an_error(values, setting, message):
    with pytest.raises(UserError) as error:
        apply_setting(values, setting)
    assert message in str(error.value)


def test_settings_are_applied_in_order_on_top_of_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[activations]\nsites = ["a"]\n[[dictionaries]]\narchitecture = "topk"\nd_sae = 8\nk = 2\n')
    assert load_recipe(path).dictionary_configs() == {"topk-8-k2": sb.TopK(d_sae=8, k=2)}
    changed = load_recipe(path, ["dictionaries.0.k=3", "dictionaries.0.k=4", "evaluation.num_tokens=5"])
    assert changed.dictionary_configs() == {"topk-8-k4": sb.TopK(d_sae=8, k=4)}
    assert changed.evaluation.num_tokens == 5
    assert load_recipe(path).evaluation.num_tokens != 5


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_parse(name):
    recipe = load_recipe(name)
    assert recipe.dictionary_configs()
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe
    assert find_recipe(find_recipe(name)) == find_recipe(name)


def test_all_recipes_ship():
    assert {"builtin", "gpt2-small", "local"} <= set(recipe_names())
    with pytest.raises(UserError, match=r"recipe 'bulitin' not found: give a toml file or one of builtin, "):
        load_recipe("bulitin")


def test_dictionaries_are_named_by_id_or_by_their_settings(values):
    configs = Recipe.parse(values).dictionary_configs()
    assert configs == {"wide": sb.TopK(d_sae=128, k=8, site="b"), "topk-64-k4": sb.TopK(d_sae=64, k=4, site="a")}
    values["dictionaries"].append(values["dictionaries"][0] | {"site": "b"})
    assert set(Recipe.parse(values).dictionary_configs()) == {"wide", "topk-64-k4", "topk-64-k4-2"}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("id", "wide", "dictionaries.1.id='wide' must be a new name"),
        ("id", "../escape", "dictionaries.0.id='../escape' must be a new name of letters, digits"),
        ("id", ".hidden", "dictionaries.0.id='.hidden' must be"),
        ("id", "", "dictionaries.0.id='' must be"),
        ("id", "line\n", "must be a new name"),
        ("id", 3, "dictionaries.0.id=3 must be"),
        ("site", "c", "dictionary 'topk-64-k4' needs site 'c', which activations.sites lacks: add it there"),
        ("architecture", "vae", "dictionaries.0.architecture='vae' is unknown: use one of batchtopk"),
        ("architecture", None, "missing key dictionaries.0.architecture: one of batchtopk"),
        ("k", 65, "k=65 exceeds d_sae=64: lower k or raise d_sae (key dictionaries.0)"),
        ("kk", 65, "unknown key dictionaries.0.kk: did you mean 'k'?"),
        ("d_sae", "wide", "dictionaries.0.d_sae='wide': input should be a valid integer"),
    ],
)
def test_wrong_dictionaries_are_named(values, place, value, message):
    values["dictionaries"][0][place] = value
    with pytest.raises(UserError) as error:
        Recipe.parse(values)
    assert message in str(error.value)


def test_an_id_that_another_dictionary_gets_by_its_settings_is_an_error(values):
    values["dictionaries"][1]["id"] = "topk-64-k4"
    with pytest.raises(UserError, match="two dictionaries are called 'topk-64-k4': give each an id of its own"):
        Recipe.parse(values)
