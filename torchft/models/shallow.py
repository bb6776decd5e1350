"""A checkpoint's first blocks as a model of their own: where a smaller student starts."""

from typing import Any

from torchft.errors import UserError
from torchft.hub import HubFormat
from torchft.models import build
from torchft.modules.decoder import Decoder


def build_shallow(config_json: dict[str, Any], num_layers: int) -> Decoder:
    """The model on meta whose ``num_layers`` blocks are the first of what ``config_json`` describes.

    `hub.load_weights` leaves the others out, and `hub.save` writes a config.json of its own. UserError if there are not
    that many.
    """
    whole = config_json.get("num_hidden_layers")
    if not isinstance(whole, int) or not 1 <= num_layers <= whole:
        raise UserError(f"num_layers: {num_layers} of {whole} blocks; keep at least 1, and no more than there are")
    lists = {key: v[:num_layers] for key, v in config_json.items() if isinstance(v, list) and len(v) == whole}
    counts = {key: min(config_json[key], num_layers) for key in ("first_k_dense_replace",) if config_json.get(key)}
    places = {key: [i for i in config_json[key] if i < num_layers] for key in ("moe_layers",) if config_json.get(key)}
    model = build(config_json | lists | counts | places | {"num_hidden_layers": num_layers})
    names = model.hub_format.names
    further = sum(config_json.get(key) or 0 for key in names.predictors)
    json = model.hub_format.config_json
    json = json | {key: 0 for key in names.predictors if key in json}
    rest = "|".join(str(i) for i in range(num_layers, whole + further))
    if rest:
        names = names.ignoring(rf"\.layers\.({rest})\.")
    model.hub_format = HubFormat(names, json)
    return model
