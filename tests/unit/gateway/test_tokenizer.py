from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagemesh.errors import CheckpointError, InvalidRequest
from stagemesh.gateway.text.chat_template import ChatTemplate
from stagemesh.gateway.text.tokenizer import Tokenizer
from stagemesh.settings.model import DEMO_MODEL

TALK = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "What is 7 + 5?\nTell me."},
    {"role": "assistant", "content": "twelve"},
    {"role": "user", "content": "日本 🙂"},
]


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("which", ["byte_level_dir", "sentencepiece_dir", "demo"])
def test_ids_and_text_are_those_of_transformers(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = DEMO_MODEL if which == "demo" else request.getfixturevalue(which)
    ours, theirs = Tokenizer(folder), transformers_tokenizer(folder)
    for text in ("hello world", "", " a  b\n", "naïve 🙂 日本", "with </s> inside", "</s>"):
        for add in (True, False):
            expected = theirs.encode(text, add_special_tokens=add)
            assert ours.encode(text, add_special_tokens=add) == expected
        for skip in (True, False):
            assert ours.decode(expected, skip_special_tokens=skip) == theirs.decode(expected, skip_special_tokens=skip)


TEMPLATES = [
    # Llama 3's shape
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # blocks on lines of their own: trim_blocks and lstrip_blocks
    "{%- for message in messages %}\n    {% if message.role == 'user' %}\n    U: {{ message.content }}\n"
    "    {% endif %}\n{% endfor %}\n",
    # tojson does not escape HTML; namespaces; loop controls; a generation block; tools undefined or none
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ m | tojson }}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if ns.n > 1 %}{% break %}{% endif %}{% endfor %}"
    "{{ tools is none }}{{ documents is none }}{{ messages | tojson(indent=2) }}",
    "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ strftime_now('%Y') }}{{ messages[-1]['content'][:2] }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("generate", [True, False])
def test_templates_render_as_in_transformers(
    tmp_path: Path, make_byte_level: Callable[..., Path], template: str, generate: bool
) -> None:
    folder = make_byte_level(tmp_path / "m", chat_template=template)
    ours, theirs = Tokenizer(folder), transformers_tokenizer(folder)
    assert ours.chat_template is not None
    rendered = ours.chat_template.render(TALK, add_generation_prompt=generate)
    assert rendered == theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generate)
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=generate)["input_ids"]
    assert ours.encode(rendered, add_special_tokens=False) == ids


def test_the_demo_models_template_renders_as_in_transformers() -> None:
    ours, theirs = Tokenizer(DEMO_MODEL), transformers_tokenizer(DEMO_MODEL)
    assert ours.chat_template is not None
    expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert ours.chat_template.render(TALK) == expected


@pytest.mark.parametrize("kind", ["jinja", "json", "named"])
def test_where_templates_lie(byte_level_dir: Path, kind: str) -> None:
    config = byte_level_dir / "tokenizer_config.json"
    if kind == "jinja":
        (byte_level_dir / "chat_template.jinja").write_text("from the file")
    elif kind == "json":
        (byte_level_dir / "chat_template.json").write_text(json.dumps({"chat_template": "from the file"}))
    else:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "from the file"}]
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": named}))
    template = Tokenizer(byte_level_dir).chat_template
    assert template is not None
    assert template.render(TALK) == "from the file"


def test_what_a_template_refuses_is_the_clients_fault(byte_level_dir: Path) -> None:
    template = Tokenizer(byte_level_dir).chat_template
    assert template is not None
    with pytest.raises(InvalidRequest, match="the assistant must not begin"):
        template.render([{"role": "assistant", "content": "hi"}])


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"])
def test_templates_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render(TALK)


def test_a_broken_template_is_the_checkpoints_fault() -> None:
    with pytest.raises(CheckpointError, match="not valid"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("a\n{{ messages", "in line 2: unexpected end of template"),
        ("{{ a | nosuch }}", "No filter named 'nosuch'"),
        ("{% break %}", "'break' outside loop"),
        ("{{ f(a=1, a=2) }}", "keyword argument repeated"),
        ("{{" + "(" * 5000 + "}}", "recursion"),
    ],
)
def test_a_broken_template_is_named_with_its_file(byte_level_dir: Path, source: str, says: str) -> None:
    for name in ("tokenizer_config.json", "chat_template.json"):
        (byte_level_dir / name).write_text(json.dumps({"chat_template": source}))
        with pytest.raises(CheckpointError, match=f"{name}: chat_template is not valid.*{says}"):
            Tokenizer(byte_level_dir)
    (byte_level_dir / "chat_template.jinja").write_text(source)
    with pytest.raises(CheckpointError, match=f"chat_template.jinja is not valid.*{says}"):
        Tokenizer(byte_level_dir)


