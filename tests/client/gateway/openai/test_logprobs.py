"""Log-probabilities of tokens: their bytes are those of the text, and their offsets are places in it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, BadRequestError
from tests.support.scripted_client import ScriptedClient, scripted_http
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from treeswarm_client.gateway.answers.token_text import TokenBytes
from treeswarm_client.gateway.openai.logprobs import CompletionLogprobs, ShownTokens, joined
from treeswarm_client.generation.run import Token
from treeswarm_client.generation.text_stream import StopText, TextStream

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level() -> Tokenizer:
    """Return a tokenizer with a token for each byte, one of two bytes within a character, and an end token."""
    names = [*LETTERS, "ðŁ", "Ġa"]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[("ð", "Ł"), ("Ġ", "a")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Return a tokenizer of SentencePiece's kind: some words, and a token for each byte."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "\u2581", "b", "é"]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


def stream(tokenizer: Tokenizer, text: str, stops: tuple[str, ...] = ()) -> list[Token]:
    """Return the tokens of a text as a generation streams them."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    before = tokenizer.encode("b b", add_special_tokens=False).ids
    texts, stop, tokens = TextStream(tokenizer, before), StopText(stops), []
    for at, token in enumerate(ids):
        piece = stop.add(texts.add(token))
        if stop.hit is None and at == len(ids) - 1:
            piece += stop.flush()
        tokens.append(Token(token, piece, -0.5, 0))
        if stop.hit is not None:
            break
    return tokens


TEXTS = st.text(st.sampled_from("ab é🎉👩‍🚀ß漢"), min_size=1, max_size=12)


@settings(max_examples=60)
@given(kind=st.sampled_from(sorted(TOKENIZERS)), text=TEXTS, stop=st.none() | st.text("ab é🎉", min_size=1, max_size=2))
def test_bytes_of_tokens_are_those_of_the_text(kind: str, text: str, stop: str | None) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = stream(tokenizer, text, () if stop is None else (stop,))
    content = "".join(token.text for token in tokens)
    shown = ShownTokens(TokenBytes(tokenizer))
    streamed = [one for token in tokens for one in shown.add(token)]
    before_end = b"".join(data for _, data in streamed)
    assert content.encode().startswith(before_end)
    assert b"".join(data for _, data in [*streamed, *shown.end()]) == content.encode()
    if stop is None:
        assert content == text
        assert len(streamed) == len(tokens)


@settings(max_examples=40)
@given(kind=st.sampled_from(sorted(TOKENIZERS)), text=TEXTS)
def test_offsets_are_places_in_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    token_bytes, tokens = TokenBytes(tokenizer), stream(TOKENIZERS[kind], text)
    whole = joined(CompletionLogprobs(token_bytes).of(tokens))
    writer = CompletionLogprobs(token_bytes)
    chunks = [joined(writer.of([token])) for token in tokens]
    assert [chunk["text_offset"][0] for chunk in chunks] == whole["text_offset"]
    assert [chunk["tokens"][0] for chunk in chunks] == whole["tokens"]
    for token, offset, name in zip(tokens, whole["text_offset"], whole["tokens"], strict=True):
        data = token_bytes.of(token.id)
        assert text.encode()[len(text[:offset].encode()) :].find(data) in (0, 1, 2, 3)
        assert name == data.decode() if not name.startswith("bytes:") else name.count("\\x") == len(data)


def test_special_tokens_add_no_bytes() -> None:
    tokenizer: Any = TOKENIZERS["byte level"]
    end = tokenizer.token_to_id("<end>")
    assert (TokenBytes(tokenizer).of(end), TokenBytes(tokenizer).of(10**6)) == (b"", b"")
    shown = ShownTokens(TokenBytes(tokenizer))
    assert shown.add(Token(end, "", -1.0, 0)) == []
    assert shown.end() == []


PROMPT, ANSWER = "def read(self):", "\n    return self"


def api_of(client: ScriptedClient) -> AsyncOpenAI:
    return AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=scripted_http(client))


async def test_likeliest_tokens_come_with_their_bytes() -> None:
    client = ScriptedClient(ANSWER)
    chat: Any = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    answer = await api_of(client).chat.completions.create(**chat)
    content = (answer.choices[0].logprobs and answer.choices[0].logprobs.content) or []
    assert len(content) == len(client.answer)
    for entry, token in zip(content, client.answer, strict=True):
        others = [bytes(one.bytes or []) for one in entry.top_logprobs]
        assert others == [TokenBytes(client.tokenizer).of(one) for one in (token, token - 1)]
        assert [one.logprob for one in entry.top_logprobs] == [-0.25, -1.25]
    chunks = [chunk async for chunk in await api_of(client).chat.completions.create(**chat, stream=True)]
    streamed = [
        one for chunk in chunks for one in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or ()
    ]
    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in content]


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo_scores_the_prompt_as_lm_eval_reads_it(length: int, as_ids: bool) -> None:
    client = ScriptedClient(ANSWER)
    ids = client.encode(PROMPT)
    request: Any = {
        "model": "demo", "prompt": ids if as_ids else PROMPT, "max_tokens": length, "echo": True, "logprobs": 1,
    }  # fmt: skip
    (choice,) = (await api_of(client).completions.create(**request)).choices
    assert choice.text == PROMPT + client.decode(client.answer[:length])
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [None, *[-0.5] * (len(ids) - 1), *[-0.25] * length]
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == choice.text
    assert [
        choice.text[at:][: len(token)] for at, token in zip(logprobs.text_offset or [], logprobs.tokens, strict=True)
    ] == logprobs.tokens
    tops: Any = logprobs.top_logprobs
    assert tops[0] is None
    assert [max(top.values()) for top in tops[1:]] == logprobs.token_logprobs[1:]
    chunks = [chunk.choices[0] async for chunk in await api_of(client).completions.create(**request, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [one for chunk in chunks for one in (chunk.logprobs and chunk.logprobs.token_logprobs) or ()] == (
        logprobs.token_logprobs
    )


async def test_prompt_logprobs_have_vllm_s_form() -> None:
    client = ScriptedClient(ANSWER)
    ids = client.encode(PROMPT)
    answer: Any = await api_of(client).completions.create(
        model="demo", prompt=PROMPT, max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    first, *others = answer.choices[0].prompt_logprobs
    assert (first, len(others)) == (None, len(ids) - 1)
    assert others[0] == {str(ids[1]): {"logprob": -0.5, "rank": 1, "decoded_token": client.decode([ids[1]])}}
    assert answer.choices[0].text == client.decode(client.answer[:1])
    for wrong in ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, {"max_tokens": 0}, {"logprobs": 21}):
        with pytest.raises(BadRequestError):
            await api_of(client).completions.create(**{"model": "demo", "prompt": PROMPT, **wrong})
