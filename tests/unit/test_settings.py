"""Options: their defaults, and the command line over the environment over the file."""

import importlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from jobworker import handlers
from jobworker.handlers.settings import HandlerSettings
from jobworker.supervisor import main as service
from jobworker.worker.cli import main as tool
from jobworker.worker.config.durations import InvalidDuration
from jobworker.worker.config.quantities import Count, Duration, Number, Size, parse_duration
from jobworker.worker.errors import ConfigurationError
from jobworker.worker.extension import extension
from jobworker.worker.keys import Source
from jobworker.worker.options import ENV_PREFIX, service_options, settings_from, unknown_variables
from jobworker.worker.outcome import RetryPolicy
from jobworker.worker.settings import (
    Settings,
    cores,
    parse_address,
    parse_handler,
    parse_source,
)


class Program:
    """The service's command line, of which only the settings are wanted."""

    def __init__(self) -> None:
        self.settings: Settings | None = None

        @click.command(context_settings={"auto_envvar_prefix": ENV_PREFIX})
        @service_options
        def command(**options: Any) -> None:
            self.settings = settings_from(options, on_terminal=False)

        self.command = command

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> Result:
        self.settings = None
        clean = {name: None for name in os.environ if name.startswith(ENV_PREFIX)}
        return CliRunner().invoke(self.command, list(arguments), env={**clean, **(env or {})})

    def settings_of(self, *arguments: str, env: dict[str, str] | None = None) -> HandlerSettings:
        result = self.run(*arguments, env=env)
        assert result.exit_code == 0, result.output
        assert isinstance(self.settings, HandlerSettings)
        return self.settings


@pytest.fixture
def program() -> Program:
    return Program()


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    """Writes a file and gives the option that names it."""

    def write(text: str) -> str:
        path = tmp_path / "jobworker.toml"
        path.write_text(text, encoding="utf-8")
        return f"--config={path}"

    return write


#: Option -> (a value other than the default, the setting it makes, that setting's default, the setting then).
OPTIONS: dict[str, tuple[str, Callable[[Settings], object], object, object]] = {
    "procs": ("3", lambda s: s.procs, cores(), 3),
    "redis-url": ("redis://h:1/2", lambda s: s.redis_url, "", "redis://h:1/2"),
    "milvus-uri": ("http://h:19530", lambda s: s.milvus_uri, "", "http://h:19530"),
    "data-dir": ("elsewhere", lambda s: s.data_dir, "./jobworker-data", "elsewhere"),
    "model": ("BAAI/bge-m3", lambda s: s.model, "", "BAAI/bge-m3"),
    "device": ("cuda:0,cuda:1", lambda s: s.device, "auto", "cuda:0,cuda:1"),
    "model-copies": ("3", lambda s: s.device_copies, 0, 3),
    "stream": ("a:b=g", lambda s: s.streams, extension().streams, (Source("a:b", "g"),)),
    "handler": ("x=m:C", lambda s: s.handlers, handlers.BUILTIN, {**handlers.BUILTIN, "x": "m:C"}),
    "metrics-addr": ("0.0.0.0:0", lambda s: s.metrics_addr, "127.0.0.1:9464", "0.0.0.0:0"),
    "lease": ("5", lambda s: s.lease_s, 30.0, 5.0),
    "max-retries": ("0", lambda s: s.retry.max_retries, 3, 0),
    "retry-initial": ("0.5", lambda s: s.retry.initial_s, 1.0, 0.5),
    "retry-max": ("600", lambda s: s.retry.max_s, 60.0, 600.0),
    "retry-multiplier": ("1", lambda s: s.retry.multiplier, 2.0, 1.0),
    "retry-jitter": ("0", lambda s: s.retry.jitter, 0.1, 0.0),
    "unique-window": ("3600", lambda s: s.unique_window_s, 86_400.0, 3600.0),
    "max-payload": ("2048", lambda s: s.max_payload, 8 * 1024 * 1024, 2048),
    "drain-timeout": ("0", lambda s: s.drain_timeout_s, 30.0, 0.0),
    "connect-timeout": ("1.5", lambda s: s.connect_timeout_s, 30.0, 1.5),
    "instance": ("blue", lambda s: s.instance, socket.gethostname(), "blue"),
    "log-level": ("debug", lambda s: s.log_level, "info", "debug"),
    "log-format": ("text", lambda s: s.log_format, "json", "text"),
    "milvus-prefix": ("p_", lambda s: s.milvus_prefix, "z_novel_", "p_"),
    "cache": ("512MiB", lambda s: s.cache_bytes, 1 << 30, 1 << 29),
    "linger": ("0.02", lambda s: s.linger_s, 0.0, 0.02),
    "milvus-partitions": ("named", lambda s: s.milvus_partitions, "key", "named"),
}
LISTS = {"stream", "handler"}
HELP = [click.Option(["--help"])]