@pytest.mark.parametrize("told", [7, {"default": "x"}, ["x"], [{"name": "default", "template": 7}], True])
def test_a_template_that_is_no_text_is_named_with_its_file(byte_level_dir: Path, told: Any) -> None:
    (byte_level_dir / "tokenizer_config.json").write_text(json.dumps({"chat_template": told}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template must be a text"):
        Tokenizer(byte_level_dir)


def test_a_template_file_that_is_not_utf_8_is_named(byte_level_dir: Path) -> None:
    (byte_level_dir / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: cannot be read"):
        Tokenizer(byte_level_dir)


@pytest.mark.parametrize(
    ("section", "content"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}]}),
        ("pre_tokenizer", {"type": "Nosuch"}),
        ("decoder", 7),
        ("model", None),
    ],
)
def test_a_tokenizer_that_cannot_work_is_named(byte_level_dir: Path, section: str, content: Any) -> None:
    """For the first two, the library panics: when it reads the file, or when it encodes a text."""
    file = byte_level_dir / "tokenizer.json"
    if section == "post_processor":
        content |= {"pair": [], "special_tokens": {}}
    file.write_text(json.dumps({**json.loads(file.read_text()), section: content}))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no tokenizer can be made of it"):
        Tokenizer(byte_level_dir)


def test_eos_ids_are_those_of_generation_config_and_tokenizer(byte_level_dir: Path) -> None:
    assert Tokenizer(byte_level_dir).eos_ids == {1, 2}
    (byte_level_dir / "generation_config.json").unlink()
    (byte_level_dir / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer(byte_level_dir).eos_ids == {1, 7}


def test_sampling_defaults(byte_level_dir: Path) -> None:
    file = byte_level_dir / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.25, "top_k": 20, "top_p": 0.9, "max_length": 20, "do_sample": True}))
    assert Tokenizer(byte_level_dir).generation.sampling == {"temperature": 0.25, "top_k": 20, "top_p": 0.9}
    file.write_text(json.dumps({"temperature": "hot"}))
    with pytest.raises(CheckpointError, match="temperature must be a number"):
        Tokenizer(byte_level_dir)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "config.json",
        "chat_template.json",
    ],
)
def test_a_damaged_file_is_named(byte_level_dir: Path, name: str) -> None:
    (byte_level_dir / name).write_text('{"half": ')
    with pytest.raises(CheckpointError, match=name):
        Tokenizer(byte_level_dir)


def test_no_directory_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        Tokenizer(tmp_path / "none")


def test_without_tokenizer_json_only_ids_are_served(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [4]}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_ids == {4}
    assert tokenizer.decode([1, 2]) == tokenizer.token_text(3) == ""
    with pytest.raises(InvalidRequest, match="send token ids"):
        tokenizer.encode("hi")


def test_lone_surrogates_are_refused(byte_level_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="surrogate at character 1"):
        Tokenizer(byte_level_dir).encode("a\ud800")


def test_bytes_of_single_tokens(byte_level_dir: Path, sentencepiece_dir: Path) -> None:
    for folder in (byte_level_dir, sentencepiece_dir):
        tokenizer = Tokenizer(folder)
        for text in ("a b", "naïve 🙂"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert b"".join(tokenizer.token_bytes(i) for i in ids).decode().strip() == text
    tokenizer = Tokenizer(byte_level_dir)
    euro = tokenizer.encode("€ w", add_special_tokens=False)
    assert [tokenizer.token_text(i) for i in euro] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", " w"]
    assert tokenizer.token_text(1) == "</s>"
    assert Tokenizer(sentencepiece_dir).token_text(tokenizer_id(sentencepiece_dir, "▁a")) == " a"


def tokenizer_id(folder: Path, token: str) -> int:
    raw = Tokenizer(folder).raw
    assert raw is not None
    found = raw.token_to_id(token)
    assert found is not None
    return found


def test_the_bound_on_tokens_is_one(byte_level_dir: Path, sentencepiece_dir: Path) -> None:
    for folder in (byte_level_dir, sentencepiece_dir, DEMO_MODEL):
        tokenizer = Tokenizer(folder)
        for text in ("hello hello " * 50, "🙂" * 100, "</s>" * 50, "a"):
            assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))
        assert tokenizer.fewest_tokens("a" * 10_000) > 50


def test_the_front_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, stagemesh.gateway.api.http.app, stagemesh.gateway.api.grpc_api, stagemesh.client\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
