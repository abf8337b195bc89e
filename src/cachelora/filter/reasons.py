"""Why a text is dropped, by the name of the filter."""

from cachelora.filter.filters import FILTERS

COPY = "copy"
DUPLICATE = "duplicate"
REASONS = {COPY: "the query's own words", DUPLICATE: "the words of a text above"} | {
    name: filter_.reason for name, filter_ in FILTERS.items()
}
"""The first two need no threshold."""
BY_SIMILARITY = frozenset(name for name, filter_ in FILTERS.items() if filter_.by_similarity)
"""The filters that ask the base model."""
