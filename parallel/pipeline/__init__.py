"""Schedules of micro-batches over stages as values: made, checked, timed, drawn and read without torch."""
