"""lightning-mpt."""
