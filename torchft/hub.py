"""Hub checkpoints <-> our parameters, by the names that each family declares; nothing here knows a family."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchft.dequantise import open_weights
from torchft.errors import UserError
from torchft.files import new_folder, read_json
from torchft.hub_check import check_names, predictor_tensors
from torchft.hub_names import HubNames, Piece, pieces
from torchft.ranks import Region, from_main, is_main, local, region, whole
from torchft.staging import Staging
from torchft.weights import SHARD_BYTES, WeightFiles, write_shards


@dataclass(frozen=True)
class HubFormat:
    """What a model needs to be written as a Hub folder; ``models.build`` gives it to every model."""

    names: HubNames
    config_json: dict[str, Any]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a Hub checkpoint holds: all but the adapters', whose names begin with ``lora_``."""
    return {n: p for n, p in model.named_parameters() if not n.rpartition(".")[2].startswith("lora_")}


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path, *, check_finite: bool = True) -> None:
    """Copy the safetensors in ``folder`` into ``model``, one parameter at a time, cast to each parameter's dtype.

    Of a sharded model each rank reads and holds its own parts alone. A GPU does what there is to do with the values:
    cast, quantise, look for NaN and infinity. Raises UserError with every missing, unexpected or misshapen tensor
    before anything is copied, and with the names of tensors that are not finite.

    What is written later is laid out as ``folder`` is, and counts no layers that were left out.
    """
    files, params, hub = open_weights(folder), base_parameters(model), hub_format(model)
    plan = places(model, files)
    names, config = hub.names, hub.config_json
    if predictor_tensors(files, params, names):
        config = config | {key: 0 for key in names.predictors if key in config}
    names = names.stacked if names.stacked and _layout(files, names) is names.stacked else names
    model.hub_format = HubFormat(names, config)  # type: ignore[assignment]  # no parameter or module
    staging = Staging(params[next(iter(plan))].device)
    finite: dict[str, Tensor] = {}
    for name, parts in plan.items():
        param = params[name]
        if not local(param).numel():
            continue  # fewer rows than ranks
        part = staging.send(_read(files, parts, region(param)))
        if check_finite:
            finite[parts[0].hub] = torch.stack(part.aminmax()).isfinite().all()
        local(param).copy_(part)
    if finite and not all(is_finite := torch.stack(list(finite.values())).tolist()):  # waits for the device, once
        broken = [name for name, fine in zip(finite, is_finite, strict=True) if not fine]
        raise UserError(
            f"{folder}: {len(broken)} tensors hold NaN or infinity, such as {broken[:4]}: "
            "training from them cannot work; download or export the checkpoint again"
        )


def places(model: nn.Module, files: WeightFiles) -> dict[str, list[Piece]]:
    """Where in ``files`` each parameter lies, by our names. UserError for all that is missing, extra or misshapen."""
    names, params = _layout(files, hub_format(model).names), base_parameters(model)
    absent = _lacking(files, params, names)
    params = {name: p for name, p in params.items() if name not in absent}
    plan: dict[str, list[Piece]] = {}
    for piece in pieces(params, names):
        plan.setdefault(piece.name, []).append(piece)
    check_names(files, plan, names)
    return plan


def lacking(model: nn.Module, folder: Path) -> set[str]:
    """Parameters of a new head that ``folder`` does not hold, or in another shape, so that loading leaves them out."""
    files = open_weights(folder)
    return _lacking(files, base_parameters(model), _layout(files, hub_format(model).names))


def _lacking(files: WeightFiles, params: Mapping[str, Tensor], names: HubNames) -> set[str]:
    found = {name: names.rename(name) for name in params if names.fresh and re.search(names.fresh, name)}
    return {n for n, hub in found.items() if hub not in files or tuple(files.shape(hub)) != tuple(params[n].shape)}


def _layout(files: WeightFiles, names: HubNames) -> HubNames:
    """Which of a family's layouts and names ``files`` have."""
    also = {old: new for old, new in names.also.items() if any(new in name for name in files.names())}
    if also:
        return replace(names, renamed=names.renamed | also)
    if names.stacked is None or not names.per_expert:
        return names
    expert = rf"{names.per_expert}\.\d+\."
    return names if any(re.search(expert, name) for name in files.names()) else names.stacked


def _read(files: WeightFiles, parts: Sequence[Piece], wanted: Region) -> Tensor:
    """What is ``wanted`` of our parameter, from the Hub tensors that hold its ``parts``."""
    if len(parts) == 1:
        return _read_piece(files, parts[0], wanted)
    result: Tensor | None = None
    experts, rows, *others = wanted
    for piece in parts:
        assert piece.expert is not None
        own = piece.rows or slice(0, piece.shape[0])
        low, high = max(rows.start, own.start), min(rows.stop, own.stop)
        if not experts.start <= piece.expert < experts.stop or low >= high:
            continue
        part = _read_piece(files, piece, (slice(low - own.start, high - own.start), *others))
        if result is None:
            result = part.new_empty([s.stop - s.start for s in wanted])
        result[piece.expert - experts.start, low - rows.start : high - rows.start] = part
    assert result is not None
    return result


def _read_piece(files: WeightFiles, piece: Piece, wanted: Region) -> Tensor:
    """``wanted`` of the piece, in its own coordinates."""
    if not wanted:
        return files.read(piece.hub)
    first, *others = wanted
    start = piece.hub_rows.start if piece.hub_rows else 0
    hub = [slice(start + first.start, start + first.stop), *others]
    if piece.transposed:
        hub[-2], hub[-1] = hub[-1], hub[-2]
    tensor = files.read(piece.hub, *hub)
    return tensor.mT if piece.transposed else tensor


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
    plan: dict[str, list[Piece]] = {}  # Hub name -> what it holds, in row order
    names = replace(hub.names, renamed=hub.names.renamed | hub.names.headed) if hub.names.fresh else hub.names
    for piece in pieces(params, names):
        plan.setdefault(piece.hub, []).append(piece)
    for parts in plan.values():
        parts.sort(key=lambda p: p.hub_rows.start if p.hub_rows else 0)
    keeps = re.compile(hub.names.keeps_dtype or r"(?!)")
    last: tuple[str, Tensor | None] = "", None  # a stacked weight is gathered once, for all its experts

    def part(piece: Piece) -> Tensor:
        nonlocal last
        if piece.name != last[0] or last[1] is None:
            last = "", None  # freed before the next one is made
            last = piece.name, read(piece.name) if read else whole(params[piece.name])
        _, tensor = last
        assert tensor is not None
        if piece.expert is not None:
            tensor = tensor[piece.expert]
        tensor = tensor if piece.rows is None else tensor[piece.rows]
        return (tensor.mT if piece.transposed else tensor).to(stored_as(piece.name))

    def stored_as(name: str) -> torch.dtype:
        return dtype if dtype and not keeps.search(name) else params[name].dtype

    def stored(hub_name: str) -> Tensor:
        parts = [part(p).cpu() for p in plan[hub_name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    sizes = {
        hub_name: sum(math.prod(p.shape) * stored_as(p.name).itemsize for p in parts)
        for hub_name, parts in plan.items()
    }
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
