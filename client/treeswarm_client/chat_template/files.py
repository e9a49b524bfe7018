"""Find a model's chat templates and special tokens in its files, as transformers does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treeswarm.model_files import read_json
from treeswarm_client.chat_template.environment import COMPILE_FAILURES, compile_template
from treeswarm_client.chat_template.template import BrokenTemplate, ChatTemplate, CompiledTemplate

FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
# Name of the template that transformers takes where tools are given, and of the one for everything else.
TOOL_USE, DEFAULT = "tool_use", "default"
# Special tokens of a tokenizer's config that templates write by name, besides any other name that ends alike.
SUFFIX = "_token"


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Read the templates of a model's tokenizer or processor, or return None if there is none.  Raises ModelError.

    A template that does not compile raises only when a conversation is to be written.
    """
    config = _read_object(folder, "tokenizer_config.json")
    try:
        sources = _sources(folder, config)
    except ValueError as error:  # a file that is not valid UTF-8
        return ChatTemplate(_broken(folder, error))
    if not sources:
        return None
    special = _special_tokens(folder, config)
    with_tools = sources.get(TOOL_USE)
    return ChatTemplate(
        _compile(folder, sources.get(DEFAULT), special),
        None if with_tools is None else _compile(folder, with_tools, special),
    )


def _compile(folder: Path, source: str | None, special: Mapping[str, str]) -> CompiledTemplate | BrokenTemplate:
    if source is None:
        return BrokenTemplate(f"'{folder}' has several chat templates, and none named {DEFAULT}")
    try:
        return CompiledTemplate(compile_template(source), source, special)
    except COMPILE_FAILURES as error:
        return _broken(folder, error)


def _broken(folder: Path, error: Exception) -> BrokenTemplate:
    return BrokenTemplate(f"the chat template of '{folder}' does not compile ({error})")


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of all templates by name: of files, else of a processor's old file, else of the config."""
    files = {path.stem: path for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / FILE).exists():
        files[DEFAULT] = folder / FILE
    if files:
        return {name: path.read_text("utf-8") for name, path in files.items()}
    of_processor = _by_name(_read_object(folder, "chat_template.json").get("chat_template"))
    return of_processor or _by_name(config.get("chat_template"))


def _by_name(templates: Any) -> dict[str, str]:
    """Return templates by name: a file has one without a name, a list of named ones, or an object of them."""
    if isinstance(templates, str):
        return {DEFAULT: templates}
    if isinstance(templates, list):
        templates = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
    if not isinstance(templates, dict):
        return {}
    return {name: text for name, text in templates.items() if isinstance(name, str) and isinstance(text, str)}


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return special tokens by name.  A config has them as text, or as the object of an added token."""
    named = dict(config)
    if "added_tokens_decoder" not in config:  # an older tokenizer, whose special tokens have a file of their own
        named |= _read_object(folder, "special_tokens_map.json")
    named = {name: token for name, token in named.items() if name.endswith(SUFFIX)}
    if isinstance(of_model := config.get("extra_special_tokens"), dict):
        named |= of_model
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dict if there is no such file or it holds no object."""
    path = folder / name
    content = read_json(path, "") if path.exists() else {}
    return content if isinstance(content, dict) else {}
