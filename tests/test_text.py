"""An answer's text as it grows, with every kind of tokenizer."""

from __future__ import annotations

import random

import pytest

from launcher.resolve import DEMO
from launcher.text import TextStream, num_shared, open_tokenizer
from tests import tokenizer_files

TEXTS = ["The dog sleeps.", "  two  spaces", "naïve café 北京 🙂 done", "", "a\nb"]
KINDS = ("sentencepiece", "byte_fallback", "llama3", "qwen")


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(DEMO)


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request, tmp_path_factory):
    """One of each kind: pieces or bytes, from either file."""
    return open_tokenizer(
        getattr(tokenizer_files, request.param)(tmp_path_factory.mktemp(request.param))
    )


def streamed(tokenizer, prompt_ids, answer_ids) -> str:
    stream = TextStream(tokenizer, prompt_ids, [])
    shown = "".join(stream.add(token)[0] for token in answer_ids) + stream.finish()
    assert shown == stream.text
    return shown


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_stream_add_up_to_the_whole_text(tokenizer, text):
    prompt, whole = tokenizer.encode("I say"), tokenizer.encode("I say " + text)
    shown = streamed(tokenizer, prompt, whole[len(prompt) :])
    assert shown == tokenizer.decode(whole)[len("I say") :]


def test_a_stream_is_the_whole_less_the_prompt_wherever_both_are_cut(any_tokenizer):
    source = random.Random(1)
    for text in tokenizer_files.random_texts(400, seed=1):
        ids = any_tokenizer.encode(text)
        end = source.randint(0, len(ids))
        start = source.randint(0, end)
        prompt, whole = any_tokenizer.decode(ids[:start]), any_tokenizer.decode(ids[:end])
        expected = whole[num_shared(prompt, whole) :]
        assert streamed(any_tokenizer, ids[:start], ids[start:end]) == expected, (text, start, end)


def test_a_cut_character_reads_as_one_replacement_and_takes_none_with_it(any_tokenizer):
    text = "Hi 😁🤔北京"
    ids = any_tokenizer.encode(text)
    for end in range(1, len(ids)):
        whole = any_tokenizer.decode(ids[:end])
        characters = whole.removesuffix("\ufffd")
        assert text.startswith(characters)
        assert "\ufffd" not in characters
    assert any_tokenizer.decode(ids) == text


def test_an_answer_begins_right_behind_characters_of_several_tokens(any_tokenizer):
    prompt, whole = any_tokenizer.encode("Hi 🤔🥲"), any_tokenizer.encode("Hi 🤔🥲😁 ok")
    assert whole[: len(prompt)] == prompt
    assert streamed(any_tokenizer, prompt, whole[len(prompt) :]) == "😁 ok"


@pytest.mark.parametrize(("number", "expected"), [(4, "😁"), (5, "😁\ufffd"), (8, "😁🤔")])
def test_an_answer_cut_inside_a_second_emoji_keeps_the_first(tokenizer, number, expected):
    prompt, whole = tokenizer.encode("Hi"), tokenizer.encode("Hi😁🤔")
    assert len(whole) == len(prompt) + 8, "each byte is a token of its own"
    assert streamed(tokenizer, prompt, whole[len(prompt) :][:number]) == expected


def test_a_character_that_the_prompt_begins_belongs_to_the_answer(tokenizer):
    ids = tokenizer.encode("Hi😁 ok")
    cut = len(tokenizer.encode("Hi")) + 2
    assert streamed(tokenizer, ids[:cut], ids[cut:]) == "😁 ok"
    # One that stays broken was in the prompt's own decode.
    assert streamed(tokenizer, ids[:cut], ids[cut + 2 :]) == " ok"
    assert streamed(tokenizer, ids[:cut], ids[cut : cut + 1]) == ""


def test_a_token_costs_one_look_up_however_long_the_text_is(tokenizer, monkeypatch):
    prompt = tokenizer.encode("I say " * 100)
    stream = TextStream(tokenizer, prompt, ["never"])
    asked = []
    stream._decoding._bytes_of = lambda token: (asked.append(token), b"x")[1]
    for token in range(50):
        stream.add(token)
    assert asked == list(range(50))


def test_nothing_follows_a_stop_string(tokenizer):
    stream = TextStream(tokenizer, [], ["stop"])
    stream._decoding._bytes_of = lambda token: "a stop 北".encode()[:-1]
    assert stream.add(1) == ("a ", True)
    assert stream.finish() == ""
    assert stream.text == "a "


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
