"""``tune run``: start a recipe in this process or, with torchrun, in one process per device.

A recipe ends with ``start(main, Config, recipe="its_name")``, so that ``tune run x``, ``python recipes/x.py`` and
``torchrun recipes/x.py`` read the same words and fail the same way.
"""

import contextlib
import faulthandler
import logging
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

from torchft import registry, shipped
from torchft.cli.arguments import Parser
from torchft.cli.main import exit_on_user_error
from torchft.cli.rendezvous import check_rendezvous
from torchft.config_load import load
from torchft.errors import UserError
from torchft.redact import redact, redact_record

C = TypeVar("C")
STDERR = 2

# torchrun's options, so that they are known without importing torch. Not --module, --no-python and --run-path, which
# would run something else than the recipe.
TORCHRUN = (
    "nnodes", "nproc-per-node", "node-rank", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf",
    "master-addr", "master-port", "local-addr", "max-restarts", "monitor-interval", "start-method",
    "event-log-handler", "role", "log-dir", "redirects", "tee", "local-ranks-filter",
    "duplicate-stdout-filters", "duplicate-stderr-filters", "logs-specs", "numa-binding", "signals-to-handle",
    "shutdown-timeout",
)  # fmt: skip
TORCHRUN_FLAGS = ("standalone", "virtual-local-rank")

RECIPES = (
    "full_finetune", "lora_finetune", "dpo", "ppo", "grpo", "qat_finetune", "knowledge_distillation",
    "reward_modeling", "embedding_finetune", "generate", "evaluate", "quantize",
)  # fmt: skip
TORCHTUNE_NAMES = {  # without _distributed and _single_device
    "full_dpo": "dpo",
    "lora_dpo": "dpo",
    "ppo_full_finetune": "ppo",
    "qat": "qat_finetune",
    "qat_lora_finetune": "qat_finetune",
    "eleuther_eval": "evaluate",
    "dev/generate_v2": "generate",
    "dev/grpo_full_finetune": "grpo",
    "dev/async_grpo_full_finetune": "grpo",
    "dev/lora_finetune_distributed_multi_dataset": "lora_finetune",
}


def main(arguments: list[str]) -> None:
    """``tune run RECIPE [torchrun options] --config CONFIG [key=value ...]``"""
    parser = _parser("run", "Run a recipe. A name that ends in _distributed runs on all visible devices of this host.")
    torchrun = parser.add_argument_group("torchrun options (any of them starts torchrun)")
    for name in TORCHRUN:
        torchrun.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")), metavar="X")
    for name in TORCHRUN_FLAGS:
        torchrun.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")), action="store_true")
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="name or .py file; values; ~key removes")
    given = parser.parse(arguments)
    if not given.words or "=" in given.words[0]:
        raise UserError("tune run needs the name or the .py file of a recipe; `tune ls` lists them")
    script, distributed = find(given.words[0])
    config = ["--config", str(shipped.find_config(given.config))] if given.config else []
    trust = [word for package in given.trust for word in ("--trust", package)]
    command = [str(script), *config, *trust, *(["--debug"] if given.debug else []), *given.words[1:]]
    options = [f"--{n}={v}" for n in TORCHRUN if (v := vars(given)[n.replace("-", "_")]) is not None]
    options += [f"--{n}" for n in TORCHRUN_FLAGS if vars(given)[n.replace("-", "_")]]
    if options and given.words[0].endswith("_single_device"):
        raise UserError(f"{given.words[0]} runs on one device; for {options[0]} use the name without _single_device")
    if options or distributed:
        _torchrun(options, command)
    else:
        sys.argv = command
        if script not in shipped.recipes().values():
            sys.path.insert(0, str(script.resolve().parent))  # as `python script` does, for what lies beside it
        runpy.run_path(str(script), run_name="__main__")


def start(main: Callable[[C], None], config: type[C], *, recipe: str) -> None:
    """Read the command line of a recipe into its ``config`` and call ``main`` with it; the last line of every recipe.

    Args:
        recipe: the name that a YAML's ``recipe:`` must have; a renamed copy of the script keeps it.
    """
    sys.excepthook = _redacted_traceback
    if not faulthandler.is_enabled():
        faulthandler.enable(STDERR)  # a crash in compiled code says where
    _show_log()
    with exit_on_user_error(debug="--debug" in sys.argv):
        parser = _parser("", sys.modules[main.__module__].__doc__ or "")
        parser.add_argument("words", nargs="*", metavar="key=value", help="values that override; ~key removes")
        given = parser.parse(sys.argv[1:])
        try:
            for package in given.trust:
                registry.trust(package)
            file = shipped.find_config(given.config) if given.config else None
            loaded = load(config, recipe=recipe, file=file, overrides=given.words)
        except UserError as e:
            e.is_shared = True
            raise
        main(loaded)


