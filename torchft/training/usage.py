"""Commands that use what a run exported, to copy from the last panel."""

from pathlib import Path

CHAT = (
    "from transformers import pipeline; "
    "print(pipeline('text-generation', {model!r})([dict(role='user', content={question!r})], max_new_tokens=64)"
    "[0]['generated_text'][-1]['content'])"
)
CHAT_ADAPTER = (
    "from transformers import AutoTokenizer as T; from peft import AutoPeftModelForCausalLM as M; t = T.from_pretrained({model!r}); "
    "i = t.apply_chat_template([dict(role='user', content={question!r})], add_generation_prompt=True, return_tensors='pt', return_dict=True); "
    "print(t.decode(M.from_pretrained({model!r}).generate(**i, max_new_tokens=64)[0]))"
)


def commands(
    *, model: Path | None, adapter: Path | None = None, base: Path | None = None, question: str
) -> dict[str, list[str]]:
    """What one does -> argument list, for an exported Hub folder and for an adapter of ``base``; None: not exported."""
    found: dict[str, list[str]] = {}
    if model:
        found["ask the model, with transformers"] = ["python", "-c", CHAT.format(model=str(model), question=question)]
        found["serve it, with vLLM"] = ["vllm", "serve", str(model)]
    if adapter:
        found["ask base and adapter, with PEFT"] = [
            *("python", "-c"),
            CHAT_ADAPTER.format(model=str(adapter), question=question),
        ]
        found["serve base and adapter, with vLLM"] = [
            *("vllm", "serve", str(base), "--enable-lora", "--lora-modules"),
            f"{adapter.parent.parent.name}={adapter}",
        ]
    return found
