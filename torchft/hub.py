"""Hub checkpoints <-> our parameters. Each family declares how its Hub names differ; nothing here knows a family.

Three rules cover every family: a renamed name, several of our tensors fused into one Hub tensor (Phi 3, GLM 4), and one
of our tensors stored as one Hub tensor per expert (Mixtral, Qwen 3 MoE, DeepSeek).
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import UserError
from torchft.files import new_folder, read_json
from torchft.ranks import Region, from_main, is_main, local, region, whole
from torchft.staging import Staging
from torchft.weights import SHARD_BYTES, WeightFiles, write_shards


@dataclass(frozen=True)
class HubNames:
    """How one family's Hub names differ from ours (which are Llama's, except for the norms)."""

    renamed: dict[str, str] = field(default_factory=dict)  # regex on our name -> replacement
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # Hub module -> our modules, in order, along dim 0
    per_expert: str | None = None  # regex whose match in our name becomes "<match>.<expert>" on the Hub
    ignored: str = r"\.rotary_emb\.inv_freq$"  # regex of Hub tensors that hold nothing to learn

    def rename(self, name: str) -> str:
        """Our module or parameter name -> the Hub's."""
        for pattern, new in self.renamed.items():
            name = re.sub(pattern, new, name)
        return name


@dataclass(frozen=True)
class HubFormat:
    """What a model needs to be written as a Hub folder; ``models.build`` gives it to every model."""

    names: HubNames
    config_json: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Our parameter ``name`` is (``rows`` of) the Hub tensors ``hub``: one, or one per expert."""

    name: str
    hub: tuple[str, ...]
    rows: slice


def pieces(params: Mapping[str, Tensor], names: HubNames) -> Iterator[Piece]:
    """Where each of our parameters lies in the Hub's tensors."""
    for name, param in params.items():
        hub, rows = name, slice(None)
        for fused, parts in names.fused.items():
            if (child := name.rsplit(".", 2)[-2]) in parts:
                sizes = [params[name.replace(f".{child}.", f".{p}.")].shape[0] for p in parts]
                start = sum(sizes[: parts.index(child)])
                hub, rows = name.replace(f".{child}.", f".{fused}."), slice(start, start + param.shape[0])
        hub = names.rename(hub)
        if names.per_expert and (m := re.search(names.per_expert, hub)):
            yield Piece(name, tuple(f"{hub[: m.end()]}.{e}{hub[m.end() :]}" for e in range(param.shape[0])), rows)
        else:
            yield Piece(name, (hub,), rows)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a Hub checkpoint holds: all but the adapters', whose names begin with ``lora_``."""
    return {n: p for n, p in model.named_parameters() if not n.rpartition(".")[2].startswith("lora_")}


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path, *, check_finite: bool = True) -> None:
    """Copy the safetensors in ``folder`` into ``model``, one parameter at a time, cast to each parameter's dtype.

    Of a sharded model each rank reads and holds its own parts alone. A GPU does what there is to do with the values:
    cast, quantise, look for NaN and infinity. Raises UserError with every missing, unexpected or misshapen tensor
    before anything is copied, and with the names of tensors that are not finite.
    """
    names = hub_format(model).names
    files, params = WeightFiles(folder), base_parameters(model)
    plan = list(pieces(params, names))
    _check_names(files, params, plan, names)
    staging = Staging(next(iter(params.values())).device)
    finite: dict[str, Tensor] = {}
    for piece in plan:
        param = params[piece.name]
        if not local(param).numel():
            continue  # fewer rows than ranks
        part = staging.send(_read(files, piece, region(param)))
        if check_finite:
            finite[piece.hub[0]] = torch.stack(part.aminmax()).isfinite().all()
        local(param).copy_(part)
    if finite and not all(is_finite := torch.stack(list(finite.values())).tolist()):  # waits for the device, once
        broken = [name for name, fine in zip(finite, is_finite, strict=True) if not fine]
        raise UserError(
            f"{folder}: {len(broken)} tensors hold NaN or infinity, such as {broken[:4]}: "
            "training from them cannot work; download or export the checkpoint again"
        )


def _read(files: WeightFiles, piece: Piece, part: Region) -> Tensor:
    """``part`` of our parameter, from the Hub tensors that hold it."""
    first, *others = part or (slice(None),)
    if len(piece.hub) > 1:
        return torch.stack([files.read(hub, *others) for hub in piece.hub[first]])
    start = piece.rows.start or 0
    return files.read(piece.hub[0], *(slice(start + first.start, start + first.stop), *others) if part else ())


