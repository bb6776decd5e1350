"""The tiny models of the parity suite, by family: the fields of transformers' config that are not tiny.SIZES."""

from families import dense, experts

CASES = dense.CASES | experts.CASES