def toml(name: str, value: str) -> str:
    """A line of the file, with the value's own kind."""
    kind = type(OPTIONS[name][3])
    written = value if kind in (int, float) and name != "cache" else f'"{value}"'
    return f"{name} = [{written}]\n" if name in LISTS else f"{name} = {written}\n"


@pytest.mark.parametrize("name", OPTIONS)
def test_default_command_line_environment_and_file(
    program: Program, config: Callable[[str], str], name: str
) -> None:
    value, setting, default, changed = OPTIONS[name]
    variable = f"JOBWORKER_{name.upper().replace('-', '_')}"
    assert setting(program.settings_of()) == default
    assert setting(program.settings_of(f"--{name}", value)) == changed
    assert setting(program.settings_of(env={variable: value})) == changed
    assert setting(program.settings_of(config(toml(name, value)))) == changed


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    program: Program, config: Callable[[str], str]
) -> None:
    in_file = config('lease = 1\nmax-retries = 1\ninstance = "file"\nstream = ["file=f"]\n')
    env = {"JOBWORKER_MAX_RETRIES": "2", "JOBWORKER_INSTANCE": "env", "JOBWORKER_STREAM": "env=e other=o"}
    found = program.settings_of(in_file, "--instance=line", env=env)
    assert (found.lease_s, found.retry.max_retries, found.instance) == (1.0, 2, "line")
    assert found.streams == (Source("env", "e"), Source("other", "o"))
    assert program.settings_of(in_file, "--stream=line=l", env=env).streams == (Source("line", "l"),)


def test_the_file_may_be_named_by_the_environment(program: Program, config: Callable[[str], str]) -> None:
    path = config("lease = 7\n").removeprefix("--config=")
    assert program.settings_of(env={"JOBWORKER_CONFIG": path}).lease_s == 7.0


@pytest.mark.parametrize(
    "name", ["dlq:s", "retry:s", "deaths:s", "fence:{s}", "dlq:dlq:s", "jobworker:paused"]
)
def test_keys_of_the_service_are_no_streams(name: str) -> None:
    with pytest.raises(ConfigurationError, match="own records"):
        parse_source(f"{name}=g")


def test_streams_given_replace_the_table(program: Program) -> None:
    found = program.settings_of("--stream", "a=g", "--stream", "stream:with=equals=h").streams
    assert found == (Source("a", "g"), Source("stream:with=equals", "h"))


def test_shards_follow_their_stream_and_those_that_cannot_be_are_refused(program: Program) -> None:
    own = ("--stream", "a=g", "--stream", "b=g", "--shards", "2", "--drain-shards", "1")
    settings = program.settings_of(*own)
    assert settings.logical_streams == ["a", "b"]
    assert [len(settings.streams), settings.spread_streams] == [8, (0, 4)]
    assert program.settings_of("--drain-shards", "2").spread_streams == ()
    for arguments, says in (
        (("--shards", "2", "--drain-shards", "2"), "present number"),
        (("--stream", "{a}b=g", "--shards", "2"), "hash tag"),
        (("--shards", "64", "--drain-shards", "63"), "at most 255 streams"),
        (("--stream", f"{settings.streams[1].stream}=g"), "keeps its own records"),
    ):
        assert says in str(program.run(*arguments).exception)


