"""Blocks of a model run some positions at a time, around attention that is computed whole."""
