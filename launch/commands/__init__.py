"""One module per command of `meshwright`."""
