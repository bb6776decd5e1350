"""Unicode's NFC as Hugging Face's tokenizers know it: with the tables of Unicode 9, whatever Python's are."""

import re
import unicodedata

# Code points that compose, or are reordered, only since a later Unicode (up to 15.1). For tokenizers they are letters
# like any other, which nothing before them combines with.
_NEWER = (
    "07fd 0898-089f 08ca-08d3 09fe 0c3c 0d3b-0d3c 0eba 1715 1abf-1ace 1df6-1dfa a82c 10d24-10d27 10eab-10eac "
    "10efd-10eff 10f46-10f50 10f82-10f85 11070 1133b 1145e 11839-1183a 11930 11935 11938 1193d-1193e 11943 119e0 "
    "11a34 11a47 11a99 11d42 11d44-11d45 11d97 11f41-11f42 16ff0-16ff1 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef"
)
_CUT = re.compile("([" + re.sub(r"[0-9a-f]+", lambda match: chr(int(match[0], 16)), _NEWER).replace(" ", "") + "])")


def nfc(text: str) -> str:
    """``text`` in normal form C."""
    if unicodedata.is_normalized("NFC", text):
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in _CUT.split(text))
