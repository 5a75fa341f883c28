"""Every verified architecture as a list of parts: the list computes what transformers' own modules compute."""

from __future__ import annotations

import pytest
import torch
from breadth import tiny_config
from parts_reference import logits, run_layer
from program_reference import run_program
from tiny_models import roughen
from transformers import AutoModelForCausalLM

from stagemesh.models.architectures import ARCHITECTURES
from stagemesh.stage_worker.model.parts.description import Linear, ModelParts
from stagemesh.stage_worker.model.parts.read import read_parts
from stagemesh.stage_worker.model.parts.reading.explain import NotKnown
from stagemesh.stage_worker.model.plain.hf import run_experts_one_by_one
from stagemesh.stage_worker.model.plain.layout import find_layout
from stagemesh.stage_worker.native.program.compile import compile_layer

VERIFIED = sorted(name for name, known in ARCHITECTURES.items() if known.verified)
NOT_KNOWN = {
    "apertus": "what the numbers mlp.act_fn.alpha_p",
    "beam": "what goes into self_attn.o_proj",
}
"""Model types with a part that is none of the known, and what is said about it."""
TOKENS = 61
"""More than the window of the tiny models, 40."""


@pytest.mark.parametrize("model_type", VERIFIED)
def test_the_parts_compute_what_the_modules_do(model_type: str) -> None:
    config = tiny_config(model_type)
    if model_type in NOT_KNOWN:
        with pytest.raises(NotKnown, match=NOT_KNOWN[model_type]):
            read_parts(config)
        return
    parts = read_parts(config)
    torch.manual_seed(20261130)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    run_experts_one_by_one(model)
    roughen(model)
    layout = find_layout(model, config)
    ids = torch.randint(0, config.vocab_size, (1, TOKENS))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0]
        base = getattr(model, layout.base_prefix)
        layers = [_tensors(layer) for layer in getattr(base, layout.layers)]
        norm = next(getattr(base, name) for name in layout.after if "orm" in type(getattr(base, name)).__name__)
        embedded = torch.nn.functional.embedding(ids[0], model.get_input_embeddings().weight)
        got = logits(parts, embedded, layers, _tensors(norm), _tensors(model.get_output_embeddings()))
        _check_programs(parts, layers)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def _check_programs(parts: ModelParts, layers: list[dict[str, torch.Tensor]]) -> None:
    """The kernels' operations compute what the parts do."""
    for kind, layer in enumerate(parts.layers):
        parameters = layers[parts.kinds.index(kind)]
        outputs = {p.name: len(parameters[f"{p.name}.weight"]) for p in layer.parts if isinstance(p, Linear)}
        x = torch.randn(TOKENS, parts.hidden, dtype=torch.float64)
        got = run_program(compile_layer(layer, parts.hidden, outputs), x, parameters)
        torch.testing.assert_close(got, run_layer(layer, x, parameters))


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
