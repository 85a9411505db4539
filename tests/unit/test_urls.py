"""URLs in options: what is accepted, what each part becomes, and errors that name the wrong part."""

import pytest

from jobworker.worker.errors import ConfigurationError
from jobworker.worker.store.redis import connect
from jobworker.worker.store.redis.connect import endpoint
from jobworker.worker.urls import parse_http_url, parse_redis_url

#: A password with each character that a URL gives a meaning, as it must be written.
PASSWORD, WRITTEN = "p@s/s?w#r:d&%", "p%40s%2Fs%3Fw%23r%3Ad%26%25"


@pytest.mark.parametrize(
    ("url", "kind", "hosts"),
    [
        ("redis://h", "single", [("h", 6379)]),
        ("redis://", "single", [("localhost", 6379)]),
        ("REDIS://h:1/", "single", [("h", 1)]),
        ("  redis://h:1 ", "single", [("h", 1)]),
        ("redis://[::1]:7000/2", "single", [("::1", 7000)]),
        ("redis://[fe80::1%25eth0]", "single", [("fe80::1%eth0", 6379)]),
        ("redis+cluster://a:1,b", "cluster", [("a", 1), ("b", 6379)]),
        ("redis+cluster://a:1, b:2 ,c:3", "cluster", [("a", 1), ("b", 2), ("c", 3)]),
        ("redis+cluster://[::1]:7000,[2001:db8::2]/0", "cluster", [("::1", 7000), ("2001:db8::2", 6379)]),
        ("redis+cluster://u:pw@[::1]:7000, b:1", "cluster", [("::1", 7000), ("b", 1)]),
        ("redis+sentinel://[::1], [::2]:5/m/3", "sentinel", [("::1", 26379), ("::2", 5)]),
        ("rediss+sentinel://:pw@a, b/m", "sentinel", [("a", 26379), ("b", 26379)]),
    ],
)
def test_hosts(url: str, kind: str, hosts: list[tuple[str, int]]) -> None:
    parsed = parse_redis_url(url)
    assert (parsed.kind, list(parsed.hosts)) == (kind, hosts)


@pytest.mark.parametrize("address", ["h:1", "[::1]:1"])
@pytest.mark.parametrize(
    ("scheme", "path"), [("redis", "/0"), ("rediss", "/0"), ("redis+cluster", ""), ("redis+sentinel", "/m/0")]
)
def test_user_and_password(scheme: str, path: str, address: str) -> None:
    parsed = parse_redis_url(f"{scheme}://me:{WRITTEN}@{address}{path}")
    assert (parsed.username, parsed.password) == ("me", PASSWORD)
    assert PASSWORD not in repr(parsed)
    parsed = parse_redis_url(f"{scheme}://:pw@{address}{path}")
    assert (parsed.username, parsed.password) == (None, "pw")


def test_master_database_socket_and_tls() -> None:
    parsed = parse_redis_url("redis+sentinel://a:1/my%20master/7")
    assert (parsed.master, parsed.db, parsed.secure) == ("my master", 7, False)
    parsed = parse_redis_url("unix:///run/my%20redis.sock?db=3")
    assert (parsed.path, parsed.db) == ("/run/my redis.sock", 3)
    parsed = parse_redis_url("redis://h/1?db=2&ssl=true&ssl_cert_reqs=none&ssl_check_hostname=no")
    assert (parsed.db, parsed.secure) == (2, True)
    assert parsed.tls_arguments() == {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    assert not parse_redis_url("rediss://h?ssl=false").secure


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ("dial_timeout=3s&pool_size=20", ("dial_timeout", "pool_size")),
        ("protocol=3", ("protocol",)),
        ("read_timeout=-1&max_retries=5&min_idle_conns=2", ("read_timeout", "max_retries", "min_idle_conns")),
        ("socket_timeout=5&decode_responses=True&health_check_interval=30",
         ("socket_timeout", "decode_responses", "health_check_interval")),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "url", ["redis://h/0", "rediss://h", "unix:///s", "redis+cluster://h", "redis+sentinel://h/m"]
)
def test_options_of_other_clients_change_nothing(url: str, options: str, ignored: tuple[str, ...]) -> None:
    assert parse_redis_url(f"{url}?{options}").ignored == ignored
    endpoint(f"{url}?{options}", 1.0)


