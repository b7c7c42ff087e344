"""Configurations: frozen, strict about names and types, and errors that give the whole key."""

import pytest
from pydantic import Field, model_validator

from saebench.config import Config
from saebench.errors import UserError


class Inner(Config):
    size: int = Field(default=3, gt=0)
    names: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _named(self):
        if len(self.names) > self.size:
            raise ValueError(f"{len(self.names)} names exceed size={self.size}: drop some")
        return self


class Outer(Config):
    title: str
    inner: Inner = Inner()
    several: list[Inner] = Field(default=[])


def test_values_are_kept_and_defaults_filled_in():
    outer = Outer.parse({"title": "a", "inner": {"size": 5}, "several": [{"names": ["x"]}]})
    assert (outer.title, outer.inner.size, outer.inner.names) == ("a", 5, [])
    assert outer.several[0].names == ["x"]
    assert Outer.parse(outer.model_dump(mode="json")) == outer


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Inner().size = 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "missing key title: it has no default"),
        ({"title": 3}, "title=3: input should be a valid string"),
        ({"title": "a", "titel": "b"}, "unknown key titel: did you mean 'title'?"),
        ({"title": "a", "zzz": 1}, "unknown key zzz: known keys: title, inner, several"),
        ({"title": "a", "inner": 4}, "inner=4: input should be a valid dictionary or instance of Inner"),
        ({"title": "a", "inner": {"sise": 4}}, "unknown key inner.sise: did you mean 'size'?"),
        ({"title": "a", "inner": {"size": "many"}}, "inner.size='many': input should be a valid integer"),
        ({"title": "a", "inner": {"size": 0}}, "inner.size=0: input should be greater than 0"),
        ({"title": "a", "several": [{}, {"zzz": 1}]}, "unknown key several.1.zzz: known keys: size, names"),
        ({"title": "a", "several": [{}, {"names": [1]}]}, "several.1.names.0=1: input should be a valid string"),
        ({"title": "a", "inner": {"size": 1, "names": ["b", "c"]}}, "2 names exceed size=1: drop some (key inner)"),
    ],
)
def test_the_first_problem_is_told_in_one_line_with_its_key(values, message):
    with pytest.raises(UserError) as error:
        Outer.parse(values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_key_that_the_data_stands_under_comes_first():
    with pytest.raises(UserError, match=r"^unknown key dictionaries\.0\.sise: did you mean 'size'"):
        Inner.parse({"sise": 1}, "dictionaries.0")
    with pytest.raises(UserError, match=r"drop some \(key dictionaries\.0\)$"):
        Inner.parse({"size": 1, "names": ["a", "b"]}, "dictionaries.0")


def test_the_constructor_raises_the_same_errors():
    with pytest.raises(UserError, match="^size=-1: input should be greater than 0"):
        Inner(size=-1)
    with pytest.raises(UserError, match="^unknown key sise"):
        Inner(sise=1)
