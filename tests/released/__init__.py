"""What each Hub repository publishes: the fields of its config.json, and the number of parameters of its safetensors.

A value of ``RELEASED`` is ``{repository: (config.json, parameters)}``, the parameters without a repeated tied head.
A float is a rounded number of parameters.
"""

from released import (
    command_r7b,
    deepseek_v3,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    llama,
    llama4,
    mistral,
    mixtral,
    olmo,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    qwen3_next,
    smollm,
)

RELEASED = (
    command_r7b.RELEASED
    | deepseek_v3.RELEASED
    | gemma2.RELEASED
    | gemma3.RELEASED
    | gemma4.RELEASED
    | glm4.RELEASED
    | glm4_moe.RELEASED
    | gpt_oss.RELEASED
    | granite.RELEASED
    | llama.RELEASED
    | llama4.RELEASED
    | mistral.RELEASED
    | mixtral.RELEASED
    | olmo.RELEASED
    | olmoe.RELEASED
    | phi3.RELEASED
    | qwen2.RELEASED
    | qwen3.RELEASED
    | qwen3_moe.RELEASED
    | qwen3_next.RELEASED
    | smollm.RELEASED
)
