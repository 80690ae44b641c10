from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from arrowmoe.routing import Policy
from arrowmoe.settings import ConfigurationError, Settings, load


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, clean_environment: pytest.MonkeyPatch) -> Path:
    clean_environment.setenv("ARROWMOE_HOME", str(tmp_path))
    return tmp_path


def test_each_layer_wins_over_the_one_below_it(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_home / "config.toml").write_text(
        'name = "file"\ndevice = "file"\ndtype = "float16"\n[router]\nmax_experts = 2\n'
    )
    monkeypatch.setenv("ARROWMOE_NAME", "environment")
    monkeypatch.setenv("ARROWMOE_DEVICE", "environment")
    monkeypatch.setenv("ARROWMOE_ROUTER__THRESHOLD", "0.6")
    loaded = load({"name": "flag", "host": None})
    settings = loaded.settings
    assert (settings.name, settings.device, settings.dtype, settings.host) == (
        "flag",
        "environment",
        "float16",
        "127.0.0.1",
    )
    assert (settings.router.max_experts, settings.router.threshold) == (2, 0.6)
    sources = {name: source for name, _, source in loaded.rows()}
    file = f"file {own_home / 'config.toml'}"
    assert {name: sources[name] for name in ("name", "device", "dtype", "host", "router.max_experts")} == {
        "name": "flag",
        "device": "environment",
        "dtype": file,
        "host": "default",
        "router.max_experts": file,
    }
    assert sources["router.threshold"] == "environment"


def test_all_errors_come_at_once_and_name_their_source(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_home / "config.yaml").write_text("nome: x\nrouter:\n  threshold: hot\n  shape: round\n")
    monkeypatch.setenv("ARROWMOE_FLIGHT_PORT", "many")
    monkeypatch.setenv("ARROWMOE_PEERS", "one:1,two")
    with pytest.raises(ConfigurationError) as caught:
        load({"dtype": "int3"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "6 settings are wrong:"
    assert sum("ARROWMOE_FLIGHT_PORT: " in line and "'many'" in line for line in lines) == 1
    assert sum("ARROWMOE_PEERS: expected a peer as HOST:PORT, got 'two'" in line for line in lines) == 1
    assert sum("--dtype: " in line for line in lines) == 1
    assert sum(f"nome (file {own_home / 'config.yaml'}): no such setting" in line for line in lines) == 1
    assert sum("router.shape" in line and "no such setting" in line for line in lines) == 1
    assert sum("router.threshold" in line and "'hot'" in line for line in lines) == 1
    assert caught.value.hint


def test_lists_may_be_written_with_commas_or_as_lists(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWMOE_PEERS", "10.0.0.1:7420, [::1]:7421")
    (own_home / "config.toml").write_text('bases = ["builtin:smollm2", "other"]')
    settings = load().settings
    assert settings.peers == ("10.0.0.1:7420", "[::1]:7421")
    assert settings.bases == ("builtin:smollm2", "other")


def test_the_file_may_be_named_by_flag_or_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.yml"
    one.write_text('name = "one"')
    other.write_text("name: other")
    monkeypatch.setenv("ARROWMOE_CONFIG", str(other))
    assert load().settings.name == "other"
    assert load(config=one).settings.name == "one"
    with pytest.raises(ConfigurationError, match=r"no configuration file .*none\.toml"):
        load(config=tmp_path / "none.toml")


def test_two_files_in_one_home_are_refused(own_home: Path) -> None:
    (own_home / "config.toml").touch()
    (own_home / "config.yaml").touch()
    with pytest.raises(ConfigurationError, match=r"found config\.toml, config\.yaml"):
        load()


@pytest.mark.parametrize(("name", "text"), [("config.toml", "name ="), ("config.yaml", "a: [")])
def test_a_damaged_file_is_named(own_home: Path, name: str, text: str) -> None:
    (own_home / name).write_text(text)
    with pytest.raises(ConfigurationError, match=name):
        load()


def test_a_yaml_file_that_is_no_mapping_is_refused(own_home: Path) -> None:
    (own_home / "config.yaml").write_text("- name")
    with pytest.raises(ConfigurationError, match="got list"):
        load()


def test_a_name_that_yaml_reads_as_no_text_is_refused(own_home: Path) -> None:
    (own_home / "config.yaml").write_text("on: true")
    with pytest.raises(ConfigurationError, match="got True for a name"):
        load()


def test_a_wrong_flag_is_spelled_as_it_is_typed() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load({"peers": ["one"]})
    assert "  --peer: expected a peer as HOST:PORT, got 'one'" in str(caught.value).splitlines()


def test_an_empty_yaml_file_changes_nothing(own_home: Path) -> None:
    (own_home / "config.yaml").write_text("# nothing yet\n")
    assert load().settings.name == Settings().name


def test_a_group_that_is_no_json_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWMOE_ROUTER", "{")
    with pytest.raises(ConfigurationError, match="router"):
        load()


def test_the_constructor_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWMOE_NAME", "environment")
    assert Settings(name="given").name == "given"
    assert Settings().name != "environment"
    with pytest.raises(ValidationError):
        Settings(nome="x")  # type: ignore[call-arg]


def test_home_is_absolute_and_tilde_is_expanded() -> None:
    assert Settings(home=Path("~/x")).home == Path.home() / "x"
    assert Settings(home=Path("x")).home == Path.cwd() / "x"


def test_the_defaults_of_the_router_are_the_routers_own() -> None:
    assert Policy(**Settings().router.model_dump()) == Policy()


def test_every_setting_has_a_meaning_and_a_line_in_the_docs() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for name, value, _ in load().rows():
        assert Settings.meaning(name), name
        line = next((line for line in guide.splitlines() if line.startswith(f"| `{name}` |")), "")
        assert Settings.meaning(name).partition(";")[0].partition(":")[0] in line.replace("`", ""), name
        if isinstance(value, bool | float) or name in ("device", "embedder", "dtype"):
            assert f"| `{json.dumps(value).strip(chr(34)).removesuffix('.0')}` |" in line, name


def test_urls_of_stores_are_shown_without_their_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWMOE_CATALOG_URL", "postgresql+psycopg://me:hush@host/name")
    monkeypatch.setenv("ARROWMOE_BLOBS_URL", "s3://me:hush@bucket/cards?region=x")
    loaded = load()
    shown = {name: value for name, value, _ in loaded.rows()}
    assert shown["catalog_url"] == "postgresql+psycopg://me:***@host/name"
    assert shown["blobs_url"] == "s3://me:***@bucket/cards?region=x"
    assert "hush" not in repr(loaded)
    assert loaded.settings.stores == {
        "catalog_url": "postgresql+psycopg://me:hush@host/name",
        "blobs_url": "s3://me:hush@bucket/cards?region=x",
    }