def save(
    model: nn.Module,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    read: Callable[[str], Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model`` as a Hub folder (config.json and safetensors), whole or not at all; an existing one is replaced.

    ``dtype``: of the stored tensors (None = as they are). ``read``: gives a full parameter by our name where it is not
    the model's own, such as one with its adapter merged in; called for one shard at a time. Bit-exact inverse of
    ``models.load`` in the same dtype. Raises UserError rather than replace a folder that holds something else.

    All ranks call it: a sharded model is gathered tensor by tensor, and the main rank writes.
    """
    folder = Path(folder)
    from_main(partial(_check_replaceable, folder))
    hub, params = hub_format(model), base_parameters(model)
    plan: dict[str, list[tuple[str, int | None]]] = {}  # Hub name -> our names (and expert), in row order
    for piece in sorted(pieces(params, hub.names), key=lambda p: p.rows.start or 0):
        for expert, name in enumerate(piece.hub):
            plan.setdefault(name, []).append((piece.name, expert if len(piece.hub) > 1 else None))

    def part(name: str, expert: int | None) -> Tensor:
        tensor = read(name) if read else whole(params[name])
        return (tensor if expert is None else tensor[expert]).to(dtype or params[name].dtype)

    def num_bytes(name: str, expert: int | None) -> int:
        param = params[name]
        return param.numel() // (1 if expert is None else len(param)) * (dtype or param.dtype).itemsize

    def stored(hub_name: str) -> Tensor:
        parts = [part(*p).cpu() for p in plan[hub_name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    sizes = {hub_name: sum(num_bytes(*p) for p in parts) for hub_name, parts in plan.items()}
    stored_dtype = dtype or next(iter(params.values())).dtype
    if not is_main():
        for hub_name in sizes:
            stored(hub_name)  # gives this rank's part
        return
    with new_folder(folder) as new:
        write_shards(new, sizes, stored, shard_bytes=shard_bytes)
        config = {k: v for k, v in hub.config_json.items() if k not in ("torch_dtype", "dtype")}
        config["torch_dtype" if "torch_dtype" in hub.config_json else "dtype"] = str(stored_dtype).removeprefix(
            "torch."
        )
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / "config.json").exists() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a checkpoint: it would be lost; give another path or delete it")


def save_side_files(source: Path, folder: Path, *, stop_ids: Sequence[int]) -> None:
    """Copy a checkpoint's licence and generation_config.json to ``folder``, the latter ending at ``stop_ids`` too.

    A base model that learnt to chat must stop where its chat format does, in transformers and vLLM as here. Of several
    ranks the main one writes.
    """
    if not is_main():
        return
    for name in ("LICENSE", "LICENSE.txt", "USE_POLICY.md"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    path = source / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    generation["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    (folder / path.name).write_text(json.dumps(generation, indent=2) + "\n")


def hub_format(model: nn.Module) -> HubFormat:
    hub = model.hub_format
    assert isinstance(hub, HubFormat), "models.build and models.load set hub_format"
    return hub


def _check_names(files: WeightFiles, params: Mapping[str, Tensor], plan: list[Piece], names: HubNames) -> None:
    """UserError unless the folder holds exactly the tensors that the model needs, in their shapes."""
    want: dict[str, list[int]] = {}
    for piece in plan:
        shape = list(params[piece.name].shape[1:] if len(piece.hub) > 1 else params[piece.name].shape)
        for hub in piece.hub:
            if hub in want:
                want[hub][0] += shape[0]  # fused along dim 0
            else:
                want[hub] = shape
    have = {n for n in files.names() if not re.search(names.ignored, n)}
    problems = []
    if "lm_head.weight" in have - set(want):
        problems += _tied_head(files, "lm_head.weight", want)
        have.remove("lm_head.weight")
    if missing := sorted(set(want) - have):
        problems.append(f"lacks {len(missing)} of {len(want)} tensors: {_some(missing)}")
    if extra := sorted(have - set(want)):
        problems.append(f"holds {len(extra)} tensors that the model has no place for: {_some(extra)}")
    for name in sorted(set(want) & have):
        if (got := files.shape(name)) != tuple(want[name]):
            problems.append(f"{name} has shape {list(got)}, but config.json asks for {want[name]}")
        elif (dtype := files.dtype(name)) not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} is stored as {dtype}, which cannot be trained: take the original checkpoint")
    if problems:
        shown = [f"{files.folder}: {p}" for p in problems[:10]]
        if len(problems) > 10:
            shown.append(f"... and {len(problems) - 10} more such tensors")
        shown[-1] += ". config.json and the weights are of different models, or damaged: download the folder again"
        raise UserError(*shown)


def _tied_head(files: WeightFiles, head: str, want: Mapping[str, Any]) -> list[str]:
    """A tied model's checkpoint may repeat the embedding as lm_head, but not hold another one."""
    embedding = next((n for n in want if n.endswith("embed_tokens.weight")), "")
    if embedding in files and torch.equal(files.read(head), files.read(embedding)):
        return []
    return [f"config.json ties the embeddings, but {head} differs from {embedding}: set tie_word_embeddings to false"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names) - 10} more)" if len(names) > 10 else "")
