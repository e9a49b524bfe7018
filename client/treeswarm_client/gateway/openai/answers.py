"""OpenAI's answers to chats and completions, whole or as the chunks of a stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm_client.gateway.answers.pieces import CallPiece, ChoiceAnswer, Piece, TextPiece, ThoughtPiece
from treeswarm_client.gateway.answers.token_text import Decode, TokenBytes
from treeswarm_client.gateway.answers.writer import AnswerMetadata, data_frame
from treeswarm_client.gateway.errors import Failure
from treeswarm_client.gateway.events import Usage
from treeswarm_client.gateway.openai.logprobs import CompletionLogprobs, ShownTokens, chat_logprobs, joined
from treeswarm_client.generation.run import Token

Event = dict[str, Any]
LAST_FRAME = "data: [DONE]\n\n"


@dataclass(eq=False)
class ChatWriter:
    """Writes `chat.completion` and its chunks."""

    metadata: AnswerMetadata
    include_usage: bool
    token_bytes: TokenBytes | None
    """The bytes of tokens, or None if the answer has no log-probabilities."""
    decode: Decode | None = None
    """The function that turns token ids into text, if log-probabilities of the prompt are shown."""
    last_frame: str = LAST_FRAME
    _shown: dict[int, ShownTokens] = field(default_factory=dict)

    def whole(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Event:
        choices = [
            {
                "index": index,
                "message": _message(answer),
                "logprobs": self._all_logprobs(answer),
                "finish_reason": _finish(answer),
                "stop_reason": answer.stop,
            }
            for index, answer in enumerate(answers)
        ]
        body = _object(self.metadata, "chat.completion", choices) | {"usage": usage_object(usage, answers)}
        return body | {"prompt_logprobs": _prompt_logprobs(answers[0], self.decode)} if self.decode else body

    def begin(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[Event]:
        for choice in range(len(answers)):
            yield self._chunk(choice, {"role": "assistant", "content": ""})

    def token(self, choice: int, token: Token, pieces: Sequence[Piece]) -> Iterator[Event]:
        logprobs = None
        if self.token_bytes is not None:
            shown = self._shown.setdefault(choice, ShownTokens(self.token_bytes))
            logprobs = chat_logprobs(tokens, self.token_bytes) if (tokens := shown.add(token)) else None
        deltas = [_delta(piece) for piece in pieces] or ([{"content": ""}] if logprobs else [])
        for delta in deltas:
            yield self._chunk(choice, delta, logprobs)
            logprobs = None

    def end_choice(self, choice: int, answer: ChoiceAnswer, pieces: Sequence[Piece]) -> Iterator[Event]:
        for piece in pieces:
            yield self._chunk(choice, _delta(piece))
        if self.token_bytes is not None and choice in self._shown and (cut := self._shown[choice].end()):
            yield self._chunk(choice, {"content": ""}, chat_logprobs(cut, self.token_bytes))
        yield self._chunk(choice, {}, finish=_finish(answer), stop=answer.stop)

    def end(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[Event]:
        if self.include_usage:
            yield _object(self.metadata, "chat.completion.chunk", []) | {"usage": usage_object(usage, answers)}

    def fail(self, failure: Failure) -> Iterator[Event]:
        yield failure.body

    def frame(self, event: Event) -> str:
        return data_frame(event)

    def _chunk(
        self, choice: int, delta: Event, logprobs: Any = None, finish: str | None = None, stop: str | None = None
    ) -> Event:
        content = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if finish is not None:
            content["stop_reason"] = stop
        return _object(self.metadata, "chat.completion.chunk", [content])

    def _all_logprobs(self, answer: ChoiceAnswer) -> Event | None:
        if self.token_bytes is None:
            return None
        shown = ShownTokens(self.token_bytes)
        tokens = [*(one for token in answer.tokens for one in shown.add(token)), *shown.end()]
        return chat_logprobs(tokens, self.token_bytes)


@dataclass(eq=False)
class CompletionWriter:
    """Writes `text_completion` objects, whole and as chunks."""

    metadata: AnswerMetadata
    include_usage: bool
    token_bytes: TokenBytes | None
    """The bytes of tokens, or None if the answer has no log-probabilities."""
    decode: Decode | None = None
    """The function that turns token ids into text, if log-probabilities of the prompt are shown."""
    last_frame: str = LAST_FRAME
    _logprobs: list[CompletionLogprobs] = field(default_factory=list)
    _answers: Sequence[ChoiceAnswer] = ()

    def whole(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Event:
        choices = []
        for index, answer in enumerate(answers):
            logprobs = None
            if self.token_bytes is not None:
                writer = CompletionLogprobs(self.token_bytes)
                logprobs = joined([*writer.of_prompt(answer), *writer.of(answer.tokens)])
            choice = _text_choice(index, answer.echo + answer.text, logprobs, answer)
            if self.decode:
                choice["prompt_logprobs"] = _prompt_logprobs(answer, self.decode)
            choices.append(choice)
        return _object(self.metadata, "text_completion", choices) | {"usage": usage_object(usage, answers)}

    def begin(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[Event]:
        self._answers = answers
        if self.token_bytes is not None:
            self._logprobs = [CompletionLogprobs(self.token_bytes) for _ in answers]
        return iter(())

    def token(self, choice: int, token: Token, pieces: Sequence[Piece]) -> Iterator[Event]:
        if len(self._answers[choice].tokens) == 1:
            yield from self._echo(choice)
        logprobs = joined(self._logprobs[choice].of([token])) if self._logprobs else None
        if token.text or logprobs:
            yield _object(self.metadata, "text_completion", [_text_choice(choice, token.text, logprobs)])

    def end_choice(self, choice: int, answer: ChoiceAnswer, pieces: Sequence[Piece]) -> Iterator[Event]:
        if not answer.tokens:
            yield from self._echo(choice)
        yield _object(self.metadata, "text_completion", [_text_choice(choice, "", None, answer)])

    def end(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[Event]:
        if self.include_usage:
            yield _object(self.metadata, "text_completion", []) | {"usage": usage_object(usage, answers)}

    def fail(self, failure: Failure) -> Iterator[Event]:
        yield failure.body

    def frame(self, event: Event) -> str:
        return data_frame(event)

    def _echo(self, choice: int) -> Iterator[Event]:
        answer = self._answers[choice]
        if answer.echo:
            logprobs = joined(self._logprobs[choice].of_prompt(answer)) if self._logprobs else None
            yield _object(self.metadata, "text_completion", [_text_choice(choice, answer.echo, logprobs)])


def usage_object(usage: Usage, answers: Sequence[ChoiceAnswer]) -> Event:
    """Return the object that counts the tokens of an answer."""
    thoughts = sum(answer.thought_tokens for answer in answers)
    details = {"completion_tokens_details": {"reasoning_tokens": thoughts}} if thoughts else {}
    return details | {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _object(metadata: AnswerMetadata, kind: str, choices: list[Event]) -> Event:
    return {
        "id": metadata.id,
        "object": kind,
        "created": metadata.created,
        "model": metadata.model,
        "system_fingerprint": metadata.fingerprint,
        "choices": choices,
    }


def _prompt_logprobs(answer: ChoiceAnswer, decode: Decode) -> list[Event | None]:
    """Return the log-probabilities of the prompt in vLLM's form: by token id, the likeliest ones with their rank."""
    scores: list[Event | None] = []
    for score in answer.prompt_logprobs or ():
        if score is None:
            scores.append(None)
            continue
        ranks = {token: rank for rank, (token, _) in enumerate(score.top, 1)}
        values = {score.id: score.logprob} | dict(score.top)
        scores.append(
            {
                str(token): {"logprob": value, "rank": ranks.get(token), "decoded_token": decode([token])}
                for token, value in values.items()
            }
        )
    return scores


def _message(answer: ChoiceAnswer) -> Event:
    message: Event = {"role": "assistant", "content": answer.text or (None if answer.calls else ""), "refusal": None}
    if answer.thoughts:
        message["reasoning_content"] = answer.thoughts
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message


def _delta(piece: Piece) -> Event:
    match piece:
        case TextPiece(text):
            return {"content": text}
        case ThoughtPiece(text):
            return {"reasoning_content": text}
        case CallPiece(index, call_id, name, arguments, begins):
            call: Event = {"index": index, "function": {"arguments": arguments}}
            if begins:
                call |= {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            return {"tool_calls": [call]}


def _finish(answer: ChoiceAnswer) -> str | None:
    return "tool_calls" if answer.calls_tools else answer.finish


def _text_choice(index: int, text: str, logprobs: Any, answer: ChoiceAnswer | None = None) -> Event:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish if answer else None}
    return choice | ({"stop_reason": answer.stop} if answer else {})
