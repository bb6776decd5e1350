"""``tune serve``: a model over HTTP, in OpenAI's form, on this machine alone unless ``--host`` says otherwise."""

from pathlib import Path

from torchft.cli.arguments import Parser
from torchft.cli.generate import add_model_options, load_model
from torchft.errors import UserError
from torchft.generation.batch import answers
from torchft.generation.loaded import engine
from torchft.generation.sampling import Sampling
from torchft.generation.worker import Worker


def main(arguments: list[str]) -> None:
    """``tune serve CHECKPOINT [--port 8000]``"""
    parser = Parser("serve", "Answer OpenAI-compatible requests: http://127.0.0.1:8000/v1. There is no password.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a Hub folder, such as a run's export/")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets every machine that reaches this one ask")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="of the model, for clients; default: the folder's")
    parser.add_argument("--num-slots", type=int, default=16, help="answers that are computed together")
    add_model_options(parser)
    given = parser.parse(arguments)
    try:
        import uvicorn

        from torchft.generation.server import app
    except ImportError as e:
        raise UserError(f"tune serve needs {e.name}: pip install 'torchft-recipes[serve]'") from None
    model, tokenizer = load_model(given)
    if not tokenizer.has_chat:
        raise UserError(f"{given.checkpoint} has no chat template: name a format with --chat-format")
    max_len = given.max_len or model.config.max_seq_len
    slots = engine(model, tokenizer, num_slots=given.num_slots, max_len=max_len, compile=given.compile)
    if given.compile:  # now, not at the first request
        answers(slots, tokenizer, [[0]], sampling=Sampling(max_new_tokens=2))
    name = given.name or given.checkpoint.resolve().name
    uvicorn.run(app(Worker(slots), tokenizer, model=name), host=given.host, port=given.port, log_level="info")
