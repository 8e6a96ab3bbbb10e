"""Text as it grows."""

from __future__ import annotations

import pytest

from launcher.resolve import DEMO
from launcher.text import TextStream, open_tokenizer

TEXTS = ["The dog sleeps.", "  two  spaces", "naïve café 北京 🙂 done", "", "a\nb"]


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(DEMO)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_stream_add_up_to_the_whole_text(tokenizer, text):
    prompt, whole = tokenizer.encode("I say"), tokenizer.encode("I say " + text)
    stream = TextStream(tokenizer, prompt, [])
    shown = "".join(stream.add(token)[0] for token in whole[len(prompt) :]) + stream.finish()
    assert shown == stream.text == tokenizer.decode(whole)[len("I say") :]


def test_half_a_character_is_never_shown(tokenizer):
    prompt, whole = tokenizer.encode("x"), tokenizer.encode("x 北京")
    stream = TextStream(tokenizer, prompt, [])
    assert all("\ufffd" not in stream.add(token)[0] for token in whole[len(prompt) :])


def test_stop_string_over_several_tokens_is_cut_and_never_shown(tokenizer):
    prompt, whole = tokenizer.encode("one"), tokenizer.encode("one two three four")
    stream, shown = TextStream(tokenizer, prompt, ["ee fo"]), ""
    for token in whole[len(prompt) :]:
        new, is_stopped = stream.add(token)
        shown += new
        if is_stopped:
            break
    assert is_stopped
    assert shown == stream.text == " two thr"


def test_beginning_of_a_stop_string_that_does_not_come_is_shown_at_the_end(tokenizer):
    prompt, whole = tokenizer.encode("one"), tokenizer.encode("one two")
    stream = TextStream(tokenizer, prompt, ["two three"])
    shown = "".join(stream.add(token)[0] for token in whole[len(prompt) :])
    assert shown + stream.finish() == " two"


def test_json_tokenizer_adds_what_its_template_says(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    library = tokenizers.Tokenizer(WordLevel({"<s>": 0, "hello": 1, "[UNK]": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = Whitespace()
    library.add_special_tokens(["<s>"])
    library.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    # Left in the file by a fine-tuning; a prompt is neither clipped nor padded.
    library.enable_truncation(2)
    library.enable_padding(length=7, pad_id=2)
    library.save(str(tmp_path / "tokenizer.json"))
    found = open_tokenizer(tmp_path)
    assert found.encode("hello hello hello") == [0, 1, 1, 1]
    assert found.encode("hello") == [0, 1]
    assert found.decode([0, 1]) == "hello"
