"""docs/models.md is what tests/models_page.py writes today, but for the measured column, which meets the bars."""

import re

from models_page import PAGE, measured_of, page
from oracles import MAX_ABS, RELATIVE

from torchft import models


def test_the_page_is_current():
    text = PAGE.read_text()
    measured = measured_of(text)
    assert page(measured) == text, "run: PYTHONPATH=. python tests/models_page.py"
    assert measured.keys() == models.FAMILIES.keys()
    for family, cell in measured.items():
        if cell.startswith("as "):
            assert models.FAMILIES[family].block is models.FAMILIES[cell.removeprefix("as ")].block
            continue
        logits, gradients = map(float, re.fullmatch(r"(\S+), (\S+)", cell).groups())
        assert 0 <= logits <= MAX_ABS and 0 < gradients <= RELATIVE
