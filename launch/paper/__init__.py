"""Jobs on paper: drawn from their own model, forecast, advised, shown."""