def test_handlers_given_add_and_replace(program: Program) -> None:
    found = program.settings_of("--handler", "audit=mine:Audit", "--handler", "shout=mine:Shout").handlers
    assert found == {**handlers.BUILTIN, "audit": "mine:Audit", "shout": "mine:Shout"}


@pytest.mark.parametrize("way", ["line", "environment", "file"])
def test_only_the_handlers_given(program: Program, config: Callable[[str], str], way: str) -> None:
    given = {
        "line": (["--no-builtin-handlers"], {}),
        "environment": ([], {"JOBWORKER_NO_BUILTIN_HANDLERS": "1"}),
        "file": ([config("no-builtin-handlers = true\n")], {}),
    }
    arguments, env = given[way]
    assert program.settings_of(*arguments, "--handler", "x=m:C", env=env).handlers == {"x": "m:C"}


def test_no_handler_at_all_is_an_error(program: Program) -> None:
    result = program.run("--no-builtin-handlers")
    assert isinstance(result.exception, ConfigurationError)
    assert "--handler" in str(result.exception)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lease = 1\nleese = 2\n", "did you mean lease?"),
        ("[retry]\ninitial = 1\n", "'retry'"),
        ("lease = \n", "line 1"),
        ("lease = 'soon'\n", "'soon'"),
        ("lease = -1\n", "-1"),
        ("log-level = 'loud'\n", "'loud'"),
        ("stream = 'a=g'\n", "list of strings"),
    ],
)
def test_a_wrong_file_is_a_usage_error(
    program: Program, config: Callable[[str], str], text: str, says: str
) -> None:
    result = program.run(config(text))
    assert result.exit_code == 2, result.output
    assert says in result.output


def test_a_file_that_is_not_there_or_no_text_is_a_usage_error(program: Program, tmp_path: Path) -> None:
    assert program.run(f"--config={tmp_path / 'none.toml'}").exit_code == 2
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\0")
    assert program.run(f"--config={tmp_path / 'binary.toml'}").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    ["--procs 0", "--lease 0", "--max-retries -1", "--retry-initial 0", "--retry-multiplier 0.5",
     "--retry-jitter 1.1", "--max-payload 10", "--drain-timeout -1", "--log-format xml", "--linger 2",
     "--no-such-option"],
)  # fmt: skip
def test_values_that_make_no_sense_are_usage_errors(program: Program, arguments: str) -> None:
    assert program.run(*arguments.split()).exit_code == 2


@pytest.mark.parametrize("text", ["", "x", "=g", "s=", "stream"])
def test_a_stream_without_a_group_says_what_to_write(text: str) -> None:
    with pytest.raises(ConfigurationError, match="NAME=GROUP"):
        parse_source(text)


@pytest.mark.parametrize("text", ["", "x", "x=", "x=m", "x=:C", "x=m:", "=m:C", "x=m:C()", "x=m:a.b"])
def test_a_handler_that_names_no_class_says_what_to_write(text: str) -> None:
    with pytest.raises(ConfigurationError, match="TYPE=module:Class"):
        parse_handler(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80)), ("host:65535", ("host", 65535))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("off", 0), ("16777216", 1 << 24), ("16M", 1 << 24), ("2GiB", 1 << 31), ("20000kb", 20_000 << 10)],
)
def test_sizes(program: Program, text: str, size_bytes: int) -> None:
    assert program.settings_of("--cache", text).cache_bytes == size_bytes


@pytest.mark.parametrize("text", ["on", "0", "15MiB", "-5G", "1.5G", "1 GiB", "1X", "1GiBB", "9" * 20])
def test_what_is_no_size_says_what_to_write(program: Program, text: str) -> None:
    result = program.run("--cache", text)
    assert result.exit_code == 2
    assert "say off or a size" in " ".join(result.output.split())


