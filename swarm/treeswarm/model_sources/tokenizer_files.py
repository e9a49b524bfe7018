"""Tokenizers in other forms than `tokenizer.json`: converted once by transformers, and kept in the user's cache."""

import hashlib
import importlib.util
from pathlib import Path

from treeswarm.errors import BadRequest, ModelError
from treeswarm.extras import install_command
from treeswarm.model_sources.cache import cache_folder, fill_once
from treeswarm.model_sources.conversion import convert

TOKENIZER = "tokenizer.json"
# Patterns of the files of a tokenizer, and the modules that transformers needs to convert them.
FORMS = (
    ("tekken.json", ("transformers",)),
    ("tiktoken.model", ("transformers", "tiktoken")),
    ("*.tiktoken", ("transformers", "tiktoken")),
    ("*.model", ("transformers", "sentencepiece")),
    ("vocab.json", ("transformers",)),
    ("vocab.txt", ("transformers",)),
)
# Files besides those that say how the tokenizer works.
SETTINGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
# Raised whenever the conversion writes something else, so that older caches are left alone.
VERSION = 1


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder with `tokenizer.json` of a model directory: itself, or one in the cache.

    Raises ModelError if there is no tokenizer or it cannot be converted, BadRequest if packages are missing.
    """
    if (folder / TOKENIZER).exists():
        return folder
    found = [(file, modules) for pattern, modules in FORMS for file in sorted(folder.glob(pattern))]
    if not found:
        raise ModelError(f"'{folder}' has no {TOKENIZER} and no tokenizer in another form: download it again")
    file, modules = found[0]
    cached = cache_folder("tokenizers", _identity(folder, [path for path, _ in found]))
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not cached.is_dir() and missing:
        raise BadRequest(
            f"'{folder}' has its tokenizer as {file.name}, which is converted once with {' and '.join(missing)}, not "
            f"installed here: {install_command('tokenizers')}"
        )
    return fill_once(cached, lambda target: convert("tokenizer", folder, target))


def _identity(folder: Path, files: list[Path]) -> str:
    """Return a name for the tokenizer by the content of its files."""
    digest = hashlib.sha256(str(VERSION).encode())
    for path in sorted({*files, *(folder / name for name in SETTINGS if (folder / name).exists())}):
        digest.update(f"\n{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()[:24]
