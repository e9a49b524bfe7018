"""The client without torch stays the client without torch."""

import subprocess
import sys

import pytest

import treeswarm_client

PROGRAM = """
import sys
import treeswarm_client
before = {"torch", "transformers"} & set(sys.modules)
from treeswarm_client import AutoSwarmModelForCausalLM
print(sorted(before), AutoSwarmModelForCausalLM.__module__, "torch" in sys.modules)
"""
WITHOUT = """
import sys
sys.modules["torch"] = None
try:
    from treeswarm_client import AutoSwarmModelForCausalLM
except ImportError as error:
    print(error)
"""


def said(program: str) -> str:
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_torch_comes_with_the_name_that_needs_it() -> None:
    assert said(PROGRAM) == ("[] treeswarm_client.hf.model True")


def test_without_torch_the_way_to_it_is_told() -> None:
    assert said(WITHOUT) == (
        "AutoSwarmModelForCausalLM needs torch and transformers: pip install 'treeswarm[draft]' (torch is missing)"
    )


def test_what_is_not_there_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AutoModel'"):
        _ = treeswarm_client.AutoModel