def options_of_type(kind: type) -> list[str]:
    return [
        parameter.opts[0]
        for parameter in Program().command.params
        if isinstance(parameter.type, kind) and isinstance(parameter, click.Option)
    ]


def test_every_duration_size_and_number_is_bounded() -> None:
    plain = (click.FloatRange, click.types.FloatParamType, click.types.IntParamType)
    found = [p.opts[0] for p in Program().command.params if isinstance(p.type, plain)]
    assert [p for p in found if p not in options_of_type(Count)] == []


DURATIONS, NUMBERS = options_of_type(Duration), options_of_type(Number)
#: Each option with three texts, and one option of each type with all others.
NO_NUMBERS = [
    *((option, text) for option in DURATIONS + NUMBERS for text in ("nan", "-1", "1e30")),
    *((option, text) for option in (DURATIONS[0], NUMBERS[0])
      for text in ("inf", "-inf", "1e999", "infinity", "", "٣", "1_0")),
]  # fmt: skip


@pytest.mark.parametrize(("option", "text"), NO_NUMBERS)
def test_a_number_that_is_none_or_not_finite_is_a_usage_error(
    program: Program, config: Callable[[str], str], option: str, text: str
) -> None:
    name = option.removeprefix("--")
    for arguments, env in (
        ([option, text], {}),
        ([], {f"JOBWORKER_{name.upper().replace('-', '_')}": text}),
        ([config(f'{name} = "{text}"\n')], {}),
        ([config(f"{name} = {text if text in ('nan', 'inf', '-inf') else '1e999'}\n")], {}),
    ):
        result = program.run(*arguments, env=env)
        assert result.exit_code == 2, (arguments, result.output)
        assert name in result.output


@pytest.mark.parametrize("option", options_of_type(Duration))
@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("0.5", 0.5), ("0.5s", 0.5), ("5e-1", 0.5)])
def test_every_duration_takes_units(
    program: Program, config: Callable[[str], str], option: str, text: str, seconds: float
) -> None:
    name = option.removeprefix("--")
    found = [program.settings_of(option, text), program.settings_of(config(f'{name} = "{text}"\n'))]
    for settings in found:
        values = [*vars(settings).values(), *settings.retry]
        assert seconds in values


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300), ("1h30m", 5400), ("1m500ms", 60.5), ("2d", 172_800), ("1w", 604_800),
                          ("90", 90), ("90s", 90), ("1.5m", 90), (" 2h ", 7200)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m",
        "5x",
        "5 m",
        "1.2.3s",
        "1.2.3",
        "s5",
        "5m5",
        "-5m",
        ".",
        "-1",
        "-1e3",
        "h",
        "1y",
        "2 h",
        "inf",
        "1e999",
    ],
)
def test_what_is_no_duration_says_so(text: str) -> None:
    with pytest.raises(InvalidDuration, match=r"not a (duration|number).*: say a duration such as 30"):
        parse_duration(text)


@pytest.mark.parametrize(("option", "value"), [("--max-payload", 8 << 20), ("--max-rss", 8)])
@pytest.mark.parametrize("text", ["8MiB", "8M", "8mb", "8192K"])
def test_every_size_takes_units(program: Program, option: str, value: int, text: str) -> None:
    settings = program.settings_of(option, text)
    assert value in (settings.max_payload if option == "--max-payload" else settings.max_rss_mib,)


def test_a_plain_number_keeps_the_unit_of_its_option(program: Program) -> None:
    settings = program.settings_of("--max-rss", "300", "--max-payload", "4096", "--max-age", "90")
    assert (settings.max_rss_mib, settings.max_payload, settings.max_age_s) == (300, 4096, 90.0)


