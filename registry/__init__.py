"""Cards and where a node keeps them: format, identity, store and catalog. Knows no torch and no network."""
