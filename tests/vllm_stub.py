"""A server that speaks what rollouts use of vLLM's protocol, over our own engine; strict about what it is sent."""

import json
import math
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from torchft import models
from torchft.generation.loaded import engine, load
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling

FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop",
    "stop_token_ids", "seed", "logprobs", "return_token_ids",
}  # fmt: skip


class Refused(Exception):
    """(status, message)"""


class Stub:
    """Attributes change what it does: how many of the next requests fail, what its answers lack, and so on."""

    def __init__(self, base):
        self.base = Path(base)
        self.lock = threading.Lock()
        self.seen = Counter()  # requests by path
        self.failures = 0  # of the next requests, with 503
        self.cuts = False  # the ends off the texts of failures
        self.ignores_temperature = False
        self.max_model_len = 256
        self.change = lambda choice: None  # made to every answer
        self.url = ""
        self.forget()

    def forget(self):
        """As after a restart."""
        self.models = {"demo": self._engine(None)}

    def answer(self, path, body):
        with self.lock:
            self.seen[path] += 1
            if self.failures:
                self.failures -= 1
                raise Refused(503, "overloaded")
            return getattr(self, "on_" + path.strip("/").replace("/", "_"))(body)

    def on_v1_models(self, body):
        cards = [{"id": "demo", "parent": None, "max_model_len": self.max_model_len}]
        return json.dumps({"data": cards + [{"id": n, "parent": "demo"} for n in self.models if n != "demo"]})

    def on_v1_load_lora_adapter(self, body):
        if body["lora_name"] in self.models:
            raise Refused(400, "has already been loaded")
        self.models[body["lora_name"]] = self._engine(Path(body["lora_path"]))
        return "Success: added"

    def on_v1_unload_lora_adapter(self, body):
        if self.models.pop(body["lora_name"], None) is None:
            raise Refused(404, "cannot be found")
        return "Success: removed"

    def on_collective_rpc(self, body):
        assert body == {"method": "reload_weights", "kwargs": {"weights_path": body["kwargs"]["weights_path"]}}
        self.base = Path(body["kwargs"]["weights_path"])
        self.forget()
        return ""

    def on_reset_prefix_cache(self, body):
        return ""

    def on_v1_completions(self, body):
        if body.keys() != FIELDS or not all(isinstance(token, int) for token in body["prompt"]):
            raise Refused(400, f"fields {sorted(body)}")
        if body["model"] not in self.models:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            raise Refused(400, "too long")
        own = self.models[body["model"]]
        sampling = Sampling(
            temperature=body["temperature"],
            top_k=None if body["top_k"] == -1 else body["top_k"],
            max_new_tokens=body["max_tokens"],
            stop=body["stop"],
            **{name: body[name] for name in ("top_p", "min_p", "repetition_penalty")},
        )
        [found] = own.complete([Request(prompt=body["prompt"], sampling=sampling, seed=body["seed"])])
        with torch.no_grad():
            logits = own.model(torch.tensor([body["prompt"]]))[0, -1].float()
        heat = 1.0 if self.ignores_temperature else body["temperature"] or 1.0
        best = {"a": (logits / heat).log_softmax(-1).max().item()}
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": found.logps, "top_logprobs": [best] * len(found.tokens)},
            "finish_reason": found.finish,
            "token_ids": found.tokens,
        }
        self.change(choice)
        return json.dumps({"choices": [choice]})

    def _engine(self, adapter):
        model, tokenizer = load(self.base, adapter=adapter, dtype=torch.float32, device=torch.device("cpu"))
        assert all(math.isfinite(p.sum()) for p in model.parameters())
        return engine(model, tokenizer, num_slots=1, max_len=models.sizes(self.base).vocab_size)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # callers at once; of more than this the system resets some: by default there are 5


@contextmanager
def served(base):
    """A `Stub` at its ``url``."""
    stub = Stub(base)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body):
            try:
                status, text = 200, stub.answer(self.path, body)
            except Refused as e:
                status, text = e.args
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode()) + 10 * (stub.cuts and status >= 400)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