@pytest.mark.parametrize("extreme", ["greatest", "least"])
def test_the_bounds_of_every_option_reach_a_child(program: Program, extreme: str) -> None:
    for parameter in program.command.params:
        kind = parameter.type
        if isinstance(kind, Count):
            value = kind.max if extreme == "greatest" else kind.min
        elif isinstance(kind, Duration):
            value = kind.most_s if extreme == "greatest" else kind.least_s
        elif isinstance(kind, Number | Size):
            value = kind.most if extreme == "greatest" else kind.least
        else:
            continue
        settings = program.settings_of(parameter.opts[0], str(value))
        assert HandlerSettings.from_json(settings.to_json()) == settings


def test_a_hyphen_and_an_underscore_are_the_same_in_the_file(
    program: Program, config: Callable[[str], str]
) -> None:
    text = 'redis_url = "redis://h:1"\nmax_retries = 7\nno_builtin_handlers = true\nhandler = ["a=m:C"]\n'
    settings = program.settings_of(config(text))
    assert (settings.redis_url, settings.retry.max_retries) == ("redis://h:1", 7)
    assert settings.handlers == {"a": "m:C"}


def test_both_spellings_of_a_key_are_refused(program: Program, config: Callable[[str], str]) -> None:
    result = program.run(config('redis_url = "redis://a"\nredis-url = "redis://b"\n'))
    assert result.exit_code == 2
    assert "given twice" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("lease = true", "lease", "a duration"),
        ("lease = [30]", "lease", "a duration"),
        ("lease = 2026-01-01", "lease", "a duration"),
        ("procs = 3.5", "procs", "a whole number"),
        ("procs = true", "procs", "a whole number"),
        ("max-payload = 8.5", "max-payload", "a size"),
        ("cache = false", "cache", "a size"),
        ("retry-jitter = true", "retry-jitter", "a number"),
        ("redis-url = 6379", "redis-url", "a string"),
        ('redis-url = ["redis://:hidden@h"]', "redis-url", "a string"),
        ("instance = {a = 1}", "instance", "a string"),
        ("milvus-token = 12345", "milvus-token", "a string"),
        ('stream = "a=g"', "stream", "a list of strings"),
        ("stream = [1]", "stream", "strings in the list"),
        ("handler = {a = 'm:C'}", "handler", "a list of strings"),
        ('no-builtin-handlers = "yes"', "no-builtin-handlers", "true or false"),
        ("no-builtin-handlers = 1", "no-builtin-handlers", "true or false"),
        ("[lease]\na = 1", "lease", "a duration"),
    ],
)
def test_a_wrong_kind_in_the_file_names_the_key_and_what_is_expected(
    program: Program, config: Callable[[str], str], text: str, key: str, expected: str
) -> None:
    result = program.run(config(text + "\n"))
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert f"{key}: expected" in said
    assert expected in said
    assert not [secret for secret in ("hidden", "12345") if secret in said]


@pytest.mark.parametrize(
    ("key", "meant"), [("leese", "lease"), ("redis-urls", "redis-url"), ("max_retry", "max-retries"),
                       ("milvus_url", "milvus-uri"), ("worker-procs", "--help")],
)  # fmt: skip
def test_an_unknown_key_gets_a_suggestion(
    program: Program, config: Callable[[str], str], key: str, meant: str
) -> None:
    result = program.run(config(f"{key} = 1\n"))
    assert result.exit_code == 2
    assert meant in result.output.partition("no option")[2]


def test_a_misspelt_option_gets_a_suggestion(program: Program) -> None:
    assert "--lease" in program.run("--leese=3").output


def test_a_misspelt_variable_is_reported_and_those_of_others_are_not() -> None:
    others = ["JOBWORKER_METRICS_URL", "JOBWORKER_LLM_KEY", "JOBWORKER_WEB_LISTEN", "JOBWORKER_WEB_TOKEN",
              "JOBWORKER_SERVICE_HOST", "JOBWORKER_PORT", "JOBWORKER_PORT_9464_TCP_ADDR", "PATH"]  # fmt: skip
    options = [f"JOBWORKER_{name.upper().replace('-', '_')}" for name in [*OPTIONS, "config"]]
    environ = dict.fromkeys([*others, *options, "JOBWORKER_REDIS_URI"], "")
    assert list(unknown_variables(environ)) == [("JOBWORKER_REDIS_URI", "JOBWORKER_REDIS_URL")]


