"""Tokenizers made here, and an engine that answers with the prompt's own tokens, behind the real fronts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from google.protobuf.json_format import MessageToDict
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from stagemesh import rpc
from stagemesh.errors import Cancelled, StagemeshError
from stagemesh.gateway.api.grpc_api import GatewayServicer
from stagemesh.gateway.api.http.app import build_app
from stagemesh.gateway.api.http.server import HttpServer, bind
from stagemesh.gateway.api.request import Delta, GenerationRequest, ServedModel, TokenLogprob
from stagemesh.gateway.telemetry.metrics import Metrics
from stagemesh.gateway.telemetry.trace import Recorder
from stagemesh.gateway.text.detokenizer import Detokenizer
from stagemesh.gateway.text.tokenizer import Tokenizer
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.protos.v1 import gateway_pb2_grpc, types_pb2
from stagemesh.settings.gateway import GatewaySettings

# Lets the tests here share `prefix_world`.
sys.path.insert(0, str(Path(__file__).parent))

CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.first %}{{ raise_exception('the assistant must not begin') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|eot|>"]


def byte_level(folder: Path, *, chat_template: str | None = CHAT, bos: bool = True) -> Path:
    """A checkpoint's text files: GPT-2's byte alphabet, a few merges, BOS added by the post-processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "he", "ll", "hell", "hello", "Ġw"])}
    raw = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]))
    raw.add_special_tokens(SPECIAL)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw.decoder = decoders.ByteLevel()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _write(folder, raw, chat_template)


