"""Tokenizer files of both kinds: ids and text as transformers gives them, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from launcher.resolve import DEMO
from launcher.text import open_tokenizer
from parallel.errors import CheckpointError
from tests import tokenizer_files
from tests.check_tokenizers import CASES, differences
from tests.tokenizer_files import LLAMA, flags, sentencepiece

IM_START, IM_END = 2048, 2049  # behind the demo's 2,048 pieces


@pytest.fixture
def transformers():
    pytest.importorskip("transformers", minversion="5.0", reason="version 4 reads legacy otherwise")


@pytest.fixture
def protobuf(transformers):
    pytest.importorskip(
        "google.protobuf", reason="transformers reads tokenizer.model with protobuf"
    )


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("json")])
@pytest.mark.usefixtures("transformers")
def test_ids_and_text_of_a_json_file_equal_those_of_transformers(name, tmp_path):
    assert not differences(name, tmp_path, 60)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("model")])
@pytest.mark.usefixtures("protobuf")
def test_ids_and_text_of_a_model_equal_those_of_transformers(name, tmp_path):
    """`python -m tests.check_tokenizers` takes 2,000 texts for each."""
    assert not differences(name, tmp_path, 60)


@pytest.mark.usefixtures("protobuf")
def test_every_model_of_the_shared_data_equals_transformers(shared, tmp_path):
    for place, model in enumerate(sorted(shared.rglob("*.model"))):
        config = model.with_name("tokenizer_config.json")
        values = json.loads(config.read_text()) if config.exists() else {"add_bos_token": True}
        folder = sentencepiece(tmp_path / str(place), model, values)
        assert not differences(lambda _, folder=folder: folder, tmp_path, 60), model


@pytest.mark.parametrize(("legacy", "prefix"), [(True, "always"), (False, "first")])
def test_both_kinds_of_file_give_the_same_ids(tmp_path, legacy, prefix):
    decoder = {
        "2048": flags("<tool>", normalized=True),
        "2049": flags("<|im_start|>", special=True),
    }
    config = {**LLAMA, "legacy": legacy, "added_tokens_decoder": decoder}
    model = open_tokenizer(sentencepiece(tmp_path / "model", config=config))
    library = open_tokenizer(tokenizer_files.byte_fallback(tmp_path / "json", prefix))
    for text in tokenizer_files.random_texts(200):
        assert model.encode(text) == library.encode(text), text
        assert model.decode(model.encode(text)) == library.decode(library.encode(text)), text


def test_special_tokens_in_a_text_become_their_ids_and_leave_no_text(tmp_path):
    ours = open_tokenizer(
        sentencepiece(
            tmp_path, config=LLAMA, added_tokens={"<|im_start|>": IM_START, "<|im_end|>": IM_END},
            special_tokens_map={"additional_special_tokens": ["<|im_end|>"]},
        )
    )  # fmt: skip
    hello, again = ours.encode("Hello"), ours.encode("[INST] hi")[1:]
    assert ours.encode("Hello</s><s> [INST] hi") == [*hello, 2, 1, *again]
    ids = ours.encode("<|im_start|>Hello<|im_end|>")
    assert (ids[:2], ids[-1]) == ([1, IM_START], IM_END)
    assert ours.decode(ids) == "<|im_start|>Hello"  # an added token is text, a special one is not
    assert ours.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": IM_END}


@pytest.mark.parametrize(("legacy", "is_word_start"), [(True, True), (False, False), (None, False)])
def test_legacy_puts_a_space_behind_each_special_token(tmp_path, legacy, is_word_start):
    config = LLAMA if legacy is None else {**LLAMA, "legacy": legacy}
    ours = open_tokenizer(sentencepiece(tmp_path, config=config))
    assert ours.decode(ours.encode("the</s>the")) == ("the the" if is_word_start else "thethe")


def test_ids_beyond_every_vocabulary_are_no_text(tmp_path):
    for folder in (DEMO, tokenizer_files.byte_fallback(tmp_path)):
        assert open_tokenizer(folder).decode([1, 999_999]) == ""


@pytest.mark.parametrize("name", ["tokenizer.model", "llama2.model", "vocabulary"])
def test_a_model_of_any_name_is_read_with_the_files_beside_it(tmp_path, name):
    folder = sentencepiece(tmp_path, config=LLAMA, added_tokens={"<|im_start|>": IM_START})
    file = shutil.move(folder / "tokenizer.model", folder / name)
    assert open_tokenizer(file).encode("<|im_start|>") == [1, IM_START]


def test_a_json_file_of_any_name_is_read(tmp_path):
    folder = tokenizer_files.llama3(tmp_path)
    ids = open_tokenizer(folder).encode("two words")
    file = shutil.move(folder / "tokenizer.json", folder / "other.json")
    assert open_tokenizer(file).encode("two words") == ids


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=rf"{name} is missing; "):
        open_tokenizer(tmp_path / name)


DAMAGED = {
    "added_tokens is a list": ({"added_tokens": ["<x>"]}, "added_tokens.json must hold a JSON object"),
    "an id is text": ({"added_tokens": {"<x>": "7"}}, "the id of '<x>' must be a whole number from 0"),
    "an id is true": ({"added_tokens": {"<x>": True}}, "whole number from 0, but is True"),
    "an id is negative": ({"added_tokens": {"<x>": -1}}, "whole number from 0, but is -1"),
    "an id is beyond int32": ({"added_tokens": {"<x>": 1 << 31}}, "but is 2147483648"),
    "an id is a piece's": ({"added_tokens": {"<x>": 300}}, "gives '<x>' the id 300, but that is"),
    "a piece has another id": ({"added_tokens": {"</s>": 2048}}, "the id 2048, but '</s>' is 2;"),
    "two tokens of one id": ({"added_tokens": {"<x>": 2048, "<y>": 2048}}, "but that is '<x>';"),
    "two ids of one token": (
        {"decoder": {"2048": flags("<x>"), "2049": flags("<x>")}}, "but '<x>' is 2048;"
    ),
    "an id is no number": ({"decoder": {"a": flags("<x>")}}, "whole number from 0, but is 'a'"),
    "a token is a number": ({"decoder": {"2048": 5}}, "added_tokens_decoder.2048 must be"),
    "a token has no text": ({"decoder": {"2048": flags("")}}, "2048.content must be a text, but is ''"),
    "a flag is a number": ({"decoder": {"2048": {**flags("<x>"), "lstrip": 1}}}, "2048.lstrip must be"),
    "a decoder is a list": ({"decoder": []}, "added_tokens_decoder must be an object of tokens"),
    "a name is a number": ({"special_tokens_map": {"pad_token": 5}}, "pad_token must be a token's"),
    "a list is a number": (
        {"special_tokens_map": {"additional_special_tokens": 5}}, "must be a list of tokens"
    ),
    "legacy is text": ({"config": {"legacy": "yes"}}, "legacy must be true or false"),
    "a prefix is a number": ({"config": {"add_prefix_space": 0}}, "add_prefix_space must be true"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_beside_the_model_that_is_wrong_is_one_sentence(tmp_path, name):
    files, expected = DAMAGED[name]
    config = {**LLAMA, **files.get("config", {})}
    if "decoder" in files:
        config["added_tokens_decoder"] = files["decoder"]
    beside = {key: value for key, value in files.items() if key not in ("config", "decoder")}
    with pytest.raises(CheckpointError) as caught:
        open_tokenizer(sentencepiece(tmp_path, config=config, **beside))
    assert expected in str(caught.value)
    assert str(caught.value).count("; ") == 1
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "name", ["added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"]
)
def test_json_that_cannot_be_read_is_named(tmp_path, name):
    folder = sentencepiece(tmp_path)
    (folder / name).write_text('{"<x>": ')
    with pytest.raises(CheckpointError, match=f"{name} is not readable JSON"):
        open_tokenizer(folder)


def test_a_decoder_that_is_not_known_is_refused(tmp_path):
    from tokenizers import Tokenizer, decoders

    folder = tokenizer_files.llama3(tmp_path)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.decoder = decoders.WordPiece()
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(
        CheckpointError, match=r"decoder must be of the steps .* but has .*WordPiece"
    ):
        open_tokenizer(folder)


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
    assert found.decode([0, 1, 1]) == "hello hello"  # as the library, which has no decoder here
