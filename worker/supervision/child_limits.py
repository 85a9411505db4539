"""Limits on children: job timeout, memory, set-up time, and silence of a process that hangs."""

import signal

from ..ipc.channel import READY, STARTING, STOPPING, Channel
from ..settings import Settings
from .process import Child

#: Time between the request for a stack dump (SIGUSR2) and SIGKILL, for a child over its limit.
_DUMP_S = 0.3
#: Reader and reaper report every 2 s at least, but one call to a slow store may block them for 5 s.
STUCK_AFTER_S = 15.0
#: Time limit for the set-up of a child. A handler may load gigabytes from a slow disk.
_SETUP_TIMEOUT_S = 600.0
#: A worker that is asked to stop during its set-up gets this long: imported code may ignore SIGTERM.
_STOP_START_WITHIN_S = 5.0
#: Interval of memory samples: while a job runs, which may use up the memory, and otherwise.
_SAMPLE_BUSY_EVERY_S, _SAMPLE_IDLE_EVERY_S = 0.1, 2.0


class ChildLimits:
    """Limits on the children of a service. A child that exceeds one is asked for its stack, then killed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def enforce(self, child: Child, now: float) -> None:
        """Check all limits of a child; nothing here blocks."""
        self._sample_memory(child, now)
        self._end_stopped_start(child, now)
        kill_cause = self._kill_cause(child, now)
        if not kill_cause:
            child.mono_overdue_s = None
        elif child.mono_overdue_s is None:
            child.mono_overdue_s = now
            child.kill_cause = kill_cause
            child.was_computing = child.is_computing()
            child.kill(signal.SIGUSR2)
        elif now - child.mono_overdue_s > (_DUMP_S if kill_cause != "rss" else 0.0):
            child.kill(signal.SIGKILL)  # a process over its memory limit gets no time to grow further

    def _sample_memory(self, child: Child, now: float) -> None:
        """Read the peak of its memory: the kernel no longer has it when the process has exited."""
        is_busy = child.channel is not None and child.channel.mono_deadline_s
        if now - child.mono_sampled_s > (_SAMPLE_BUSY_EVERY_S if is_busy else _SAMPLE_IDLE_EVERY_S):
            child.mono_sampled_s = now
            child.sample_peak()

    def _end_stopped_start(self, child: Child, now: float) -> None:
        """Kill a worker whose set-up continues although it was asked to stop; it has no job."""
        if not child.stopping or child.channel is None or child.channel.phase != STARTING:
            return
        if child.mono_stopping_s is None:
            child.mono_stopping_s = now
        elif now - child.mono_stopping_s > _STOP_START_WITHIN_S:
            child.killed_by_stop = True
            child.kill(signal.SIGKILL)

    def _kill_cause(self, child: Child, now: float) -> str:
        """The limit that the child exceeds: boot, stuck, timeout, cancelled or rss; empty if none."""
        if not child.ready:
            return "boot" if now - child.mono_started_s > _SETUP_TIMEOUT_S else ""
        if child.channel is None:
            return "stuck" if now - child.mono_last_message_s > STUCK_AFTER_S else ""
        deadline = child.channel.mono_deadline_s
        if deadline:
            if now > deadline:
                return "timeout"
            if child.channel.is_cancel_overdue(now):
                return "cancelled"
            return "rss" if self.exceeds_rss(child) else ""
        # A worker without a job that neither takes one nor exits.
        idle = child.channel.phase in (READY, STOPPING)
        return "stuck" if idle and now - child.channel.mono_heartbeat_s > STUCK_AFTER_S else ""

    def describe(self, child: Child, channel: Channel) -> str:
        """The limit that the child exceeded, with its number."""
        match child.kill_cause:
            case "timeout" if channel.mono_deadline_s:
                return f"timeout of {channel.mono_deadline_s - channel.mono_since_s:.6g} s"
            case "cancelled":
                return f"its jobs were cancelled, and ran for {self._settings.cancel_grace_s:.6g} s more"
            case "rss":
                return f"rss above {self._settings.max_rss_mib} MiB"
            case "boot":
                return f"boot of more than {_SETUP_TIMEOUT_S:.0f} s"
            case "stuck":
                return f"stuck for {STUCK_AFTER_S:.0f} s"
        return child.kill_cause

    def exceeds_rss(self, child: Child) -> bool:
        """Whether the child uses more memory than `--max-rss` allows."""
        return bool(self._settings.max_rss_mib) and child.rss_mib() > self._settings.max_rss_mib
