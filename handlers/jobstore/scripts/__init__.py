"""Lua scripts of write admission, rebuilds and records."""

from importlib.resources import files

from jobworker.worker.scripted_redis import LuaScripts

script = LuaScripts(files(__name__))
