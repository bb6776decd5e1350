"""The output folder of one run: locked while in use, one run per folder, run.json and config.yaml.

    with open_run(config.output_dir, dump(config), recipe="lora_finetune", resume=config.resume) as run:
        saved = checkpoint.latest(run.path, run.id)   # None in a new run

resume: ``auto`` continues the folder's run if the config agrees, or starts one; ``accept_changes`` continues it with a
changed config; ``never`` refuses a folder that holds results.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from torchft.errors import UserError
from torchft.files import atomic_write, read_json
from torchft.ranks import from_main, gather
from torchft.redact import redact, redact_tree
from torchft.training import checkpoint
from torchft.training.environment import git_commit, versions
from torchft.training.interrupt import Stopped

log = logging.getLogger(__name__)

Resume = Literal["auto", "accept_changes", "never"]

# Top-level keys that a resume may change: where and how often things are written, how long to train, and what trades
# memory for time. A longer run also stretches a schedule that ends with it.
FREE_KEYS = {
    *("output_dir", "resume", "max_steps", "epochs", "log_every", "eval_every", "save_every", "keep_last"),
    *("export", "export_dtype", "metric_loggers", "profile", "compile", "recompute", "offload_activations"),
    *("parallel", "guard"),
}
_RESULTS = re.compile(r"step_\d{6,}|export")
_OURS = re.compile(r"run\.json|config\.yaml|metrics\.jsonl|loss\.png|report\.html|" + _RESULTS.pattern)


@dataclass(frozen=True, kw_only=True)
class Run:
    """An open run folder. ``config_changed``: what the config says now counts, not what the checkpoint says."""

    path: Path
    id: str
    is_new: bool
    config_changed: bool


@contextlib.contextmanager
def open_run(output_dir: Path, config_text: str, **how: Any) -> Iterator[Run]:
    """All ranks: `opened` by the main rank, and known to all. Same arguments. UserError if ranks' configs differ."""
    texts = gather(config_text)
    if others := [r for r, text in enumerate(texts) if text != texts[0]]:
        main, other = _dotted(_parsed(texts[0])), _dotted(_parsed(texts[others[0]]))
        keys = [key for key in {**main, **other} if main.get(key) != other.get(key)]
        raise UserError(
            f"rank {others[0]} was started with another config than rank 0: {', '.join(keys[:10])}. Start the same "
            "command, with the same files, on each node",
            is_shared=True,
        )
    with contextlib.ExitStack() as stack:
        yield from_main(lambda: stack.enter_context(opened(output_dir, config_text, **how)))


