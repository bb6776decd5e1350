"""Data that judges answers: `pairs` of which one is preferred, `unpaired` good and bad ones, `scored` ones, and
reasoning that is judged `stepwise`. A config names these functions as it does those of datasets.py.

    dataset: {_component_: torchft.data.preferences.pairs, source: data/train.jsonl, split: "train[:95%]"}

A pair is one sample of two documents, chosen and rejected, each with its prompt: a batch holds both in one row.
``seq_len`` bounds the sample. No answer is ever cut, which would change what is judged: rows that are ``too_long`` are
dropped and counted, or an error.
"""

from functools import partial

from torchft.data import judged
from torchft.data.builder import builder
from torchft.data.encoders import Encoder
from torchft.data.messages import RowError, Values, missing
from torchft.data.samples import Samples
from torchft.data.stream import Stream
from torchft.errors import UserError
from torchft.tokenizers.tokenizer import Tokenizer

JUDGED = {  # kinds of judged data -> what makes them
    "pairs": "torchft.data.preferences.pairs",
    "scored": "torchft.data.preferences.scored",
    "stepwise": "torchft.data.preferences.stepwise",
    "classes": "torchft.data.labelled.classes, with one label for each row",
    "candidates": "torchft.data.labelled.candidates",
}


@builder(whole=True, too_long="drop")
def auto(tokenizer: Tokenizer, example: Values) -> Encoder:
    """Whichever of the others the first row's columns fit: chosen and rejected, completions and labels, or a label."""
    if "chosen" in example and "rejected" in example:
        return partial(judged.pair, tokenizer=tokenizer, margin_column=None)
    if "completions" in example and "labels" in example:
        return partial(judged.steps, tokenizer=tokenizer, end=tokenizer.encode("\n", control=False))
    if "label" in example:
        return partial(judged.rated, tokenizer=tokenizer)
    raise RowError(missing(("chosen", "rejected"), example))


@builder(whole=True, too_long="drop")
def pairs(tokenizer: Tokenizer, example: Values, *, margin_column: str | None = None) -> Encoder:
    """Columns chosen and rejected, text or messages: with a column prompt, or each with the prompt that both share.

    Text with a prompt becomes a question and its answer in the checkpoint's chat format, plain text if it has none.
    Text without one stays plain. Only the answers are trained, with their end.

    Args:
        margin_column: of numbers, by how much the chosen answer is better: the samples' targets.
    """
    return partial(judged.pair, tokenizer=tokenizer, margin_column=margin_column)


@builder(whole=True, too_long="drop")
def unpaired(tokenizer: Tokenizer, example: Values) -> Encoder:
    """Columns prompt and completion, or a conversation, and label: true or 1 for a good answer, false or 0 for a bad
    one, which is the sample's target."""
    return partial(judged.rated, tokenizer=tokenizer)


@builder(whole=True, too_long="drop")
def scored(tokenizer: Tokenizer, example: Values, *, scores: list[str]) -> Encoder:
    """Columns prompt and completion, or a conversation, and numbers that judge the answer, the sample's targets.

    Args:
        scores: the columns with the numbers, for example [helpfulness, correctness].
    """
    if not scores:
        raise UserError("dataset.scores: name at least one column of numbers")
    return partial(judged.scored, tokenizer=tokenizer, columns=scores)


@builder(whole=True, too_long="drop")
def stepwise(tokenizer: Tokenizer, example: Values, *, step_end: str = "\n") -> Encoder:
    """Columns prompt (text), completions (the steps, a list of text) and labels (for each true or 1 if it is right).

    The steps follow the prompt, in the chat format if the checkpoint has one. At the last token of each its label, 1 or
    0, is what is learned.

    Args:
        step_end: text that ends each step, where it is judged.
    """
    end = tokenizer.encode(step_end, control=False)
    if not end:
        raise UserError(f"dataset.step_end: {step_end!r} is no token; a step needs one where it is judged")
    return partial(judged.steps, tokenizer=tokenizer, end=end)


def check_kind(data: Samples | Stream, *, pairs: bool, why: str) -> None:
    """UserError unless ``data`` is, or is not, of pairs, as ``why`` wants it."""
    samples = data.probe if isinstance(data, Stream) else data
    if samples.are_pairs != pairs:
        kind = "pairs" if pairs else "unpaired"
        raise UserError(f"dataset: {why} needs data of another kind: torchft.data.preferences.{kind}", is_shared=True)


def check_judged(data: Samples | Stream, builder: str, *, why: str) -> None:
    """UserError unless ``data`` is as ``builder`` of `JUDGED` makes it, and ``why`` wants it.

    What is in classes needs one for each sample. Two candidates are a pair, and the other way round.
    """
    samples = data.probe if isinstance(data, Stream) else data
    found = "pairs" if samples.are_pairs else "scored" if samples.num_targets else "stepwise"
    found = "candidates" if samples.are_several else found
    fits = builder == found or (found, builder) in (("scored", "classes"), ("pairs", "candidates"))
    if fits and builder == "classes":
        n = samples.num_targets
        sums = [sum(samples.targets[i * n : (i + 1) * n]) for i in range(len(samples))]
        fits = all(total == 1.0 for total in sums)
    if not fits:
        raise UserError(f"dataset: {why} needs data of another kind: {JUDGED[builder]}", is_shared=True)
