"""The interface for transformers users.  It imports torch and transformers; nothing else in the client imports it."""

from treeswarm_client.hf.inference_session import InferenceSession
from treeswarm_client.hf.model import AutoSwarmModelForCausalLM
from treeswarm_client.hf.output import SwarmGenerateOutput

__all__ = ["AutoSwarmModelForCausalLM", "InferenceSession", "SwarmGenerateOutput"]
