"""docs/faults.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_fault_has_its_tests():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    lines = [x for x in (ROOT / "docs" / "faults.md").read_text().splitlines() if re.match(r"\| [KXNR]\d", x)]
    rows = {cells[1].strip(): cells[4] for cells in (line.split("|") for line in lines)}
    assert len(rows) > 45
    assert not [fault for fault, names in rows.items() if "`test_" not in names]
    for fault, names in rows.items():
        for name in re.findall(r"`(test_\w+)`", names):
            assert f"def {name}(" in tests, f"{fault}: {name}"
