"""Secrets by name, by shape and by value; nothing else is touched."""

import logging

import pytest

from torchft.redact import REDACTED, is_secret, redact, redact_record


@pytest.mark.parametrize(
    "name", ["token", "HF_TOKEN", "hf_token", "api_key", "apikey", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "password",
             "db.password", "client_secret", "private_key", "credentials"],
)  # fmt: skip
def test_secret_names(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["num_tokens", "tokens", "tokenizer", "cls_token", "pad_token", "eos_token", "stop_token", "key",
             "sort_key", "keys", "max_new_tokens", "secretary", "HOME", "monkey"],
)  # fmt: skip
def test_other_names(name):
    assert not is_secret(name)


def test_shapes_and_values(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "not-a-known-shape")
    for secret in ("hf_" + "a1" * 17, "sk-" + "b" * 40, "ghp_" + "c" * 36, "AKIA" + "D" * 16, "not-a-known-shape"):
        assert redact(f"x {secret} y") == f"x {REDACTED} y"
    assert redact("git clone https://me:pw@host/r.git") == f"git clone https://{REDACTED}@host/r.git"
    for text in ("hf_hub", "sk-learn", "mail me@host.org", "c0ffee" * 6 + "cafe", "https://host/a@b"):
        assert redact(text) == text


def test_log_filter(caplog):
    log = logging.getLogger("test_redact")
    log.addFilter(redact_record)
    log.warning("token %s in %d", "hf_" + "a1" * 17, 3)
    log.removeFilter(redact_record)
    assert caplog.records[0].getMessage() == f"token {REDACTED} in 3"
