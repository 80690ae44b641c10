from __future__ import annotations

import pytest

from registry.urls import shown


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("postgresql+psycopg://me:hush@host:5432/name", "postgresql+psycopg://me:***@host:5432/name"),
        ("postgresql+psycopg://me@host/name?sslmode=require", "postgresql+psycopg://me@host/name?sslmode=require"),
        ("postgresql+psycopg:///name?user=me&password=hush", "postgresql+psycopg:///name?user=me&password=***"),
        ("s3://AKIA:hu/s@h@bucket/prefix?region=x", "s3://AKIA:***@bucket/prefix?region=x"),
        ("abfss://cards@account.example/x?sas_token=hush&y=1", "abfss://cards@account.example/x?sas_token=***&y=1"),
        ("file:///mnt/cards", "file:///mnt/cards"),
        ("", ""),
    ],
)
def test_what_is_secret_is_not_shown(url: str, wanted: str) -> None:
    assert shown(url) == wanted