@pytest.mark.parametrize("text", ["a\x1b[31m", "a\nb", "a\x00b", "a\udcff"])
@pytest.mark.parametrize("name", ["instance", "data_dir", "redis_url", "milvus_prefix"])
def test_control_characters_and_bytes_that_are_no_text_are_refused(name: str, text: str) -> None:
    context = Program().command.make_context("x", [], resilient_parsing=True)
    with pytest.raises(ConfigurationError, match=f"--{name.replace('_', '-')}: "):
        settings_from({**context.params, name: text}, on_terminal=False)


@pytest.mark.parametrize("text", ["", "9464", ":9464", "host", "host:", "host:65536", "host:-1", "host:http"])
def test_what_is_no_address_says_what_to_write(text: str) -> None:
    with pytest.raises(ConfigurationError, match="HOST:PORT"):
        parse_address(text)


def test_help_names_every_option_and_its_variable(program: Program) -> None:
    text = program.run("--help").output
    assert [name for name in OPTIONS if f"--{name} " not in text] == []
    variables = [f"JOBWORKER_{name.upper().replace('-', '_')}" for name in OPTIONS]
    assert [variable for variable in variables if variable not in "".join(text.split())] == []


def test_a_child_gets_the_same_settings() -> None:
    settings = HandlerSettings(
        procs=7, redis_url="redis://:pä@h", streams=(Source("a", "b"),), handlers={"t": "m:C"},
        retry=RetryPolicy(9, 0.5, 1e6, 3.0, 0.0), instance="第一",
    )  # fmt: skip
    again = HandlerSettings.from_json(settings.to_json())
    assert again == settings
    assert again.streams[0].group == "b"
    assert again.retry.max_retries == 9


def test_what_goes_into_the_log_holds_no_secret() -> None:
    secret = "s3cr3t"
    settings = HandlerSettings(
        redis_url=f"redis://:{secret}@h", milvus_token=secret, milvus_uri=f"http://u:{secret}@m:1"
    )
    assert secret not in repr(settings.public())
    assert settings.public()["lease_s"] == 30.0


def test_the_form_of_the_log_follows_the_terminal() -> None:
    found = []

    @click.command()
    @service_options
    def command(**options: Any) -> None:
        found.extend(settings_from(options, on_terminal).log_format for on_terminal in (True, False))

    assert CliRunner().invoke(command, []).exit_code == 0
    assert CliRunner().invoke(command, ["--log-format=json"]).exit_code == 0
    assert found == ["text", "json", "json", "json"]


def test_an_earlier_name_of_a_handler_leads_to_where_it_is_now(program: Program) -> None:
    earlier, now = next(iter(handlers.MOVED.items()))
    settings = program.settings_of("--handler", f"a={earlier}", "--handler", "b=other:Class")
    assert (settings.handlers["a"], settings.handlers["b"]) == (now, "other:Class")


@pytest.mark.parametrize("target", [*handlers.BUILTIN.values(), *handlers.MOVED.values()])
def test_every_builtin_target_can_be_imported(target: str) -> None:
    module, _, name = target.partition(":")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def verbs(command: click.Command) -> Iterator[click.Command]:
    """A command and everything below it."""
    yield command
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from verbs(below)


