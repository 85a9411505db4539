"""URLs in options, parsed without any client library, so that the supervisor can check them.

Errors name the part that is wrong and never show a password.
"""

import re
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from .errors import ConfigurationError

#: Scheme -> (kind, TLS).
_SCHEMES = {
    "redis": ("single", False), "rediss": ("single", True), "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False), "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False), "rediss+cluster": ("cluster", True),
}  # fmt: skip
_EXAMPLES = (
    "redis://host:6379/0, rediss://…, unix:///path, redis+sentinel://host:26379,host:26379/master/0 or "
    "redis+cluster://host:6379,host:6379"
)
#: A name or an IPv6 address in brackets, and a port.
_HOST_HEADER = re.compile(r"(?:\[(?P<address>[^\[\]]*)\]|(?P<name>[^:\[\]]*))(?::[0-9]{1,5})?")
_DEFAULT_PORT = {"single": 6379, "cluster": 6379, "sentinel": 26379, "unix": 0}
_HOST = re.compile(r"[\w.-]{1,255}")
# Compiled here and not where they are used: the children of the forkserver share what an import makes.
_USER_INFO, _AUTHORITY = re.compile(r"[^/]*@"), re.compile(r"[^/?#]*")
_OPTION = re.compile(r"[a-z0-9_-]{1,40}")
_NUMBER, _PORT = re.compile(r"[0-9]{1,6}"), re.compile(r"[0-9]{1,5}")
_TRUE, _FALSE = ("1", "true", "yes", "y", "on", "t"), ("0", "false", "no", "n", "off", "f")
#: Options of the TLS connection, as redis-py calls them.
_TLS_TEXTS = ("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_certfile", "ssl_keyfile", "ssl_password",
              "ssl_ciphers")  # fmt: skip
_TLS_FLAGS = ("ssl_check_hostname", "ssl_validate_ocsp", "ssl_validate_ocsp_stapled")
#: Options of other clients (go-redis, redis-py) about their pools, retries and time limits. This service has
#: its own, so they change nothing here, and producers may share their URL.
_WITHOUT_EFFECT = frozenset({
    "dial_timeout", "read_timeout", "write_timeout", "pool_timeout", "pool_size", "pool_fifo",
    "min_idle_conns", "max_idle_conns", "max_active_conns", "conn_max_idle_time", "conn_max_lifetime",
    "idle_timeout", "idle_check_frequency", "max_conn_age", "max_retries", "min_retry_backoff",
    "max_retry_backoff", "context_timeout_enabled", "identity_suffix", "disable_identity",
    "disable_indentity", "read_only", "route_by_latency", "route_randomly", "max_redirects",
    "max_connections", "timeout", "socket_timeout", "socket_connect_timeout", "socket_keepalive",
    "socket_read_size", "retry_on_timeout", "health_check_interval", "decode_responses", "encoding",
    "encoding_errors", "protocol", "legacy_responses", "client_name", "lib_name", "lib_version",
})  # fmt: skip
_WITH_EFFECT = (
    "db",
    "username",
    "password",
    "sentinel_username",
    "sentinel_password",
    "ssl",
    "ssl_cert_reqs",
    "skip_verify",
    *_TLS_TEXTS,
    *_TLS_FLAGS,
)


@dataclass(frozen=True)
class RedisUrl:
    """A parsed URL. ``kind`` is single, unix, sentinel or cluster; ``tls`` holds arguments of redis-py."""

    kind: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    master: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    secure: bool = False
    tls: dict[str, Any] = field(default_factory=dict, repr=False)
    #: User and password of the sentinels; user and password of the URL are those of the master.
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    #: Options that are accepted and change nothing.
    ignored: tuple[str, ...] = ()

    def tls_arguments(self) -> dict[str, Any]:
        """Arguments of redis-py's TLS connections; none without TLS, whose connections refuse them."""
        return dict(self.tls) if self.secure else {}


def parse_redis_url(url: str) -> RedisUrl:
    """Parse a URL of the job store. Raises `ConfigurationError`, which says what is wrong."""
    try:
        return _parse(url.strip())
    except ValueError as error:
        raise ConfigurationError(f"cannot be read as a Redis URL: {error}") from None


def _parse(url: str) -> RedisUrl:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in _SCHEMES:
        # Not the text itself: without a scheme it may begin with a password.
        raise ValueError(f"it must begin with a scheme: {_EXAMPLES}")
    kind, secure = _SCHEMES[scheme.lower()]
    user_info, address, path, query = _split(kind, rest)
    username, password = _credentials(user_info)
    options = _options(query)
    secure = _flag("ssl", options["ssl"]) if "ssl" in options else secure
    if kind != "sentinel" and (given := [name for name in options if name.startswith("sentinel_")]):
        raise ValueError(f"the option {given[0]} needs redis+sentinel://")
    if secure and kind == "unix":
        raise ValueError("the option ssl: a Unix socket has no TLS")
    master, db = _place(kind, path, options.get("db"))
    return RedisUrl(
        kind,
        hosts=_hosts(address, _DEFAULT_PORT[kind], single=kind == "single") if kind != "unix" else (),
        path=unquote(path) if kind == "unix" else "",
        master=master,
        db=db,
        username=options.get("username", username) or None,
        password=options.get("password", password) or None,
        sentinel_username=options.get("sentinel_username") or None,
        sentinel_password=options.get("sentinel_password") or None,
        secure=secure,
        tls=_tls(options),
        ignored=tuple(name for name in options if name in _WITHOUT_EFFECT),
    )


