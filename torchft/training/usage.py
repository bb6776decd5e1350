"""Commands that use what a run exported, to copy from the last panel."""

import json
from pathlib import Path

CHAT = """from transformers import pipeline
chat = pipeline("text-generation", {model})
print(chat([{{"role": "user", "content": {question}}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])"""
CHAT_ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained({model}), AutoTokenizer.from_pretrained({model})
chat = pipeline("text-generation", model, tokenizer=tokenizer)
print(chat([{{"role": "user", "content": {question}}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])"""


def commands(
    *, model: Path | None, adapter: Path | None = None, base: Path | None = None, question: str
) -> dict[str, list[str]]:
    """What one does -> argument list, for an exported Hub folder and for an adapter of ``base``; None: not exported."""
    found: dict[str, list[str]] = {}
    asked = ["--", question] if question.startswith("-") else [question]
    if model:
        found["ask the model"] = ["tune", "generate", str(model), *asked]
        code = CHAT.format(model=_quoted(str(model)), question=_quoted(question))
        found["the same with transformers (pip install transformers)"] = ["python", "-c", code]
        found["serve it: tune serve, or vLLM (pip install vllm)"] = ["vllm", "serve", str(model)]
    if adapter:
        found["ask base and adapter"] = ["tune", "generate", str(base), "--adapter", str(adapter), *asked]
        code = CHAT_ADAPTER.format(model=_quoted(str(adapter)), question=_quoted(question))
        served = f"{adapter.parent.parent.name}={adapter}"
        found["the same with PEFT (pip install peft transformers)"] = ["python", "-c", code]
        found["serve both, with vLLM (pip install vllm)"] = [
            "vllm", "serve", str(base), "--enable-lora", "--lora-modules", served
        ]  # fmt: skip
    return found


def _quoted(text: str) -> str:
    """Python that means ``text``, in double quotes: the shell's are single ones."""
    return json.dumps(text, ensure_ascii=False)
