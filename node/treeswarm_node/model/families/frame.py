"""Run a causal LM's own forward around decoder blocks that are run here.

Families differ in what they do around their blocks: scaled or normed embeddings, absolute positions, rotary tables and
masks by layer kind, arguments, norms and caps before and after the LM head.  None of that is known here: the model's
own forward runs, with every decoder block replaced by a stand-in.  The stand-ins before a span return what they are
given, the first of the span continues with the activations that came from upstream, and the last one ends the forward.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from treeswarm.protocol.spans import Span
from treeswarm_node.attention.interface import IMPLEMENTATION
from treeswarm_node.model.families.blocks import find_blocks, is_wrapper, text_decoder, text_modules
from treeswarm_node.model.families.extra_inputs import ExtraInputs
from treeswarm_node.model.families.lm_head import SlicedHead, keeps_16_bits
from treeswarm_node.model.families.rotary import SessionRows, rotary_by_session

# Names by which layers take the cache of keys and values.
CACHES = ("past_key_values", "layer_past")
# Names by which a text decoder takes what a forward is run with besides tokens and mask.
OPTIONS = {"position_ids", "use_cache"}

RunLayer = Callable[[int, dict[str, Any]], Any]
"""Runs the block with this index with the arguments that the model gave it, and returns the block's result."""
Visit = Callable[[int, dict[str, Any]], Any]


