"""The cron tables of a stream in memory: the rules of the Lua scripts ``cron_*.lua``."""

from collections.abc import Sequence

from ...keys import cron_key
from ..cron import (
    FORGET_AFTER_S,
    WRONG_CLOCK_S,
    CronHash,
    StoredTable,
    Taken,
    TakenTick,
    TickJob,
    encode_pause,
    parse_cron_hash,
)
from .server import MemoryServer


class MemoryCronStore:
    """`CronStore` over a `MemoryServer`."""

    _server: MemoryServer

    def cron_publish(self, stream: str, service: str, digest: str, tables: Sequence[StoredTable]) -> bool:
        with self._server.lock:
            fields, now_s = self._cron_fields(stream), int(self._server.wall_now_s())
            host = f"host/{service}".encode()
            record = fields.get(host)
            if not tables and record is None and not fields:
                return False
            is_news = bool(tables) if record is None else record.split(b" ")[0] != digest.encode()
            changed = is_news and self._replace_tables(fields, tables, now_s)
            if is_news:
                fields[b"digest"] = digest.encode()
            fields[host] = f"{digest} {now_s}".encode()
            found = parse_cron_hash(fields)
            for name, one in found.hosts.items():
                if abs(now_s - one.wall_seen_s) > FORGET_AFTER_S:
                    del fields[f"host/{name}".encode()]
            for name, cursor_s in found.cursors_s.items():
                if cursor_s > now_s + WRONG_CLOCK_S:
                    fields[f"last/{name}".encode()] = b"%d" % now_s
            return changed

    def cron_clock(self, stream: str) -> tuple[bytes, float]:
        with self._server.lock:
            return self._cron_fields(stream).get(b"version", b""), self._server.wall_now_s()

    def cron_hash(self, stream: str) -> CronHash:
        with self._server.lock:
            return parse_cron_hash(self._cron_fields(stream))

    def cron_take(self, stream: str, version: bytes, tick: TickJob) -> TakenTick:
        with self._server.lock:
            fields = self._cron_fields(stream)
            found = parse_cron_hash(fields)
            cursor_s = found.cursors_s.get(tick.name)
            if found.version != version or cursor_s is None:
                return TakenTick(Taken.OUTDATED, 0)
            if tick.tick_s <= cursor_s:
                return TakenTick(Taken.LATE, cursor_s)
            if tick.tick_s > self._server.wall_now_s():
                return TakenTick(Taken.EARLY, cursor_s)
            paused = tick.name in found.pauses
            if tick.data and not paused:
                self._server.check(stream)
                entry = self._server.append(stream, tick.data).decode()
                fields[f"ran/{tick.name}".encode()] = f"{tick.tick_s} {entry} {tick.job_id}".encode()
            fields[f"last/{tick.name}".encode()] = b"%d" % tick.tick_s
            return TakenTick(Taken.PAUSED if paused else Taken.DONE, tick.tick_s)

    def cron_pause(self, stream: str, name: str, note: str) -> None:
        with self._server.lock:
            pause = encode_pause(self._server.wall_now_s(), note)
            self._cron_fields(stream)[f"paused/{name}".encode()] = pause

    def cron_resume(self, stream: str, name: str) -> bool:
        with self._server.lock:
            fields = self._cron_fields(stream)
            if fields.pop(f"paused/{name}".encode(), None) is None:
                return False
            cursor_s = parse_cron_hash(fields).cursors_s.get(name)
            if cursor_s is not None:
                fields[f"last/{name}".encode()] = b"%d" % max(cursor_s, int(self._server.wall_now_s()))
            return True

    def _cron_fields(self, stream: str) -> dict[bytes, bytes]:
        self._server.check(cron_key(stream))
        return self._server.stream(stream).cron

    @staticmethod
    def _replace_tables(fields: dict[bytes, bytes], tables: Sequence[StoredTable], now_s: int) -> bool:
        before = {field: value for field, value in fields.items() if field.startswith((b"table/", b"rule/"))}
        for name in parse_cron_hash(fields).tables.keys() - {table.name for table in tables}:
            for kind in ("table", "rule", "last", "ran"):
                fields.pop(f"{kind}/{name}".encode(), None)
        for name, rule, data in tables:
            if fields.get(f"rule/{name}".encode()) != rule.encode():
                fields[f"last/{name}".encode()] = b"%d" % now_s
            fields |= {f"rule/{name}".encode(): rule.encode(), f"table/{name}".encode(): data}
        after = {field: value for field, value in fields.items() if field.startswith((b"table/", b"rule/"))}
        if before != after:
            fields[b"version"] = b"%d" % (int(fields.get(b"version", b"0")) + 1)
        return before != after