def find(name: str) -> tuple[Path, bool]:
    """The script for a recipe's name, torchtune's name for it, or a ``.py`` path; and whether it asks for torchrun."""
    if name in shipped.recipes() or name.endswith(".py"):
        return shipped.find_recipe(name), False
    base = name.removesuffix("_distributed").removesuffix("_single_device")
    base = TORCHTUNE_NAMES.get(name, TORCHTUNE_NAMES.get(base, base))
    if base in RECIPES and base not in shipped.recipes():
        also = "" if base == name else f" is a name of the recipe {base!r}, which"
        raise UserError(f"{name!r}{also} is planned, but not in this version; it has {', '.join(shipped.recipes())}")
    return shipped.find_recipe(base), name.endswith("_distributed")


def is_recipe(name: str) -> bool:
    """Whether ``name`` is one of torchtune's for a recipe of ours, or has its ending for the devices."""
    base = name.removesuffix("_distributed").removesuffix("_single_device")
    return TORCHTUNE_NAMES.get(name, TORCHTUNE_NAMES.get(base, base)) in shipped.recipes()


def _parser(verb: str, description: str) -> Parser:
    parser = Parser(verb, description)
    parser.add_argument("--config", metavar="CONFIG", help="name (`tune ls`) or YAML file")
    trust = "your own package, whose classes and functions the config may name"
    parser.add_argument("--trust", metavar="PACKAGE", action="append", default=[], help=trust)
    return parser


def _torchrun(options: list[str], command: list[str]) -> None:
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if not any(option.startswith("--nproc-per-node=") for option in options):
        devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 1
        options = [*options, f"--nproc-per-node={devices}"]
    check_rendezvous({name[2:]: value for name, _, value in (option.partition("=") for option in options)})
    given = {option.partition("=")[0] for option in options}
    if "--rdzv-endpoint" in given and "--rdzv-backend" not in given:
        options = [*options, "--rdzv-backend=c10d"]  # the one that reads it; torchrun's default does not
    if not given & {"--nnodes", "--rdzv-endpoint", "--rdzv-backend", "--master-addr", "--master-port", "--standalone"}:
        options = [*options, "--standalone"]  # on a free port: two runs on one machine do not meet
    if "--max-restarts" in given and "--max-restarts=0" not in options:
        # Else processes that torchrun starts again find in its store the addresses of the dead, and call them in vain.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # said below, once
    if "--signals-to-handle" not in given:
        # torchrun would give its processes 30 s from the signal; ours end by themselves, when the step is saved.
        options = [*options, "--signals-to-handle=SIGHUP,SIGQUIT"]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _pass_on)
    try:
        torchrun.run(torchrun.get_args_parser().parse_args([*options, *command]))
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if _passed_on and failure.exitcode == -_passed_on[0]:
            print(f"\n{signal.Signals(_passed_on[0]).name}: stopped all processes", file=sys.stderr)
            sys.exit(128 + _passed_on[0])
        if failure.exitcode in (2, 3, 130):  # the process has said why
            sys.exit(1 if failure.exitcode == 3 else failure.exitcode)
        how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else "failed; its error is above"
        again = "; if it has saved a checkpoint, the same command goes on from there"
        again = again if failure.exitcode == -signal.SIGKILL else ""
        print(f"error: rank {rank} {how} (exit code {failure.exitcode}){again}", file=sys.stderr)
        sys.exit(1)
    except SignalException as e:
        print(f"\n{signal.Signals(e.sigval).name}: stopped all processes", file=sys.stderr)
        sys.exit(128 + e.sigval)
    except (ValueError, RendezvousError) as e:
        why = str(e) or "not all nodes came in time (--rdzv-conf=join_timeout=600, seconds); start the others too"
        raise UserError(f"torchrun: {why}") from None


_passed_on: list[int] = []  # signals that the processes have been sent


def _pass_on(number: int, frame: FrameType | None) -> None:
    """To the processes that torchrun has started, which then end, and torchrun with them."""
    _passed_on.append(number)
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), number)


def _show_log() -> None:
    """What the library says goes to stderr without secrets, unless the recipe sets up logging of its own."""
    logging.getLogger("torchft").setLevel(logging.INFO)
    handler = logging.lastResort
    assert handler is not None
    handler.setLevel(logging.INFO)
    handler.addFilter(redact_record)
    for name in ("torchao", "torch.utils._pytree"):  # of its libraries for other machines, and to its authors
        logging.getLogger(name).setLevel(logging.ERROR)


def _redacted_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")
