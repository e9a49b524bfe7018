"""Say in one line why the hub gave nothing, and what to do."""


def explain_hub_error(error: Exception, repository: str, *, file: str = "", revision: str | None = None) -> str:
    """Return what an error of the hub's client means for someone who asked for a model, or for one file of it."""
    from huggingface_hub import constants, errors  # noqa: PLC0415  # Only for hub ids.

    where = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"'{repository}' is gated on the hub: accept its terms at {where}, then log in with `hf auth login`, "
            "or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no model '{repository}', or it is private: check the name, or log in with `hf auth login`, "
            "or give a local directory"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"'{repository}' has no revision '{revision}' on the hub: give a branch, tag or commit of {where}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"'{repository}' has no file '{file}' on the hub: look for it at {where}/tree/main"
    described = f"'{repository}:{file}'" if file else f"'{repository}'"
    if revision is not None:
        described = f"revision '{revision}' of {described}"
    local = "the path of a local GGUF file" if file else "a local directory"
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    return (
        f"cannot get {described} from the hub ({type(error).__name__}: {reason}): check the name and the network, or "
        f"give {local}"
    )
