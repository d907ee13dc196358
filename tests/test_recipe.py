"""Recipes: read, checked, and refused with the place of the mistake."""

from pathlib import Path

import pytest

import allrounder as ar
from allrounder.recipe import load_recipe

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


def write(folder, text):
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_the_default_is_the_embedded_digits_with_every_method():
    recipe = load_recipe()
    assert recipe.suite == "digits"
    assert recipe.methods == {}
    assert recipe.all_seeds == [0, 1, 2]
    assert load_recipe(seed=4, seeds=2).all_seeds == [4, 5]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path):
    assert load_recipe(path).title


def test_methods_are_a_list_or_a_mapping(tmp_path):
    assert load_recipe(write(tmp_path, "methods: [average, ties]")).methods == {"average": {}, "ties": {}}
    recipe = load_recipe(write(tmp_path, "methods:\n  average:\n  ties: {density: 0.1, combine: sum}\n"))
    assert recipe.methods == {"average": {}, "ties": {"density": 0.1, "combine": "sum"}}
    assert load_recipe(write(tmp_path, "")).suite == "digits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("suit: digits", "suit: no such key; did you mean 'suite'"),
        ("suite: numbers", "suite: input should be 'digits'"),
        ("seeds: 0", "seeds: input should be greater than or equal to 1, got 0"),
        ("training: {lr: fast}", "training.lr: input should be a valid number"),
        ("training: {epoch: 3}", "training.epoch: no such key; did you mean 'epochs'"),
        ("methods: [tie]", "methods.tie: no such method; did you mean 'ties'"),
        ("methods: {ties: {densty: 0.2}}", "methods.ties.densty: no such option; did you mean 'density'"),
        ("methods: {ties: {density: 20}}", "methods.ties.density: input should be less than or equal to 1, got 20"),
        ("methods: {ties: {combine: max}}", "methods.ties.combine: input should be 'mean' or 'sum'"),
        ("methods: {average: {scale: 1}}", "methods.average.scale: no such option; it has no options"),
        ("methods: {ties: 0.2}", "methods.ties: input should be a valid dictionary"),
        ("- a\n- b", "must be a mapping of keys, got list"),
        ("suite: [", "not readable YAML at line"),
        ("suite: !!python/object/apply:os.getcwd []", "not readable YAML"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path, text, message):
    with pytest.raises(ar.InputError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ar.InputError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ar.InputError, match="not readable YAML"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(ar.InputError, match="not readable YAML"):
        load_recipe(tmp_path)


def test_ways_of_training_together_stand_under_one_key(tmp_path):
    for text in (
        "methods: {average: {}, multitask: {mt-adamw: {temperature: 2}}}",
        "methods:\n  average:\n  multitask:\n    mt-adamw:\n      temperature: 2",
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        assert load_recipe(tmp_path / "recipe.yaml").methods == {
            "average": {},
            "multitask/mt-adamw": {"temperature": 2.0},
        }
    (tmp_path / "recipe.yaml").write_text("methods: {multitask: [mt-adamw]}")
    assert load_recipe(tmp_path / "recipe.yaml").methods == {"multitask/mt-adamw": {}}
    (tmp_path / "recipe.yaml").write_text("methods: {multitask: [mean], continual: {er: {buffer: 5}}}")
    assert load_recipe(tmp_path / "recipe.yaml").methods == {"multitask/mean": {}, "continual/er": {"buffer": 5}}
    (tmp_path / "recipe.yaml").write_text("methods: {multitask: {mt-adam: {}}}")
    with pytest.raises(
        ar.InputError, match="methods.multitask/mt-adam: no such method; did you mean 'multitask/mt-adamw'"
    ):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("methods: {multitask: {mt-adamw: {temperature: -1}}}")
    with pytest.raises(ar.InputError, match="methods.multitask/mt-adamw.temperature: .* greater than 0"):
        load_recipe(tmp_path / "recipe.yaml")
