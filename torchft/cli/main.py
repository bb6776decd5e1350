"""``tune``: the command line. Each verb is a module of this package, imported only when it is asked for.

Exit codes: 0 done, 2 the user can fix it (one message, no traceback unless ``--debug``), 1 a failure of ours,
130 interrupted.
"""

import errno
import importlib
import importlib.metadata
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torchft.errors import LostContact, UserError
from torchft.names import nearest
from torchft.redact import redact

VERBS = {
    "ls": "list the recipes and configs that torchft ships",
    "run": "run a recipe, on one device or with torchrun",
    "cp": "copy a recipe or a config, to edit it",
    "cat": "print a config or a recipe",
    "validate": "check a config without running anything",
    "vocab": "write a checkpoint with new special tokens",
    "preview": "show what a config trains on, token by token",
    "download": "fetch a checkpoint from the Hugging Face Hub",
    "generate": "ask a model: prompts, a file of them, or a chat",
    "serve": "a model over HTTP, in OpenAI's form",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"torchft {importlib.metadata.version('torchft-recipes')}")
        return 0
    verb, *rest = arguments
    with exit_on_user_error(debug="--debug" in rest):
        if verb not in VERBS:
            raise UserError(f"tune has no command {verb!r}{nearest(verb, VERBS)}; `tune --help` lists them")
        try:
            importlib.import_module(f"torchft.cli.{verb}").main(rest)
            sys.stdout.flush()
        except BrokenPipeError:
            if verb == "run":
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `tune ls | head`: nobody reads on
    return 0


@contextmanager
def exit_on_user_error(*, debug: bool) -> Iterator[None]:
    """Turn a UserError, or too many open files, into a message and exit code 2, and Ctrl-C into 130."""
    try:
        yield
    except UserError as e:
        if debug:
            print(redact(traceback.format_exc()), file=sys.stderr)
        rank, alone = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") == "1"
        if e.is_shared and rank != "0":
            time.sleep(60)  # rank 0 says it; when it exits, torchrun ends this process
        else:
            print(redact(f"{'' if alone or e.is_shared else f'[rank {rank}] '}error: {e}"), file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as e:
        if e.errno not in (errno.EMFILE, errno.ENFILE) or debug:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        way_out = f"this process may have {limit} open; run `ulimit -n 65536` before the command, in the same shell"
        print(redact(f"error: {e}: {way_out}"), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except LostContact as e:
        if debug:
            print(redact(traceback.format_exc()), file=sys.stderr)
        print(redact(f"error: {e}"), file=sys.stderr, flush=True)
        sys.exit(3)


def _help() -> str:
    verbs = "\n".join(f"  {verb:10}{text}" for verb, text in VERBS.items())
    return (
        f"usage: tune COMMAND ...\n\n{verbs}\n\n`tune COMMAND --help` says more. A first run, offline and on a CPU:\n\n"
        "  tune run lora_finetune --config demo/lora"
    )


if __name__ == "__main__":
    sys.exit(main())
