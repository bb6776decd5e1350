"""Keeping secrets out of everything that is printed, logged or saved: by name, by shape, and by value."""

import logging
import os
import re
from typing import Any

REDACTED = "<redacted>"

_SECRET_NAME = re.compile(
    r"(^|[_\-.])(token|(api|access|private|secret|auth|account|hf|wandb)_?key|secret|password|passwd|pwd|credentials?)$",
    re.IGNORECASE,
)
# a tokenizer's special token is a setting, not a secret
_SPECIAL_TOKEN = re.compile(
    r"(^|_)(bos|eos|pad|cls|sep|unk|mask|stop|end|start|image|special|new)_token$", re.IGNORECASE
)
_SECRET_SHAPE = re.compile(
    r"hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abp]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|wandb_v1_\w{16,}|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_WANDB_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # also the shape of a git commit
_COMMIT_NAME = re.compile(r"(revision|commit|sha|sha1|hash|digest)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret: ``hf_token``, not ``num_tokens``."""
    return bool(_SECRET_NAME.search(name)) and not _SPECIAL_TOKEN.search(name)


def redact(text: str) -> str:
    """``text`` without what looks like a secret and without the values of this process's secret variables."""
    for name, value in os.environ.items():
        if len(value) >= 8 and is_secret(name) and name not in ("PWD", "OLDPWD"):  # the shell's folders
            text = text.replace(value, REDACTED)
    return _URL_LOGIN.sub(REDACTED, _SECRET_SHAPE.sub(REDACTED, text))


def redact_tree(tree: Any, name: str = "") -> Any:
    """The same for a tree of dicts, lists and scalars, whose keys say more."""
    if isinstance(tree, dict):
        return {key: redact_tree(value, key) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact_tree(value, name) for value in tree]
    if not isinstance(tree, str) or not tree:
        return tree
    if is_secret(name):
        return REDACTED
    return redact(tree if _COMMIT_NAME.search(name) else _WANDB_KEY.sub(REDACTED, tree))


def redact_record(record: logging.LogRecord) -> bool:
    """A logging filter (``handler.addFilter(redact_record)``) that lets every record pass, redacted."""
    record.msg, record.args = redact(record.getMessage()), None
    return True
