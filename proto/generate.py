"""Generate `swarm/treeswarm/wire/treeswarm_pb2.py` from `treeswarm.proto`; with --check, only compare.

    python proto/generate.py [--check]

grpcio-tools is pinned in the development extra, because newer versions generate code that needs the newest runtime.
"""

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "swarm" / "treeswarm" / "wire"
GENERATED = ("treeswarm_pb2.py", "treeswarm_pb2.pyi")


def generate(out: Path) -> None:
    """Write the generated code below `out`.

    The virtual path in -I makes the imports in the generated code right, so that it needs no patching.
    """
    arguments = [
        "protoc",
        f"-Itreeswarm/wire={ROOT / 'proto'}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        "treeswarm/wire/treeswarm.proto",
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the committed code is out of date")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        for name in GENERATED:
            generated = (Path(scratch) / "treeswarm" / "wire" / name).read_text()
            if not check:
                (TARGET / name).write_text(generated)
            elif (TARGET / name).read_text() != generated:
                sys.exit(f"{TARGET / name} does not match proto/treeswarm.proto: run python proto/generate.py")


if __name__ == "__main__":
    main()
