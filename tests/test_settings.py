"""Where settings come from, how they merge, and what is said when they cannot be."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import SecretStr

from fastapi_hardening import ConfigurationError, Settings
from fastapi_hardening.api.errors import ErrorsSettings
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.observability.health import HealthSettings
from fastapi_hardening.settings import PROFILES

Environment = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def clean(monkeypatch: Environment, tmp_path: Path) -> None:
    """No settings of the machine, and a folder without ``.env``."""
    monkeypatch.chdir(tmp_path)


def source_of(settings: Settings, key: str) -> str:
    return next(value.source for value in settings.describe() if value.key == key)


def mistake(**values: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    return str(caught.value)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_each_source_gives_way_to_the_stronger_one_key_by_key(monkeypatch: Environment, tmp_path: Path) -> None:
    """Argument, environment, ``.env``, file, profile, default; keys of one concern may come from all of them."""
    (tmp_path / "hardening.toml").write_text(
        'environment = "development"\n[health]\nttl_seconds = 1\nreadyz_path = "/file"\nlivez_path = "/file"\n'
        'startupz_path = "/file-startup"\n'
    )
    (tmp_path / ".env").write_text(
        "HARDENING_HEALTH__TTL_SECONDS=2\nHARDENING_HEALTH__READYZ_PATH=/dotenv\nHARDENING_HEALTH__LIVEZ_PATH=/dot\n"
    )
    monkeypatch.setenv("HARDENING_FILE", "hardening.toml")
    monkeypatch.setenv("HARDENING_HEALTH__TTL_SECONDS", "3")
    monkeypatch.setenv("HARDENING_HEALTH__READYZ_PATH", "/environment")
    settings = Settings(health=HealthSettings(ttl_seconds=4))
    health = settings.health
    assert (health.ttl_seconds, health.readyz_path, health.livez_path) == (4, "/environment", "/dot")
    assert (health.startupz_path, health.details, health.timeout_seconds) == ("/file-startup", "always", 2)
    assert source_of(settings, "health.ttl_seconds") == "argument"
    assert source_of(settings, "health.readyz_path") == "environment variable HARDENING_HEALTH__READYZ_PATH"
    assert source_of(settings, "health.livez_path") == ".env: HARDENING_HEALTH__LIVEZ_PATH"
    assert source_of(settings, "health.startupz_path") == "file hardening.toml"
    assert source_of(settings, "health.details") == "profile development"
    assert source_of(settings, "health.timeout_seconds") == "default"


def test_arguments_may_be_models_or_mappings() -> None:
    """What a model leaves at its default is not an argument."""
    model = Settings(errors=ErrorsSettings(format="fastapi"), environment="development")
    mapping = Settings(errors={"format": "fastapi"}, environment="development")
    assert model.errors == mapping.errors == ErrorsSettings(format="fastapi", details=True)


@pytest.mark.parametrize("text", ["10.0.0.0/8, unix", '["10.0.0.0/8", "unix"]', "10.0.0.0/8,unix,"])
def test_lists_may_be_written_plainly_or_as_json(monkeypatch: Environment, text: str) -> None:
    """Nobody should have to quote quotes in a deployment file."""
    monkeypatch.setenv("HARDENING_TRUSTED_PROXIES", text)
    assert Settings().trusted_proxies == ("10.0.0.0/8", "unix")
    monkeypatch.setenv("HARDENING_SECURITY_HEADERS__REMOVE", text)
    assert Settings().security_headers.remove == ("10.0.0.0/8", "unix")


def test_a_whole_concern_may_be_one_variable(monkeypatch: Environment) -> None:
    """As JSON; its single keys still merge."""
    monkeypatch.setenv("HARDENING_HEALTH", '{"ttl_seconds": 7, "details": "never"}')
    settings = Settings(health={"details": "always"})
    assert (settings.health.ttl_seconds, settings.health.details) == (7, "always")


def test_a_text_that_may_also_be_a_list_is_left_as_it_is(monkeypatch: Environment) -> None:
    """A limit such as ``5/minute`` is one limit, not a list of one."""
    monkeypatch.setenv("HARDENING_RATE_LIMIT__DEFAULT", "200/minute")
    assert Settings().rate_limit.default == "200/minute"


def test_names_of_variables_do_not_depend_on_case(monkeypatch: Environment) -> None:
    """As Windows and some people write them."""
    monkeypatch.setenv("hardening_health__details", "never")
    assert Settings().health.details == "never"


def test_foreign_keys_in_dotenv_are_none_of_our_business(tmp_path: Path) -> None:
    """The file belongs to the whole application."""
    (tmp_path / ".env").write_text("DATABASE_URL=sqlite://\nEMPTY\nHARDENING_SERVICE_NAME=shop\n")
    assert Settings().service_name == "shop"
    assert Settings(_env_file=None).service_name is None


def test_what_kubernetes_injects_is_not_a_setting(monkeypatch: Environment) -> None:
    """A service named ``hardening-…`` puts such variables into every pod."""
    for name, value in {
        "HARDENING_SERVICE_HOST": "10.0.0.1",
        "HARDENING_SERVICE_PORT": "80",
        "HARDENING_SERVICE_PORT_HTTP": "80",
        "HARDENING_PORT": "tcp://10.0.0.1:80",
        "HARDENING_PORT_80_TCP": "tcp://10.0.0.1:80",
        "HARDENING_PORT_80_TCP_PROTO": "tcp",
        "HARDENING_SHOP_SERVICE_HOST": "10.0.0.1",
        "HARDENING_SHOP_PORT_80_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert Settings() == Settings(_env_file=None)


@pytest.mark.parametrize("environment", ["production", "staging", "development"])
def test_a_profile_changes_what_its_table_says_and_nothing_else(environment: str) -> None:
    """Whoever reads the table knows the difference."""
    plain, profile = Settings(), Settings(environment=environment)
    changed = {
        value.key: value.value
        for value, before in zip(profile.describe(), plain.describe(), strict=True)
        if value.value != before.value and value.key != "environment"
    }
    table = PROFILES[environment]
    assert changed == {f"{concern}.{key}": value for concern, keys in table.items() for key, value in keys.items()}


def test_secrets_are_never_printed() -> None:
    """Neither by the description nor by the settings themselves."""
    settings = Settings(health={"token": "0123456789abcdef"})
    assert settings.health.token == SecretStr("0123456789abcdef")
    assert "0123456789abcdef" not in repr(settings) + str(settings.describe())


def test_settings_do_not_change() -> None:
    """What was checked is what holds."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().workers = 3  # type: ignore[misc]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_said_at_once_each_with_its_source(monkeypatch: Environment) -> None:
    """Nobody should have to deploy five times to find five of them."""
    monkeypatch.setenv("HARDENING_HELTH__TTL_SECONDS", "1")
    monkeypatch.setenv("HARDENING_HEALTH__TTL_SECOND", "1")
    monkeypatch.setenv("HARDENING_WORKERS", "many")
    said = mistake(environment="prod")
    assert "helth: unknown key; did you mean 'health'?" in said
    assert "health.ttl_second: unknown key; did you mean 'ttl_seconds'" in said
    assert "workers: Input should be a valid integer" in said
    assert "(from environment variable HARDENING_WORKERS)" in said
    assert "environment: Input should be 'production', 'staging' or 'development' (from argument)" in said


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"trusted_proxies": ["proxy.internal"]}, "trusted_proxies: 'proxy.internal' is not an address or a network"),
        ({"health": {"drain_delay_seconds": 60}}, "load balancers still send them"),
        ({"health": {"livez_path": "livez"}}, "starts with a slash"),
        ({"health": {"livez_path": "/x", "readyz_path": "/x"}}, "belongs to one probe"),
        ({"health": {"token": "short"}}, "openssl rand -hex 16"),
        ({"workers": {"many": 3}}, "workers: has no keys of its own"),
        ({"auth": {"default": "required", "enabled": False}}, "auth: enabled is false, so default='required' would"),
        ({"health": 3}, "health: takes keys of its own, not int"),
        ({"health": "{"}, "health: is not JSON"),
        ({"trusted_proxies": "[1"}, "trusted_proxies: is not JSON"),
        ({"request_id": {"header": "X Request"}}, "not a header name"),
        ({"workers": 0}, "workers: Input should be greater than or equal to 1"),
        ({"state_url": "http://user:secret@host"}, "state_url: begins with redis://, rediss:// (TLS)"),
        ({"nonsense": 1}, "nonsense: unknown key; known are access_log,"),
    ],
)
def test_a_mistake_is_told_by_the_sentence_that_mends_it(values: dict[str, object], sentence: str) -> None:
    """And never with a secret in it."""
    said = mistake(**values)
    assert sentence in said
    assert "secret" not in said


