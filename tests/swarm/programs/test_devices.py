"""`auto` chooses the device and the numbers of a node from what the machine has and how the swarm computes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from treeswarm.programs.devices import (
    AUTO,
    Machine,
    NumericsRequest,
    attention_fault,
    checkpoint_dtype,
    choose_device,
    choose_dtype,
    choose_numerics,
    describe_machine,
)
from treeswarm.protocol.messages import NumericsClass

PLAIN_CPU, NEW_CPU = Machine(), Machine(cpu_bf16=True)
OLD_GPU, NEW_GPU = Machine(cuda=1), Machine(cuda=1, cuda_bf16=True)
APPLE, BROKEN_APPLE = Machine(mps=True), Machine(mps=True, mps_fault="it is off by 1.0e-01")
BF16, F32 = NumericsClass("w" * 64, "bfloat16"), NumericsClass("w" * 64, "float32")
NF4 = NumericsClass("w" * 64, "bfloat16", "nf4")
INT4, INT8 = NumericsClass("w" * 64, "bfloat16", "int4"), NumericsClass("w" * 64, "float32", "int8")
INT8_ROWS = NumericsClass("w" * 64, "bfloat16", "none", "int8")
OPEN = NumericsRequest()


@pytest.mark.parametrize(
    ("machine", "name", "why"),
    [
        (PLAIN_CPU, "cpu", "no GPU"),
        (NEW_GPU, "cuda:0", "a GPU that torch can use"),
        (Machine(cuda=4, mps=True), "cuda:0", "the first of 4 GPUs"),
        (APPLE, "mps", "a GPU that torch can use"),
        (BROKEN_APPLE, "cpu", "attention fails on the Apple GPU, it is off by 1.0e-01"),
    ],
)
def test_a_gpu_is_chosen_if_it_can_be_used(machine: Machine, name: str, why: str) -> None:
    choice = choose_device(AUTO, machine)
    assert choice.name == name
    assert why in choice.why


def test_a_dtype_of_the_swarm_that_is_only_emulated_here_is_warned_of() -> None:
    choice = choose_numerics(OPEN, "cpu", PLAIN_CPU, "bfloat16", [BF16])
    assert (choice.dtype, choice.why) == ("bfloat16", "as the swarm computes")
    assert choice.warning.endswith("will be slow: this CPU has no bfloat16 arithmetic")
    assert choose_numerics(OPEN, "cpu", NEW_CPU, "bfloat16", [BF16]).warning == ""
    assert choose_numerics(OPEN, "cpu", PLAIN_CPU, "bfloat16", [F32]).warning == ""
    asked = NumericsRequest(dtype="bfloat16")
    assert choose_numerics(asked, "cpu", PLAIN_CPU, "bfloat16", [BF16]).warning == ""


def test_a_quantization_that_is_unknown_here_is_not_taken_over() -> None:
    unknown = NumericsClass("w" * 64, "bfloat16", "fp2")
    machine = Machine(bitsandbytes=True)
    assert choose_numerics(OPEN, "cpu", machine, "float32", [unknown, unknown, BF16]).dtype == "bfloat16"
    alone = choose_numerics(OPEN, "cpu", machine, "float32", [unknown])
    assert (alone.dtype, alone.quantization) == ("float32", "none")
    assert "fp2 weights" in alone.warning
    assert alone.warning.endswith("install the release that they run")


def test_a_named_device_is_kept_without_a_reason() -> None:
    assert (choose_device("cuda:1", PLAIN_CPU).name, choose_device("cpu", NEW_GPU).why) == ("cuda:1", "")


@pytest.mark.parametrize(
    ("machine", "device", "checkpoint", "dtype", "why"),
    [
        (NEW_GPU, "cuda:0", "bfloat16", "bfloat16", "the checkpoint's dtype"),
        (NEW_GPU, "cuda:0", "float16", "float16", "the checkpoint's dtype"),
        (NEW_GPU, "cuda:0", "float32", "float32", "the checkpoint's dtype"),
        (OLD_GPU, "cuda:0", "bfloat16", "float32", "this GPU has no bfloat16 arithmetic"),
        (OLD_GPU, "cuda:0", "float16", "float16", "the checkpoint's dtype"),
        (APPLE, "mps", "bfloat16", "bfloat16", "the checkpoint's dtype"),
        (NEW_CPU, "cpu", "bfloat16", "bfloat16", "the checkpoint's dtype"),
        (PLAIN_CPU, "cpu", "bfloat16", "float32", "this CPU has no bfloat16 arithmetic"),
        (NEW_GPU, "cpu", "bfloat16", "float32", "this CPU has no bfloat16 arithmetic"),
        (NEW_CPU, "cpu", "float16", "float32", "float16 is slow on CPUs"),
        (NEW_GPU, "cuda:0", "", "float32", "the checkpoint names no other dtype"),
        (NEW_GPU, "cuda:0", "float8_e4m3fn", "float32", "the checkpoint names no other dtype"),
    ],
)
def test_the_checkpoint_s_dtype_is_used_where_there_is_arithmetic_for_it(
    machine: Machine, device: str, checkpoint: str, dtype: str, why: str
) -> None:
    assert choose_dtype(AUTO, device, machine, checkpoint) == (dtype, why)


def test_a_named_dtype_is_kept_without_a_reason() -> None:
    assert choose_dtype("float16", "cpu", PLAIN_CPU, "bfloat16") == ("float16", "")


def test_a_new_swarm_computes_plainly() -> None:
    choice = choose_numerics(OPEN, "cpu", PLAIN_CPU, "bfloat16", [])
    assert (choice.dtype, choice.quantization, choice.activations) == ("float32", "none", "")
    assert (choice.why, choice.warning) == ("this CPU has no bfloat16 arithmetic", "")


@pytest.mark.parametrize(
    ("swarm", "machine"),
    [
        ([BF16], PLAIN_CPU),
        ([F32], NEW_GPU),
        ([INT8_ROWS, INT8_ROWS, F32], NEW_CPU),
        ([NF4], Machine(bitsandbytes=True)),
        ([INT8], PLAIN_CPU),
        ([INT4], Machine(cpu_int4=True)),
    ],
)
def test_a_joining_node_computes_as_most_nodes_of_the_swarm(swarm: list[NumericsClass], machine: Machine) -> None:
    choice = choose_numerics(OPEN, "cpu", machine, "bfloat16", swarm)
    expected = swarm[0]
    assert (choice.dtype, choice.quantization, choice.activations) == (
        expected.dtype, expected.quantization, expected.activations,
    )  # fmt: skip
    assert choice.why == "as the swarm computes"
    is_emulated = choice.dtype == "bfloat16" and not machine.cpu_bf16
    assert bool(choice.warning) == is_emulated


def test_a_node_that_cannot_quantize_says_so_and_what_to_install() -> None:
    choice = choose_numerics(OPEN, "cpu", PLAIN_CPU, "bfloat16", [NF4])
    assert (choice.dtype, choice.quantization) == ("float32", "none")
    assert choice.warning == (
        "this node will compute with float32, the swarm's nodes with bfloat16, nf4 weights, so that no text can use "
        "both: install bitsandbytes to join them"
    )


def test_weights_in_4_bits_for_cpus_are_not_taken_over_on_a_gpu() -> None:
    choice = choose_numerics(OPEN, "cuda:0", Machine(cuda=1, cuda_bf16=True, cpu_int4=True), "bfloat16", [INT4])
    assert (choice.dtype, choice.quantization) == ("bfloat16", "none")
    assert choice.warning.endswith("give --device cpu, with a torch that has this kernel, to join them")


def test_a_named_dtype_that_no_node_has_is_kept_with_a_warning() -> None:
    choice = choose_numerics(NumericsRequest(dtype="float32"), "cpu", NEW_CPU, "bfloat16", [BF16, BF16])
    assert (choice.dtype, choice.why) == ("float32", "")
    assert choice.warning.endswith("leave out --dtype, --quantization and --activations to join them")


def test_a_named_dtype_chooses_among_the_classes_of_the_swarm() -> None:
    choice = choose_numerics(NumericsRequest(dtype="float32"), "cpu", NEW_CPU, "bfloat16", [BF16, BF16, F32])
    assert (choice.dtype, choice.warning) == ("float32", "")


def test_a_record_without_a_quantization_means_none() -> None:
    choice = choose_numerics(OPEN, "cpu", PLAIN_CPU, "bfloat16", [NumericsClass("", "float32", "")])
    assert (choice.quantization, choice.warning) == ("none", "")


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": None, "text_config": None}, ""),
        ({}, ""),
    ],
)
def test_the_checkpoint_s_dtype_is_read_from_its_config(config: dict[str, Any], dtype: str) -> None:
    assert checkpoint_dtype(config) == dtype


def fake_torch(*, cuda: int = 0, mps: bool = False, features: dict[str, bool] | None = None) -> Any:
    """Return what `describe_machine` looks at; without a GPU, attention on it fails."""
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: cuda > 0, device_count=lambda: cuda, is_bf16_supported=lambda **_: True
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        cpu=SimpleNamespace(get_capabilities=lambda: features or {}),
    )


def test_the_machine_is_described_as_torch_sees_it() -> None:
    assert describe_machine(fake_torch()) == PLAIN_CPU
    assert describe_machine(fake_torch(cuda=2)) == Machine(cuda=2, cuda_bf16=True)
    for feature in ("avx512_bf16", "amx_bf16", "arm_bf16"):
        assert describe_machine(fake_torch(features={feature: True, "avx2": True})) == NEW_CPU
    assert describe_machine(fake_torch(features={"avx2": True, "amx_bf16": False})) == PLAIN_CPU
    assert describe_machine(fake_torch(mps=True)).mps_fault


def test_this_machine_can_be_described() -> None:
    machine = describe_machine(torch)
    assert machine.cuda == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_attention_is_tried_on_the_device() -> None:
    assert attention_fault(torch, "cpu") == ""
    assert "no-such-device" in attention_fault(torch, "no-such-device")