def sentencepiece(folder: Path) -> Path:
    """Llama 2's kind: spaces as ▁, bytes of unknown characters as <0xNN>, the space that begins a text stripped."""
    pieces = ["▁", "a", "b", "c", "▁a", "▁b", "é"]
    vocab = {t: i for i, t in enumerate(["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    merges = [("▁", "a"), ("▁", "b")]
    raw = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.add_special_tokens(["<unk>", *SPECIAL])
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _write(folder, raw, None)


def _write(folder: Path, raw: Any, chat_template: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    told: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    }
    if chat_template is not None:
        told["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.5}))
    return folder


class EchoStream:
    """Gives the prompt's tokens again and again; what the reader has not taken is merged into its next batch."""

    def __init__(self, engine: EchoEngine, request: GenerationRequest) -> None:
        self.request = request
        self._engine = engine
        self._cancelled = asyncio.Event()
        self._ended = False
        self.cached_tokens = 0
        self.batches = 0
        self.produced = 0

    def cancel(self) -> None:
        if not self._ended:
            self._ended = True
            self._engine.cancelled.append(self.request.request_id)
            self._engine.changed.set()
        self._engine.running.pop(self.request.request_id, None)
        self._cancelled.set()

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        request, engine = self.request, self._engine
        texts = [
            Detokenizer(
                engine.tokenizer,
                request.prompt,
                request.stop,
                request.skip_special_tokens,
                request.include_stop_str_in_output,
                request.sampling.min_tokens,
            )
            for _ in range(request.n)
        ]
        live = set(range(request.n))
        for step in range(request.max_tokens):
            if engine.gate is not None:
                waits = {asyncio.ensure_future(engine.gate.acquire()), asyncio.ensure_future(self._cancelled.wait())}
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
            else:
                await asyncio.sleep(0)
            if self._cancelled.is_set():
                raise Cancelled("cancelled by name")
            if engine.fail_at is not None and step == engine.fail_at[0]:
                raise engine.fail_at[1]
            batch = [self._delta(c, step, texts[c]) for c in sorted(live)]
            live -= {d.choice for d in batch if d.finish_reason is not None}
            if not live:
                self._ended = True
                engine.running.pop(request.request_id, None)
            self.batches += 1
            yield batch
            if not live:
                return

    def _delta(self, choice: int, step: int, text: Detokenizer) -> Delta:
        request = self.request
        body = [t for t in request.prompt if t != 0] or [1]
        token = body[(step + choice) % len(body)]
        self.produced += 1
        delta = Delta(choice, "", [token])
        if request.sampling.logprobs:
            top = tuple(
                (t, -float(rank + 1)) for rank, t in enumerate([token, 3, 4, 5][: request.sampling.top_logprobs])
            )
            delta.logprobs = [TokenLogprob(token, -1.0, top)]
        if token in request.stop_token_ids and step >= request.sampling.min_tokens:
            delta.text, delta.finish_reason = text.finish(), "stop"
            delta.stop_reason = None if token in self._engine.tokenizer.eos_ids else token
            return delta
        delta.text, stopped_by = text.push(token)
        if stopped_by is not None:
            delta.finish_reason, delta.stop_reason = "stop", stopped_by
        elif step + 1 == request.max_tokens:
            delta.text += text.finish()
            delta.finish_reason = "length"
        return delta


class EchoEngine:
    """Serves `folder`'s tokenizer; tests make it wait (`gate`), fail (`refuse`, `fail_at`) or be away (`away`)."""

    def __init__(self, folder: Path, max_model_len: int = 256) -> None:
        self.tokenizer = Tokenizer(folder)
        self._model = ServedModel("echo", max_model_len, 300, 1_700_000_000, self.tokenizer)
        self.away = ""
        self.refuse: StagemeshError | None = None
        self.fail_at: tuple[int, StagemeshError] | None = None
        self.gate: asyncio.Semaphore | None = None
        pipeline = types_pb2.PipelineView(pipeline_id="p0", epoch=3, state=types_pb2.PIPELINE_STATE_SERVING)
        self.mesh = types_pb2.MeshView(pipelines=[pipeline])
        self.running: dict[str, EchoStream] = {}
        self.requests: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.changed = asyncio.Event()

    @property
    def model(self) -> ServedModel | None:
        return None if self.away else self._model

    def submit(self, request: GenerationRequest) -> EchoStream:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        stream = self.running[request.request_id] = EchoStream(self, request)
        self.changed.set()
        return stream

    def cancel(self, request_id: str) -> bool:
        stream = self.running.get(request_id)
        if stream is not None:
            stream.cancel()
        return stream is not None

    def ready(self) -> tuple[bool, str]:
        return (not self.away, self.away)

    def describe(self) -> dict[str, object]:
        return {
            "ready": not self.away,
            **MessageToDict(self.mesh, preserving_proto_field_name=True),
            "gateway": {"id": "g", "running": len(self.running), "waiting": 0, "free_pages": 7, "total_pages": 9},
        }

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a submission or cancellation after which `condition` holds."""
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class Served:
    """The fronts over one engine."""

    def __init__(self, engine: EchoEngine, settings: GatewaySettings, timing: GatewayTiming) -> None:
        self.engine = engine
        self.settings = settings
        self.timing = timing
        self.metrics = Metrics()
        self.app = build_app(engine, settings, self.metrics, timing, Recorder())

    @contextlib.asynccontextmanager
    async def http(self) -> AsyncIterator[str]:
        """A real uvicorn server; its base URL."""
        sock = bind("127.0.0.1", 0)
        server = HttpServer(self.app, self.timing)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            await asyncio.wait_for(task, 30)
            sock.close()

    @contextlib.asynccontextmanager
    async def grpc(self) -> AsyncIterator[str]:
        """A real gRPC server; its address."""
        servicer = GatewayServicer(self.engine, self.settings)
        server = await rpc.start_server(
            "127.0.0.1",
            0,
            lambda s: gateway_pb2_grpc.add_GatewayServicer_to_server(servicer, s),
            ("stagemesh.v1.Gateway",),
        )
        try:
            yield f"127.0.0.1:{server.port}"
        finally:
            await server.stop(0)


@pytest.fixture
def byte_level_dir(tmp_path: Path) -> Path:
    """A byte-level checkpoint's text files."""
    return byte_level(tmp_path / "byte_level")


@pytest.fixture
def sentencepiece_dir(tmp_path: Path) -> Path:
    """A byte-fallback checkpoint's text files."""
    return sentencepiece(tmp_path / "sentencepiece")


@pytest.fixture
def make_served(byte_level_dir: Path) -> Callable[..., Served]:
    """Makes fronts over an echo engine; keywords are settings of the gateway."""

    def make(
        folder: Path | None = None,
        max_model_len: int = 256,
        timing: GatewayTiming = GatewayTiming(),
        **settings: Any,
    ) -> Served:
        return Served(EchoEngine(folder or byte_level_dir, max_model_len), GatewaySettings(**settings), timing)

    return make


@pytest.fixture
def make_byte_level() -> Callable[..., Path]:
    """Writes byte-level text files with another template."""
    return byte_level


@pytest.fixture
def events() -> Callable[[Iterable[str]], list[Any]]:
    """Parses lines of server-sent events; [DONE] comes as the string."""

    def parse(lines: Iterable[str]) -> list[Any]:
        data = [line.removeprefix("data: ") for line in lines if line]
        return [d if d == "[DONE]" else json.loads(d) for d in data]

    return parse
