"""``tune download``: fetch what torchft reads of a checkpoint (safetensors, JSON, tokenizer, templates) from the Hub.

Pickles, code and Meta's ``original/`` stay there. An interrupted download goes on where it stopped. The token comes
from HF_TOKEN or ``hf auth login``, never from an option.
"""

import glob
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from torchft.cli.arguments import Parser
from torchft.errors import UserError
from torchft.files import atomic_write, safe_join, sha256

MANIFEST = "download.json"  # the commit and the sha256 of every file, beside the files
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[\w][\w./-]{0,199}", re.ASCII)
SUFFIXES = {".safetensors", ".json", ".model", ".tiktoken", ".txt", ".jinja", ".md"}

GOES_ON = "try again later; what is here stays, and the download goes on from it"
REASONS = {  # the first that fits
    GatedRepoError: "this model is gated: accept its license at {url}, run `hf auth login`, and try again",
    RepositoryNotFoundError: "not on the Hub, or private: check the name at {url}; a private one needs `hf auth login`",
    RevisionNotFoundError: "there is no revision {revision!r}; {url}/tree/main shows the branches and tags",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it and try again",
    HfHubHTTPError: f"the Hub answered with an error; {GOES_ON}",
    HTTPError: f"the Hub cannot be reached, check the network; {GOES_ON}",
    LocalEntryNotFoundError: f"the Hub cannot be reached, check the network; {GOES_ON}",
}


def main(arguments: list[str]) -> None:
    """``tune download ORG/MODEL [--revision REVISION] [--output-dir FOLDER]``"""
    parser = Parser(
        "download", "Fetch a checkpoint from the Hugging Face Hub. Private and gated models: `hf auth login`."
    )
    parser.add_argument("repo", metavar="ORG/MODEL")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    parser.add_argument("--output-dir", type=Path, metavar="FOLDER", help="default: MODEL")
    given = parser.parse(arguments)
    if not REPO.fullmatch(given.repo) or ".." in given.repo or "--" in given.repo:
        raise UserError(f"{given.repo!r} is not a model of the Hub; write ORG/MODEL, as in meta-llama/Llama-3.2-1B")
    if not REVISION.fullmatch(given.revision) or ".." in given.revision:
        raise UserError(f"--revision {given.revision!r} is not a branch, tag or commit")
    folder = (given.output_dir or Path(given.repo.split("/")[1])).expanduser()
    with _hub_errors(given.repo, given.revision):
        commit = download(given.repo, given.revision, folder)
    print(f"{given.repo} at {commit}\nis in {folder}")
    print(f"next: tune run lora_finetune --config CONFIG checkpoint_dir={folder}  (`tune ls` lists the configs)")


def download(repo: str, revision: str, folder: Path) -> str:
    """Fetch into ``folder``, hold the weights' sha256 against the Hub's, write the manifest, return the commit."""
    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    assert info.sha is not None and info.siblings is not None
    files = {file.rfilename: file for file in info.siblings if is_wanted(file.rfilename)}
    for name in files:
        safe_join(folder, name)
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{repo} has no safetensors weights; torchft loads nothing else (pickles can run code)")
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, sum(file.size or 0 for file in files.values()))
    snapshot_download(repo, revision=info.sha, local_dir=folder, allow_patterns=[glob.escape(name) for name in files])
    digests = {name: sha256(folder / name) for name in sorted(files)}
    bad = [name for name, file in files.items() if file.lfs is not None and file.lfs.sha256 != digests[name]]
    if bad:
        raise UserError(*(f"{folder / name} differs from the Hub's: delete it and download it again" for name in bad))
    manifest = {"repo": repo, "commit": info.sha, "sha256": digests}
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return info.sha


def is_wanted(name: str) -> bool:
    """Whether a file of a Hub repository is one that torchft reads, or its license or model card."""
    path = PurePosixPath(name)
    is_text = path.name.upper().startswith(("LICENSE", "USE_POLICY", "NOTICE"))
    return len(path.parts) == 1 and not name.startswith("consolidated") and (path.suffix in SUFFIXES or is_text)


def _check_space(folder: Path, size: int) -> None:
    missing = size - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"{folder}: {missing / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB free; use --output-dir"
        )


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError) as e:  # the Hub's client, or a full disk
        reason = next((text for kind, text in REASONS.items() if isinstance(e, kind)), f"cannot write the files: {e}")
        raise UserError(f"{repo}: {reason.format(url=f'https://huggingface.co/{repo}', revision=revision)}") from None