def test_a_file_that_is_missing_or_broken_is_told(monkeypatch: Environment, tmp_path: Path) -> None:
    """Silence would run production on defaults."""
    monkeypatch.setenv("HARDENING_FILE", "missing.toml")
    assert "HARDENING_FILE names missing.toml, which does not exist" in mistake()
    monkeypatch.setenv("HARDENING_FILE", "broken.toml")
    (tmp_path / "broken.toml").write_text("= 3")
    assert "cannot be read as TOML" in mistake()


def test_every_name_that_deployments_rely_on_is_known() -> None:
    """From the first day, so that configurations outlive the building of the concerns."""
    fixed = (
        "environment service_name state_url workers trusted_proxies allowed_hosts errors.format rate_limit.default "
        "rate_limit.strategy input_validation.mode request_limits.max_body_bytes cors.allow_origins auth.default "
        "metrics.engine tracing.engine health.details routing.fast"
    )
    concerns = (
        "request_id access_log metrics tracing security_headers cors errors load_shedding request_limits address_limit "
        "versioning auth tenancy rate_limit input_validation idempotency compression response_cache health timeout "
        "routing security_txt csp_reports docs_pages"
    )
    known = {value.key for value in Settings().describe()}
    assert known >= {*fixed.split(), *(f"{concern}.enabled" for concern in concerns.split())}


