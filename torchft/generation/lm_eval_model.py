"""A model for EleutherAI's lm-evaluation-harness, on our engine (extra ``eval``).

https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/model_guide.md
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from torchft.errors import UserError
from torchft.generation.batch import answers
from torchft.generation.compiled import Compile
from torchft.generation.loaded import engine
from torchft.generation.multiple_choice import continuation_logps
from torchft.generation.sampling import sampling_of
from torchft.modules.decoder import Decoder
from torchft.names import nearest
from torchft.tokenizers.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task does not say


class EngineLM(LM):
    """Contexts longer than ``max_len`` lose their beginning, as the harness expects; ``num_cut`` counts them."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        max_len: int,
        batch_size: int,
        num_slots: int,
        compile: Compile = False,
    ) -> None:
        super().__init__()
        self._model, self._tokenizer, self._compile = model, tokenizer, compile
        self._max_len, self._batch_size, self._num_slots = max_len, batch_size, num_slots
        self.num_cut = 0

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        pairs = []
        for request in requests:
            context, continuation = request.args
            moved = len(context) - len(context.rstrip())  # white space belongs to what follows it
            if moved:
                context, continuation = context[:-moved], context[-moved:] + continuation
            start = self._start(context)
            whole = self._tokenizer.encode(context + continuation)
            own = self._tokenizer.encode(context)
            rest = whole[len(own) :] or self._tokenizer.encode(continuation)
            before = [*start, *whole[: len(whole) - len(rest)]]
            room = max(1, self._max_len - len(rest))
            self.num_cut += len(before) > room or len(rest) >= self._max_len
            pairs.append((before[-room:], rest[: self._max_len - 1]))
        return continuation_logps(self._model, pairs, batch_size=self._batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Every token once, in windows of ``max_len`` that each begin with the token before."""
        found = []
        for request in requests:
            tokens = [self._first(), *self._tokenizer.encode(request.args[0])]
            windows = [tokens[i : i + self._max_len] for i in range(0, len(tokens) - 1, self._max_len - 1)]
            pairs = [(window[:1], window[1:]) for window in windows]
            found.append(sum(logp for logp, _ in continuation_logps(self._model, pairs, batch_size=self._batch_size)))
        return found

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        found: dict[int, str] = {}
        for options in {repr(sorted(r.args[1].items())): r.args[1] for r in requests}.values():  # each kind together
            same = [i for i, request in enumerate(requests) if request.args[1] == options]
            how = _sampling(options)
            room = self._max_len - min(how["max_new_tokens"], self._max_len // 2)
            prompts = []
            for i in same:
                text = requests[i].args[0]
                prompt = [*self._start(text), *self._tokenizer.encode(text)]
                self.num_cut += len(prompt) > room
                prompts.append(prompt[-room:])
            sizes = {"num_slots": min(self._num_slots, len(same)), "max_len": self._max_len}
            slots = engine(self._model, self._tokenizer, **sizes, compile=self._compile)
            replies = answers(slots, self._tokenizer, prompts, sampling=sampling_of(how))
            found |= {i: reply.text for i, [reply] in zip(same, replies)}
        return [found[i] for i in range(len(requests))]

    def _first(self) -> int:
        bos = self._tokenizer.bos_id
        return self._tokenizer.eos_id if bos is None else bos

    def _start(self, text: str) -> list[int]:
        """What goes before a text: what the checkpoint puts there, and something before an empty one."""
        start = [i for i in self._tokenizer.encode("", add_special_tokens=True)[:1] if i == self._tokenizer.bos_id]
        return start or ([] if text else [self._first()])


def find_tasks(tasks: list[str]) -> TaskManager:
    """What the harness knows. UserError with every one of ``tasks`` that it does not; a .yaml file is a task too."""
    manager = TaskManager()
    known = manager.all_tasks
    unknown = [task for task in tasks if task not in known and not Path(task).is_file()]
    if unknown:
        why = "no task of the harness and no .yaml file; `lm_eval ls tasks` lists them"
        raise UserError(*(f"tasks: {task!r} is {why}{nearest(task, known)}" for task in unknown))
    return manager


def run_tasks(
    lm: EngineLM, tasks: list[str], manager: TaskManager, *, num_fewshot: int | None, limit: int | None
) -> dict[str, float]:
    """{"task/metric": value} of the harness's own tasks; "task/metric,filter" where answers are filtered."""
    how = {"num_fewshot": num_fewshot, "limit": limit, "bootstrap_iters": 0}
    results = lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, **how)
    return {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Of the harness's ``generation_kwargs``."""
    until = options.get("until") or []
    return {
        "temperature": float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
        "max_new_tokens": int(options.get("max_gen_toks", MAX_NEW_TOKENS)),
        "stop": [until] if isinstance(until, str) else list(until),
    }
