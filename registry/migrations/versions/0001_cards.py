"""Cards, labels, tags, origins and publishers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To 0001."""
    op.create_table(
        "publishers",
        sa.Column("fingerprint", sa.String(32), primary_key=True),
        sa.Column("public_key", sa.LargeBinary(32), nullable=False),
        sa.Column("first_seen", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "cards",
        sa.Column("digest", sa.String(71), primary_key=True),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("base_name", sa.Text),
        sa.Column("architecture", sa.Text),
        sa.Column("fingerprint", sa.String(71), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("nbytes", sa.BigInteger, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("domains", sa.JSON, nullable=False),
        sa.Column("examples", sa.JSON, nullable=False),
        sa.Column("search_text", sa.Text, nullable=False),
        sa.Column("publisher", sa.String(32), sa.ForeignKey("publishers.fingerprint")),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_cards_name", "cards", ["name"])
    op.create_table(
        "labels",
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("version", sa.String(32), primary_key=True),
        _card_key(),
    )
    op.create_index("ix_labels_digest", "labels", ["digest"])
    op.create_table("tags", _card_key(), sa.Column("tag", sa.String(96), primary_key=True))
    op.create_index("ix_tags_tag", "tags", ["tag"])
    op.create_table(
        "origins",
        _card_key(),
        sa.Column("peer_id", sa.Text, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
    )


def downgrade() -> None:
    """Back to an empty database."""
    for table in ("origins", "tags", "labels", "cards", "publishers"):
        op.drop_table(table)


def _card_key() -> sa.Column[str]:
    return sa.Column("digest", sa.String(71), sa.ForeignKey("cards.digest", ondelete="CASCADE"), primary_key=True)
