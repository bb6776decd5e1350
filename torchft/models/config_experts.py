"""The experts of a config.json as DeepSeek V3 and GLM 4.5 spell them: grouped, shared, behind some dense layers."""

from typing import Any

from torchft.errors import UserError
from torchft.models.config_json import field

Json = dict[str, Any]


def experts_from_hub(
    json: Json, *, num_experts: int, num_dense: int, scale: float, groups: tuple[int, int]
) -> dict[str, Any]:
    """The fields of a config class; by name, what config.json may leave out."""
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):  # these layers are left out: HubNames.predictor
        json.get(key)
    experts = {
        "num_experts": field(json, "n_routed_experts", int, default=num_experts),
        "top_k": field(json, "num_experts_per_tok", int, default=8),
        "expert_dim": field(json, "moe_intermediate_size", int),
        "num_shared": field(json, "n_shared_experts", int, default=1),
        "num_dense": num_dense if json.get("first_k_dense_replace") is None else json["first_k_dense_replace"],
        "num_groups": field(json, "n_group", int, default=groups[0]),
        "top_groups": field(json, "topk_group", int, default=groups[1]),
        "renormalises": field(json, "norm_topk_prob", bool, default=True),
        "expert_scale": field(json, "routed_scaling_factor", float, default=scale),
    }
    num_layers = field(json, "num_hidden_layers", int)
    if experts["num_dense"] not in range(num_layers + 1):
        raise UserError(
            f"config.json: first_k_dense_replace is {experts['num_dense']!r}, expected how many of {num_layers} layers"
        )
    of_group, rest = divmod(experts["num_experts"], experts["num_groups"])
    if rest or (experts["num_groups"] > 1 and of_group < 2) or experts["top_groups"] > experts["num_groups"]:
        raise UserError(
            f"config.json: n_group is {experts['num_groups']} and topk_group {experts['top_groups']} of "
            f"{experts['num_experts']} experts: groups must be equal, of two or more, and topk_group at most n_group"
        )
    return experts


def experts_to_hub(c: Any) -> dict[str, Any]:
    """The inverse of ``experts_from_hub``."""
    return {
        "n_routed_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_dim,
        "n_shared_experts": c.num_shared,
        "first_k_dense_replace": c.num_dense,
        "n_group": c.num_groups,
        "topk_group": c.top_groups,
        "norm_topk_prob": c.renormalises,
        "routed_scaling_factor": c.expert_scale,
        "num_nextn_predict_layers": 0,
    }
