"""Signals, gaps, nights, jobs, and what a teacher was asked and paid."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TABLES = (
    "notes",
    "reservations",
    "budgets",
    "teacher_calls",
    "progress",
    "jobs",
    "nights",
    "gaps",
    "signals",
)


def upgrade() -> None:
    """To 0002."""
    op.create_table(
        "signals",
        sa.Column("id", sa.String(32), primary_key=True),
        _moment("created"),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("card", sa.String(71)),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("answer", sa.Text),
        sa.Column("accepted", sa.Boolean, nullable=False),
        sa.Column("p_value", sa.Double),
        sa.Column("sequence_nats", sa.Double),
        sa.Column("tokens", sa.Integer),
        sa.Column("feedback", sa.String(8)),
        sa.Column("correction", sa.Text),
        sa.Column("agreement", sa.Double),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("gap_id", sa.Integer),
    )
    op.create_index("ix_signals_created", "signals", ["created"])
    op.create_index("ix_signals_gap", "signals", ["gap_id"])
    op.create_table(
        "gaps",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("night_id", sa.Integer),
        _moment("created"),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("theme", sa.JSON, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("worth", sa.Double, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("card", sa.String(71)),
    )
    op.create_table(
        "nights",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("planned_at", sa.DateTime(timezone=True), nullable=False, unique=True),
        _moment("started"),
        sa.Column("ended", sa.DateTime(timezone=True)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(255), nullable=False, unique=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("owner", sa.String(64)),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        _moment("not_before"),
        _moment("created"),
        _moment("updated"),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("outcome", sa.JSON, nullable=False),
    )
    op.create_index("ix_jobs_state", "jobs", ["state", "priority"])
    op.create_table(
        "progress",
        sa.Column("job_id", sa.Integer, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("phase", sa.String(16), primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("steps", sa.Integer, nullable=False),
        sa.Column("loss_nats", sa.Double),
        _moment("at"),
    )
    op.create_table(
        "teacher_calls",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("account", sa.String(64), nullable=False),
        _moment("created"),
        sa.Column("teacher", sa.Text, nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("disclosure", sa.String(16), nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("response", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("microusd", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
    )
    op.create_index("ix_teacher_calls_account", "teacher_calls", ["account"])
    op.create_table(
        "budgets",
        sa.Column("account", sa.String(64), primary_key=True),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("limit_microusd", "limit_tokens", "spent_microusd", "spent_tokens")
        ),
    )
    op.create_table(
        "reservations",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("account", sa.String(64), sa.ForeignKey("budgets.account", ondelete="CASCADE"), nullable=False),
        sa.Column("microusd", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        _moment("expires"),
    )
    op.create_index("ix_reservations_account", "reservations", ["account"])
    op.create_table(
        "notes",
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("value", sa.JSON, nullable=False),
    )


def downgrade() -> None:
    """Back to 0001."""
    for table in _TABLES:
        op.drop_table(table)


def _moment(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)
