"""Catalogs that come with meshwright: numbers of hardware, with their sources."""
