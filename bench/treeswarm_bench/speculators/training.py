"""The training of a speculator, in a folder from which it goes on after any interruption.

First the target writes texts of its own.  Then the head learns from input text, and last from the target's texts, which
are what it will be used on.  How many texts and steps fit into the given minutes is measured once and written down, so
that a run that was interrupted ends with the same weights.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from treeswarm.errors import BadRequest
from treeswarm_bench.speculators.kinds.table import TRAINED_KINDS
from treeswarm_bench.speculators.learning import HeadLearner
from treeswarm_bench.speculators.own_questions import own_questions
from treeswarm_bench.speculators.reads import BATCH, KeptReadings, TextReading, read_texts
from treeswarm_bench.speculators.samples import InputTexts, PromptSource, Samples, padded
from treeswarm_bench.speculators.target import TappedTarget
from treeswarm_bench.speculators.writing import WRITTEN_AT_ONCE, write_texts
from treeswarm_node.speculator.files import AUTOREGRESSIVE, SpeculatorConfig, save_speculator
from treeswarm_node.speculator.guesses import EMBEDDING, VOCABULARY
from treeswarm_node.speculator.packing import packed, unpacked

# Share of the minutes in which the target writes its own texts.
WRITING_SHARE = 0.58
# Share of the steps on input text, for targets that continue texts and for those that answer questions: input text is
# no conversation, and the target reads it anew for each step.
INPUT_SHARE, CHAT_INPUT_SHARE = 0.35, 0.08
# Noise on the states of own texts, which are learned from several times, as a share of their root mean square.
NOISE = 0.1
# Number of texts that are only used to measure agreement.
HELD_OUT = 16
SAVE_EVERY_S, REPORT_EVERY_S = 60.0, 60.0
# A head guesses among so many tokens, those that the texts use most: scoring a whole vocabulary of 128,000 tokens takes
# longer than the layer.
MOST_TOKENS = 8192
# Tokens of input text that are counted for kinds with n-grams.
COUNTED_TOKENS = 1_000_000
WORK = "training"
"""Folder in which a training keeps what it needs to go on."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a training does.  It is written down before the work that it plans begins."""

    seed: int
    minutes: float
    window: int
    """Number of tokens of a text, and of rows that the head attends to."""
    taps: tuple[int, ...]
    chats: bool
    """Whether the target's own texts are replies to questions."""
    kind: str = AUTOREGRESSIVE
    """Kind of the speculator, one of `kinds.table.TRAINED_KINDS`."""
    own_texts: int = 0
    """Number of texts that the target writes, or 0 until that is known."""
    steps: int = 0
    """Number of training steps, or 0 until that is known."""
    spent_s: float = 0.0
    """Seconds spent so far, in all runs of this training."""

    @property
    def input_steps(self) -> int:
        """Number of steps on input text, which come first."""
        return round(self.steps * self.input_share)

    @property
    def input_share(self) -> float:
        """Share of the steps on input text."""
        return CHAT_INPUT_SHARE if self.chats else INPUT_SHARE


@dataclass(frozen=True)
class TargetIdentity:
    """The digests of the target, as nodes compute them."""

    config: str
    weights: str


