"""Chat templates: a conversation as text for the model."""

from treeswarm_client.chat_template.files import load_chat_template
from treeswarm_client.chat_template.messages import MessageDict
from treeswarm_client.chat_template.template import ChatTemplate

__all__ = ["ChatTemplate", "MessageDict", "load_chat_template"]
