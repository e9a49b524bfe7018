"""The client imports torch only when the Hugging Face interface is asked for."""

import subprocess
import sys

import pytest

import treeswarm_client
from treeswarm.extras import install_command

PROGRAM = """
import sys
import treeswarm_client
before = {"torch", "transformers"} & set(sys.modules)
from treeswarm_client import AutoSwarmModelForCausalLM
print(sorted(before), AutoSwarmModelForCausalLM.__module__, "torch" in sys.modules)
"""
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
try:
    from treeswarm_client import AutoSwarmModelForCausalLM
except ImportError as error:
    print(error)
"""


def run_program(program: str) -> str:
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_torch_is_imported_with_the_model_class_only() -> None:
    assert run_program(PROGRAM) == ("[] treeswarm_client.hf.model True")


def test_missing_torch_error_says_how_to_install_it() -> None:
    assert run_program(WITHOUT_TORCH) == (
        f"AutoSwarmModelForCausalLM needs torch and transformers: {install_command('draft')} (torch is missing)"
    )


def test_unknown_attribute_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AutoModel'"):
        _ = treeswarm_client.AutoModel
