"""What `auto` chooses on a machine: the device, the dtype, and the numbers that a swarm computes in.  Pure.

`describe_machine` alone looks at the machine, through the torch that its caller imported.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treeswarm.protocol.messages import NumericsClass

AUTO = "auto"
CPU_BF16_FEATURES = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")
"""Names by which torch's CPU capabilities call bfloat16 arithmetic on x86 and Arm."""
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "published", "int8", "int4", "nf4")


@dataclass(frozen=True)
class Machine:
    """What a machine has to compute with."""

    cuda: int = 0
    """Number of CUDA devices."""
    cuda_bf16: bool = False
    """Whether the CUDA devices have bfloat16 arithmetic."""
    mps: bool = False
    """Whether there is an Apple GPU."""
    mps_fault: str = ""
    """Why attention is not computed correctly on the Apple GPU, or empty if it is."""
    cpu_bf16: bool = False
    """Whether the CPU has bfloat16 arithmetic."""
    bitsandbytes: bool = False
    """Whether the library that packs weights in nf4 is installed."""
    cpu_int4: bool = False
    """Whether torch has a kernel for weights in 4 bits on this CPU."""

    def explain_unusable(self, quantization: str, device: str) -> str:
        """Return what to do before this machine can use weights of a kind on the device; empty if it can."""
        if quantization == "nf4" and not self.bitsandbytes:
            return "install bitsandbytes"
        if quantization in ("int4", "published") and not (device == "cpu" and self.cpu_int4):
            return "give --device cpu, with a torch that has this kernel,"
        return ""


@dataclass(frozen=True)
class DeviceChoice:
    """A device, and why it was chosen."""

    name: str
    why: str = ""
    """Reason for an automatic choice, or empty for a device that the user named."""


@dataclass(frozen=True)
class NumericsRequest:
    """The numbers that a user asked for; each may be `auto`."""

    dtype: str = AUTO
    quantization: str = AUTO
    activations: str = AUTO

    @property
    def is_open(self) -> bool:
        """Whether anything is left to choose."""
        return AUTO in (self.dtype, self.quantization, self.activations)

    def allows(self, numerics: NumericsClass) -> bool:
        """Return whether a numerics class has everything that the user named."""
        pairs = (
            (self.dtype, numerics.dtype),
            (self.quantization, numerics.quantization),
            (self.activations, numerics.activations),
        )
        return all(asked in (AUTO, has) for asked, has in pairs)


@dataclass(frozen=True)
class NumericsChoice:
    """The numbers that a node computes in, and why."""

    dtype: str
    quantization: str = "none"
    activations: str = ""
    why: str = ""
    """Reason for an automatic choice, or empty if the user named everything that matters."""
    warning: str = ""
    """What is wrong with the choice, and what to do; empty if nothing is."""


def choose_device(asked: str, machine: Machine) -> DeviceChoice:
    """Return the device asked for; for `auto` CUDA, then an Apple GPU if attention is right on it, else the CPU."""
    if asked != AUTO:
        return DeviceChoice(asked)
    if machine.cuda:
        more = f", the first of {machine.cuda} GPUs" if machine.cuda > 1 else ""
        return DeviceChoice("cuda:0", f"a GPU that torch can use{more}")
    if machine.mps and machine.mps_fault:
        return DeviceChoice("cpu", f"attention fails on the Apple GPU, {machine.mps_fault}")
    if machine.mps:
        return DeviceChoice("mps", "a GPU that torch can use")
    return DeviceChoice("cpu", "no GPU that torch can use")


def choose_dtype(asked: str, device: str, machine: Machine, checkpoint: str) -> tuple[str, str]:
    """Return the dtype asked for and no reason; for `auto` a dtype for `device` and the reason.

    `checkpoint` is the dtype in which the model was published, or empty if its config does not say.
    """
    if asked != AUTO:
        return asked, ""
    if checkpoint not in DTYPES or checkpoint == "float32":
        return "float32", "the checkpoint's dtype" if checkpoint == "float32" else "the checkpoint names no other dtype"
    kind = device.partition(":")[0]
    has_bf16 = {"cuda": machine.cuda_bf16, "cpu": machine.cpu_bf16}.get(kind, True)
    if kind == "cpu" and checkpoint == "float16":
        return "float32", "float16 is slow on CPUs"
    if checkpoint == "bfloat16" and not has_bf16:
        return "float32", f"this {'CPU' if kind == 'cpu' else 'GPU'} has no bfloat16 arithmetic"
    return checkpoint, "the checkpoint's dtype"


