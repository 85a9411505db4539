"""Cron tables: their configuration, schedules, and the enqueuer that the reaper runs."""