@contextlib.contextmanager
def opened(
    output_dir: Path,
    config_text: str,
    *,
    recipe: str,
    resume: Resume = "auto",
    checkpoint_dir: Path | None = None,
    device: str = "",
    command: Sequence[str] | None = None,
) -> Iterator[Run]:
    """Creates or reopens ``output_dir`` for this process alone, until the block ends. UserError if it can't be used.

    Args:
        config_text: the resolved YAML with secrets redacted, as ``torchft.config.dump`` gives it.
        checkpoint_dir: the base model's folder, which must not contain ``output_dir``.
        command: for run.json, redacted there; default: this process's.
    """
    path = _folder(output_dir, checkpoint_dir)
    with _locked(path):
        checkpoint.clean(path)
        for name in ("run.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "loss.png"):
            for orphan in path.glob(f".{name}.*.tmp"):  # of a killed atomic_write
                orphan.unlink()
        record, changed = _continued(path, config_text, recipe, resume)
        is_new = record is None
        if record is None:
            now = datetime.now(UTC)
            record = {"id": f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}", "recipe": recipe, "starts": []}
        start = {
            "started": _now(),
            "status": "running",
            "command": redacted_command(sys.argv if command is None else command),
            "versions": versions(),
            "git_commit": git_commit(Path.cwd()),
            "host": socket.gethostname(),
            "device": device,
        }
        record["starts"].append(start)
        config_file, saved = path / "config.yaml", _steps(path)
        text_of_saved = config_file.read_text() if changed else config_text
        atomic_write(config_file, config_text)
        _write(path, record)
        try:
            yield Run(path=path, id=record["id"], is_new=is_new, config_changed=changed)
            start["status"] = "finished"
        except Stopped:
            start["status"] = "stopped"
            raise
        except BaseException as e:
            start["status"] = "interrupted" if isinstance(e, KeyboardInterrupt) else "failed"
            start["error"] = redact(f"{type(e).__name__}: {e}")[:2000]
            raise
        finally:
            start["ended"] = _now()
            with contextlib.suppress(OSError):  # a full disk must not hide the error that brought us here
                _write(path, record)
                if start["status"] in ("failed", "interrupted") and _steps(path) == saved:
                    atomic_write(config_file, text_of_saved)  # whose command goes on: nothing is of this one's


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for all that differs between two configs, FREE_KEYS left out."""
    before, after = _dotted(old), _dotted(new)
    keys = [k for k in {**before, **after} if k.split(".")[0] not in FREE_KEYS]
    absent = "(not set)"
    return [
        f"{k}: {before.get(k, absent)} -> {after.get(k, absent)}"
        for k in keys
        if before.get(k, absent) != after.get(k, absent)
    ]


def redacted_command(arguments: Sequence[str]) -> str:
    """A command line to paste into a shell, without secrets, be they known by their key or by their look."""
    parts = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        parts.append(
            f"{key}={redact_tree({key.split('.')[-1]: value})[key.split('.')[-1]]}" if equals else redact(argument)
        )
    return shlex.join(parts)


def _continued(path: Path, config_text: str, recipe: str, resume: Resume) -> tuple[dict[str, Any] | None, bool]:
    """The record of the run to continue (None: start a new one), and whether its config has changed."""
    here = sorted(p.name for p in path.iterdir() if _OURS.fullmatch(p.name))
    results = [name for name in here if _RESULTS.fullmatch(name)]
    way_out = "choose another output_dir, or move these files away"
    if not (path / "run.json").exists():
        if here:
            raise UserError(f"output_dir {path} holds {', '.join(here[:5])}, but no run.json: not a run's; {way_out}")
        return None, False
    if not results:
        return None, False  # that run ended before its first checkpoint: nothing is lost by starting over
    if resume == "never":
        raise UserError(f"output_dir {path} holds a run ({', '.join(results[:5])}) and resume is 'never'; {way_out}")
    record = read_json(path / "run.json")
    if record["recipe"] != recipe:
        raise UserError(f"output_dir {path} holds a run of {record['recipe']}, not of {recipe}; {way_out}")
    differences = changes(_parsed((path / "config.yaml").read_text()), _parsed(config_text))
    if differences and resume == "auto":
        raise UserError(
            *differences,
            f"output_dir {path} holds run {record['id']}, made with another config (above: then -> now). To continue "
            "it with this one: resume=accept_changes. To start anew: another output_dir",
        )
    for difference in differences:
        log.warning("continuing with a changed config: %s", difference)
    return record, bool(differences)


def _steps(path: Path) -> set[str]:
    return {step.name for step in path.glob("step_*")}


def _folder(output_dir: Path, checkpoint_dir: Path | None) -> Path:
    """The absolute folder, made and writable."""
    if match := re.search(r"\$\{?(\w+)", str(output_dir)):
        raise UserError(f"output_dir {output_dir}: shell variables are not expanded; write ${{oc.env:{match[1]}}}")
    path = output_dir.expanduser().resolve()
    if checkpoint_dir and path.is_relative_to(checkpoint_dir.expanduser().resolve()):
        raise UserError(f"output_dir {path} lies inside checkpoint_dir {checkpoint_dir}: choose a folder outside of it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".run.json.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(
            f"output_dir {path} cannot be written: {e.strerror}: choose a folder that you may write"
        ) from None
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds ``.lock``; the system lets go of it when the process ends, however it ends."""
    with open(path / ".lock", "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise UserError(
                f"output_dir {path} is in use by {f.read().strip() or 'another process'}: wait for it or choose another"
            ) from None
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        f.flush()
        yield


def _parsed(config_text: str) -> dict[Any, Any]:
    tree = OmegaConf.to_container(OmegaConf.create(config_text))
    assert isinstance(tree, dict)
    return tree


def _dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)  # type: ignore[assignment]
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in _dotted(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def _write(path: Path, record: Mapping[str, Any]) -> None:
    atomic_write(path / "run.json", json.dumps(record, indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
