"""What each Hub repository publishes: the fields of its config.json, and the number of parameters of its safetensors.

A value of ``RELEASED`` is ``{repository: (config.json, parameters)}``, the parameters without a repeated tied head.
"""

from released import gemma2, llama, qwen3

RELEASED = llama.RELEASED | qwen3.RELEASED | gemma2.RELEASED
