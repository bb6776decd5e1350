"""A checkpoint's first blocks: every family's config.json says the same of fewer layers."""

import pytest

from torchft import models
from torchft.errors import UserError
from torchft.models.shallow import build_shallow

WHOLE = {f"{family}/{next(reversed(module.CONFIGS))}" for family, module in models.FAMILIES.items()}
WHOLE |= {"deepseek_v3/DeepSeek-V3", "glm4_moe/GLM-4.6", "llama4/Llama-4-Scout-17B-16E"}


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_blocks_are_the_first_ones(name):
    whole = models.build(name)
    for num_layers in (1, 4):
        few = build_shallow(whole.hub_format.config_json, num_layers)
        assert few.config.num_layers == num_layers
        for a, b in zip(few.layers, whole.layers):
            assert {n: p.shape for n, p in a.named_parameters()} == {n: p.shape for n, p in b.named_parameters()}
            assert (a.sight, a.rope) == (b.sight, b.rope)


def test_more_blocks_than_there_are():
    json = models.build("llama3/Llama-3.2-1B").hub_format.config_json
    with pytest.raises(UserError, match="num_layers: 17 of 16 blocks"):
        build_shallow(json, 17)
