"""Reads a checkpoint's description, without torch: config.json and the headers of its safetensors files.

`inspect` counts parameters and FLOPs of each decoder layer, of the embedding and of the head, for the cost model.
`fingerprint` tells one revision of a checkpoint from another. Both read headers, and only a few blocks of the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.hub.substitute import in_its_place
from stagemesh.models.bits import bits_of, with_bits
from stagemesh.models.quantization import Quantization, quantization_of
from stagemesh.models.quantized_tensors import as_weights, refuse_unnamed
from stagemesh.models.size import CheckpointInfo, ModelConfig, Part, estimated
from stagemesh.safetensors_header import StoredTensor, read_header, read_raw_header

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_DTYPE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"
"""File in which NVIDIA's ModelOpt says how it quantized the weights."""
SAMPLE_BYTES, SAMPLES_PER_FILE = 4096, 64
# Families whose configuration class ties the embedding unless config.json says otherwise.
TIED_BY_DEFAULT = ("gemma", "gpt2", "cohere", "starcoder", "opt", "bloom", "falcon", "gpt_bigcode")
# Families whose MLP has no gate.
UNGATED = ("gpt", "opt", "bloom", "phi", "falcon", "starcoder")
# Towers and heads of a checkpoint that are not part of the served decoder.
FOREIGN = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal|mm_projector|mtp)")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings|tok_embeddings|embed_positions)\b")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
EXPERT = re.compile(r"\.experts(\.|_)")


def read_config(model_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads config.json of a checkpoint. Raises CheckpointError if the folder or the file is missing or broken."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such directory; give the folder that holds the checkpoint's config.json, or an id (org/name)"
        )
    config = _read_json(folder / "config.json", "give a Hugging Face checkpoint directory")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: a JSON object is expected; fetch the file again")
    return config


