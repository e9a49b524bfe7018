"""Which library applies grammars here, and whether two ends of a chain apply them alike.  Imports nothing of it."""

import importlib.util
import json
from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from treeswarm.extras import install_command
from treeswarm.model_files import read_json
from treeswarm.model_sources.tokenizer_files import TOKENIZER, tokenizer_folder

LIBRARY = "llguidance"
# Raised whenever this release makes other masks of the same library: other options of JSON, other limits.
MASKS_VERSION = 1
DIGEST_BYTES = 6
# Parts of `tokenizer.json` on which the bytes of tokens depend, and which tokens spell a text.
TOKEN_PARTS = ("normalizer", "pre_tokenizer", "decoder", "model", "added_tokens")


def is_installed() -> bool:
    """Return whether grammars can be applied on this machine."""
    return importlib.util.find_spec(LIBRARY) is not None


def why_not_installed() -> str:
    """Return what to do where the library is not installed, as a clause."""
    return f"{LIBRARY} is not installed: {install_command('grammar')}"


def grammar_class(folder: Path, vocab_size: int) -> str:
    """Return the name under which a node or client applies grammars with the tokenizer in `folder`.

    It names the library, its version and this release's way to use it, and a digest of the tokenizer.  Where two names
    are equal, the same tokens are allowed after every text.  Raises ModelError or BadRequest without a tokenizer.
    """
    tokenizer = read_json(tokenizer_folder(folder) / TOKENIZER, "")
    return f"{LIBRARY}-{version(LIBRARY)}.{MASKS_VERSION}-{_digest(tokenizer, vocab_size)}"


def _digest(tokenizer: Mapping[str, Any], vocab_size: int) -> str:
    relevant = [vocab_size, *(tokenizer.get(part) for part in TOKEN_PARTS)]
    text = json.dumps(relevant, sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).hexdigest()
