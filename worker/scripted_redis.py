"""Redis client for handlers that keep state in the job store, with Lua scripts of their own.

It accepts every form of ``--redis-url`` (single server, Sentinel, Cluster, TLS) and has the service's
timeouts. One thread uses a client.
"""

from .store.redis.base import RedisStoreBase as ScriptedRedis
from .store.redis.base import checked
from .store.redis.connection import Reply
from .store.redis.lua import Argument, Command, LuaScripts

__all__ = ["Argument", "Command", "LuaScripts", "Reply", "ScriptedRedis", "checked"]