def read_configs(model_dir: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Reads config.json, and the other file that may say how the weights are quantized. Raises CheckpointError."""
    found, beside = {CONFIG: read_config(model_dir)}, Path(model_dir) / MODELOPT
    content = _read_json(beside, "fetch the file again") if beside.is_file() else None
    return {**found, MODELOPT: content} if isinstance(content, dict) else found


def weight_map(
    model_dir: str | os.PathLike[str], headers: Mapping[Path, Mapping[str, StoredTensor]] | None = None
) -> dict[str, Path]:
    """Returns the tensors that the checkpoint lists, each with its file. Whoever reads weights reads these.

    The files need not be there: a worker may have only those of its layers. `headers`: the headers of all weight files,
    if they are known without the files. Raises CheckpointError if it is not clear which file is meant, or none is.
    """
    folder = Path(model_dir)
    index = folder / INDEX
    there = {path.name for path in (*folder.glob("*.safetensors"), *(headers or ()))}
    content = _read_json(index, "fetch the file again") if index.is_file() else None
    names = listed_weights(there, content, folder, f"remove {SINGLE}, or {INDEX} and its files")
    if names is None:
        single = folder / SINGLE
        return dict.fromkeys(headers[single] if headers is not None else read_header(single), single)
    return {name: folder / file for name, file in names.items()}


def listed_weights(files: Collection[str], index: object, where: object, advice: str) -> dict[str, str] | None:
    """Returns the tensors that an index lists, each with its file. None without an index: then SINGLE holds them all.

    Args:
        files: the files that are there. Those that the index names need not be.
        index: the content of the index, or None if there is none.
        where: the folder or repository, for errors.
        advice: what to do if SINGLE is there beside an index of other files.

    Raises:
        CheckpointError: it is not clear which weights are meant, or there are none.
    """
    if index is None:
        if SINGLE not in files:
            found = sorted(name for name in files if name.endswith(".safetensors"))
            raise CheckpointError(
                f"{where}: {found[0]} needs {INDEX} beside it, which is missing; fetch it too"
                if found
                else f"{where} has neither {SINGLE} nor {INDEX}; fetch the weights in safetensors format, or use "
                "--load-format dummy for random weights"
            )
        return None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(_is_inside(file) for file in names.values()):
        raise CheckpointError(f"{where}/{INDEX}: no weight_map in it with files of this folder; fetch the file again")
    if SINGLE in files and set(names.values()) != {SINGLE}:
        # transformers takes the single file, and others the index. They may be of different revisions.
        raise CheckpointError(
            f"{where}: {SINGLE} lies beside {INDEX}, which names other files; it is not clear which weights are "
            f"meant: {advice}"
        )
    return names


def _is_inside(file: object) -> bool:
    return isinstance(file, str) and not Path(file).is_absolute() and ".." not in Path(file).parts


def weight_files(model_dir: str | os.PathLike[str]) -> list[Path]:
    """Returns the files of `weight_map`, in name order. Raises CheckpointError also if one is missing."""
    return _present(Path(model_dir), weight_map(model_dir))


def _present(folder: Path, names: Mapping[str, Path]) -> list[Path]:
    files = sorted(set(names.values()))
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder / INDEX}: it names {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}, "
            f"which {'is' if len(missing) == 1 else 'are'} not in {folder}; fetch the missing files"
        )
    return files


def inspect(
    model_dir: str | os.PathLike[str],
    load_format: str = "auto",
    headers: Mapping[Path, Mapping[str, StoredTensor]] | None = None,
) -> CheckpointInfo:
    """Describes the checkpoint in `model_dir`. With load_format "dummy" it only reads config.json.

    `headers`: the headers of all weight files, if they are known without the files.

    Raises CheckpointError (file, what is wrong, what to do) and UnsupportedModel.
    """
    folder = Path(model_dir)
    configs = read_configs(folder)
    quantization = quantization_of(folder, configs)
    config = ModelConfig(configs[CONFIG], folder / CONFIG)
    if load_format == "dummy":
        return config.info(estimated(config), config.dtype or "float32", tied=config.tied)
    return _measured(config, folder, _served(folder, headers), quantization)


def describe(model_dir: str | os.PathLike[str]) -> CheckpointInfo:
    """Describes a checkpoint of which only config.json must be there.

    If the weights are there, their headers say how many bytes they take, and else config.json does. Raises
    CheckpointError and UnsupportedModel.
    """
    folder = Path(model_dir)
    configs = read_configs(folder)
    quantization = quantization_of(folder, configs)
    config = ModelConfig(configs[CONFIG], folder / CONFIG)
    if any(folder.glob("*.safetensors")) and all(path.is_file() for path in weight_map(folder).values()):
        return _measured(config, folder, _served(folder, None), quantization)
    parts = estimated(config)
    method = quantization.method if quantization is not None else ""
    if quantization is not None:
        bits = bits_of(configs)
        if bits is None:
            raise UnsupportedModel(
                f"{folder}: it is not known how many bits its weights take ({method}); fetch the weights, whose "
                "headers say it"
            )
        parts[:-2] = with_bits(parts[:-2], bits[0], experts_only=bits[1])
    return config.info(parts, config.dtype or "bfloat16", tied=config.tied, quantization=method)


def _served(folder: Path, headers: Mapping[Path, Mapping[str, StoredTensor]] | None) -> dict[str, StoredTensor]:
    """Returns the tensors of the served decoder. Raises CheckpointError."""
    return {name: tensor for name, tensor in _stored(folder, headers).items() if not FOREIGN.search(name)}


def _measured(
    config: ModelConfig, folder: Path, tensors: Mapping[str, StoredTensor], quantization: Quantization | None
) -> CheckpointInfo:
    """Describes a checkpoint by the tensors in its headers. Raises CheckpointError and UnsupportedModel."""
    tensors = as_weights(quantization, tensors)
    refuse_unnamed(folder, tensors.items())
    sizes = Counter[str]()
    for tensor in tensors.values():
        if tensor.dtype in STORED_DTYPE:
            sizes[STORED_DTYPE[tensor.dtype]] += tensor.parameters
    dtype = config.dtype or max(sizes, key=sizes.__getitem__, default="float32")
    parts, tied = _counted(config, folder, tensors)
    if quantization is None:
        return config.info(parts, dtype, tied=tied)
    return config.info(_weighed(config, parts, tensors), dtype, tied=tied, quantization=quantization.method)


def _stored(folder: Path, headers: Mapping[Path, Mapping[str, StoredTensor]] | None) -> dict[str, StoredTensor]:
    """Returns all tensors by the headers of their files, which it reads if they are not given.

    Raises CheckpointError, also for a tensor that is not in its file.
    """
    names = weight_map(folder, headers)
    if headers is None:
        headers = {path: read_header(path) for path in _present(folder, names)}
    tensors = {}
    for name, path in names.items():
        if name not in headers[path]:
            raise CheckpointError(
                f"tensor {name!r} should be in {path} but is not; fetch {path.name} and {INDEX} again"
            )
        tensors[name] = headers[path][name]
    return tensors


def fingerprint(model_dir: str | os.PathLike[str], load_format: str = "auto") -> str:
    """Returns a SHA-256 (hex) that identifies a revision of a checkpoint. It is the same on every machine.

    The hash covers config.json, tokenizer.json, hf_quant_config.json and the index. For each weight file it covers the
    header, the size and up to 64 blocks of 4 KiB, each from the middle of a tensor. With dummy weights it covers only
    config.json.
    """
    folder = Path(model_dir)
    read_config(folder)
    digest = hashlib.sha256()

    def add(label: str, data: bytes) -> None:
        digest.update(f"{label}\0{len(data)}\0".encode())
        digest.update(data)

    add("config.json", (folder / "config.json").read_bytes())
    if load_format == "dummy":
        return digest.hexdigest()
    for name in ("tokenizer.json", MODELOPT, INDEX):
        if (folder / name).is_file():
            add(name, (folder / name).read_bytes())
    for path in weight_files(folder):
        header = read_raw_header(path)
        add(path.name, header + str(path.stat().st_size).encode())
        middles = sorted(tensor.offset + tensor.nbytes // 2 for tensor in read_header(path).values())
        with path.open("rb") as file:
            for middle in middles[:: max(1, -(-len(middles) // SAMPLES_PER_FILE))]:
                file.seek(max(8 + len(header), middle - SAMPLE_BYTES // 2))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _read_json(path: Path, advice: str) -> Any:
    data = b""
    try:
        data = path.read_bytes()
        return json.loads(data)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: no such file; {advice}") from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        if other := in_its_place(data):
            raise CheckpointError(f"{path} is {other}") from e
        raise CheckpointError(f"{path}: not valid JSON ({e}); fetch the file again") from e


def _is_experts(config: ModelConfig, name: str) -> bool:
    return config.experts > 0 and EXPERT.search(name) is not None


def _weighed(config: ModelConfig, parts: Sequence[Part], tensors: Mapping[str, StoredTensor]) -> list[Part]:
    """Gives the layers of `parts` the bits that their weights take by the headers."""
    nbytes, expert_bytes = Counter[int](), Counter[int]()
    for name, tensor in tensors.items():
        if layer := LAYER.search(name):
            (expert_bytes if _is_experts(config, name) else nbytes)[int(layer[1])] += tensor.nbytes
    layers = [
        replace(
            part,
            bits=8 * nbytes[index] / (part.parameters - part.expert_parameters),
            expert_bits=8 * expert_bytes[index] / part.expert_parameters if part.expert_parameters else None,
        )
        for index, part in enumerate(parts[:-2])
    ]
    return [*layers, *parts[-2:]]


def _counted(config: ModelConfig, folder: Path, tensors: Mapping[str, StoredTensor]) -> tuple[list[Part], bool]:
    """Counts the parts from the tensors in the headers. Returns them, and whether embedding and head are one tensor.

    They are if only one is stored. transformers uses both if both are, whatever tie_word_embeddings says.
    """
    embedding, head = config.num_layers, config.num_layers + 1
    parameters, flops, experts = Counter[int](), Counter[int](), Counter[int]()
    tables: dict[int, int] = {}
    for name, tensor in tensors.items():
        count = tensor.parameters
        work = 2 * count if len(tensor.shape) > 1 else 0
        if layer := LAYER.search(name):
            place = int(layer[1])
            if place >= config.num_layers:
                continue  # Layers of another head, such as multi-token prediction.
            if _is_experts(config, name):
                work = work * config.experts_used // config.experts
                experts[place] += count
        elif EMBEDDING.search(name):
            place, work = embedding, 0
            tables[place] = max(tables.get(place, 0), count)
        else:
            place = head
            if HEAD.search(name):
                tables[place] = count
        parameters[place] += count
        flops[place] += work
    missing = [str(layer) for layer in range(config.num_layers) if layer not in parameters]
    if missing:
        raise CheckpointError(
            f"{folder}: config.json says {config.num_layers} layers, the weights hold none of layer "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; fetch the missing files"
        )
    if config.says_tied is False and tables.keys() == {embedding}:
        raise CheckpointError(
            f"{folder}: the weights hold no output head, and tie_word_embeddings is false in config.json; fetch the "
            "missing files"
        )
    for place in {embedding, head} - tables.keys():
        table = max(tables.values(), default=0)
        parameters[place] += table
        flops[place] += 2 * table if place == head else 0
    return [Part(parameters[place], float(flops[place]), experts[place]) for place in range(head + 1)], len(tables) < 2
