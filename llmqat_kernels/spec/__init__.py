"""The numeric specification in plain torch: slow, obvious, and the only home of each formula.

``docs/spec.md`` states the same numbered paragraphs in words. The ``reference`` backend is exactly
these functions; every other backend is proven equal to them.
"""

SPEC_VERSION = "lq-1"
