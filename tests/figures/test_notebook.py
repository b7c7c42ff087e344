"""Contexts as notebooks show them: a table that says what it shades, without colours too."""

from html.parser import HTMLParser

from saebench.features import Example
from saebench.figures.notebook import highlighted, table

WORDS = ["<s>", " a<b", "\n", " c"]


class Cells(HTMLParser):
    """The text of all cells of a table, and the styles of what is shaded."""

    def __init__(self):
        super().__init__()
        self.cells, self.styles = [], []

    def handle_starttag(self, tag, attributes):
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "span":
            self.styles.append(dict(attributes)["style"])

    def handle_data(self, data):
        self.cells[-1] += data


def parsed(shown):
    cells = Cells()
    cells.feed(shown._repr_html_())
    return cells


def example(values, focus, document=""):
    return Example(ids=list(range(len(WORDS))), values=values, focus=focus, document=document)


def test_the_table_has_value_token_context_and_document():
    found = parsed(highlighted([example([0, 2.5, 0, 1], 1, "one & two"), example([0, 0, 0, 5], 3)], WORDS.__getitem__))
    heads, first, second = found.cells[:4], found.cells[4:8], found.cells[8:]
    assert heads == ["value", "token", "context", "document"]
    assert first == ["2.50", "·a<b", "<s> a<b↵ c", "one & two"]
    assert second == ["5.00", "·c", "<s> a<b↵ c", ""]


def test_shades_are_shares_of_the_strongest():
    one = [example([0, 2.0, 0, 1.0], 1)]
    shades = [float(style.rpartition(",")[2].rstrip(")")) for style in parsed(highlighted(one, WORDS.__getitem__)).styles]
    weaker = [float(style.rpartition(",")[2].rstrip(")")) for style in parsed(highlighted(one, WORDS.__getitem__, 4.0)).styles]
    assert shades[0] > shades[1] == weaker[0] > weaker[1] > 0


def test_a_single_example_has_no_document_column_and_prints_its_focus():
    shown = highlighted(example([0, 0, 0, 1], 3), WORDS.__getitem__)
    assert parsed(shown).cells[:3] == ["value", "token", "context"]
    assert repr(shown) == "    1.00  <s> a<b↵[ c]"


def test_silence_is_not_shaded():
    assert parsed(highlighted([example([0, 0, 0, 0], 0)], WORDS.__getitem__)).styles == []


def test_a_table_escapes_its_cells_and_prints_in_columns():
    rows = [{"latent": 7, "label": "<b>"}, {"latent": 1234, "label": "line\nend"}]
    assert parsed(table(rows)).cells == ["latent", "label", "7", "<b>", "1234", "line↵end"]
    assert repr(table(rows)).split("\n") == ["latent  label", "7       <b>", "1234    line↵end"]


def test_what_has_no_rows_says_so():
    for empty in (table([]), highlighted([], WORDS.__getitem__)):
        assert repr(empty) == "none"
        assert empty._repr_html_() == "<p>none</p>"