def choose_numerics(
    request: NumericsRequest, device: str, machine: Machine, checkpoint: str, swarm: Sequence[NumericsClass]
) -> NumericsChoice:
    """Return the numbers for a node: those of the swarm that it joins if they can be had here, else its own.

    `swarm` has the numerics class of each other node that serves the model.  Nodes of different classes never serve one
    session, so a node of a class of its own helps nobody.
    """
    dtype, why = choose_dtype(request.dtype, device, machine, checkpoint)
    own = NumericsChoice(
        dtype,
        "none" if request.quantization == AUTO else request.quantization,
        "" if request.activations == AUTO else request.activations,
        why,
    )
    if not swarm:
        return own
    classes = Counter((c.dtype, c.quantization or "none", c.activations) for c in swarm)
    # A record may name any quantization, also one of a later release.
    known = [values for values, _ in classes.most_common() if values[1] in QUANTIZATIONS]
    common = NumericsClass("", *classes.most_common(1)[0][0])
    for values in known:
        numerics = NumericsClass("", *values)
        if request.allows(numerics) and not machine.explain_unusable(numerics.quantization, device):
            why = "as the swarm computes" if request.is_open else ""
            return NumericsChoice(*values, why, _slowness(request.dtype, numerics.dtype, device, machine))
    difference = f"this node will compute with {_words(own)}, the swarm's nodes with {_words(common)}, so that no text "
    difference += "can use both"
    if common.quantization not in QUANTIZATIONS:
        hint = "install the release that they run"
    elif request.allows(common):
        hint = f"{machine.explain_unusable(common.quantization, device)} to join them"
    else:
        hint = "leave out --dtype, --quantization and --activations to join them"
    return NumericsChoice(own.dtype, own.quantization, own.activations, why, f"{difference}: {hint}")


def _slowness(asked: str, dtype: str, device: str, machine: Machine) -> str:
    """Return a warning if a swarm's dtype, which the user did not ask for, is one that this machine only emulates."""
    usual, reason = choose_dtype(AUTO, device, machine, dtype)
    if asked != AUTO or usual == dtype:
        return ""
    return f"this node computes in {dtype}, as the swarm does, and will be slow: {reason}"


def _words(numerics: NumericsChoice | NumericsClass) -> str:
    quantization = "" if numerics.quantization in ("", "none") else f", {numerics.quantization} weights"
    activations = f", {numerics.activations} activations" if numerics.activations else ""
    return f"{numerics.dtype}{quantization}{activations}"


def checkpoint_dtype(config: dict[str, Any]) -> str:
    """Return the dtype in which a model was published, from its config, or an empty string."""
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                return str(part[key]).removeprefix("torch.")
    return ""


def describe_machine(torch: Any, *, bitsandbytes: bool = False) -> Machine:
    """Return what this machine has, as the imported module `torch` sees it."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = bool(torch.backends.mps.is_available())
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return Machine(
        cuda=cuda,
        cuda_bf16=bool(cuda) and bool(torch.cuda.is_bf16_supported(including_emulation=False)),
        mps=mps,
        mps_fault=attention_fault(torch, "mps") if mps else "",
        cpu_bf16=any(features.get(feature) for feature in CPU_BF16_FEATURES),
        bitsandbytes=bitsandbytes,
        cpu_int4=hasattr(torch, "_weight_int4pack_mm_for_cpu"),
    )


def attention_fault(torch: Any, device: str) -> str:
    """Return why a device does not compute what attention to a tree needs, or an empty string if it does.

    It compares a masked attention in two parts, merged by log-sum-exp, on copied rows, with the CPU's.
    """
    try:
        generator = torch.Generator().manual_seed(0)
        queries, keys, values = (torch.randn(2, 8, 16, generator=generator) for _ in range(3))
        mask = torch.ones(8, 8, dtype=torch.bool).tril()
        expected = _attend(torch, queries, keys, values, mask)
        moved = [part.to(device) for part in (queries, keys, values, mask)]
        difference = float((_attend(torch, *moved).cpu() - expected).abs().max())
    except Exception as error:  # a backend may raise anything
        return (str(error) or type(error).__name__).splitlines()[0]
    return "" if difference < 1e-4 else f"it is off by {difference:.1e}"


def _attend(torch: Any, queries: Any, keys: Any, values: Any, mask: Any) -> Any:
    order = torch.arange(keys.shape[1] - 1, -1, -1, device=keys.device)
    keys, values = keys[:, order][:, order], values[:, order][:, order]
    scores = (queries @ keys.transpose(1, 2)) / keys.shape[2] ** 0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    half = keys.shape[1] // 2
    parts = [(scores[..., :half], values[:, :half]), (scores[..., half:], values[:, half:])]
    sums = torch.stack([torch.logsumexp(part, -1) for part, _ in parts])
    weights = torch.exp(sums - torch.logsumexp(sums, 0)).nan_to_num()
    outputs = [torch.softmax(part, -1).nan_to_num() @ value for part, value in parts]
    return sum(weight[..., None] * output for weight, output in zip(weights, outputs, strict=True))
