"""The vocabulary: the published ranks, ordinary text only, and the check of a model's own file."""

import base64
import hashlib
import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss import vocabulary as module
from mlx_gptoss.errors import VocabularyError
from mlx_gptoss.vocabulary import (
    N_TEXT,
    PATTERN,
    Special,
    TextDecoder,
    check_tokenizer_json,
    load_vocabulary,
    special_spelling,
)

PUBLISHED_RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


@pytest.fixture(scope="module")
def published_json() -> dict:
    """A tokenizer.json as transformers writes it: the published one without its merges."""
    spelling = module._byte_spelling()
    vocab = {
        token.decode("latin-1").translate(spelling): rank
        for rank, token in enumerate(load_vocabulary().tokens)
    }
    return {
        "added_tokens": [
            {"id": token, "content": special_spelling(token)} for token in range(N_TEXT, 200_019)
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False},
            ],
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def test_ranks_are_the_published_ones() -> None:
    lines = (
        base64.b64encode(token) + b" %d\n" % rank
        for rank, token in enumerate(load_vocabulary().tokens)
    )
    assert hashlib.sha256(b"".join(lines)).hexdigest() == PUBLISHED_RANKS_SHA256


def test_encoding_has_one_name_per_id_and_as_many_as_the_model_has_rows() -> None:
    encoding = load_vocabulary().encoding
    assert encoding.n_vocab == 201_088
    assert encoding.encode("<|start|>", allowed_special="all") == [200_006]
    names = {encoding.decode_single_token_bytes(token) for token in range(N_TEXT, 201_088)}
    assert len(names) == 201_088 - N_TEXT


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_text_survives_a_round_trip_without_control_tokens(text: str) -> None:
    ids = load_vocabulary().encode(text)
    assert all(token < N_TEXT for token in ids)
    assert load_vocabulary().decode(ids) == text


def test_spelling_of_a_control_token_is_ordinary_text() -> None:
    vocabulary = load_vocabulary()
    for token in range(N_TEXT, 201_088):
        ids = vocabulary.encode(special_spelling(token))
        assert len(ids) > 1
        assert max(ids) < N_TEXT


def test_decode_spells_control_tokens_and_refuses_other_ids() -> None:
    vocabulary = load_vocabulary()
    assert vocabulary.decode([Special.START, 64, 200_013]) == "<|start|>a<|reserved_200013|>"
    for token in (-1, 201_088):
        with pytest.raises(ValueError, match=rf"token id: expected 0\.\.201087, got {token}"):
            vocabulary.decode([token])


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    vocabulary = load_vocabulary()
    assert vocabulary.decode(vocabulary.encode("a\ud800b")) == "a\ufffdb"


def test_a_million_spaces_do_not_break_the_regex_engine() -> None:
    """tiktoken panics (a BaseException) past a million backtracks, so one paste ended the app."""
    vocabulary = load_vocabulary()
    text = "x" + " " * 1_000_001 + "\u3000" * 400_001 + "y"
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_splitting_long_space_changes_nothing_shorter() -> None:
    text = "word " * 100_000 + "\n" * 1000 + "end"
    assert len(text) > module._LONGEST_SPACE
    assert load_vocabulary().encode(text) == load_vocabulary().encoding.encode_ordinary(text)


@settings(max_examples=200, deadline=None)
@given(st.binary(), st.lists(st.integers(0, 40)))
def test_incremental_decoding_equals_decoding_at_once(data: bytes, cuts: list[int]) -> None:
    decoder = TextDecoder()
    edges = [0, *sorted(c for c in cuts if c < len(data)), len(data)]
    pieces = [decoder.feed(data[a:b]) for a, b in pairwise(edges)]
    assert "".join(pieces) + decoder.finish() == data.decode("utf-8", errors="replace")
    assert decoder.finish() == ""


def test_only_text_and_tokens_with_a_meaning_are_sampleable() -> None:
    mask = load_vocabulary().sampleable
    assert mask.shape == (201_088,)
    assert mask[:N_TEXT].all()
    assert [int(token) for token in mask[N_TEXT:].nonzero()[0] + N_TEXT] == [
        199_999, 200_002, 200_003, 200_005, 200_006, 200_007, 200_008, 200_012,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="read-only"):
        mask[5] = False