@dataclass(eq=False)
class SpeculatorTraining:
    """One training, in the folder `out`."""

    target: TappedTarget
    identity: TargetIdentity
    texts: InputTexts
    prompts: PromptSource
    plan: TrainingPlan
    out: Path
    report: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._work = self.out / WORK
        self._work.mkdir(parents=True, exist_ok=True)
        self._continue_plan()
        self._began = self.clock() - self.plan.spent_s

    def run(self) -> SpeculatorConfig:
        """Train to the end, from where the last run was interrupted.  Return the config of the speculator."""
        held_out, own = self._own_texts()
        learner = self._learner(own)
        readings = KeptReadings(self.target, learner.vocabulary, own)
        judged = list(KeptReadings(self.target, learner.vocabulary, held_out).groups())
        if not self.plan.steps:
            self._plan_steps(learner, readings)
        step = self._restore(learner)
        reported = saved = self.clock()
        while step < self.plan.steps:
            loss = learner.learn(self._reading(step, learner, readings), step / self.plan.steps)
            step += 1
            now = self.clock()
            if now - reported > REPORT_EVERY_S:
                agreement = ", ".join(f"{share:.3f}" for share in learner.agreement(judged))
                stage = "input text" if step <= self.plan.input_steps else "the target's own texts"
                self._tell(f"step {step} of {self.plan.steps} on {stage}: loss {loss:.3f}, agreement {agreement}")
                reported = self.clock()
            if now - saved > SAVE_EVERY_S:
                self._save(learner, step)
                saved = self.clock()
        self._save(learner, step)
        return self._finish(learner, own, judged)

    # ---------------------------------------------------------------- plan

    def _continue_plan(self) -> None:
        """Take over the plan of the run before, if there was one.  Raises BadRequest if that was another training."""
        file = self._work / "plan.json"
        if not file.exists():
            self._write_plan()
            return
        content = json.loads(file.read_text("utf-8"))
        before = TrainingPlan(**content | {"taps": tuple(content["taps"])})
        same = replace(before, own_texts=0, steps=0, spent_s=0.0) == replace(self.plan, own_texts=0, steps=0)
        if not same:
            raise BadRequest(
                f"'{self.out}' holds a training with other settings: give the same ones to go on with it, or another "
                "--out"
            )
        self.plan = before

    def _write_plan(self) -> None:
        partial = self._work / "plan.json.part"
        partial.write_text(json.dumps(asdict(self.plan)), "utf-8")
        partial.replace(self._work / "plan.json")

    def _advance(self, *, own_texts: int = 0, steps: int = 0) -> None:
        """Write down the time spent, and numbers that have become known."""
        own_texts, steps = own_texts or self.plan.own_texts, steps or self.plan.steps
        self.plan = replace(self.plan, own_texts=own_texts, steps=steps, spent_s=self.clock() - self._began)
        self._write_plan()

    def _plan_steps(self, learner: HeadLearner, own: KeptReadings) -> None:
        """Measure how long a step takes, and plan as many as the minutes allow.  No weight changes."""
        tokens, real = own.samples.batch(np.arange(min(BATCH, len(own.samples))))
        start = self.clock()
        reading = read_texts(self.target, learner.vocabulary, tokens, real)
        read_s = self.clock() - start
        torch.autograd.backward(learner.loss(reading))
        start = self.clock()
        torch.autograd.backward(learner.loss(reading))
        step_s = max(self.clock() - start, 1e-3)
        learner.head.zero_grad(set_to_none=True)
        # Input text is read for each step, an own text once.
        left_s = 60 * self.plan.minutes - (self.clock() - self._began) - read_s * len(own.samples) / BATCH
        input_share = self.plan.input_share
        self._advance(steps=max(10, round(0.9 * left_s / (step_s + input_share * read_s))))
        self._tell(f"{self.plan.steps} steps fit into {self.plan.minutes:g} minutes")

    # ---------------------------------------------------------------- texts

    def _own_texts(self) -> tuple[Samples, Samples]:
        """Return texts that the target has written: those held out, and those for training."""
        file = self._work / "own.safetensors"
        tensors = load_file(file) if file.exists() else {}
        held_out, own = _read_samples(tensors, "held_out"), _read_samples(tensors, "own")
        if held_out is None:
            held_out = self._write_texts(0, HELD_OUT, held_out=True)
            _write_samples(file, {"held_out": held_out})
        while not self.plan.own_texts or own is None:
            first = 0 if own is None else len(own)
            written = self._write_texts(first, WRITTEN_AT_ONCE, held_out=False)
            own = written if own is None else own.joined(written)
            _write_samples(file, {"held_out": held_out, "own": own})
            self._tell(f"the target has written {len(own)} texts")
            if self.clock() - self._began > 60 * WRITING_SHARE * self.plan.minutes:
                self._advance(own_texts=len(own))
            else:
                self._advance()
        return held_out, own

    def _write_texts(self, first: int, count: int, *, held_out: bool) -> Samples:
        """Let the target write texts, greedily and by sampling in turn."""
        sampled = not held_out and first // WRITTEN_AT_ONCE % 2 == 1
        seed = self.plan.seed * 1_000_003 + first
        prompts = self.prompts.prompts(first, count, held_out=held_out)
        if self.plan.chats and not held_out:
            # Most prompts are questions of the target's own: they are of more kinds than those of any list.
            questions = own_questions(self.target.model, self.prompts.encoder, 3 * count // 4, seed)
            prompts[: len(questions)] = [self.prompts.of_question(question) for question in questions]
        texts = write_texts(
            self.target.model, prompts, self.plan.window, temperature=1.0 if sampled else 0.0, seed=seed
        )
        return padded([[*text, *text[-1:]] if len(text) < 2 else text for text in texts], self.plan.window)

    def _reading(self, step: int, learner: HeadLearner, own: KeptReadings) -> TextReading:
        """Return the texts of a step, the same ones every time, as the target reads them."""
        if step < self.plan.input_steps:
            samples = self.texts.windows(BATCH, self.plan.window, self.plan.seed * 1_000_003 + step)
            return read_texts(self.target, learner.vocabulary, *samples.batch(np.arange(len(samples))))
        random = np.random.default_rng([self.plan.seed, step])
        reading = own.of(random.integers(0, len(own.samples), min(BATCH, len(own.samples))))
        return reading.with_noise(NOISE, self.plan.seed * 1_000_003 + step)

    # ---------------------------------------------------------------- head

    def _learner(self, own: Samples) -> HeadLearner:
        torch.manual_seed(self.plan.seed)
        kind = TRAINED_KINDS[self.plan.kind]
        head = kind.make(self._config()).to(self.target.model.device)
        return kind.learner(self.target, head, self._vocabulary(own))

    def _config(self) -> SpeculatorConfig:
        """Return the config of a head like one of the target's blocks."""
        config = self.target.config
        heads = int(config.num_attention_heads)
        hidden = int(config.hidden_size)
        return SpeculatorConfig(
            kind=self.plan.kind,
            config_digest=self.identity.config,
            weights_digest=self.identity.weights,
            hidden_size=hidden,
            vocab_size=int(self.target.lm_head.shape[0]),
            taps=self.target.taps,
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
            intermediate_size=int(getattr(config, "intermediate_size", None) or 3 * hidden),
            window=self.plan.window,
        )

    def _vocabulary(self, own: Samples) -> torch.Tensor:
        """Return the ids of the tokens that the texts use most, rising."""
        size = int(self.target.lm_head.shape[0])
        if size <= MOST_TOKENS:
            return torch.arange(size)
        counts = np.bincount(self.texts.train, minlength=size).astype(np.float64) / max(1, len(self.texts.train))
        written = own.tokens[np.arange(own.tokens.shape[1]) < own.lengths[:, None]]
        counts += 4 * np.bincount(written, minlength=size) / max(1, len(written))
        return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:MOST_TOKENS]))

    def _restore(self, learner: HeadLearner) -> int:
        """Continue from the last saved step, and return its number."""
        file = self._work / "state.safetensors"
        if not file.exists():
            return 0
        with safe_open(file, framework="pt") as opened:
            step = int(opened.metadata()["step"])
        learner.restore(load_file(file))
        self._tell(f"going on from step {step} of {self.plan.steps}")
        return step

    def _save(self, learner: HeadLearner, step: int) -> None:
        partial = self._work / "state.safetensors.part"
        save_file(learner.state(), partial, metadata={"step": str(step)})
        partial.replace(self._work / "state.safetensors")
        self._advance()

    def _finish(self, learner: HeadLearner, own: Samples, held_out: Sequence[TextReading]) -> SpeculatorConfig:
        """Measure the head on held-out texts, as its files have it, and write them."""
        learner.head.load_state_dict(unpacked(packed(learner.head.state_dict())))
        agreement = learner.agreement(held_out)
        greedy, sampled = learner.fitted_taus(held_out)
        rounded = tuple(round(share, 4) for share in agreement)
        config = replace(self._config(), greedy_tau=round(greedy, 3), sampled_tau=round(sampled, 3), agreement=rounded)
        tensors = dict(learner.head.state_dict())
        texts = [row[:length].astype(np.int64) for row, length in zip(own.tokens, own.lengths, strict=True)]
        tensors |= learner.extra_tensors([*texts, self.texts.train[:COUNTED_TOKENS]], held_out, greedy)
        if len(learner.vocabulary) < config.vocab_size:
            tensors[VOCABULARY] = learner.vocabulary.to(torch.int32)
        if not self.target.is_tied:
            tensors[EMBEDDING] = self.target.embedding
        save_speculator(self.out, config, tensors)
        shares = ", ".join(f"{share:.3f}" for share in agreement)
        self._tell(f"done: the first guess is right at {shares} of the held-out tokens, by level")
        return config

    def _tell(self, words: str) -> None:
        self.report(f"{(self.clock() - self._began) / 60:6.1f} min  {words}")


def _read_samples(tensors: dict[str, torch.Tensor], name: str) -> Samples | None:
    if f"{name}.tokens" not in tensors:
        return None
    return Samples(tensors[f"{name}.tokens"].numpy(), tensors[f"{name}.lengths"].numpy())


def _write_samples(file: Path, samples: dict[str, Samples]) -> None:
    tensors = {}
    for name, each in samples.items():
        tensors[f"{name}.tokens"] = torch.from_numpy(each.tokens)
        tensors[f"{name}.lengths"] = torch.from_numpy(each.lengths)
    partial = file.with_suffix(".part")
    save_file(tensors, partial)
    partial.replace(file)
