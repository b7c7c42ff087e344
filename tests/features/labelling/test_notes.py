"""Notes beside a store: what is kept, by whom, and what must not be lost."""

import json
import multiprocessing
import shutil
import threading

import planted
import pytest

from saebench.errors import UserError
from saebench.features import FeatureStore
from saebench.features.labelling.notes import LONGEST_LABEL, Note, Notes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rows, names = planted.corpus(4)
    return planted.make(tmp_path_factory.mktemp("features") / "small", rows, names, planted.codes(rows))


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made.path, tmp_path / "small")
    return FeatureStore(tmp_path / "small")


def test_kept_beside_the_store_and_found_again(store):
    before = {path.name: path.stat().st_mtime_ns for path in store.path.iterdir()}
    notes = Notes.open(store)
    assert notes.all() == {} and notes.of(3) == Note() and not notes.path.exists()
    notes.change(3, bookmark=True)
    notes.change(3, note="  fires on\nself  ")
    notes.change(5, label=" a\n  word ")
    again = Notes.open(FeatureStore(store.path))
    assert again.of(3).bookmark and again.of(3).note == "fires on\nself" and again.of(3).label == ""
    assert again.labels() == {5: "a word"} and again.bookmarks() == [3]
    assert again.path == store.path.parent / "small.notes.json"
    assert {path.name: path.stat().st_mtime_ns for path in store.path.iterdir()} == before
    store.verify()
    content = json.loads(again.path.read_text())
    assert (content["format"], content["version"]) == ("saebench-notes", 1)
    assert set(content["latents"]) == {"3", "5"} and content["latents"]["3"]["changed"][:2] == "20"


def test_what_becomes_empty_is_removed(store):
    notes = Notes.open(store)
    notes.change(1, bookmark=True, label="x", note="y")
    notes.change(1, label="")
    assert notes.of(1).label == "" and notes.of(1).note == "y"
    notes.change(1, bookmark=False, note=" ")
    assert notes.all() == {} and notes.of(1) == Note()
    assert json.loads(notes.path.read_text())["latents"] == {}


def test_no_change_writes_nothing(store):
    notes = Notes.open(store)
    notes.change(2, label="same")
    before = notes.path.stat().st_mtime_ns, notes.path.stat().st_ino
    assert notes.change(2, label="same").label == "same"
    notes.change(4, bookmark=False)
    assert (notes.path.stat().st_mtime_ns, notes.path.stat().st_ino) == before


def test_two_who_have_it_open_see_each_other(store):
    one, other = Notes.open(store), Notes.open(store)
    one.change(1, bookmark=True)
    assert other.bookmarks() == [1]
    other.change(1, note="mine")
    other.change(2, bookmark=True)
    assert one.of(1) == Note(True, "", "mine", one.of(1).changed) and one.bookmarks() == [1, 2]


def change_many(path: str, offset: int) -> None:
    notes = Notes.open(FeatureStore(path))
    for number in range(14):
        notes.change((2 * number + offset) % 14, note=f"{offset} wrote {number}")
        notes.change(0, **({"label": f"label {number}"} if offset else {"bookmark": True}))


def test_threads_at_once(store):
    """Each with a file of its own opened, as several visitors of a page have."""
    threads = [threading.Thread(target=change_many, args=(str(store.path), offset)) for offset in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    nothing_lost(Notes.open(store))


def nothing_lost(notes: Notes) -> None:
    assert notes.of(0).bookmark and notes.of(0).label == "label 13"
    assert all(notes.of(latent).note.startswith(f"{latent % 2} wrote") for latent in range(14))


@pytest.mark.slow
def test_two_processes_and_four_threads_at_once(store):
    """Nothing that one wrote is lost to another: each sets its own fields of latent 0, and other latents."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=change_many, args=(str(store.path), offset)) for offset in (0, 1)]
    threads = [threading.Thread(target=lambda n=n: Notes.open(store).change(n, label=f"thread {n}")) for n in range(2, 6)]
    for worker in (*processes, *threads):
        worker.start()
    for worker in (*processes, *threads):
        worker.join()
    assert [process.exitcode for process in processes] == [0, 0]
    notes = Notes.open(store)
    nothing_lost(notes)
    assert {n: notes.of(n).label for n in range(2, 6)} == {n: f"thread {n}" for n in range(2, 6)}


def noted(number, label=""):
    note = f'{{"bookmark": true, "label": "{label}", "note": "", "changed": ""}}'
    return f'{{"format": "saebench-notes", "version": 1, "latents": {{"{number}": {note}}}}}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"format": "saebench-notes", "version": 1, "latents": {"1": {"bookm', "is damaged"),
        ("", "is damaged"),
        ("[]", "is not a file of format saebench-notes: move it away to begin anew"),
        ('{"format": "saebench-notes", "version": 7, "latents": {}}', "is of version 7; this saebench reads version 1"),
        ('{"format": "saebench-notes", "version": 1, "latents": {"x": {}}}', "is damaged"),
        (
            '{"format": "saebench-notes", "version": 1, "latents": {"1": {"bookmark": 1, "label": "", "note": "", "changed": ""}}}',
            "is damaged",
        ),
        ('{"format": "saebench-notes", "version": 1}', "is damaged"),
        (noted("1", label="\\ud800"), "is damaged"),
        (noted("9" * 5000), "is damaged"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_left_as_it_is(store, content, said, capsys):
    notes = Notes.open(store)
    notes.path.write_text(content)
    for use in (lambda: notes.of(1), lambda: notes.all(), lambda: notes.change(1, bookmark=True)):
        with pytest.raises(UserError, match=said) as caught:
            use()
        assert str(notes.path) in str(caught.value) and "\n" not in str(caught.value)
    assert notes.bookmarks() == [] and notes.labels() == {}
    (line,) = capsys.readouterr().err.splitlines()  # once for both
    assert said in line and str(notes.path) in line and line.endswith("its notes are ignored")
    assert notes.path.read_text() == content


def test_notes_on_latents_that_the_store_does_not_have_are_ignored_and_kept(store, capsys):
    one = {"bookmark": True, "label": "own", "note": "", "changed": ""}
    latents = {str(latent): one for latent in (3, 14, 99_999)}
    notes = Notes.open(store)
    notes.path.write_text(json.dumps({"format": "saebench-notes", "version": 1, "latents": latents}))
    assert notes.bookmarks() == [3] and notes.labels() == {3: "own"} and notes.of(14) == Note()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{notes.path} has notes on latents from 14 on, which the store does not have: they are ignored"
    notes.change(5, bookmark=True)
    assert notes.bookmarks() == [3, 5]
    assert set(json.loads(notes.path.read_text())["latents"]) == {"3", "5", "14", "99999"}


def test_what_is_wrong_is_said(store, monkeypatch):
    notes = Notes.open(store)
    with pytest.raises(UserError, match="latent 14 is not one of the 14"):
        notes.change(14, bookmark=True)
    with pytest.raises(UserError, match="the label of latent 1 has 301 characters: 300 is the most"):
        notes.change(1, label="x" * (LONGEST_LABEL + 1))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("saebench.features.labelling.notes.write_json", refuse)
    with pytest.raises(UserError, match="cannot write .*small.notes.json: Permission denied"):
        notes.change(1, bookmark=True)
    assert not notes.path.exists()


def test_any_text_is_kept_as_it_is(store):
    text = "<script>alert(1)</script> \u202e \U0001d4b3 \"quotes\" 'and' \\ back"
    Notes.open(store).change(1, label=text, note=text)
    assert Notes.open(store).of(1).label == Notes.open(store).of(1).note == text
