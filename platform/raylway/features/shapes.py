"""The shape of a text: what may be told of customers' texts that are no categories.

A bundle carries no text of the training rows but the names of categories, which the model can't do without. Of other
columns of text, which only functions of the user's read, it has their shapes: each letter is `a` or `A`, each digit
`1` (`2011` where four or eight stand alone, so that a date stays one). Made-up rows and drift are content with that.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

_LONGEST = 80
"""Characters; longer texts have the shape of their beginning."""


def shapes(texts: pa.Array) -> pa.Array:
    """The shape of each of N strings; missing stays missing."""
    found = pc.utf8_slice_codeunits(texts, 0, _LONGEST)
    found = pc.replace_substring_regex(found, r"\p{Lu}", "A")
    found = pc.replace_substring_regex(found, r"[a-z]|[^\x00-\x7f]", "a")
    found = pc.replace_substring_regex(found, r"[0-9]", "1")
    return pc.replace_substring_regex(found, r"\b1111(1111)?\b", r"2011\1")
