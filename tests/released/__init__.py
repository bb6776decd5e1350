"""What each Hub repository publishes: the fields of its config.json, and the number of parameters of its safetensors.

A value of ``RELEASED`` is ``{repository: (config.json, parameters)}``, the parameters without a repeated tied head.
"""

from released import gemma2, llama, mixtral, qwen3, qwen3_moe

RELEASED = llama.RELEASED | qwen3.RELEASED | gemma2.RELEASED | mixtral.RELEASED | qwen3_moe.RELEASED