class Frame:
    """Runs a causal LM's forward without its blocks, in the dtype of its parts or in another.

    Parts without weights on this machine compute with zeros: nothing that they compute is used.  A Frame must be used
    from one thread at a time.
    """

    def __init__(self, skeleton: PreTrainedModel, device: torch.device, unused: set[int]) -> None:
        self._build(skeleton, device, None, unused)

    @classmethod
    def for_head(cls, skeleton: PreTrainedModel, device: torch.device) -> "Frame":
        """Return a frame that computes logits in float32; it does not embed."""
        frame, head = cls.__new__(cls), skeleton.get_output_embeddings()
        sliced = {id(head): SlicedHead(head)} if keeps_16_bits(head) else {}
        used = set() if sliced else {id(parameter) for parameter in head.parameters()}
        embeddings = [module for module in skeleton.modules() if isinstance(module, torch.nn.Embedding)]
        embeddings.append(skeleton.get_input_embeddings())
        unused = {id(parameter) for module in embeddings for parameter in module.parameters()} - used
        frame._build(skeleton, device, torch.float32, unused, sliced)
        return frame

    def _build(
        self,
        skeleton: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype | None,
        unused: set[int],
        replaced: Mapping[int, torch.nn.Module] = MappingProxyType({}),
    ) -> None:
        self.blocks = find_blocks(skeleton)
        self.extra_inputs = ExtraInputs(skeleton, self.blocks)
        self.sessions = SessionRows()
        self.device = device
        self._visit: Visit = _visit_nothing
        self.parts_of_result = 0
        """Number of parts of a block's result, or 0 if it is the activations themselves; known after `run`."""
        stand_ins = [_StandIn(self, index, layer) for index, layer in enumerate(self.blocks.layers)]
        copies = _Copies(device, dtype, unused, {id(self.blocks.layers): stand_ins}, replaced, self.sessions)
        copies.not_hosted = _parameters_besides_text(skeleton)
        self.model: PreTrainedModel = copies.module(skeleton)
        self.depends_on_room = copies.depends_on_room
        self.configs = _configs_of(skeleton)
        self.names_of_block = {name for stand_in in stand_ins for name in stand_in.__dict__["_names"]}
        self._arguments = _arguments_of(skeleton)

    @property
    def output_embeddings(self) -> Any:
        """The LM head, a linear layer or one that computes in slices."""
        head: Any = self.model.get_output_embeddings()
        return head

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Return what block 0 is given [n, hidden], for tokens int64 [n] at positions int64 [n].

        Without positions, the model counts them itself.
        """

        def visit(_: int, arguments: dict[str, Any]) -> Any:
            raise _Left(_activations_in(arguments))

        return self._run_until_left(visit, tokens, positions)

    def run(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor | None,
        span: Span,
        run_layer: RunLayer,
        sessions: Sequence[tuple[slice, int]] = (),
        length: int = 0,
        before: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the blocks of `span` on activations [n, hidden] at positions int64 [n], and return the activations.

        Without positions, the model counts them itself.  `sessions` are as in `SessionRows`.  `length` is the number of
        keys that a position bias must cover, if it is more than n.  `before` is what embedding and blocks before the
        span return instead of `hidden`; it must not matter.  `tokens`, int64 [n], are only needed if blocks take inputs
        of their own.
        """

        state = self.extra_inputs.to_state(hidden)

        def visit(index: int, arguments: dict[str, Any]) -> Any:
            if index < span.start:
                return state if before is None else self.extra_inputs.to_state(before)
            if index == span.start:
                arguments[next(iter(arguments))] = state
            result = run_layer(index, arguments)
            self.parts_of_result = len(result) if isinstance(result, tuple | list) else 0
            if index == span.end - 1:
                raise _Left(result[0] if self.parts_of_result else result)
            return result

        self.sessions.rows = list(sessions)
        try:
            embedded = None if before is None or self.extra_inputs.per_layer else before[None]
            zeros = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            inputs = zeros if tokens is None else tokens
            return self._run_until_left(visit, inputs, positions, length, embedded)
        finally:
            self.sessions.rows = []

    def finish(self, hidden: torch.Tensor, parts_of_result: int) -> torch.Tensor:
        """Return the logits [n, vocab] of the last block's activations [n, hidden]."""

        state = self.extra_inputs.to_state(hidden)

        def visit(_: int, __: dict[str, Any]) -> Any:
            return (state, *[None] * (parts_of_result - 1)) if parts_of_result else state

        zeros = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = self._forward(visit, zeros, zeros).logits[0]
        return logits

    def _run_until_left(
        self,
        visit: Visit,
        tokens: torch.Tensor,
        positions: torch.Tensor | None,
        length: int = 0,
        embedded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        try:
            self._forward(visit, tokens, positions, length, embedded)
        except _Left as left:
            return self.extra_inputs.to_rows(left.activations)
        raise AssertionError("the model's forward ran no decoder block")

    def _forward(
        self,
        visit: Visit,
        tokens: torch.Tensor,
        positions: torch.Tensor | None,
        length: int = 0,
        embedded: torch.Tensor | None = None,
    ) -> Any:
        self._visit = visit
        # A mask of ones says that nothing is padded.  Without it, transformers looks for packed texts in positions.
        ones = torch.ones((), dtype=torch.int64, device=self.device).expand(1, max(length, len(tokens)))
        options: dict[str, Any] = {"attention_mask": ones, "use_cache": False, "return_dict": True}
        if positions is not None:
            options["position_ids"] = positions[None]
        inputs = {"input_ids": tokens[None]}
        if embedded is not None and "inputs_embeds" in self._arguments:
            inputs = {"inputs_embeds": embedded}
        try:
            return self.model(**inputs, **{k: v for k, v in options.items() if k in self._arguments})
        finally:
            self._visit = _visit_nothing  # It may hold blocks that are no longer needed, as the check's copies are.

    @contextlib.contextmanager
    def attending_by(self, implementation: str) -> Iterator[None]:
        """Let the model's masks and attention be of another implementation in this context."""
        set_implementation(self.configs, implementation)
        try:
            yield
        finally:
            set_implementation(self.configs, IMPLEMENTATION)


def _visit_nothing(_index: int, _arguments: dict[str, Any]) -> None:
    """Stand for the visit of blocks while no forward runs."""


def set_implementation(configs: list[PretrainedConfig], implementation: str) -> None:
    """Set the attention implementation of configs, also of models whose attention is not exchangeable."""
    for config in configs:
        config._attn_implementation_internal = implementation


def _configs_of(skeleton: PreTrainedModel) -> list[PretrainedConfig]:
    configs = (getattr(module, "config", None) for module in skeleton.modules())
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())


