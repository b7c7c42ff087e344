import pytest
from helpers import small_text

from saebench.errors import UserError
from saebench.lm import Document, Text, pack


def test_contexts_hold_the_documents_in_order(tiny_lm):
    tokenizer = tiny_lm.tokenizer
    text = small_text(7)
    contexts = pack(text, tokenizer, 32)
    assert contexts.ids_NS[:, 0].eq(tokenizer.bos_token_id).all()
    flat = contexts.ids_NS[:, 1:].flatten().tolist()
    expected = [i for d in text for i in [tokenizer.bos_token_id, *tokenizer(d.text)["input_ids"]]]
    assert flat == expected[: len(flat)]
    assert len(expected) - len(flat) < 31


def test_documents_and_positions_locate_every_token(tiny_lm):
    text = small_text(7)
    contexts = pack(text, tiny_lm.tokenizer, 32)
    encoded = [tiny_lm.tokenizer(d.text)["input_ids"] for d in text]
    rows = zip(
        contexts.ids_NS.flatten().tolist(),
        contexts.documents_NS.flatten().tolist(),
        contexts.positions_NS.flatten().tolist(),
        strict=True,
    )
    for token, document, position in rows:
        if position >= 0:
            assert encoded[document][position] == token
        else:
            assert token == tiny_lm.tokenizer.bos_token_id
    assert contexts.names == [d.name for d in text]


def test_num_tokens_limits_and_reads_no_more_than_needed(tiny_lm):
    read = []
    text = Text("lazy", lambda: (read.append(i) or Document(str(i), "x = 1\n" * 500) for i in range(10_000)))
    assert pack(text, tiny_lm.tokenizer, 32, 320).num_tokens == 320
    assert len(read) <= 64


def test_empty_and_short_texts_are_refused(tiny_lm):
    with pytest.raises(UserError, match="is empty"):
        pack(Text("nothing", list), tiny_lm.tokenizer, 32)
    with pytest.raises(UserError, match="less than one context of 32"):
        pack(Text("short", lambda: [Document("d", "x")]), tiny_lm.tokenizer, 32)
    with pytest.raises(UserError, match="context_size=1"):
        pack(small_text(), tiny_lm.tokenizer, 1)
