"""The numerics class: what all nodes of a chain must have in common."""

from dataclasses import dataclass

# Number of values that share a scale in 8-bit activations.  A scale costs 3 % of the bytes, and an outlier makes the 63
# other values of its block less precise.
ACTIVATION_BLOCK = 64


def int8_row_bytes(size: int) -> int:
    """Return the number of bytes of `size` values in 8 bits each, with their scales."""
    return size + 2 * -(-size // ACTIVATION_BLOCK)


@dataclass(frozen=True)
class NumericsClass:
    """What all nodes of one chain must have in common, because it decides which text the model generates."""

    weights: str
    """Hex digest of the model's config and every weight file."""
    dtype: str
    """Type of the weights, the KV cache and the activations on the wire: `float32`, `bfloat16` or `float16`."""
    quantization: str = "none"
    """Quantization of the weights: `none`, `published`, `int8`, `int4` or `nf4`."""
    activations: str = ""
    """How rows travel between nodes: `int8`, which changes the text, or empty for `dtype`."""

    def row_bytes(self, hidden_size: int) -> int:
        """Return the number of bytes of one row of activations on a link, before compression."""
        if self.activations == "int8":
            return int8_row_bytes(hidden_size)
        return hidden_size * (4 if self.dtype == "float32" else 2)

    @property
    def plain(self) -> bool:
        """True if neither weights nor activations are stored in fewer bits than `dtype` has."""
        return self.quantization in {"", "none"} and not self.activations

    def difference(self, other: "NumericsClass") -> str:
        """Name the first thing in which `other`, which is not equal, differs from this class."""
        if self.weights != other.weights:
            return f"their weights differ ({self.weights[:12]} and {other.weights[:12]})"
        if self.dtype != other.dtype:
            return f"they compute in {self.dtype} and {other.dtype}"
        if self.quantization != other.quantization:
            return f"their quantization differs ({self.quantization} and {other.quantization})"
        return f"their activations differ ({self.activations or 'native'} and {other.activations or 'native'})"

    def __str__(self) -> str:
        """Describe the class for people; weights are named by the first digits of their digest."""
        quantization = f", {self.quantization} weights" if self.quantization not in ("", "none") else ""
        activations = f", {self.activations} activations" if self.activations else ""
        return f"{self.dtype}{quantization}{activations} ({self.weights[:12]})"
