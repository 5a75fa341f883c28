"""Converts a checkpoint of `tools/make_model.py` to GGUF with llama.cpp's own converter.

    python benchmarks/peers/to_gguf.py LLAMA_CPP_SOURCE MODEL OUT.gguf

The converter recognizes a byte-level BPE by a hash of its output for a text, and refuses unknown ones. The checkpoint's
tokenizer splits like GPT-2, with its own vocabulary. This script tells that to the converter, which does the rest.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def convert(source: Path, model: Path, out: Path) -> None:
    """Writes `model` as bf16 GGUF to `out`, with the converter in llama.cpp's folder `source`."""
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    from conversion import base, llama

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    llama.LlamaModel.set_vocab = lambda self: self._set_vocab_gpt2()
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outtype", "bf16", "--outfile", str(out)]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    convert(*(Path(argument) for argument in sys.argv[1:4]))
