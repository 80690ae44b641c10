"""Epochs, tombstones, hidden cards, and numbered changes; cards that are there count as added in their order."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To 0003."""
    op.add_column("cards", sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table(
        "epochs",
        sa.Column("publisher", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("version", sa.String(32), primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "tombstones",
        sa.Column("digest", sa.String(71), primary_key=True),
        sa.Column("publisher", sa.String(32), primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("signature", sa.Text, nullable=False),
    )
    op.create_table(
        "hidden",
        sa.Column("digest", sa.String(71), primary_key=True),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("publisher", sa.String(32)),
        sa.Column("hidden_at", sa.DateTime(timezone=True), nullable=False),
    )
    changes = op.create_table(
        "changes",
        sa.Column("digest", sa.String(71), primary_key=True),
        sa.Column("publisher", sa.String(32), primary_key=True),
        sa.Column("sequence", sa.BigInteger, nullable=False, unique=True),
        sa.Column("kind", sa.String(8), nullable=False),
    )
    op.bulk_insert(changes, _cards_there())
    index = op.create_table("change_index", sa.Column("id", sa.String(32), primary_key=True))
    op.bulk_insert(index, [{"id": secrets.token_hex(16)}])


def downgrade() -> None:
    """Back to 0002."""
    for table in ("change_index", "changes", "hidden", "tombstones", "epochs"):
        op.drop_table(table)
    with op.batch_alter_table("cards") as cards:
        cards.drop_column("epoch")


def _cards_there() -> list[dict[str, object]]:
    cards = sa.table("cards", *map(sa.column, ("digest", "publisher", "added_at")))
    query = sa.select(cards.c.digest, cards.c.publisher).order_by(cards.c.added_at, cards.c.digest)
    return [
        {"digest": digest, "publisher": publisher or "", "sequence": number, "kind": "added"}
        for number, (digest, publisher) in enumerate(op.get_bind().execute(query), start=1)
    ]
