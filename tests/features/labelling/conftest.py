"""The planted corpus, its store and its offline labels, made once for all tests of labels."""

import shutil

import planted
import pytest

from saebench.features import FeatureStore
from saebench.features.labelling.labels import label_offline


@pytest.fixture(scope="session")
def text():
    return planted.corpus()


@pytest.fixture(scope="session")
def store(text, tmp_path_factory):
    """To be left as it is."""
    return planted.make(tmp_path_factory.mktemp("features") / "planted", *text, planted.codes(text[0]))


@pytest.fixture(scope="session")
def labels(store):
    return label_offline(store)


@pytest.fixture
def fresh(store, tmp_path):
    """A store of its own, for tests that change what is beside it."""
    shutil.copytree(store.path, tmp_path / "planted")
    return FeatureStore(tmp_path / "planted")