def _split(kind: str, rest: str) -> tuple[str, str, str, str]:
    """User and password, address, path, options."""
    user_info = ""
    if kind in ("sentinel", "cluster") and (found := _USER_INFO.match(rest)):
        user_info, rest = found[0], rest[found.end() :]
    found = _AUTHORITY.match(rest)
    assert found is not None
    authority, tail = found[0], rest[found.end() :]
    if "#" in tail:
        raise ValueError("a # in the password or an option must be written %23")
    if not user_info:
        user_info, at, address = authority.rpartition("@")
        if not at and kind != "unix" and "@" in tail.partition("?")[0]:
            raise ValueError("a / in the password must be written %2F")
    else:
        address = authority
    path, _, query = tail.partition("?")
    if not user_info and "@" in query.partition("=")[0]:
        raise ValueError("a ? in the password must be written %3F")
    return user_info.removesuffix("@"), address, path, query


def _credentials(user_info: str) -> tuple[str | None, str | None]:
    user, colon, password = user_info.partition(":")
    return (unquote(user) or None), (unquote(password) if colon else None)


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        if not pair:
            continue
        name, _, value = pair.partition("=")
        name = unquote(name).strip().lower()
        if name not in _WITH_EFFECT and name not in _WITHOUT_EFFECT:
            # A text that is no name may be a part of a password.
            shown = repr(name) if _OPTION.fullmatch(name) else "(not shown)"
            from difflib import get_close_matches  # only for a mistake: it takes memory of the supervisor

            close = get_close_matches(name[:40], [*_WITH_EFFECT, *_WITHOUT_EFFECT], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown option {shown}{hint}")
        if name in options:
            raise ValueError(f"the option {name} is given twice")
        options[name] = unquote(value.replace("+", " "))
    return options


def _tls(options: dict[str, str]) -> dict[str, Any]:
    tls: dict[str, Any] = {name: options[name] for name in _TLS_TEXTS if name in options}
    tls |= {name: _flag(name, options[name]) for name in _TLS_FLAGS if name in options}
    if "ssl_cert_reqs" in options:
        if options["ssl_cert_reqs"] not in ("none", "optional", "required"):
            raise ValueError("the option ssl_cert_reqs must be none, optional or required")
        tls["ssl_cert_reqs"] = options["ssl_cert_reqs"]
    if "skip_verify" in options and _flag("skip_verify", options["skip_verify"]):
        tls |= {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    return tls


def _flag(name: str, value: str) -> bool:
    if value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise ValueError(f"the option {name} must be true or false")


def _place(kind: str, path: str, option: str | None) -> tuple[str, int]:
    """The master's name, and the database: the option wins over the path."""
    if kind == "unix":
        if not path.startswith("/"):
            raise ValueError("a Unix socket needs a path: unix:///run/redis.sock")
        return "", _database(option or "0")
    parts = [part.strip() for part in path.strip("/").split("/")] if path.strip("/") else []
    master = ""
    if kind == "sentinel":
        if not parts:
            raise ValueError("the master's name is missing: redis+sentinel://host:26379/mymaster/0")
        master = unquote(parts.pop(0))
    if len(parts) > 1:
        raise ValueError("the path has too many parts: write /0 for database 0")
    db = _database(option or (parts[0] if parts else "0"))
    if kind == "cluster" and db:
        raise ValueError("a cluster has database 0 only")
    return master, db


def _database(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError("the database must be a number, such as /0")
    return int(text)


def _hosts(text: str, default_port: int, *, single: bool) -> tuple[tuple[str, int], ...]:
    if single and not text.strip():
        return (("localhost", default_port),)
    if single and "," in text:
        raise ValueError("several hosts need redis+sentinel:// or redis+cluster://")
    return tuple(parse_host(part.strip(), default_port) for part in text.split(","))


def parse_http_url(text: str, option: str, example: str) -> SplitResult:
    """Parts of a URL with http or https, a host and at most a valid port. Raises `ConfigurationError`."""
    try:
        parts = urlsplit(text.strip())
        port, host = parts.port, parts.hostname
    except ValueError:
        port, host, parts = 0, None, urlsplit("")
    known = parts.scheme in ("http", "https") and host and port != 0
    if not known or re.search(r"\s", parts.netloc):
        raise ConfigurationError(f"{option}: must be a URL such as {example}")
    return parts


def parse_host(text: str, default_port: int) -> tuple[str, int]:
    """``host``, ``host:port``, ``[IPv6]`` or ``[IPv6]:port``. Raises ValueError."""
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        host = unquote(host)
        if not closed or not _is_ipv6(host) or (port and not port.startswith(":")):
            raise ValueError("an IPv6 address is written [::1]:6379")
        port = port.removeprefix(":") if port else str(default_port)
    elif text.count(":") > 1:
        raise ValueError("an IPv6 address needs brackets: [::1]:6379")
    else:
        host, colon, port = text.partition(":")
        port = port if colon else str(default_port)
        if not _HOST.fullmatch(host):
            raise ValueError("a host is missing or holds a character that no host name has")
    if not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise ValueError("a port must be a number from 1 to 65535")
    return host, int(port)


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a Host header or an address is a loopback name.

    A page without a token refuses other names: they belong to a site whose name was pointed at this machine
    (DNS rebinding).
    """
    in_header = _HOST_HEADER.fullmatch(host)
    name = (in_header["address"] or in_header["name"] or "") if in_header else host
    try:
        return name.lower() == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
