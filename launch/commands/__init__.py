"""One module per command of `meshwright`."""

__all__: list[str] = []
