"""Generates the committed gRPC stubs: `python protos/generate.py [--check]`.

`--check` generates into a scratch folder and fails when a committed stub differs. grpcio-tools is pinned to 1.76: its
stubs load on grpcio 1.78 and later, while those of a newer generator refuse older runtimes.
"""

from __future__ import annotations

import filecmp
import pathlib
import shutil
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
FILES = ["types", "coordinator", "stage", "gateway", "worker", "processes"]


def generate(out: pathlib.Path) -> None:
    """Writes the stubs of every proto file below `out` (as `out/stagemesh/protos/v1/*`)."""
    import grpc_tools
    from grpc_tools import protoc

    include = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    args = ["protoc", f"-Istagemesh/protos={HERE}", f"-I{include}"]
    args += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(args + [str(HERE / "v1" / f"{name}.proto") for name in FILES]) != 0:
        raise SystemExit("protoc failed")


def main() -> int:
    """Generates, or checks; returns the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(pathlib.Path(scratch))
        made = sorted((pathlib.Path(scratch) / "stagemesh/protos/v1").iterdir())
        if "--check" in sys.argv[1:]:
            stale = [
                f.name
                for f in made
                if not (HERE / "v1" / f.name).exists() or not filecmp.cmp(f, HERE / "v1" / f.name, shallow=False)
            ]
            if stale:
                print(f"stubs out of date: {', '.join(stale)}; run `make protos`", file=sys.stderr)
            return 1 if stale else 0
        for f in made:
            shutil.copy(f, HERE / "v1" / f.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
