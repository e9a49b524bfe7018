"""transformers' face of the client.  Brings torch and transformers: nothing else in the client imports it."""

from treeswarm_client.hf.inference_session import InferenceSession
from treeswarm_client.hf.model import AutoSwarmModelForCausalLM, SwarmGenerateOutput

__all__ = ["AutoSwarmModelForCausalLM", "InferenceSession", "SwarmGenerateOutput"]
