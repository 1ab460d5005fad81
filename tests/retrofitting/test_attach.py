"""Attaching learned parameters."""

from retrofitting.tiny import SITES, language, tokens

import fastattn_compile as fa


def test_sizes_are_those_of_this_call_whatever_was_scanned_before():
    model = language()
    for length in (40, 72, 88):  # Dynamo would take the third length for a symbol
        bundles = fa.attach(model, "fma", tokens(n=length), options={"block": 8, "basis": "depthwise"})
        assert list(bundles) == SITES
        fa.detach(model)
