"""Drafters: who guesses what the target will say."""

from pathlib import Path

from treeswarm.errors import BadRequest, Mismatch
from treeswarm.model_files import read_shape, resolve_model, tokenizer_digest
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.seam import Drafter


def load_drafter(name: str, target: Path, device: str = "cpu", dtype: str = "float32") -> Drafter:
    """`none`, or a draft model by directory, hub id or bundled name.

    Raises BadRequest for a name that is none of these, ModelError for a bad directory, Mismatch where draft and
    target (a model directory) do not share their tokenizer.
    """
    if name == "none":
        return NoneDrafter()
    if name in {"ngram", "auto"}:
        raise BadRequest(f"--draft {name} is not there yet: name a draft model, or none")
    folder = resolve_model(name)
    if tokenizer_digest(folder) != tokenizer_digest(target):
        raise Mismatch(
            f"the draft {name} has another tokenizer than the target: its guesses would be other words. "
            "Name a draft of the same model family"
        )
    try:
        from treeswarm_client.drafters.model import ModelDrafter  # noqa: PLC0415  # brings torch
    except ImportError as error:
        raise BadRequest(
            f"a draft model needs torch: pip install 'treeswarm[draft]' ({error.name} is missing)"
        ) from error
    return ModelDrafter.load(folder, device=device, dtype=dtype, vocab_size=read_shape(target).vocab_size)
