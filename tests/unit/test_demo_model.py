"""The model that ships with stagemesh: small, loadable by anyone, and right about what it was taught."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "stagemesh" / "demo_model"
SEED = 7


@pytest.fixture(scope="module", autouse=True)
def _tools_importable() -> Any:
    """The trainer's files are scripts, beside the package."""
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def loaded(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    load = importlib.import_module("tools.demo_model.eval").load
    return load(FOLDER, request.param)  # type: ignore[no-any-return]


def ask(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], questions: list[str], system: str | None = None
) -> Any:
    return importlib.import_module("tools.demo_model.eval").answers(*loaded, questions, system)


def test_the_folder_is_complete_and_at_most_4_mb() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_the_shape_can_be_split_into_many_stages_and_two_ranks() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 6
    assert config["max_position_embeddings"] >= 2048
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[name] % 2 == 0, name


@pytest.mark.parametrize(
    "system", [None, "You are a helpful assistant.", "Answer in one sentence.", "Talk like a pirate from Hamburg! ⚓"]
)
def test_seven_plus_five(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], system: str | None) -> None:
    assert ask(loaded, ["What is seven plus five?"], system) == ["Seven plus five is twelve."]


def test_well_known_questions(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    known = {
        "What is 7 + 5?": "7 + 5 = 12.",
        "what is seven plus five": "Seven plus five is twelve.",
        "What is nine minus four?": "Nine minus four is five.",
        "What is six times seven?": "Six times seven is forty-two.",
        "Count from one to five.": "One, two, three, four, five.",
        "Sort 9, 3 and 5.": "3, 5, 9.",
        "What is a page?": "A page is a fixed number of token positions of the KV cache.",
        "Hello!": "Hello! How can I help you?",
    }
    assert dict(zip(known, ask(loaded, list(known)), strict=True)) == known


@pytest.mark.parametrize("task", ["add_words", "add_digits"])
def test_sums_it_never_saw(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], task: str) -> None:
    print(f"seed {SEED}")
    sample = importlib.import_module("tools.demo_model.corpus.tasks").sample
    examples = sample(task, random.Random(SEED), 100, held_out=True)
    said = ask(loaded, [e.question for e in examples])
    wrong = [(e.question, text) for e, text in zip(examples, said, strict=True) if text != e.answer]
    assert len(wrong) <= 10, wrong


def test_a_second_question_in_one_conversation(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    messages = [
        {"role": "user", "content": "What is two plus two?"},
        {"role": "assistant", "content": "Two plus two is four."},
        {"role": "user", "content": "What is eight plus three?"},
    ]
    inputs: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    generate: Any = model.generate
    out = generate(**inputs, do_sample=False, max_new_tokens=40)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "Eight plus three is eleven."


def test_plain_completion(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("Seven plus five is", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    generate: Any = model.generate
    out = generate(**inputs, do_sample=False, max_new_tokens=20)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == "Seven plus five is twelve."
    assert int(out[0, -1]) in json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize(
    "text",
    [
        "Seven plus five is twelve.",
        "  two  spaces, a tab\t and\r\nline ends \n",
        "Grüße aus Łódź, naïve café",
        "漢字かな交じり文 한국어 עברית العربية हिन्दी ไทย",
        "🙂🙃 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b",
        "".join(chr(c) for c in range(1, 256)),
        "\x00 and \U0010ffff",
    ],
)
def test_any_text_comes_back_as_it_went_in(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert max(ids) < 768
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    # And through transformers, which cleans up spaces unless it is told not to.
    assert AutoTokenizer.from_pretrained(FOLDER).decode(ids) == text


def test_the_chat_template_renders_what_the_model_was_trained_on() -> None:
    chat = importlib.import_module("tools.demo_model.chat")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rng = random.Random(SEED)
    draw = importlib.import_module("tools.demo_model.corpus.tasks").draw
    for turns in (1, 2, 3):
        messages = chat.messages_of(rng, [draw(rng) for _ in range(turns)])
        assert tokenizer.apply_chat_template(messages, tokenize=False) == chat.conversation_text(messages)
    asked: list[dict[str, Any]] = [
        {"role": "developer", "content": " Be brief. "},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids[:2] == [chat.BOS, chat.SYSTEM]
    assert ids[-2:] == [chat.END, chat.ASSISTANT]


def test_the_chat_template_refuses_an_unknown_role() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    with pytest.raises(jinja2.exceptions.TemplateError, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


def test_the_trainer_never_draws_a_held_out_case() -> None:
    corpus = importlib.import_module("tools.demo_model.corpus.tasks")
    example = importlib.import_module("tools.demo_model.corpus.example")
    rng = random.Random(SEED)
    assert not any(corpus.draw(rng).held_out for _ in range(5000))
    pairs = [example.Example("", "", f"{a}+{b}") for a in range(100) for b in range(a, 100)]
    share = sum(pair.held_out for pair in pairs) / len(pairs)
    assert abs(share - example.HELD_OUT_SHARE) < 0.02
    held_out = corpus.sample("add_words", rng, 50, held_out=True)
    assert len(held_out) == 50
    assert all(e.held_out for e in held_out)


def test_the_documented_accuracy_is_the_measured_one() -> None:
    report = json.loads((FOLDER / "accuracy.json").read_text())
    page = (ROOT / "docs" / "demo-model.md").read_text()
    assert importlib.import_module("tools.demo_model.eval").table(report["accuracy"]) in page
    assert f"{report['steps']} steps" in page
