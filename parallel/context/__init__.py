"""The sequence of one sample dealt over ranks: mesh axis `cp`."""
