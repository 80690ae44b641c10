"""Peers and invitations, what other nodes have, and cards in quarantine."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To 0004."""
    op.create_table(
        "peers",
        sa.Column("node_id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("address", sa.Text),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("introducer", sa.Boolean, nullable=False),
        sa.Column("introduced_by", sa.String(32)),
        sa.Column("first_seen", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_seen", sa.DateTime(timezone=True)),
        sa.Column("decided", sa.DateTime(timezone=True)),
    )
    op.create_table(
        "invites",
        sa.Column("secret_hash", sa.LargeBinary(32), primary_key=True),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_by", sa.String(32)),
    )
    op.create_table(
        "peer_indexes",
        sa.Column("node_id", sa.String(32), primary_key=True),
        sa.Column("index_id", sa.String(32), nullable=False),
        sa.Column("upto", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "peer_cards",
        sa.Column("node_id", sa.String(32), primary_key=True),
        sa.Column("digest", sa.String(71), primary_key=True),
        sa.Column("entry", sa.Text, nullable=False),
    )
    op.create_index("ix_peer_cards_digest", "peer_cards", ["digest"])
    op.create_table(
        "quarantine",
        sa.Column("digest", sa.String(71), sa.ForeignKey("cards.digest", ondelete="CASCADE"), primary_key=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    """Back to 0003."""
    for table in ("quarantine", "peer_cards", "peer_indexes", "invites", "peers"):
        op.drop_table(table)
