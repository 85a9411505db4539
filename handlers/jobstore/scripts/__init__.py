"""The Lua scripts of this folder."""

from importlib.resources import files

from jobworker.worker.scripted_redis import LuaScripts

script = LuaScripts(files(__name__))