@pytest.mark.parametrize("options", ["", "?dial_timeout=3s&protocol=3", "?ssl=true", "?ssl=false&db=0"])
@pytest.mark.parametrize("url", ["redis://h/0", "rediss://h", "redis://u:p@[::1]:5"])
def test_a_connection_can_be_made_from_what_is_accepted(url: str, options: str) -> None:
    connection = endpoint(url + options, 1.0).connection("k")
    assert connection.protocol == 2
    assert connection.socket_timeout == 1.0


@pytest.mark.parametrize("url", ["redis+sentinel://[::1]:1, h/m/2?ssl=true", "redis+sentinel://u:p@h/m/2"])
def test_a_sentinel_url_becomes_connections_to_the_masters_database(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "find_master", lambda *_: ("::1", 6379))
    connection = endpoint(url, 1.0).connection("k")
    assert (connection.db, connection.protocol) == (2, 2)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:6379", "must begin with a scheme"),
        ("h", "must begin with a scheme"),
        ("//h", "must begin with a scheme"),
        ("http://h:6379", "must begin with a scheme"),
        ("redis:/h", "must begin with a scheme"),
        ("redis://h?foo=1", "unknown option 'foo'"),
        ("redis://h?pool_sizes=1", "did you mean pool_size?"),
        ("redis+cluster://h?master_name=x", "unknown option 'master_name'"),
        ("redis://h?db=1&db=2", "db is given twice"),
        ("redis://h?db=x", "database must be a number"),
        ("redis://h/x", "database must be a number"),
        ("redis://h/0/1", "too many parts"),
        ("redis://h/-1", "database must be a number"),
        ("redis://h?ssl=maybe", "ssl must be true or false"),
        ("redis://h?ssl_cert_reqs=never", "ssl_cert_reqs must be"),
        ("unix:///s?ssl=1", "no TLS"),
        ("redis://h?sentinel_password=x", "sentinel_password needs redis+sentinel://"),
        ("unix://s", "needs a path"),
        ("redis://h:0", "port must be"),
        ("redis://h:65536", "port must be"),
        ("redis://h:x", "port must be"),
        ("redis://h:", "port must be"),
        ("redis://::1:6379", "needs brackets"),
        ("redis+cluster://::1", "needs brackets"),
        ("redis://[::1", "is written [::1]"),
        ("redis://[::1]6379", "is written [::1]"),
        ("redis://[nonsense]:1", "is written [::1]"),
        ("redis://a,b", "several hosts"),
        ("redis+cluster://a,,b", "host is missing"),
        ("redis+cluster://a,", "host is missing"),
        ("redis+cluster://", "host is missing"),
        ("redis+cluster://a b:1", "holds a character"),
        ("redis+cluster://h/1", "database 0 only"),
        ("redis+sentinel://h", "master's name"),
        ("redis+sentinel://h/", "master's name"),
        ("redis+sentinel://h/m/x", "database must be a number"),
        ("redis://:hun/ter2@h", "must be written %2F"),
        ("redis://:hun#ter2@h", "must be written %23"),
        ("redis://:hun?ter2@h", "port must be|must be written %3F"),
    ],
)
def test_an_error_names_what_is_wrong_and_no_password(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read as a Redis URL") as caught:
        parse_redis_url(url)
    assert [part for part in said.split("|") if part in str(caught.value)]
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://h", "https://u:p@h:19530/db", "http://[::1]:19530", " http://h:1 "])
def test_http_urls(url: str) -> None:
    assert parse_http_url(url, "--milvus-uri", "x").hostname


@pytest.mark.parametrize(
    "url",
    ["localhost:19530", "h", "tcp://h:1", "http://", "http://:1", "http://h:x", "http://h:0", "http://h:65536",
     "http://[::1", "http://a b:1", "./milvus.db", "http//h"],
)  # fmt: skip
def test_what_is_no_http_url_names_the_option_and_an_example(url: str) -> None:
    with pytest.raises(ConfigurationError, match="--milvus-uri: must be a URL such as http://example"):
        parse_http_url(url, "--milvus-uri", "http://example")
