"""Who is out there: one seam, and the forms it takes."""

from treeswarm.errors import BadRequest
from treeswarm.registry.seam import Registry
from treeswarm.registry.static import StaticRegistry


def parse_registry(spec: str) -> Registry:
    """`static:H:P,H:P`.  Raises BadRequest for any other kind."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind != "static":
        raise BadRequest(f"'{spec}' is no registry: give static:HOST:PORT,HOST:PORT")
    return StaticRegistry.parse(rest)
