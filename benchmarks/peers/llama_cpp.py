"""The other peer: llama.cpp. Each of its RPC servers holds a part of the layers.

    python -m benchmarks.peers.llama_cpp DIR    # once: half an hour of one core, 1 GB

Its source is in the source distribution of `llama-cpp-python` on PyPI. The set-up builds `llama-server` and
`ggml-rpc-server` for this machine's processor.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common.errors import BenchmarkError

PACKAGE = "llama-cpp-python==0.3.36"
CMAKE_OPTIONS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_RPC=ON", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_OPENSSL=OFF"),
    *("-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_MTMD=OFF"),
)
"""CMake options without a web page and TLS, so that the set-up needs no network except PyPI."""
TARGETS = ("llama-server", "ggml-rpc-server")


@dataclass(frozen=True)
class LlamaCpp:
    """A folder that `set_up` has filled."""

    folder: Path
    gguf: Path | None = None
    """The converted model."""

    @property
    def source(self) -> Path:
        """The folder of llama.cpp's source."""
        found = sorted(self.folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
        if not found:
            raise BenchmarkError(
                f"no llama.cpp in {self.folder}: run `python -m benchmarks.peers.llama_cpp {self.folder}`"
            )
        return found[-1]

    @property
    def server(self) -> Path:
        """The program of the HTTP server."""
        return self.folder / "build" / "bin" / "llama-server"

    @property
    def rpc_server(self) -> Path:
        """The program that holds a part of the layers for a server."""
        return self.folder / "build" / "bin" / "ggml-rpc-server"

    def check(self) -> None:
        """Raises BenchmarkError unless both programs are there."""
        for program in (self.server, self.rpc_server):
            if not program.exists():
                raise BenchmarkError(f"no {program}: run `python -m benchmarks.peers.llama_cpp {self.folder}`")

    def version(self) -> str:
        """Returns its version, and the version of its package."""
        said = subprocess.run([self.server, "--version"], capture_output=True, text=True, timeout=30, check=False)
        lines = [line for line in (said.stderr + said.stdout).splitlines() if line.startswith("version")]
        package = self.source.parents[1].name.replace("_", "-")
        return f"{lines[0].partition(':')[2].strip() if lines else 'unknown'}, from {package}"

    def with_model(self, model: Path, folder: Path) -> LlamaCpp:
        """Converts the checkpoint in `model` to bf16 GGUF in `folder`."""
        out = folder / "model.gguf"
        script = Path(__file__).with_name("to_gguf.py")
        command = [sys.executable, str(script), str(self.source), str(model), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0 or not out.exists():
            raise BenchmarkError(f"llama.cpp's converter failed:\n{done.stderr[-2000:]}")
        return replace(self, gguf=out)


def set_up(folder: Path, jobs: int = 1) -> None:
    """Downloads, unpacks and builds llama.cpp. Skips a download that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    llama = LlamaCpp(folder)
    if not list(folder.glob("llama_cpp_python-*/vendor/llama.cpp")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        _run([*pip, "--dest", str(folder), PACKAGE])
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    build = folder / "build"
    _run(["cmake", "-S", str(llama.source), "-B", str(build), *CMAKE_OPTIONS])
    _run(["cmake", "--build", str(build), "--parallel", str(jobs), "--target", *TARGETS])
    llama.check()


def _run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    try:
        subprocess.run(command, check=True, timeout=7200)
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"setting up llama.cpp failed: {error}") from error


if __name__ == "__main__":
    try:
        set_up(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    except IndexError:
        sys.exit("usage: python -m benchmarks.peers.llama_cpp DIR [JOBS]")
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
