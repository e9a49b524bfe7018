"""A model's family is recognised by its tokenizer, and two vocabularies are compared token by token."""

import json
from pathlib import Path

import pytest

from treeswarm.errors import ModelError
from treeswarm.model_files import ModelShape
from treeswarm_client.drafters.selection.families import FAMILIES, DraftFamily, family_of
from treeswarm_client.drafters.selection.vocabulary import Vocabulary, read_vocabulary, same_texts, share_vocabulary


def shape(vocab_size: int, blocks: int = 32, hidden_size: int = 4096) -> ModelShape:
    return ModelShape("llama", blocks, hidden_size, vocab_size, 4096, frozenset())


def vocabulary(family: DraftFamily) -> Vocabulary:
    return Vocabulary({9_999_999: "text"}, family.marks)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_family_is_recognised_by_its_marks(family: DraftFamily) -> None:
    for size in family.vocab_sizes:
        assert family_of(shape(size), vocabulary(family)) is family
    assert family_of(shape(family.vocab_sizes[0] + 1), vocabulary(family)) is None, "another size of embeddings"
    assert family_of(shape(family.vocab_sizes[0]), Vocabulary({}, {})) is None, "none of its special tokens"


def test_a_qwen_2_5_model_with_thinking_tokens_keeps_its_family() -> None:
    """QwQ has Qwen 3's special tokens and the padded embeddings of Qwen 2.5."""
    by_name = {family.name: family for family in FAMILIES}
    assert family_of(shape(152064), vocabulary(by_name["Qwen 3"])) is by_name["Qwen 2.5"]


def test_a_draft_must_be_at_most_half_the_target() -> None:
    draft = DraftFamily("Some", "org/small", 1.0, 10, 100, (), {})
    assert draft.is_smaller_than(shape(1, blocks=20, hidden_size=100))
    assert not draft.is_smaller_than(shape(1, blocks=19, hidden_size=100))


def test_special_tokens_may_differ_and_texts_may_not() -> None:
    base = Vocabulary({0: "a", 1: "b", 2: "<s>"}, {2: "<s>"})
    assert same_texts(base, Vocabulary({0: "a", 1: "b"}, {2: "<s>", 3: "<think>"}))
    assert same_texts(base, Vocabulary({0: "a", 1: "b", 2: "<reserved>"}, {2: "<reserved>"}))
    assert not same_texts(base, Vocabulary({0: "b", 1: "a"}, {2: "<s>"}))
    assert not same_texts(base, Vocabulary({0: "a"}, {2: "<s>"}))


def test_vocabularies_are_read_in_both_forms(tmp_path: Path) -> None:
    added = [{"id": 2, "content": "<s>"}]
    contents = {
        "dictionary": {"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, "added_tokens": added},
        "list": {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}},
        "none": {"model": {}},
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(tmp_path / "dictionary").text == {0: "a", 1: "b"} == read_vocabulary(tmp_path / "list").text
    assert read_vocabulary(tmp_path / "dictionary").added == {2: "<s>"}
    assert share_vocabulary(tmp_path / "dictionary", tmp_path / "list")
    with pytest.raises(ModelError, match="has no vocabulary"):
        read_vocabulary(tmp_path / "none")
