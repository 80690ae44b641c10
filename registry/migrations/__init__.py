"""Alembic's migrations of the catalog; `registry.database` runs them."""