# --- renamed keys -----------------------------------------------------------------------------------------------------


class Kettle(ConcernSettings):
    """A concern whose key was renamed."""

    renamed: ClassVar[Mapping[str, str]] = {"heat": "degrees"}
    degrees: int = 100


class Kitchen(Settings):
    """Settings of which a field was renamed."""

    renamed: ClassVar[Mapping[str, str]] = {"pot": "kettle"}
    kettle: Kettle = Kettle()


def test_an_old_name_works_and_warns_with_the_new_one(monkeypatch: Environment) -> None:
    """For a major version, in every source."""
    with pytest.warns(DeprecationWarning, match="'heat' is now 'degrees'"):
        assert Kettle.model_validate({"heat": 80}).degrees == 80
    monkeypatch.setenv("HARDENING_POT__HEAT", "70")
    with pytest.warns(DeprecationWarning, match="is now") as told:
        assert Kitchen().kettle.degrees == 70
    assert ["'pot' is now 'kettle'" in str(told[0].message), "'kettle.heat' is now" in str(told[1].message)] == [
        True
    ] * 2


def test_the_new_name_wins_over_the_old_one() -> None:
    """Who sets both is on the way from one to the other."""
    with pytest.warns(DeprecationWarning, match="degrees"):
        assert Kettle.model_validate({"heat": 80, "degrees": 90}).degrees == 90


def test_a_concern_alone_reads_texts_and_guesses_mistakes() -> None:
    """The same help where only one middleware is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Kettle.model_validate('{"degrees": 3}').degrees == 3
        assert Kettle.model_validate(Kettle(degrees=4)).degrees == 4
    with pytest.raises(ValueError, match="did you mean 'degrees'"):
        Kettle.model_validate({"degree": 3})