def test_no_verb_takes_a_number_without_bounds() -> None:
    plain = (click.types.FloatParamType, click.types.IntParamType)
    found = [
        f"{verb.name} {parameter.name}"
        for verb in verbs(tool)
        for parameter in verb.params
        if isinstance(parameter.type, plain) and not isinstance(parameter.type, Count)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--redis-url", "localhost:6379"], "--redis-url"),
        (["--redis-url", "redis://h?foo=1"], "'foo'"),
        (["--redis-url", "rediss://h?ssl_ca_certs=/does/not/exist"], "ssl_ca_certs"),
        (["--milvus-uri", "localhost:19530"], "--milvus-uri"),
        (["--milvus-uri", "http://h:19530?x=1"], "--milvus-uri"),
        (["--llm-url", "localhost:11434/v1", "--llm-model", "m"], "--llm-url"),
        (["--llm-url", "http:///v1", "--llm-model", "m"], "--llm-url"),
        (["--device", "gpu"], "--device"),
        (["--device", "cuda:0,,cuda:1"], "--device"),
        (["--device", "cuda:0,auto"], "--device"),
        (["--milvus-prefix", "1-x"], "--milvus-prefix"),
        (["--summary-sink", "mysql"], "--summary-sink"),
        (["--summary-sink", "postgres"], "--postgres-dsn"),
        (["--stream", "a=g", "--stream", "a=h"], "given twice"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_start(
    program: Program, arguments: list[str], said: str
) -> None:
    result = program.run(*arguments)
    assert isinstance(result.exception, ConfigurationError)
    assert said in str(result.exception)


def test_blanks_around_the_parts_of_an_option_do_not_matter(program: Program) -> None:
    found = program.settings_of(
        "--device", "cuda:0, cuda:1", "--stream", "a = g", "--handler", "x = m:C",
        "--redis-url", " redis+cluster://a:1, b:2 ", "--milvus-uri", "http://h:19530 ",
    )  # fmt: skip
    assert found.device == "cuda:0,cuda:1"
    assert found.streams == (Source("a", "g"),)
    assert found.handlers["x"] == "m:C"
    assert (found.redis_url, found.milvus_uri) == ("redis+cluster://a:1, b:2", "http://h:19530")


def test_the_help_shows_eleven_options_first_and_each_in_one_group() -> None:
    text = CliRunner().invoke(service, ["--help"]).output
    sections = re.split(r"^(\w[\w ]*):$", text, flags=re.MULTILINE)[1:]
    listed = {
        title: re.findall(r"^  --([\w-]+)", body, re.MULTILINE)
        for title, body in zip(sections[::2], sections[1::2], strict=True)
    }
    assert len(listed["Most needed options"]) == 11
    assert next(iter(listed)) == "Most needed options"
    every = [name for names in listed.values() for name in names]
    assert sorted(every) == sorted(p.opts[0].removeprefix("--") for p in [*service.params, *HELP])
    assert listed["Other"] == ["version", "help"]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_empty_value_is_never_the_default(
    program: Program, config: Callable[[str], str], option: str
) -> None:
    variable = f"JOBWORKER_{option.upper().replace('-', '_')}"
    for blank in ("", " "):
        for arguments, env in ([f"--{option}", blank], {}), ([], {variable: blank}):
            result = program.run(*arguments, env=env)
            assert result.exit_code == 2, (arguments, env)
            assert "leave the option out" in result.output or "unset it" in result.output
    value = '[""]' if option in LISTS else '""'
    result = program.run(config(f"{option} = {value}\n"))
    assert (result.exit_code, option in result.output) == (2, True)


def test_an_empty_url_is_told_how_to_get_the_embedded_store(program: Program) -> None:
    for arguments, env in (["--redis-url", ""], {}), ([], {"JOBWORKER_REDIS_URL": ""}):
        assert "an embedded Valkey" in " ".join(program.run(*arguments, env=env).output.split())
    assert program.run(env={"JOBWORKER_REDIS_URL": "redis://h"}).exit_code == 0
    assert program.run("--redis-url", "redis://h", env={"JOBWORKER_REDIS_URL": ""}).exit_code == 0


@pytest.mark.parametrize("name", ["handler", "stream"])
def test_an_empty_list_in_the_file_is_refused(
    program: Program, config: Callable[[str], str], name: str
) -> None:
    assert "leave the key out" in program.run(config(f"{name} = []\n")).output