def test_threads_share_one_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_loaded", [])
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(load_vocabulary())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(v) for v in found}) == 1


def test_damaged_package_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_loaded", [])
    monkeypatch.setattr(module, "files", lambda _: tmp_path)
    with pytest.raises(VocabularyError, match=r"cannot be read.*reinstall mlx-gptoss"):
        load_vocabulary()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/o200k_base.split.xz").write_bytes(module.lzma.compress(b"other"))
    with pytest.raises(VocabularyError, match=r"expected sha256 4407.*got .*reinstall mlx-gptoss"):
        load_vocabulary()


def test_published_file_is_known_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"stands in for 28 MB")
    digest = hashlib.sha256(b"stands in for 28 MB").hexdigest()
    monkeypatch.setattr(module, "PUBLISHED_TOKENIZER_SHA256", digest)
    check_tokenizer_json(path)


def test_file_of_another_writer_is_compared_by_content(
    tmp_path: Path, published_json: dict
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(published_json))
    check_tokenizer_json(path)


def _with_swapped_tokens(parsed: dict) -> None:
    vocab = parsed["model"]["vocab"]
    vocab["Hello"], vocab["hello"] = vocab["hello"], vocab["Hello"]


def _with_fewer_tokens(parsed: dict) -> None:
    parsed["model"]["vocab"].popitem()


def _with_other_special(parsed: dict) -> None:
    parsed["added_tokens"][8]["content"] = "<|im_start|>"


def _with_added_rows(parsed: dict) -> None:
    parsed["added_tokens"].append({"id": 201_088, "content": "<|extra|>"})


def _with_other_pattern(parsed: dict) -> None:
    parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_with_swapped_tokens, r"vocab\['Hello'\]: expected 13225, got 24912; the file is damaged"),
        (_with_fewer_tokens, r"model.vocab: expected 199998 entries, got 199997"),
        (_with_other_special, r"expected <\|start\|> at id 200006, got <\|im_start\|>"),
        (_with_added_rows, r"expected ids 199998..201087, got 201088 \(<\|extra\|>\)"),
        (_with_other_pattern, r"pre_tokenizer: expected one Split with the o200k pattern, got \["),
        (lambda parsed: parsed.pop("model"), r"expected a tokenizer.json with model.vocab"),
    ],
)
def test_file_of_another_model_is_refused(
    tmp_path: Path, published_json: dict, damage, message: str
) -> None:
    parsed = {
        "added_tokens": [dict(entry) for entry in published_json["added_tokens"]],
        "pre_tokenizer": json.loads(json.dumps(published_json["pre_tokenizer"])),
        "model": {"vocab": dict(published_json["model"]["vocab"])},
    }
    damage(parsed)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parsed))
    with pytest.raises(VocabularyError, match=message):
        check_tokenizer_json(path)


def test_truncated_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(VocabularyError, match=r"tokenizer.json: cannot be read: No such file"):
        check_tokenizer_json(path)
    path.write_text('{"model": {"vocab": {"a": 0')
    with pytest.raises(VocabularyError, match=r"it is damaged: fetch it again"):
        check_tokenizer_json(path)


def test_encoding_is_what_tiktoken_builds() -> None:
    """The pattern and ranks give what tiktoken's own o200k definition gives, text by text."""
    from tiktoken_ext import openai_public

    def ranks(*_: object, **__: object) -> dict[bytes, int]:
        return {token: rank for rank, token in enumerate(load_vocabulary().tokens)}

    original = openai_public.load_tiktoken_bpe
    openai_public.load_tiktoken_bpe = ranks
    try:
        theirs = tiktoken.Encoding(**openai_public.o200k_base())
    finally:
        openai_public.load_tiktoken_bpe = original
    for text in ["It's 12345 o'clock", "  a\n\n b\t", "ÀÉ漢字 ｶﾅ", "👩‍👩‍👧 e\u0301", "x=1;//\r\n"]:
        assert load_vocabulary().encode(text) == theirs.encode_ordinary(text)
