"""transformers' face of the client.  Brings torch and transformers: nothing else in the client imports it."""

from treeswarm_client.hf.model import AutoSwarmModelForCausalLM, SwarmGenerateOutput
from treeswarm_client.hf.turns import InferenceSession

__all__ = ["AutoSwarmModelForCausalLM", "InferenceSession", "SwarmGenerateOutput"]
