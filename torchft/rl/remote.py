"""Answers from a vLLM server over HTTP, in place of the built-in engine; it gets the weights before every rollout.

Written from the source of vLLM's OpenAI-compatible server as of 2026: /v1/models, /v1/completions on token ids, and
/v1/load_lora_adapter, or for whole models /collective_rpc and /reset_prefix_cache. It has met a stub of these alone.
"""

import json
import logging
import math
import os
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

from torchft.config import Range
from torchft.errors import UserError
from torchft.generation.requests import Completion, Finish, Request
from torchft.generation.sampling import Sampling
from torchft.ranks import from_main

log = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0  # between two tries
KEY = "VLLM_API_KEY"  # environment variable, as the server's own


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The ``rollout.server:`` section of a config. docs/reinforcement_learning.md says how to start the server."""

    url: str  # http://host:8000, without /v1
    timeout_s: Annotated[float, Range(above=0)] = 600.0  # of one request
    patience_s: Annotated[float, Range(min=0)] = 300.0  # for which a server that is gone is asked again


class RemoteEngine:
    """As `Engine`, to the extent that rollouts use it. All ranks make one.

    Args:
        publish: writes the model to a folder that the server can read, ``adapter`` alone or ``whole``; gives that.
        adapters: whether the model has them: then the server holds its base, and gets them under a new name each time,
            so that what it has cached of prompts is never that of other weights.
        num_slots: requests under way at a time.
        max_len, stop_ids: as for Engine.
    """

    def __init__(
        self,
        config: ServerConfig,
        publish: Callable[..., Path],
        *,
        adapters: bool,
        num_slots: int,
        max_len: int,
        stop_ids: Iterable[int],
        temperature: float,
    ) -> None:
        self.max_len, self.num_retries = max_len, 0
        self._config, self._publish, self._adapters = config, publish, adapters
        self._num_slots, self._stop_ids = num_slots, list(stop_ids)
        self._lost = threading.Event()  # set once a request has failed for good: the others give up, too
        self._base = from_main(partial(self._check, temperature))
        self._model = self._base

    def update(self) -> None:
        """All ranks: the server gets the weights as they are now."""
        folder = self._publish(whole=not self._adapters, adapter=self._adapters).resolve()
        self._model = from_main(partial(self._load, folder))

    def complete(self, requests: Iterable[Request]) -> list[Completion]:
        """All of ``requests``, in their order. UserError if the server is gone for longer than ``patience_s``."""
        with ThreadPoolExecutor(self._num_slots) as pool:
            return list(pool.map(self._complete, requests))

    def release(self) -> None:
        """Nothing: no memory of this process is held."""

    def _check(self, temperature: float) -> str:
        """The name of the model that is served. UserError for a server that cannot do what rollouts need."""
        served = next((m for m in self._json("/v1/models")["data"] if not m.get("parent")), None)
        if served is None:
            raise UserError(f"rollout.server: {self._config.url} serves no model")
        self._model = str(served["id"])
        if (length := served.get("max_model_len")) and length < self.max_len:
            raise UserError(f"rollout.server: its --max-model-len {length} is less than seq_len {self.max_len}")
        cold, hot = (self._best_logp(t) for t in (1.0, temperature))
        if temperature != 1.0 and math.isclose(cold, hot, abs_tol=1e-4) and hot < -1e-2:
            raise UserError(
                f"rollout.server: its log-probabilities ignore rollout.sampling.temperature {temperature:g}: start it "
                "with --logprobs-mode processed_logprobs"
            )
        return self._model

    def _best_logp(self, temperature: float) -> float:
        """log p of the likeliest token after one that every model has, as the server gives it."""
        choice = self._choice([1], Sampling(temperature=temperature, max_new_tokens=1), seed=0)
        return max(choice["logprobs"]["top_logprobs"][0].values())

    def _load(self, folder: Path) -> str:
        if not self._adapters:
            self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            self._ask("/reset_prefix_cache", {})
            return self._base
        name = f"torchft-{uuid.uuid4().hex[:12]}"
        # Asked again after a time-out, a server that had loaded it refuses: the name is this update's alone.
        asked = {"lora_name": name, "lora_path": str(folder / "adapter")}
        self._ask("/v1/load_lora_adapter", asked, done=b"already been loaded")
        if self._model != self._base:
            self._ask("/v1/unload_lora_adapter", {"lora_name": self._model})
        return name

    def _complete(self, request: Request) -> Completion:
        if len(request.prompt) >= self.max_len:
            return Completion(tokens=[], logps=[], finish="too_long")
        choice = self._choice(list(request.prompt), request.sampling, seed=request.seed)
        tokens, logps, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise UserError(f"rollout.server: an answer ended with {reason!r}: the server was stopped, or has failed")
        finish: Finish = "stop" if reason == "stop" else "length"
        bad = next((i for i, logp in enumerate(logps) if logp is None or not math.isfinite(logp)), None)
        if bad is not None:
            return Completion(tokens=tokens[:bad], logps=logps[:bad], finish="not_finite")
        return Completion(tokens=tokens, logps=logps, finish=finish)

    def _choice(self, prompt: list[int], sampling: Sampling, *, seed: int) -> dict[str, Any]:
        """What is not set would be the server's own default, from the model's generation_config.json: all is set."""
        asked = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": min(sampling.max_new_tokens, self.max_len - len(prompt)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "stop": sampling.stop,
            "stop_token_ids": self._stop_ids,
            "seed": seed,
            "logprobs": 1,
            "return_token_ids": True,
        }
        choice: dict[str, Any] = self._json("/v1/completions", asked)["choices"][0]
        tokens, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if tokens is None or logps is None or len(tokens) != len(logps):
            raise UserError(
                "rollout.server: its answers lack token ids or their log-probabilities (return_token_ids, logprobs): "
                "vLLM 0.10.2 is the first that gives both"
            )
        return choice

    def _json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self._ask(path, body)
        try:
            found: dict[str, Any] = json.loads(answer)
        except ValueError:
            raise UserError(f"rollout.server: {self._config.url}{path} answers no JSON: {answer[:200]!r}") from None
        return found

    def _ask(self, path: str, body: dict[str, Any] | None = None, *, done: bytes | None = None) -> bytes:
        """POST ``body``, or GET. Tries again while there is no answer, or one of the server's own failure.

        ``done``: in a refusal, says that an earlier try was heard."""
        key = os.environ.get(KEY)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self._config.url.rstrip("/") + path, data=data, headers=headers)
        wait, end = FIRST_WAIT_S, time.monotonic() + self._config.patience_s
        while not self._lost.is_set():
            try:
                status, text = self._answer(asked)
            except (OSError, HTTPException) as e:  # refused, reset, timed out, cut off
                problem, final = repr(getattr(e, "reason", e)), False
            else:
                if status < 400 or (done and done in text):
                    return text
                problem, final = f"{status}: {text[:500].decode(errors='replace')}", status < 500 and status != 429
            if final or time.monotonic() + wait > end:
                self._lost.set()
                tried = "" if final else f", asked again for {self._config.patience_s:g} s"
                raise UserError(f"rollout.server: {asked.full_url} answers {problem}{tried}. {_way_out(path)}")
            if not self.num_retries:
                log.warning("%s answers %s; asking again for %g s", asked.full_url, problem, self._config.patience_s)
            self.num_retries += 1
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)
        raise UserError(f"rollout.server: {self._config.url} is lost")

    def _answer(self, asked: urllib.request.Request) -> tuple[int, bytes]:
        """Status and text. OSError or HTTPException where there is none, or not all of it."""
        try:
            with urllib.request.urlopen(asked, timeout=self._config.timeout_s) as answer:
                return answer.status, bytes(answer.read())
        except urllib.error.HTTPError as e:
            with e:
                return e.code, e.read()


def _way_out(path: str) -> str:
    if path == "/v1/load_lora_adapter":
        return "Start it with --enable-lora, --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    if path in ("/collective_rpc", "/reset_prefix_cache"):
        return "Start it with VLLM_SERVER_DEV_MODE=1, and a vLLM whose reload_weights takes a weights_path"
    return "Start it, then the same command: the run goes on from its newest checkpoint"