def _parameters_besides_text(skeleton: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters that a multimodal model has for images and sound."""
    text = {id(parameter) for module in text_modules(skeleton) for parameter in module._parameters.values()}
    return {id(parameter) for parameter in skeleton.parameters()} - text


def _arguments_of(skeleton: PreTrainedModel) -> set[str]:
    """Return the names of the arguments that a model's forward takes.

    The forward of some multimodal models hands on to the text decoder what it does not know.
    """
    parameters = inspect.signature(type(skeleton).forward).parameters
    names = set(parameters)
    if is_wrapper(skeleton.config) and any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        names |= set(inspect.signature(type(text_decoder(skeleton)[1]).forward).parameters) & OPTIONS
    return names


def _activations_in(arguments: dict[str, Any]) -> torch.Tensor:
    """Return a block's first argument, which is the activations in every family."""
    activations: torch.Tensor = next(iter(arguments.values()))
    return activations


class _Left(BaseException):  # It is no error, and no model's `except Exception` may catch it.
    """Leaves a model's forward with activations [1, n, hidden]."""

    def __init__(self, activations: torch.Tensor) -> None:
        super().__init__()
        self.activations = activations


class _StandIn(torch.nn.Module):
    """Stands in a model for one of its blocks; it has the block's attributes, and calls the frame."""

    def __init__(self, frame: Frame, index: int, block: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block
        self.__dict__["_frame"] = frame
        self.__dict__["_index"] = index
        self.__dict__["_names"] = list(inspect.signature(type(block).forward).parameters)[1:]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self._frame._visit(self._index, dict(zip(self._names, arguments, strict=False)) | named)


class _Copies:
    """Copies a model's modules; the copies share weights with the originals and may have other children."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        unused: set[int],
        lists: dict[int, list[Any]],
        replaced: Mapping[int, torch.nn.Module],
        sessions: SessionRows,
    ) -> None:
        self._device, self._dtype, self._unused = device, dtype, unused
        self._lists = lists
        """Lists that replace lists of modules: a plain list is sliced in no time, a ModuleList in 0.2 ms."""
        self._modules: dict[int, torch.nn.Module] = dict(replaced)
        self._tensors: dict[int, torch.nn.Parameter] = {}
        self._sessions = sessions
        self.not_hosted: set[int] = set()
        """Ids of parameters that must not matter: they are copied as NaN, which shows in what is computed with them."""
        self.depends_on_room = False

    def module(self, original: torch.nn.Module) -> Any:
        """Return the copy of a module."""
        if id(original) not in self._modules:
            changed = copy.copy(original)
            changed._parameters = {k: p if p is None else self._parameter(p) for k, p in original._parameters.items()}
            changed._buffers = {
                k: b if b is None or b.device.type != "meta" else torch.zeros_like(b, device=self._device)
                for k, b in original._buffers.items()
            }
            changed._modules = {}
            for name, child in original._modules.items():
                if id(child) in self._lists:
                    changed.__dict__[name] = self._lists[id(child)]
                else:
                    changed._modules[name] = child if child is None else self.module(child)
            by_session = rotary_by_session(changed, self._sessions)
            self.depends_on_room |= by_session is not changed
            self._modules[id(original)] = by_session
        return self._modules[id(original)]

    def _parameter(self, original: torch.nn.Parameter) -> torch.nn.Parameter:
        if id(original) not in self._tensors:
            dtype = self._dtype if self._dtype is not None and original.is_floating_point() else original.dtype
            if original.device.type == "meta" or id(original) in self._unused:
                # One number for all values: lookups and products work, and take no memory.
                is_nan = id(original) in self.not_hosted and dtype.is_floating_point
                value = torch.full((), float("nan") if is_nan else 0, dtype=dtype, device=self._device)
                self._tensors[id(original)] = torch.nn.Parameter(value.expand(original.shape), requires_grad=False)
            elif original.dtype == dtype:
                self._tensors[id(original)] = original
            else:
                self._tensors[id(original)] = torch.nn.Parameter(original.data.to(dtype), requires_grad=False)
        return self._tensors[id(original)]
