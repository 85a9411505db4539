"""Advice for a job store that does not answer or refuses: what to check, by the text of its error."""

#: In the text of a refusal by the access list. It begins a sentence in some versions.
_NO_PERMISSION = "o permissions"
#: Parts of an error's text, and the advice. The first match counts.
_BY_TEXT = (
    (
        ("No space left on device", "MISCONF"),
        "the store cannot write to its disk: free space there (--data-dir for the embedded store, else "
        "the disk of its server). It takes jobs again without a restart",
    ),
    (
        (_NO_PERMISSION,),
        "the Redis user may not do this: give it the commands and keys of deploy/acl/jobworker.acl",
    ),
    (("OOM ",), "the store's memory is full: raise maxmemory, and find the backlog with jobworker stats"),
    (
        ("WRONGPASS", "NOAUTH", "invalid username-password", "Authentication", "invalid password"),
        "the store answers and refuses user or password: check those in --redis-url (JOBWORKER_REDIS_URL)",
    ),
    (("READONLY",), "this server is a replica: give the url of its master by --redis-url"),
    (
        ("Protocol error, got", "Protocol Error", "InvalidResponse"),
        "this is not a Redis server: another program answers at this port. Check the port in --redis-url",
    ),
    (
        ("not known", "name resolution", "nodename nor servname", "No address associated"),
        "the host name cannot be resolved: check the host in --redis-url",
    ),
    (
        ("refused",),
        "no server listens at this address: check host and port in --redis-url, and whether the server runs",
    ),
    (
        ("SSL", "WRONG_VERSION_NUMBER", "Connection closed by server", "reset by peer"),
        "the server ends the connection: check the port in --redis-url, and whether the server expects TLS (rediss://)",
    ),
    (
        ("imeout", "timed out", "unreachable", "No route"),
        "the host does not answer: check host and port in --redis-url, the network and a firewall between",
    ),
    (
        ("No such file", "Permission denied"),
        "check the path of the socket in --redis-url, and its permissions",
    ),
)
_OTHER = "check --redis-url (JOBWORKER_REDIS_URL): host, port, user and password; and whether the server runs"


def store_advice(error: str) -> str:
    """What to check, in words."""
    return next((advice for parts, advice in _BY_TEXT if any(part in error for part in parts)), _OTHER)


def lacks_permission(error: str) -> bool:
    """Whether the access list of the store refused a command, by the text of its error."""
    return _NO_PERMISSION in error
